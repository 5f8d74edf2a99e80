"""What all training loops share: checks before the work, the run directory, checkpoints, processes.

Exact resume: every random draw of step t is a function of (run.seed, t), so a checkpoint is the
trained tensors, the optimizer's moments and a step number, in one safetensors file. Processes of
torchrun share a step and sum gradients, with the result of one process. Only process 0 writes."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from nanoexit.adapters import adapter_base, copy_in, load_adapter, save_tensors
from nanoexit.config import Config, UserError, load_config, parse_json, rounded, to_yaml, write_text
from nanoexit.exits import attach, check_cap, parse_policy
from nanoexit.judge import check_judge
from nanoexit.lora import adapters, attach_lora
from nanoexit.model import Transformer
from nanoexit.score import batches
from nanoexit.tasks import Prompt, load_prompts
from nanoexit.tokenizer import Tokenizer, load_tokenizer
from nanoexit.weights import load_model

MAY_CHANGE = ["run.dir", "run.threads", "run.patience"]
MAY_CHANGE += ["model.device", "model.logits_chunk", "sft.save_every", "sft.micro_batch"]
MAY_CHANGE += ["rl.save_every", "rl.micro_batch"]


# --- before the work --------------------------------------------------------------------------
def check(config: Config, resume: bool = False, reinforce: bool = False) -> None:
    """Raise UserError for any mistake that can be found in config, files and prompts beforehand."""
    for key in ("policies", "frontier"):
        for policy in getattr(config.evaluate, key):
            parse_policy(policy, where=f"evaluate.{key}: ")
    for split in ("train", "held_out"):
        load_prompts(config, split, 1)
    check_judge(config.judge)
    if config.sft.early and config.sft.targets == "base":
        raise UserError("sft.early trains the student's readouts: it needs sft.targets=student")
    _check_folder(Path(config.run.dir), resume)
    if config.data.traces:
        _check_writable(Path(config.data.traces), "data.traces")
    if reinforce:  # its gradient is only right for samples of the model's own distribution
        for key, expected in {"temperature": 1.0, "top_p": 1.0, "top_k": 0}.items():
            found = getattr(config.generation, key)
            if found != expected:
                raise UserError(f"generation.{key}: REINFORCE expects {expected}, found {found}")
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        if config.rl.prompts < ranks:
            raise UserError(f"rl.prompts: {config.rl.prompts} is fewer than {ranks} processes")


def load_student(config: Config) -> tuple[Transformer, Tokenizer]:
    """The base with heads, adapters and cap, fresh or from run.init; and its tokenizer. UserError
    if the exits or LoRA of run.init differ from the config's, or if a prompt does not fit."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    m, exits, init = config.model, config.exits, config.run.init
    lora, seed = config.lora, config.run.seed
    if init and m.revision is None and adapter_base(init)[0] == m.name:
        m.revision = adapter_base(init)[1]
    model = load_model(m.name, m.device, m.dtype, m.revision)
    model.logits_chunk = m.logits_chunk
    tokenizer = load_tokenizer(m.name, m.revision)
    attach(model, exits.layers, exits.head, exits.shortcuts, lora, exits.cap, seed)
    if init:
        wanted = _attached(model)
        load_adapter(model, init)
        if not adapters(model):  # an SFT that left the blocks as they are
            attach_lora(model, lora, seed)
        for key, found in _attached(model).items():
            if found != wanted[key]:
                said = f"the config says {wanted[key]}, the run in run.init, {init}, has {found}"
                raise UserError(f"{key}: {said}")
        model.cap = exits.cap = exits.cap or model.cap  # null in the config means the run's
    for cap in config.evaluate.caps:
        check_cap(model, cap, "evaluate.caps")
    _check_lengths(model, tokenizer, config)
    return model, tokenizer


def _attached(model: Transformer) -> dict:
    """What is attached to a model, by the keys of the config."""
    heads = model.exits
    ours = adapters(model)
    return {
        "exits.layers": list(heads.layers) if heads else [],
        "exits.head": heads.kind if heads else None,
        "exits.shortcuts": bool(heads and heads.lenses),
        "lora.r": sorted({adapter.lora_A.shape[0] for adapter in ours.values()}),
        "lora.alpha / lora.r": sorted({adapter.scale for adapter in ours.values()}),
        "lora.targets": sorted({name.rsplit(".", 1)[-1] for name in ours}),
    }


def _check_lengths(model: Transformer, tokenizer: Tokenizer, config: Config) -> None:
    """Check that every prompt of a file leaves room for a response; generated ones are short."""
    most, longest = config.generation.max_new_tokens, model.shape.max_positions
    for split in ("train", "held_out"):
        for prompt in load_prompts(config, split):
            length = len(prompt_ids(tokenizer, prompt, config)) if prompt.where else 0
            if length + most > longest:
                found = f"{prompt.where or 'data.prompts'}: the prompt has {length} tokens"
                room = f"it exceeds the model's {longest} positions"
                raise UserError(f"{found}; with generation.max_new_tokens={most} {room}")


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt, config: Config) -> list[int]:
    """The token ids of a prompt, with the template variables of the config."""
    return tokenizer.prompt_ids(prompt.prompt, prompt.system, **config.data.template)


