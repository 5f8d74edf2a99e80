"""Several processes make what one makes; an error, a kill or a hang in one of them ends all."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanoexit import reinforce, sft, training
from nanoexit.config import ROOT, UserError, load_config
from nanoexit.training import load_student, processes, run_directory

TINY = str(ROOT / "configs" / "tiny.yaml")
SMALL = ["data.count=16", "teacher.chunk=8", "lora.dropout=0.1", "run.threads=1"]
SMALL += ["sft.steps=4", "sft.batch_size=8", "sft.micro_batch=4", "sft.save_every=1"]
SMALL += ["rl.steps=3", "rl.prompts=3", "rl.rollouts=4", "rl.kl_weight=0.1"]
WORK = {"sft": sft.run_sft, "stopped": sft.run_sft, "rl": reinforce.run_reinforce}


def fork(work, *args) -> list[int | None]:
    """work(*args) in two processes, as torchrun would start them -> their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    context, started = get_context("fork"), []
    for rank in range(2):
        its = settings | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(context.Process(target=begin, args=(its, work, args)))
        started[-1].start()
    started[0].join()
    started[1].join(5)
    codes = [process.exitcode for process in started]
    started[1].kill()
    return codes


def begin(settings: dict[str, str], work, args) -> None:
    os.environ.update(settings)
    torch.set_num_threads(1)
    work(*args)


def run_work(folder: Path, names: list[str]) -> None:
    """SFT, SFT from a checkpoint, REINFORCE."""
    config = load_config(TINY, SMALL)
    with processes(config):
        for name in names:
            config.run.dir = str(folder / name)
            model, tokenizer = load_student(config)
            with run_directory(config, resume=name == "stopped") as run:
                WORK[name](model, tokenizer, config, run)


def test_processes_make_what_one_makes(tmp_path, monkeypatch):
    """Catches: gradients over the wrong count, rows twice or never, noise or dropout that depends
    on ranks; a checkpoint that another number of processes continues to other weights."""
    one, two, save = tmp_path / "one", tmp_path / "two", training.save_checkpoint

    def keep_step_2(folder: Path, step: int, *rest) -> None:
        save(folder, step, *rest)
        if step == 2 and folder.name == "sft":
            shutil.copytree(folder, two / "stopped")

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", keep_step_2)
        run_work(one, ["sft", "rl"])
    assert fork(run_work, two, ["sft", "stopped", "rl"]) == [0, 0]
    for name in WORK:
        files = ("adapter_model.safetensors", "exit_heads.safetensors")
        for file in files:
            a = load_file(one / name.replace("stopped", "sft") / "adapter" / file)
            b = load_file(two / name / "adapter" / file)
            for key, tensor in a.items():
                assert torch.allclose(tensor, b[key], rtol=0, atol=1e-5), (name, key)


def shard_work(folder: Path) -> None:
    """SFT with the base in shares; the bytes of the base that are left in this process."""
    config = load_config(TINY, [*SMALL, f"run.dir={folder}", "run.shard=true"])
    with processes(config):
        model, tokenizer = load_student(config)
        base = [p for p in model.parameters() if not p.requires_grad]
        here = sum(getattr(p, "_local_tensor", p).nbytes for p in base)
        assert here < 0.55 * sum(p.nbytes for p in base)
        with run_directory(config, resume=False) as run:
            sft.run_sft(model, tokenizer, config, run)


def test_a_base_in_shares_trains_to_the_same_weights(tmp_path):
    """Catches: a share that is not gathered, or all of the base kept in each process."""
    run_work(tmp_path, ["sft"])
    assert fork(shard_work, tmp_path / "shares") == [0, 0]
    a, b = (
        load_file(tmp_path / name / "adapter/adapter_model.safetensors")
        for name in ("sft", "shares")
    )
    assert all(torch.allclose(t, b[key], rtol=0, atol=1e-4) for key, t in a.items())


def test_dropout_needs_a_micro_batch_for_each_process(monkeypatch):
    """Catches: a number of processes at which dropout would be drawn otherwise, without a word."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="micro_batch is 4, expected at most 2 for 3 processes"):
        training.check(load_config(TINY, SMALL))


def lose_a_process(how: str) -> None:
    """Rank 1 is killed or hangs; exit code 7 where rank 0 notices."""
    config = load_config(TINY, ["run.patience=2"])
    with processes(config):
        if training.is_main():
            with pytest.raises(UserError, match="ended, or did not answer"):
                training.barrier()
            os._exit(7)
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_a_lost_process_ends_the_others(how):
    """Catches: a run that waits for ever for a process that was killed or does not answer."""
    started = time.monotonic()
    codes = fork(lose_a_process, how)
    assert codes == [7, -9 if how == "killed" else None] and time.monotonic() - started < 12


def torchrun(script: str, *args: str) -> list[str]:
    launch = [sys.executable, str(ROOT / "scripts" / "torchrun.py"), "--nproc-per-node", "2"]
    return [*launch, "--master-port", "29517", str(ROOT / "scripts" / script), *args]


def test_torchrun_reports_an_error_once(tmp_path):
    """Catches: a mistake reported by every process, or an exit code 1 in place of 2."""
    config = str(ROOT / "configs" / "tiny_rl.yaml")
    command = torchrun("train_rl.py", config, "rl.prompts=1", f"run.dir={tmp_path}/run")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "OMP_NUM_THREADS" not in line] == [
        "error: rl.prompts: 1 is fewer than 2 processes"
    ]
