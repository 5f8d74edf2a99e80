"""What both training loops share: the run directory, optimizer, checkpoints, metrics, processes.

Exact resume, by construction: every random draw of step t is a function of (run.seed, t), so a checkpoint is the trained
tensors, the optimizer's moments and a step number, nothing else. It is one safetensors file, replaced by a rename.

Many processes: started by torchrun, each takes every world-th row of a step; sums of gradients are added up by torch.distributed,
so that the result is that of one process. Only process 0 writes.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nanoexit.adapters import load_adapter
from nanoexit.config import Config, to_yaml
from nanoexit.data import replace, rounded
from nanoexit.errors import UserError
from nanoexit.exits import attach
from nanoexit.generate import parse_prompt_exits
from nanoexit.model import Transformer
from nanoexit.tokenizer import Tokenizer, load_tokenizer
from nanoexit.weights import load_model

MAY_CHANGE = {"run.wandb", "model.device", "sft.save_every", "rl.save_every", "sft.micro_batch", "rl.micro_batch"}


# --- the run directory -----------------------------------------------------------------------------------------------


def start_run(config: Config, resume: bool) -> Path:
    """Make runs/NAME with its config.yaml. An earlier run of that name is kept aside, unless `resume` goes on with it.

    Raises UserError where there is nothing to resume, or where it was made with another config.
    """
    folder = Path(config.run.dir)
    saved = folder / "config.yaml"
    if resume:
        if not saved.is_file():
            raise UserError(f"--resume: {folder} holds no run (no config.yaml); leave --resume out to start one")
        _same_config(yaml.safe_load(saved.read_text(encoding="utf-8")), yaml.safe_load(to_yaml(config)), saved)
    elif is_main():
        if folder.is_dir() and any(path.name != saved.name for path in folder.iterdir()):
            folder.rename(_unused(folder))
        folder.mkdir(parents=True, exist_ok=True)
        replace(saved, lambda path: path.write_text(to_yaml(config), encoding="utf-8"))
    barrier()
    return folder


def load_student(config: Config) -> tuple[Transformer, Tokenizer]:
    """The base with heads and adapters attached, fresh or from run.init, and its tokenizer."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    model = load_model(config.model.name, config.model.device, config.model.dtype, config.model.revision)
    tokenizer = load_tokenizer(config.model.name, config.model.revision)
    attach(model, config.exits.layers, config.exits.head, config.lora, config.run.seed)
    parse_prompt_exits(config.exits.prompt, model)  # a mistake there is told before any work
    if config.run.init:
        load_adapter(model, config.run.init)
    return model, tokenizer


def _unused(folder: Path) -> Path:
    return next(path for i in range(1, 10**6) if not (path := folder.with_name(f"{folder.name}.before-{i}")).exists())


def _same_config(old: dict, new: dict, where: Path) -> None:
    for section in new:
        for key, value in new[section].items():
            before = (old.get(section) or {}).get(key)
            if before != value and f"{section}.{key}" not in MAY_CHANGE:
                raise UserError(f"--resume: {section}.{key} is {value!r} now, but {where} says {before!r}; "
                                "resume with the same config, or start another run with run.dir=...")


# --- optimizer -------------------------------------------------------------------------------------------------------


def make_optimizer(groups: Sequence[tuple[list[nn.Parameter], float]], weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW over (parameters, peak learning rate) groups; the decay is on matrices only."""
    split = []
    for parameters, lr in groups:
        for decay, wanted in ((weight_decay, True), (0.0, False)):
            chosen = [p for p in parameters if (p.dim() > 1) == wanted]
            split += [{"params": chosen, "lr": lr, "peak": lr, "weight_decay": decay}] if chosen else []
    return torch.optim.AdamW(split, betas=(0.9, 0.98))


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group's learning rate to this share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def cosine_share(step: int, steps: int, warmup: int, floor: float = 0.02) -> float:
    """Share of the peak rate at `step` (from 0): linear warm-up, then a half cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    along = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * along))