# --- the run directory ------------------------------------------------------------------------
@contextlib.contextmanager
def run_directory(config: Config, resume: bool) -> Iterator[Path]:
    """The folder of the run with its config.yaml, locked against a second process. An earlier run
    of that name is moved aside, unless `resume` continues it. UserError if the folder is in use or
    not a run, or if the run to resume was made with another config."""
    folder = Path(config.run.dir)
    with contextlib.ExitStack() as locks:
        if is_main():
            used = _check_folder(folder, resume)
            locks.callback(os.close, lock_folder(folder))
            if resume:
                _check_same_config(folder / "config.yaml", config)
            elif used:
                places = (folder.with_name(f"{folder.name}.before-{n}") for n in count(1))
                aside = folder.rename(next(place for place in places if not place.exists()))
                print(f"the earlier run in {folder} is now {aside}", file=sys.stderr)
                locks.close()
                locks.callback(os.close, lock_folder(folder))
            remove_leftovers(folder)
            write_text(folder / "config.yaml", to_yaml(config))
        barrier()
        yield folder


def _check_folder(folder: Path, resume: bool) -> bool:
    """-> whether it holds more than a config and traces, which a new run can use. UserError if it
    is used but not a run, or if there is no run to resume."""
    ours = os.path.isfile(folder / "config.yaml")
    if resume and not ours:
        raise UserError(f"--resume: {folder} holds no run; leave --resume out to start one")
    inside = os.listdir(folder) if os.path.isdir(folder) else [folder.name] * os.path.exists(folder)
    used = not all(re.fullmatch(r"traces|config\.yaml(\.\d+\.tmp)?", name) for name in inside)
    if used and not ours:
        raise UserError(f"run.dir: {folder} is not a run (no config.yaml), so it is left alone")
    _check_writable(folder, "run.dir")
    return used


def _check_writable(folder: Path, key: str) -> None:
    place = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    if not os.path.isdir(place) or not os.access(place, os.W_OK):
        raise UserError(f"{key}: {folder} cannot be written: {place} is a file or read-only")


def lock_folder(folder: Path) -> int:
    """Make the folder and lock it until the handle is closed or the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"run.dir: {folder} is in use by another process") from None
    return handle


def remove_leftovers(folder: Path, seconds: float = 0) -> None:
    """Remove temporary files of this age or older, left by processes killed while writing."""
    for left in folder.rglob("*.tmp"):
        if time.time() - left.stat().st_mtime >= seconds:
            left.unlink()


def _check_same_config(path: Path, config: Config) -> None:
    cure = f"delete {path.parent} to train from the start"
    try:
        kept = load_config(path, schema=type(config))
    except UserError as error:
        raise UserError(f"{error}; resume with the code that wrote it, or {cure}") from None
    if to_yaml(kept).encode() != path.read_bytes():  # also if it was cut between two keys
        raise UserError(f"{path} was cut or edited; {cure}")
    old = dataclasses.asdict(kept)
    for section, values in dataclasses.asdict(config).items():
        for key, value in values.items():
            name, before = f"{section}.{key}", old[section][key]
            if value != before and name not in MAY_CHANGE:
                found = f"{name} is {value!r}, but {path} says {before!r}"
                raise UserError(f"--resume: {found}; a changed config needs another run.dir")


# --- steps, checkpoints, metrics --------------------------------------------------------------
def make_optimizer(model: nn.Module, lr: float) -> AdamW:
    """AdamW without weight decay, with its moments allocated, so that every checkpoint has all."""
    parameters = trained(model).values()
    optimizer = AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    for p in parameters:
        moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(0.0), **moments}
    return optimizer


def cosine_share(step: int, steps: int, warmup: int = 10) -> float:
    """Share of the peak rate at `step` (from 0): linear warm-up, a half cosine down to 0.02."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    along = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.49 * (1 + math.cos(math.pi * along))


