"""Several processes make what one makes; an error, a kill or a hang in one ends them all."""

import os
import shutil
import signal
import socket
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torchrun as launcher
from conftest import TINY, script
from safetensors.torch import load_file

from nanoexit import reinforce, sft, training
from nanoexit.config import ROOT, UserError, load_config
from nanoexit.training import load_student, processes, run_directory

SMALL = ["data.count=16", "teacher.chunk=8", "run.threads=1"]
SMALL += ["sft.steps=3", "sft.batch_size=8", "sft.micro_batch=4", "sft.save_every=1"]
SMALL += ["rl.steps=2", "rl.prompts=3", "rl.rollouts=4", "rl.kl_weight=0.1"]
SMALL += ["rl.exit_kl_weight=0.1", "exits.shortcuts=true"]
WORK = {"sft": sft.run_sft, "stopped": sft.run_sft, "rl": reinforce.run_reinforce}


def fork(work, *args, others: float = 20) -> list[int | None]:
    """work(*args) in two processes -> exit codes; the second may end up to `others` s later."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    context, started = get_context("fork"), []
    for rank in range(2):
        its = settings | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(context.Process(target=begin, args=(its, work, args)))
        started[-1].start()
    started[0].join(300)
    started[1].join(others)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
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
            with run_directory(config, resume=name == "stopped") as run:
                WORK[name](*load_student(config), config, run)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """What one process makes; "stopped" is its SFT at step 2."""
    folder, save = tmp_path_factory.mktemp("one"), training.save_checkpoint

    def keep_step_2(run: Path, step: int, *rest) -> None:
        save(run, step, *rest)
        if step == 2 and run.name == "sft":
            shutil.copytree(run, folder / "stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "save_checkpoint", keep_step_2)
        run_work(folder, ["sft", "rl"])
    return folder


def most_different(a: Path, b: Path) -> float:
    """The largest difference of two runs' weights."""
    names = (f"adapter/{name}.safetensors" for name in ("adapter_model", "exit_heads"))
    pairs = [(load_file(a / name), load_file(b / name)) for name in names]
    return max((x[n] - y[n]).abs().max().item() for x, y in pairs for n in x)


def test_processes_make_what_one_makes(one, tmp_path):
    """Catches: gradients over the wrong count; rows twice or never; noise that depends on ranks."""
    shutil.copytree(one / "stopped", tmp_path / "stopped")
    assert fork(run_work, tmp_path, [*WORK]) == [0, 0]
    for name in WORK:
        assert most_different(one / name.replace("stopped", "sft"), tmp_path / name) < 1e-5


def lose_a_process(how: str) -> None:
    """Rank 1 is killed or hangs; exit code 7 where rank 0 notices."""
    config = load_config(TINY, ["run.patience=1"])
    with processes(config):
        if training.is_main():
            with pytest.raises(UserError, match="ended, or did not answer"):
                training.barrier()
            os._exit(7)
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_a_lost_process_ends_the_others(how):
    """Catches: a run that waits forever for a process that was killed or does not answer."""
    started = time.monotonic()
    codes = fork(lose_a_process, how, others=1)
    assert codes == [7, -9 if how == "killed" else None] and time.monotonic() - started < 12


def test_torchrun_reports_an_error_once_and_with_its_code(tmp_path):
    """Catches: a mistake reported by every process, or that ends as code 1 or as a signal."""
    assert launcher.exit_code([-15, 2]) == launcher.exit_code([2, 143]) == 2
    assert launcher.exit_code([-9, -15]) == 128 + 9
    work = [ROOT / "scripts" / "train_rl.py", ROOT / "configs" / "tiny_rl.yaml", "rl.prompts=1"]
    work = ["--nproc-per-node=2", "--master-port=29517", *work, f"run.dir={tmp_path}/run"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # torchrun warns where it is not set
    done = script("torchrun", *work, env=env)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: rl.prompts: 1 is fewer than 2 processes"]