def update(optimizer: torch.optim.Optimizer, grad_clip: float) -> float:
    """Add up gradients over processes, clip, step, clear -> the norm before clipping. Raises UserError where it is not finite."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters if world() > 1 else ():  # in the same order everywhere, also where a process had no rows
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        total(p.grad)
    norm = nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf).item()
    if not math.isfinite(norm):
        raise UserError(f"the gradient is {norm}: nothing was updated; try a smaller learning rate, or model.dtype=float32")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# --- checkpoints -----------------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """State after `step` steps, into folder/checkpoint/state.safetensors."""
    tensors, steps = {}, {}
    for name, p in trained(model).items():
        state = optimizer.state.get(p, {})
        tensors[f"parameter.{name}"] = p.detach()
        tensors |= {f"{moment}.{name}": state[moment] for moment in ("exp_avg", "exp_avg_sq") if moment in state}
        steps[name] = float(state.get("step", 0))
    metadata = {"step": str(step), "optimizer_steps": json.dumps(steps)}
    replace(folder / "checkpoint" / "state.safetensors", lambda path: save_file(tensors, path, metadata))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore what save_checkpoint wrote -> the number of steps done; 0 where there is no checkpoint yet."""
    path = folder / "checkpoint" / "state.safetensors"
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
        steps = json.loads(metadata["optimizer_steps"])
        for name, p in trained(model).items():
            if f"parameter.{name}" not in names:
                raise UserError(f"{path}: no tensor parameter.{name}: the checkpoint is of another model or config")
            p.data.copy_(file.get_tensor(f"parameter.{name}"))
            if steps[name]:
                optimizer.state[p] = {"step": torch.tensor(steps[name])} | {
                    m: file.get_tensor(f"{m}.{name}").to(p.device) for m in ("exp_avg", "exp_avg_sq")}
    return int(metadata["step"])


# --- randomness and order --------------------------------------------------------------------------------------------


def seed_of(*numbers: int) -> int:
    """One seed for torch out of several numbers, such as (run.seed, step)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def batch_at(step: int, items: int, batch_size: int, seed: int) -> list[int]:
    """Which items step `step` trains on: epochs are shuffled passes, and a batch may span two of them."""
    orders: dict[int, np.ndarray] = {}
    chosen = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(place, items)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(items)
        chosen.append(int(orders[epoch][i]))
    return chosen


# --- metrics ---------------------------------------------------------------------------------------------------------


class Metrics:
    """metrics.jsonl, one object a step; on resume, steps after the checkpoint are dropped. May mirror to Weights & Biases."""

    def __init__(self, folder: Path, done: int, config: Config):
        self.path = folder / "metrics.jsonl"
        self.wandb = _wandb(config, folder) if is_main() else None
        if is_main():
            kept = [line for line in self._lines() if json.loads(line)["step"] <= done]
            replace(self.path, lambda path: path.write_text("".join(kept), encoding="utf-8"))

    def _lines(self) -> list[str]:
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]  # a kill may tear the last one

    def write(self, step: int, **values: Any) -> None:
        """Add the figures of step `step` (counted from 1)."""
        if not is_main():
            return
        row = {"step": step, **{k: rounded(v) for k, v in values.items()}}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in row.items() if isinstance(v, (int, float))}, step=step)


def _wandb(config: Config, folder: Path):
    if not config.run.wandb:
        return None
    try:
        import wandb
    except ImportError:
        raise UserError("run.wandb is true, but the package wandb is not installed: pip install wandb, or run.wandb=false") from None
    return wandb.init(project="nanoexit", name=folder.name, dir=str(folder), config=yaml.safe_load(to_yaml(config)))


# --- processes -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def processes(config: Config):
    """Join the processes that torchrun started; each CUDA process takes the card of its local rank."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available() and config.model.device in ("auto", "cuda"):
        config.model.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(config.model.device)
    dist.init_process_group("nccl" if config.model.device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def mine(items: Sequence) -> list:
    """This process's share of a step's items."""
    return list(items[rank() :: world()])


def total(tensor: Tensor) -> Tensor:
    """Sum over processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def totals(values: Iterable[float], device: torch.device) -> list[float]:
    """Sums of some numbers over processes."""
    return total(torch.tensor([float(v) for v in values], dtype=torch.float32, device=device)).tolist()