def clip_and_step(optimizer: Optimizer, lr: float) -> float:
    """Sum gradients over processes, clip their norm to 1, step, clear -> the norm before clipping.
    UserError for a norm that is not finite, before any weight changes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:  # the same order in every process
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        total(p.grad)
    norm = nn.utils.clip_grad_norm_(parameters, 1.0).item()
    if not math.isfinite(norm):
        hint = "try a smaller learning rate or model.dtype=float32; the last checkpoint is kept"
        raise UserError(f"the norm of the gradient is {norm}, so nothing was updated; {hint}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def training_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """What a checkpoint holds: the trained parameters, and their steps and moments."""
    return {
        f"{key}.{name}": value
        for name, p in trained(model).items()
        for key, value in {"parameter": p.data, **optimizer.state[p]}.items()
    }


def save_checkpoint(folder: Path, step: int, model: nn.Module, optimizer: Optimizer) -> None:
    """State after `step` steps, into folder/checkpoint/state.safetensors."""
    metrics = zlib.crc32(lines_until(folder / "metrics.jsonl", step))
    state, about = training_state(model, optimizer), {"step": str(step), "metrics": str(metrics)}
    save_tensors(folder / "checkpoint" / "state.safetensors", state, about)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Restore what save_checkpoint wrote -> steps done; 0 without a checkpoint. UserError for a
    damaged file, or one of another model."""
    path = folder / "checkpoint" / "state.safetensors"
    if not path.is_file():
        return 0
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
        done, crc = int(about["step"]), int(about["metrics"])
        copy_in(path, training_state(model, optimizer))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        problem = f"is damaged or another model's ({error})"
        raise UserError(f"{path} {problem}; delete it to train from the start") from None
    metrics = folder / "metrics.jsonl"
    if metrics.exists() and zlib.crc32(lines_until(metrics, done)) != crc:
        problem = f"is damaged up to step {done}, or {path} is another run's"
        raise UserError(f"{metrics} {problem}; delete it to go on without it")
    return done


def lines_until(path: Path, step: int = sys.maxsize) -> bytes:
    """The complete lines {"step": n, ...} of a file up to this step. UserError if it is damaged."""
    found = path.read_bytes() if path.is_file() else b""
    kept = b""
    try:
        for number, line in enumerate(found.split(b"\n")[:-1], start=1):  # the last was cut off
            row = parse_json(line.decode(), f"{path}:{number}", dict)
            kept += line + b"\n" if row.get("step", step + 1) <= step else b""
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to go on without it") from None
    return kept


def stream(name: str, seed: int, *numbers: int) -> list[int]:
    """The seed of one named use of randomness: no two names share a stream."""
    return [zlib.crc32(name.encode()), seed, *numbers]


def batch_at(step: int, items: int, batch_size: int, seed: int) -> list[int]:
    """Items of a step: epochs are shuffled passes, and a batch may span several of them."""
    first = step * batch_size
    order = []
    for epoch in range(first // items, (first + batch_size - 1) // items + 1):
        order += np.random.default_rng(stream("order", seed, epoch)).permutation(items).tolist()
    return order[first % items :][:batch_size]


def progress(total: int, name: str, unit: str = "row", done: int = 0) -> tqdm:
    """A progress bar in process 0; hidden without a name or work to do. Inner bars vanish."""
    hidden = not name or not is_main() or done >= total
    looks: Any = {"desc": name, "unit": unit, "leave": None, "dynamic_ncols": True}
    return tqdm(total=total, initial=done, disable=hidden, **looks)


class StepLog:
    """A file of lines {"step": n, ...}; on resume, those after step `done` are dropped."""

    def __init__(self, path: Path, done: int):
        self.path, kept = path, lines_until(path, done)
        if is_main():
            write_text(path, kept.decode())

    def write(self, step: int, **values: Any) -> None:
        if is_main():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")


class Metrics(StepLog):
    """metrics.jsonl: the figures of each step, from 1. UserError for one that is not finite."""

    def write(self, step: int, **values: Any) -> None:
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise UserError(f"step {step}: {name} is {value}; the last checkpoint is kept")
        super().write(step, **rounded(values))


# --- processes --------------------------------------------------------------------------------
@contextlib.contextmanager
def processes(config: Config) -> Iterator[None]:
    """Join the processes that torchrun started; each takes the CUDA device of its local rank."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda and config.model.device in ("auto", "cuda"):
        config.model.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(config.model.device)
    patience = timedelta(seconds=config.run.patience)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=patience)
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def mine(items: Sequence) -> list:
    """The share of a step's items that this process takes."""
    if not dist.is_initialized():
        return list(items)
    return list(items[dist.get_rank() :: dist.get_world_size()])


def my_batches(items: int, size: int) -> list[range]:
    """The micro-batches of at most `size` items that this process takes of a step."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return mine(batches(range(items), min(size, math.ceil(items / ranks))))


def total(tensor: Tensor) -> Tensor:
    """Sum over processes, in place."""
    _together(dist.all_reduce, tensor)
    return tensor


def barrier() -> None:
    """Wait for all processes."""
    _together(dist.barrier)


def _together(collective: Callable, *tensors: Tensor) -> None:
    """A collective call. Raises UserError if another process does not take part."""
    if dist.is_initialized():
        try:
            collective(*tensors)
        except RuntimeError as error:
            problem = "another process ended, or did not answer for run.patience seconds"
            raise UserError(f"{problem}: {str(error).partition('. ')[0]}") from None
