"""Law 6: a run that was stopped, at any moment, ends with the same weights bit for bit; and one process or two make the same."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanoexit import reinforce, sft
from nanoexit.config import ROOT, load_config
from nanoexit.errors import UserError
from nanoexit.score import score as real_score
from nanoexit.teacher import make_traces
from nanoexit.training import load_checkpoint, load_student, make_optimizer, save_checkpoint, start_run, trained

SMALL = ["data.count=96", "teacher.chunk=32", "sft.steps=6", "sft.batch_size=12", "sft.micro_batch=8", "sft.samples_per_trace=2",
         "sft.save_every=1", "lora.dropout=0.1", "evaluate.count=8", "evaluate.samples=1", "sft.warmup=2"]
SCRIPT = [sys.executable, str(ROOT / "scripts" / "train_sft.py"), str(ROOT / "configs" / "tiny.yaml")]


def command(folder: Path, *more: str) -> list[str]:
    return [*SCRIPT, *SMALL, f"run.dir={folder}", *more]


def adapter_bits(folder: Path) -> dict[str, bytes]:
    """Every trained tensor, bit for bit. (The order of a safetensors file's metadata is not fixed, so files may differ.)"""
    files = sorted((folder / "adapter").glob("*.safetensors"))
    return {f"{path.name} {name}": t.numpy().tobytes() for path in files for name, t in load_file(path).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(command(folder), check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("moment", ["traces", "steps"])
def test_a_killed_run_ends_with_the_same_weights(whole, tmp_path, moment):
    """Catches: randomness that is not a function of the step, moments or steps of the optimizer lost, a trace written twice."""
    folder = tmp_path / "run"
    file, lines = {"traces": (folder / "traces" / "00000.jsonl", 1), "steps": (folder / "metrics.jsonl", 3)}[moment]
    process = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (file.exists() and len(file.read_text().splitlines()) >= lines) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "adapter").exists(), "killed too late to show anything"
    done = subprocess.run(command(folder, "--resume"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert adapter_bits(folder) == adapter_bits(whole) and adapter_bits(whole)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_run_writes_what_it_promises(whole):
    """Catches: a file of the run directory left out, a summary without the figures that programs read."""
    names = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "checkpoint/state.safetensors", "adapter/adapter_model.safetensors",
            "adapter/adapter_config.json", "adapter/exit_heads.safetensors", "adapter/nanoexit.json"} <= names
    summary = json.loads((whole / "summary.json").read_text())
    assert {"accuracy", "mean_depth", "full_depth", "layers_run", "kl", "tokens", "seconds", "teacher"} <= set(summary)
    assert summary["teacher"]["layers_run"] == 1.0 and 0 < summary["layers_run"] < 1
    assert not list(whole.rglob("*.tmp"))


def test_a_second_run_of_a_name_keeps_the_first(whole):
    """Catches: results overwritten because a command was run twice."""
    config = load_config(ROOT / "configs" / "tiny.yaml", [f"run.dir={whole}"])
    before = adapter_bits(whole)
    start_run(config, resume=False)
    kept = whole.with_name("run.before-1")
    assert adapter_bits(kept) == before and not (whole / "adapter").exists()
    (whole / "config.yaml").unlink()
    whole.rmdir()
    kept.rename(whole)


def test_resume_refuses_another_config(whole):
    """Catches: a run that goes on with other settings than it began with."""
    done = subprocess.run(command(whole, "sft.lr=0.5", "--resume"), capture_output=True, text=True)
    assert done.returncode == 2 and "sft.lr is 0.5 now" in done.stderr


def test_traces_of_another_origin_are_refused(whole, tmp_path):
    """Catches: training on traces that another seed or another model wrote."""
    done = subprocess.run(command(tmp_path / "run", f"data.traces={whole}/traces", "run.seed=9"), capture_output=True, text=True)
    assert done.returncode == 2 and "seed = 0, the config says 9" in done.stderr


def test_two_processes_make_what_one_makes(whole, tmp_path):
    """Catches: gradients averaged over the wrong count, rows trained on twice or never, ranks that drift apart."""
    overrides = ["lora.dropout=0"]
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run(command(one, *overrides), check=True, capture_output=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517", *command(two, *overrides)[1:]]
    done = subprocess.run(torchrun, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    rows = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, two)]
    for a, b in zip(*rows, strict=True):
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-3) and a["mean_depth"] == pytest.approx(b["mean_depth"], rel=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


def test_reinforce_resumes_exactly(tmp_path, monkeypatch):
    """Catches: rollouts that depend on where the loop began; samples or metrics of steps that are run again, kept twice."""
    weights, written = [], []
    for name in ("straight", "stopped"):
        config = load_config(ROOT / "configs" / "tiny.yaml", [f"run.dir={tmp_path / name}", "rl.steps=4", "rl.prompts=2", "rl.rollouts=4",
                                                               "rl.save_every=2", "data.count=20", "rl.kl_weight=0.1"])
        if name == "stopped":  # at its worst moment: metrics and samples of step 4 are written, its checkpoint is not
            with monkeypatch.context() as patch:
                patch.setattr(reinforce, "save_checkpoint", lambda folder, step, *rest: save_checkpoint(folder, step, *rest) if step < 4 else 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    reinforce_run(config, resume=False)
        weights.append(reinforce_run(config, resume=name == "stopped"))
        written.append([(tmp_path / name / file).read_text() for file in ("metrics.jsonl", "samples.jsonl")])
    assert all(torch.equal(p, weights[1][n]) for n, p in weights[0].items())
    assert written[0] == written[1]


def reinforce_run(config, resume: bool) -> dict[str, torch.Tensor]:
    model, tokenizer = load_student(config)
    reinforce.train(model, tokenizer, config, start_run(config, resume))
    return trained(model)


def test_a_step_does_not_depend_on_the_micro_batch(tmp_path):
    """Catches: means of means, or noise that depends on how a batch is split."""
    gradients = []
    for size in (4, 64):
        config = load_config(ROOT / "configs" / "tiny.yaml", [f"run.dir={tmp_path}", "data.count=10", f"sft.micro_batch={size}", "sft.samples_per_trace=2"])
        model, tokenizer = load_student(config)
        traces = make_traces(model, tokenizer, config)
        figures = sft.step_losses(model, traces, config, step=0)
        gradients.append((figures, {n: p.grad for n, p in trained(model).items() if p.grad is not None}))
    (a, grads_a), (b, grads_b) = gradients
    assert a["kl"] == pytest.approx(b["kl"], rel=1e-4) and a["exit_loss"] == pytest.approx(b["exit_loss"], rel=1e-4)
    assert all(torch.allclose(g, grads_b[n], atol=1e-5) for n, g in grads_a.items())


@pytest.mark.parametrize("prompt, first", [("full", {8}), ("limit:2", {2}), ("head", {1, 2, 3, 4, 5, 6, 7, 8})])
def test_prompts_train_at_the_depth_that_they_are_given(tmp_path, monkeypatch, prompt, first):
    """Catches: exits.prompt that generation knows and training does not, or targets that are missing where the prompt exits too."""
    config = load_config(ROOT / "configs" / "tiny.yaml", [f"run.dir={tmp_path}", "data.count=10", f"exits.prompt={prompt}"])
    model, tokenizer = load_student(config)
    traces = make_traces(model, tokenizer, config)
    seen = []
    monkeypatch.setattr(sft, "score", lambda m, ids, depths, lens: seen.append((depths, lens)) or real_score(m, ids, depths, lens))
    figures = sft.step_losses(model, traces, config, step=0)
    prompts = [d for depths, lens in seen for row, n in zip(depths.tolist(), lens) for d in row[:n]]
    assert set(prompts) <= first and (len(first) == 1 or len(set(prompts)) > 2)
    assert all(x == x for x in (figures["kl"], figures["exit_loss"])) and figures["exit_loss"] > 0


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    """Catches: half of a checkpoint loaded without a word."""
    config = load_config(ROOT / "configs" / "tiny.yaml")
    model, _ = load_student(config)
    optimizer = make_optimizer([(list(trained(model).values()), 1e-3)])
    save_checkpoint(tmp_path, 3, model, optimizer)
    assert load_checkpoint(tmp_path, model, optimizer) == 3
    config.exits.layers, config.exits.head = [2], "mlp"
    other, _ = load_student(config)
    with pytest.raises(UserError, match="no tensor parameter.exits.heads.2"):
        load_checkpoint(tmp_path, other, make_optimizer([(list(trained(other).values()), 1e-3)]))
