"""Law 6: a run stopped at any moment ends with the same weights."""

import json
import os
import random
import re
import shutil
import subprocess
import time
from dataclasses import replace as changed
from multiprocessing import get_context
from pathlib import Path

import finetune
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, scramble, script
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_finetune import configured

from nanoexit import reinforce, sft, training
from nanoexit.adapters import save_adapter
from nanoexit.config import Config, UserError, load_config, write_text
from nanoexit.lora import adapters
from nanoexit.report import read_run
from nanoexit.teacher import make_traces
from nanoexit.training import check, load_checkpoint, load_student, run_directory, save_checkpoint

SMALL = ["data.count=96", "teacher.chunk=32", "evaluate.count=8", "evaluate.samples=1"]
SMALL += ["sft.steps=6", "sft.batch_size=12", "sft.micro_batch=8", "sft.save_every=1"]
SMALL += ["evaluate.policies=[head]", "evaluate.caps=[]", "exits.shortcuts=true"]
ROLL = ["rl.steps=4", "rl.prompts=2", "rl.rollouts=4", "rl.save_every=2", "rl.kl_weight=0.1"]
ROLL += ["rl.exit_kl_weight=0.1"]


def run(name: str, folder: Path, *more: str) -> subprocess.CompletedProcess:
    return script(name, TINY, *SMALL, f"run.dir={folder}", *more)


def adapter_bits(folder: Path) -> dict[str, bytes]:
    """Every trained tensor, bit for bit."""
    files = sorted(folder.glob("[am]*/*.safetensors"))  # adapter/ or model/
    tensors = [(f"{path.name} {name}", t) for path in files for name, t in load_file(path).items()]
    return {name: t.numpy().tobytes() for name, t in tensors}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that was not stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run("train_sft", folder)
    assert done.returncode == 0, done.stderr
    return folder


def work(stage: str, folder: Path, resume: bool) -> None:
    """One stage, in a process of its own."""
    if stage == "finetune":
        keys = (f"run.dir={folder}", "finetune.steps=6", "finetune.scaffold_steps=4")
        return finetune.finetune(configured(folder.parent, *keys), resume)
    keys = [*SMALL, *ROLL, "data.count=48", "teacher.chunk=8", f"run.dir={folder}"]
    config = load_config(TINY, keys)
    job = reinforce.run_reinforce if stage == "rl" else sft.run_sft
    with run_directory(config, resume) as run:
        job(*load_student(config), config, run)


def begin(*arguments):
    process = get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


@pytest.mark.parametrize("stage", ["traces", "sft", "rl", "finetune"])
def test_a_killed_run_ends_with_the_same_weights(tmp_path, stage):
    """Catches: randomness that is not a function of the step; lost moments; a step twice."""
    begun = "config.yaml" if stage == "traces" else "metrics.jsonl"
    took, whole = 0.0, {}
    for kill in range(int(os.environ.get("KILLS", 1)) + 1):  # KILLS=10: the long form
        folder = tmp_path / str(kill)
        process = begin(stage, folder, False)
        while process.is_alive() and not (folder / begun).exists():
            time.sleep(0.01)
        started = time.monotonic()
        if kill:
            process.join(random.uniform(0, took / 3 if stage == "traces" else took))
            process.kill()
            process.join()
            process = begin(stage, folder, True)
        process.join()
        if not kill:
            took, whole = time.monotonic() - started, adapter_bits(folder)
        assert process.exitcode == 0 and adapter_bits(folder) == whole != {}
        assert (folder / "metrics.jsonl").read_text() == (tmp_path / "0/metrics.jsonl").read_text()


def test_a_run_writes_what_it_promises(whole):
    """Catches: a file of the run directory left out; a summary without what programs read."""
    names = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    adapter = ["adapter_model.safetensors", "adapter_config.json", "exit_heads.safetensors"]
    assert {f"adapter/{name}" for name in [*adapter, "nanoexit.json"]} <= names
    files = {"config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json"}
    assert files | {"checkpoint/state.safetensors"} <= names
    summary = json.loads((whole / "summary.json").read_text())
    expected = {"accuracy", "mean_depth", "max_depth", "full_depth", "layers_run", "kl", "tokens"}
    assert expected | {"teacher"} <= set(summary)
    assert summary["teacher"]["layers_run"] == 1.0 and 0 < summary["layers_run"] < 1
    assert not list(whole.rglob("*.tmp"))


def test_the_traces_alone(whole, tmp_path):
    """Catches: --resume refused; traces that differ from those that training writes."""
    said = [run("generate_teacher", tmp_path, "--resume").stdout for _ in range(2)]
    assert said[0] == said[1] and said[0].startswith("96 traces, ")
    both = [{p.name: p.read_bytes() for p in f.rglob("traces/*/*")} for f in (tmp_path, whole)]
    assert both[0] == both[1] != {}


def test_a_second_run_of_a_name_keeps_the_first(whole, tmp_path, capsys):
    """Catches: results overwritten by a second run, or moved without a word."""
    folder = shutil.copytree(whole, tmp_path / "run")
    config = load_config(TINY, [f"run.dir={folder}"])
    with run_directory(config, resume=False):
        kept = folder.with_name("run.before-1")
        assert adapter_bits(kept) == adapter_bits(whole) and not (folder / "adapter").exists()
    assert str(kept) in capsys.readouterr().err


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path):
    """Catches: run.dir=thesis that moves a thesis; a mistake that moves a finished run."""
    write_text(tmp_path / "thesis" / "chapter1.tex", "...")
    write_text(tmp_path / "file", "x")
    for name in ("thesis", "file"):
        with pytest.raises(UserError, match=f"{name} is not a run"):
            check(load_config(TINY, [f"run.dir={tmp_path / name}"]))
    with pytest.raises(UserError, match=r"cannot be written: .*file is a file or read-only"):
        check(load_config(TINY, [f"run.dir={tmp_path}/file/run"]))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["chapter1.tex", "file", "thesis"]
    write_text(tmp_path / "killed" / "config.yaml.7.tmp", "")  # by a kill during the first write
    check(load_config(TINY, [f"run.dir={tmp_path}/killed"]))


def test_a_second_process_on_one_run_is_refused(whole, tmp_path):
    """Catches: two writers in one directory; a lock that a finished process leaves behind."""
    shutil.copytree(whole, tmp_path / "run")
    config = load_config(TINY, [*SMALL, f"run.dir={tmp_path / 'run'}"])
    for name, flags in (("train_sft", ["--resume"]), ("evaluate", ["--adapter", tmp_path / "run"])):
        with run_directory(config, resume=True):
            done = run(name, tmp_path / "run", *flags)
            assert done.returncode == 2 and "in use by another process" in done.stderr


@pytest.mark.parametrize("file", ["checkpoint/state.safetensors", "config.yaml", "metrics.jsonl"])
@pytest.mark.parametrize("damage", ["empty", "cut", "other", "NaN"])
def test_a_damaged_run_file_is_named(whole, tmp_path, file, damage):
    """Catches: a traceback, or half of a file used, after a disk was full."""
    path = shutil.copytree(whole, tmp_path / "run") / file
    config = load_config(TINY, [f"run.dir={tmp_path / 'run'}", *SMALL])
    data = path.read_bytes()
    nan = data[:-4] + b"\xff\xff\xff\x7f"  # the last number of a checkpoint
    cut = data[: len(data) // 2]
    path.write_bytes({"empty": b"", "cut": cut, "other": b"[3]", "NaN": nan}[damage])
    model, _ = load_student(config)
    with pytest.raises(UserError, match=file) as error, run_directory(config, True) as folder:
        load_checkpoint(folder, model, training.make_optimizer(model, 1e-3))
    assert "\n" not in str(error.value) and "delete" in str(error.value)


def test_a_damaged_adapter_says_what_to_delete(whole, tmp_path):
    """Catches: a finished run that is lost although its checkpoint is whole."""
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/adapter/nanoexit.json").write_text("{")
    with pytest.raises(UserError, match=r"nanoexit\.json is not JSON.*delete .*adapter, and"):
        load_student(load_config(TINY, [*SMALL, f"run.init={tmp_path / 'run'}"]))
    shutil.rmtree(tmp_path / "run" / "adapter")
    assert run("train_sft", tmp_path / "run", "--resume").returncode == 0
    assert adapter_bits(tmp_path / "run") == adapter_bits(whole)


def test_damaged_lines_of_a_run_say_what_to_delete(tmp_path):
    """Catches: a damaged file of a run that is named without the way to go on."""
    for name in ("samples.jsonl", "metrics.jsonl"):
        (tmp_path / name).write_text('{"step": 1}\n{"st')
        with pytest.raises(UserError, match=rf"{name}:2 is not JSON.*delete"):
            read_run(tmp_path)
        assert training.lines_until(tmp_path / name) == b'{"step": 1}\n'  # killed while writing
        for line in (b'{"st', b'{"step": "x"}', b'{"step": \xff}'):
            (tmp_path / name).write_bytes(b'{"step": 1}\n' + line + b"\n")
            with pytest.raises(UserError, match=rf"{name} is damaged.*delete it"):
                training.lines_until(tmp_path / name)
        (tmp_path / name).unlink()


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    """Catches: a shared folder of traces that fills up; a file removed while it is written."""
    config = load_config(TINY, [f"data.traces={tmp_path}/traces", "data.count=8"])
    model, tokenizer = load_student(config)
    make_traces(model, tokenizer, config)
    folder = next(tmp_path.glob("traces/*"))
    for name, age in {"old.1.tmp": 90, "new.2.tmp": 5}.items():
        (folder / name).write_text("")
        os.utime(folder / name, (time.time() - age,) * 2)
    make_traces(model, tokenizer, config)
    assert [path.name for path in folder.glob("*.tmp")] == ["new.2.tmp"]


def test_traces_belong_to_their_content(tmp_path):
    """Catches: training on traces of another seed or prompt; traces of the same config not used."""
    config = load_config(TINY, [f"data.traces={tmp_path}/traces", "data.count=20"])
    model, tokenizer = load_student(config)
    first = make_traces(model, tokenizer, config)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    assert make_traces(model, tokenizer, config) == first
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    other = make_traces(model, tokenizer, changed(config, run=changed(config.run, seed=9)))
    assert [t.tokens for t in other] != [t.tokens for t in first]
    assert make_traces(model, tokenizer, config) == first
    next(iter(files)).write_text("{}\n")
    with pytest.raises(UserError, match="delete it"):
        make_traces(model, tokenizer, config)


def test_settings_other_than_those_of_a_run_are_refused(whole, tmp_path):
    """Catches: settings unlike those of a run or of run.init; no adapters after an SFT without."""
    config = load_config(TINY, [*SMALL, f"run.dir={whole}", "sft.lr=0.5"])
    with pytest.raises(UserError, match=r"sft\.lr is 0\.5, but"), run_directory(config, True):
        pass
    start = [*SMALL, f"run.init={whole}"]
    for override in ("exits.layers=[3]", "lora.r=4", "exits.shortcuts=false"):
        key = override.partition("=")[0]
        with pytest.raises(UserError, match=f"{key}.*: the config says .* the run in run.init"):
            load_student(load_config(TINY, [*start, override]))
    assert load_student(load_config(TINY, [*start, "exits.cap=3"]))[0].cap == 3
    bare, _ = load_student(load_config(TINY, [*SMALL, "lora.targets=[]"]))
    save_adapter(bare, tmp_path / "adapter")
    assert adapters(load_student(load_config(TINY, [*SMALL, f"run.init={tmp_path}"]))[0])


def test_reinforce_resumes_exactly(tmp_path, monkeypatch):
    """Catches: rollouts that depend on where the loop began; metrics or samples of a step twice."""

    def fail_at_4(folder: Path, step: int, *rest) -> None:
        if step == 4:  # the worst moment: its metrics and samples are written, its checkpoint not
            raise ZeroDivisionError
        save_checkpoint(folder, step, *rest)

    work("rl", tmp_path / "straight", resume=False)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(reinforce.training, "save_checkpoint", fail_at_4)
        work("rl", tmp_path / "stopped", resume=False)
    work("rl", tmp_path / "stopped", resume=True)
    assert adapter_bits(tmp_path / "straight") == adapter_bits(tmp_path / "stopped") != {}
    for file in ("metrics.jsonl", "samples.jsonl"):
        first, second = ((tmp_path / name / file).read_text() for name in ("straight", "stopped"))
        assert first == second


def test_a_number_that_is_not_finite_ends_the_run(tmp_path):
    """Catches: NaN trained on and reported as a figure (law 9). The last checkpoint is kept."""
    config = load_config(TINY, [*ROLL, f"run.dir={tmp_path}/run", "rl.save_every=1"])
    model, tokenizer = load_student(config)
    p = next(iter(training.trained(model).values()))
    p.grad = torch.full_like(p, float("nan"))
    with pytest.raises(UserError, match="nothing was updated"):
        training.clip_and_step(training.make_optimizer(model, 1e-3), 1e-3)
    p.data.fill_(float("nan"))
    with run_directory(config, False) as folder, pytest.raises(UserError, match="not finite"):
        reinforce.run_reinforce(model, tokenizer, config, folder)
    assert not (tmp_path / "run" / "checkpoint").exists()


def taught(tmp_path, *overrides: str) -> tuple[sft.Teacher, Config]:
    keys = [f"run.dir={tmp_path}", "data.count=10", "exits.shortcuts=true", *overrides]
    model, tokenizer = load_student(config := load_config(TINY, keys))
    return sft.Teacher(model, make_traces(model, tokenizer, config), config), config


@pytest.mark.parametrize("key", ["targets=student", "targets=base", "early=1", "price=true"])
def test_a_step_does_not_depend_on_the_micro_batch(tmp_path, key):
    """Catches: means of means, or noise that depends on how a batch is split."""
    gradients = []
    for size in (4, 64):
        teacher, config = taught(tmp_path, f"sft.micro_batch={size}", f"sft.{key}")
        figures = sft.step_losses(teacher.model, teacher, range(10), config, step=0)
        named = training.trained(teacher.model).items()
        gradients.append((figures, {n: p.grad for n, p in named if p.grad is not None}))
    (a, grads_a), (b, grads_b) = gradients
    assert [a["kl"], a["exit_loss"]] == pytest.approx([b["kl"], b["exit_loss"]], rel=1e-4)
    assert (a["exit_loss"] > 1) == ("price" in key), "the loss that the config names"
    assert all(torch.allclose(g, grads_b[n], atol=1e-5) for n, g in grads_a.items())


def drawn(tmp_path):
    """A step's traces, aligned, with the exits that SFT draws, uniformly."""
    teacher, config = taught(tmp_path, "sft.broad=1")
    sft.fit_shortcuts(teacher.model, teacher, 4)
    a, known = teacher(range(10))
    noise, uniform = sft.draw_noise(a, range(10), 7, config, 0)
    return teacher.model, (a, known, sft.Draw(teacher.model, a, uniform), noise), config


def test_exits_are_drawn_at_readouts_only(tmp_path):
    """Catches: prompt tokens that exit; a first readout that may not; prices of other blocks."""
    model, (a, known, draw, noise), config = drawn(tmp_path)
    scored = sft.score(model, a.ids, a.depths, a.prompt_lens, policy=draw, noise=noise)
    depths = scored.depths.flatten()
    assert set(depths[(draw.slot < 0) & (a.depths.flatten() > 0)].tolist()) == {8}
    first = [row * a.ids.shape[1] + n - 1 for row, n in enumerate(a.prompt_lens)]
    assert len(set(depths[first].tolist())) > 2 and len(set(depths[a.at].tolist())) == 8
    reached = depths[a.at][:, None] >= torch.arange(1, 8)
    assert torch.equal((draw.h != 0).any(-1), reached)
    out, last = (depths[a.at] < 8).nonzero()[:, 0], scored.hidden.flatten(0, 1)[a.at]
    assert len(out) and torch.equal(draw.h[out, depths[a.at][out] - 1], last[out])
    kl = torch.stack([sft.readout_kl(model, known[0], draw.h[:, e]) for e in range(7)], 1)
    for price, saved, of_base in ((False, 1, [kl / 2]), (True, torch.arange(7, 0, -1), [])):
        config.sft.price, config.teacher.kl_strength = price, 4.0
        figures = sft.student_losses(model, a, [*known, *of_base], draw, noise, config)[1]
        c, z = (of_base or [kl])[0].clamp(max=2) / saved, scored.head_logits.flatten(0, 1)[a.at]
        losses, chances = sft.exit_loss(z, c, 4.0, price), sft.target_chance(c, 4.0)
        assert torch.allclose(figures["exit_loss"], losses[reached].sum()) and kl.max() > 0.5
        assert torch.allclose(figures["target_exit"], (chances * reached).sum(0))


def test_shortcuts_start_as_least_squares_fits(tmp_path):
    """Catches: a fit to the student, to padding or between other depths; one without a constant."""
    teacher = taught(tmp_path)[0]
    model, watch = teacher.model, sft.Watch([2, 3, 7])
    scramble(training.trained(model).items(), 1)
    sft.fit_shortcuts(model, teacher, 4)
    a, (last,) = teacher(range(10))
    with sft.as_base(model):
        model.run(a.ids, stop=watch)
    seen, exits = {d: sft.unit(h[a.at]) for d, h in watch.seen.items()}, model.exits
    lenses = [(exits.lenses[str(d)], seen[d], sft.unit(last)) for d in seen]
    for affine, x, y in [*lenses, (exits.shortcuts["3"], seen[2], seen[3])]:
        slope = F.pad(x, (0, 1), value=1).T @ (y - affine(x))
        wanted = sft.RIDGE * torch.cat((affine.weight.T, affine.bias[None]))
        assert torch.allclose(slope, wanted, atol=1e-3) and wanted.abs().max() > 0.1


def test_nearly_good_early_readouts_train(tmp_path):
    """Catches: sft.early without a gradient, with another slope, or at readouts not reached."""
    model, (a, known, draw, noise), config = drawn(tmp_path)
    early = changed(config, sft=changed(config.sft, early=1))
    both = [sft.student_losses(model, a, known, draw, noise, c)[0] for c in (early, config)]
    reached = (draw.h != 0).any(-1)
    kl = sft.readout_kl(model, known[0][reached.nonzero()[:, 0]], draw.h[reached])
    gain = -2 * F.softplus(-kl).sum()
    assert torch.allclose(both[0] - both[1], gain, rtol=1e-4)
    first = next(p for n, p in training.trained(model).items() if "lora_B" in n)
    slopes = [torch.autograd.grad(x, first, retain_graph=True)[0] for x in (*both, gain)]
    assert torch.allclose(slopes[0] - slopes[1], slopes[2], atol=1e-4) and slopes[2].norm() > 0.1


def test_the_base_rule_looks_at_the_base(tmp_path):
    """Catches: targets of the original's rule that change while the student learns."""
    teacher = taught(tmp_path, "sft.targets=base", "teacher.keep_mb=0")[0]
    a, (_, kl) = teacher(range(10))
    scramble(training.trained(teacher.model).items(), 1)
    assert kl.shape == (len(a.at), 7) and torch.equal(teacher(range(10))[1][1], kl)


def test_a_kept_teacher_says_the_same(tmp_path):
    """Catches: residuals kept for one trace and used for another."""
    teacher = taught(tmp_path, "sft.targets=base", "sft.micro_batch=3")[0]
    assert len(teacher.kept) == 10
    a, all_known = teacher(range(10))
    _, known = teacher([7, 2])
    places = [torch.isin(a.rows, torch.tensor([row])) for row in (7, 2)]
    teacher.kept = []
    again = teacher([7, 2])[1]  # recomputed
    for found, new, whole in zip(known, again, all_known):
        assert torch.allclose(found, new, atol=1e-4)
        assert torch.equal(found, torch.cat([whole[at] for at in places]))


@pytest.mark.parametrize("price", [False, True])
def test_the_exit_loss_is_least_at_the_target(price):
    """Catches: another chance than 2 (1 - sigmoid(s KL)), or for two tokens than of their mean; a
    deviance without a slope where heads never exit."""
    z = torch.linspace(-12, 12, 240001)
    for kl in (0.0, 0.05, 0.3, 1.0):
        p = z[sft.exit_loss(z, torch.tensor(kl), 4.0, price).argmin()].sigmoid()
        assert p.item() == pytest.approx(sft.target_chance(torch.tensor(kl), 4.0).item(), abs=1e-3)
    low, high, *_ = sft.exit_loss(z[:2], torch.tensor(0.3), 4.0, price)
    assert (low - high > 1e-5) == price
    both = sum(sft.exit_loss(z, torch.tensor(kl), 4.0, price) for kl in (0.0, 0.6))
    mean = sft.target_chance(torch.tensor(0.3), 4.0).item()
    assert z[both.argmin()].sigmoid().item() == pytest.approx(mean, abs=1e-3)


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    """Catches: half of a checkpoint loaded silently; moments that broadcast to other shapes."""
    config, path = load_config(TINY), tmp_path / "checkpoint" / "state.safetensors"
    model, _ = load_student(config)
    save_checkpoint(tmp_path, 3, model, training.make_optimizer(model, 1e-3))
    assert load_checkpoint(tmp_path, model, training.make_optimizer(model, 1e-3)) == 3
    config.exits.layers, config.exits.head = [2], "mlp"
    other, _ = load_student(config)
    with pytest.raises(UserError, match=r"another model.s .*exits\.heads\.2"):
        load_checkpoint(tmp_path, other, training.make_optimizer(other, 1e-3))
    with safe_open(path, "pt") as file:
        about, tensors = file.metadata(), load_file(path)
    name = next(name for name in tensors if re.fullmatch(r"exp_avg_sq.*lora_A", name))
    save_file(tensors | {name: tensors[name][..., :1].contiguous()}, path, about)
    with pytest.raises(UserError, match=name):
        load_checkpoint(tmp_path, model, training.make_optimizer(model, 1e-3))


def test_a_student_without_exits_trains(tmp_path):
    """Catches: exits.layers=[], which the help allows, ending in a traceback."""
    teacher, config = taught(tmp_path, "exits.layers=[]")
    figures = sft.step_losses(teacher.model, teacher, range(10), config, step=0)
    assert figures["mean_depth"] == 8 and figures["exit_loss"] == 0
