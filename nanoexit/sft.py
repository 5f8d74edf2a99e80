"""SFT: the student learns to write the teacher's text while spending less depth.

For each trace, exit depths are drawn from the teacher's own stick-breaking distribution, several patterns a trace. One forward
runs the whole trace with those exits prescribed, later positions attending to what frozen ones left. The loss is

    kl_weight * KL(student || teacher), mean over response tokens
  + exit_weight * sum over the heads that a position reached of H(target, head), mean over positions that may exit,

with H the cross-entropy against the teacher's chance there (`soft`) or against the sampled decision (`sampled`).

Simplified against the original: 1. the teacher's logits are recomputed each step from frozen weights, not stored; 2. the early
readout uses the final norm, in targets, training and generation alike; 3. KL from float32 log-softmax, without epsilons.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nanoexit.adapters import save_adapter
from nanoexit.config import Config
from nanoexit.data import Trace
from nanoexit.exits import sample_depths, teacher_chance
from nanoexit.lora import adapters_off
from nanoexit.model import Transformer
from nanoexit.score import Score, pad, readout_kl, score
from nanoexit.teacher import make_traces
from nanoexit.tokenizer import Tokenizer
from nanoexit.training import (
    Metrics,
    barrier,
    batch_at,
    cosine_share,
    is_main,
    load_checkpoint,
    load_student,
    make_optimizer,
    mine,
    save_checkpoint,
    seed_of,
    set_rate,
    start_run,
    total,
    totals,
    trained,
    update,
)


@dataclass
class Batch:
    """Traces as tensors; B rows, T input positions, right-padded."""

    ids: Tensor  # [B, T]
    prompt_lens: list[int]
    lengths: Tensor  # [B] input positions of each row
    written: Tensor  # [B, T] bool: positions whose readout predicts a response token
    free: Tensor  # [B, T] bool: positions that may exit
    chance: Tensor  # [B, T, E] the teacher's chance to exit at each depth; 0 where no exit is free


def make_batch(traces: Sequence[Trace], config: Config, device: torch.device) -> Batch:
    ids = pad([t.prompt_ids + t.tokens[:-1] for t in traces], device)
    B, T = ids.shape
    starts = torch.tensor([len(t.prompt_ids) for t in traces], device=device)[:, None]
    lengths = starts + torch.tensor([len(t.tokens) - 1 for t in traces], device=device)[:, None]
    at = torch.arange(T, device=device)
    kl = torch.full((B, T, traces[0].kl.shape[-1]), torch.inf)
    for row, (trace, end) in enumerate(zip(traces, lengths[:, 0].tolist())):
        kl[row, end - len(trace.kl) : end] = trace.kl
    first = torch.zeros_like(starts) if config.exits.prompt == "head" else starts
    free = (at >= first) & (at < lengths)
    chance = teacher_chance(kl.to(device), config.teacher.kl_strength).masked_fill(~free[..., None], 0.0)
    return Batch(ids, [len(t.prompt_ids) for t in traces], lengths[:, 0], (at >= starts - 1) & (at < lengths), free, chance)


def draw_noise(batch: Batch, places: Sequence[int], patterns: int, seed: Sequence[int]) -> Tensor:
    """[patterns, B, T, E] uniform, a row's own by its place in the step: the same however rows are split up."""
    noise = np.ones((patterns, *batch.chance.shape), dtype=np.float32)
    for row, (place, length) in enumerate(zip(places, batch.lengths.tolist())):
        size = (patterns, length, noise.shape[-1])
        noise[:, row, :length] = np.random.default_rng([*seed, place]).random(size, dtype=np.float32)
    return torch.from_numpy(noise).to(batch.ids.device)


def draw_depths(batch: Batch, noise: Tensor, config: Config, full_depth: int) -> Tensor:
    """Noise [B, T, E] -> depths [B, T] from the teacher's distribution; the prompt as exits.prompt says; 0 on padding."""
    depths = sample_depths(batch.chance, noise, sorted(config.exits.layers), full_depth)
    at = torch.arange(depths.shape[1], device=depths.device)
    if config.exits.prompt.startswith("limit:"):
        starts = torch.tensor(batch.prompt_lens, device=depths.device)[:, None]
        depths = depths.masked_fill(at < starts, int(config.exits.prompt.partition(":")[2]))
    return depths.masked_fill(at >= batch.lengths[:, None], 0)


@dataclass
class Losses:
    """Sums over the rows of one forward; dividing by the step's counts makes them means."""

    kl: Tensor
    exit: Tensor
    kl_count: int
    exit_count: int
    depth: Tensor  # sum of depths over free positions
    reached: Tensor  # [E] how many free positions reached each head
    teacher: Tensor  # [E] sum of the teacher's chances there
    student: Tensor  # [E] sum of the heads' chances there


def student_losses(model: Transformer, batch: Batch, depths: Tensor, teacher_hidden: Tensor, config: Config) -> Losses:
    """One pattern of exits, depths [B, T]. teacher_hidden [n, D]: the teacher's residuals where batch.written."""
    scored = score(model, batch.ids, depths, batch.prompt_lens)
    kl = readout_kl(model, scored.hidden[batch.written], teacher_hidden, config.sft.chunk, config.sft.divergence)
    cross, reached = exit_cross_entropy(scored, batch, config)
    chances = torch.sigmoid(scored.head_logits.detach())
    return Losses(kl.sum(), cross.sum(), len(kl), int(batch.free.sum()), depths[batch.free].sum(), reached.sum((0, 1)),
                  (batch.chance * reached).sum((0, 1)), (chances * reached).sum((0, 1)))


def exit_cross_entropy(scored: Score, batch: Batch, config: Config) -> tuple[Tensor, Tensor]:
    """-> cross-entropy [B, T, E] of each head that was reached (0 elsewhere), and which were reached [B, T, E] bool."""
    layers = torch.tensor(sorted(config.exits.layers), device=batch.ids.device)
    depths = scored.depths[..., None]
    reached = batch.free[..., None] & (depths >= layers)
    target = batch.chance if config.sft.exit_loss == "soft" else (depths == layers).float()
    return F.binary_cross_entropy_with_logits(scored.head_logits, target, reduction="none") * reached, reached


def step_losses(model: Transformer, traces: Sequence[Trace], config: Config, step: int) -> dict:
    """Backward through one step's traces, a micro-batch at a time -> the step's mean figures."""
    device, patterns = model.device, config.sft.samples_per_trace
    size = max(1, config.sft.micro_batch // patterns)
    places = mine(range(len(traces)))
    pieces = [places[i : i + size] for i in range(0, len(places), size)]
    batches = [make_batch([traces[i] for i in piece], config, device) for piece in pieces]
    tokens, free = totals([patterns * sum(int(getattr(b, mask).sum()) for b in batches) for mask in ("written", "free")], device)
    sums = torch.zeros(3 + 3 * len(config.exits.layers), device=device)
    for batch, piece in zip(batches, pieces):
        with torch.no_grad(), adapters_off(model):
            teacher_hidden = model.run(batch.ids).hidden[batch.written]
        torch.manual_seed(seed_of(config.run.seed, step, piece[0]))  # dropout
        for noise in draw_noise(batch, piece, patterns, [config.run.seed, 4, step]):
            losses = student_losses(model, batch, draw_depths(batch, noise, config, model.full_depth), teacher_hidden, config)
            (config.sft.kl_weight * losses.kl / tokens + config.sft.exit_weight * losses.exit / max(1, free)).backward()
            sums += torch.cat([torch.stack([losses.kl, losses.exit, losses.depth]).detach(), losses.reached, losses.teacher, losses.student])
    return _figures(total(sums).tolist(), tokens, max(1, free), config)


def _figures(sums: list[float], tokens: float, free: float, config: Config) -> dict:
    kl, exit_loss, depth, *rest = sums
    E = len(config.exits.layers)
    reached, teacher, student = rest[:E], rest[E : 2 * E], rest[2 * E :]
    return {"loss": config.sft.kl_weight * kl / tokens + config.sft.exit_weight * exit_loss / free, "kl": kl / tokens,
            "exit_loss": exit_loss / free, "mean_depth": depth / free,
            "teacher_exit": [t / max(1, n) for t, n in zip(teacher, reached)],
            "student_exit": [s / max(1, n) for s, n in zip(student, reached)]}


def train(model: Transformer, traces: Sequence[Trace], config: Config, folder: Path) -> None:
    """The loop: draw traces, losses, step, log, save. Goes on from folder/checkpoint where there is one."""
    heads = list(model.exits.parameters())
    adapters = [p for name, p in trained(model).items() if ".lora_" in name]
    optimizer = make_optimizer([(adapters, config.sft.lr), (heads, config.sft.head_lr or config.sft.lr)], config.sft.weight_decay)
    done = load_checkpoint(folder, model, optimizer)
    metrics = Metrics(folder, done, config)
    model.train()
    with tqdm(total=config.sft.steps, initial=done, desc="SFT", unit="step", disable=not is_main(), dynamic_ncols=True) as bar:
        for step in range(done, config.sft.steps):
            share = cosine_share(step, config.sft.steps, config.sft.warmup)
            set_rate(optimizer, share)
            chosen = batch_at(step, len(traces), config.sft.batch_size, config.run.seed)
            figures = step_losses(model, [traces[i] for i in chosen], config, step)
            norm = update(optimizer, config.sft.grad_clip)
            metrics.write(step + 1, **figures, grad_norm=norm, lr=config.sft.lr * share)
            bar.set_postfix(kl=f"{figures['kl']:.3f}", exit=f"{figures['exit_loss']:.3f}", depth=f"{figures['mean_depth']:.2f}/{model.full_depth}", refresh=False)
            bar.update()
            if is_main() and ((step + 1) % config.sft.save_every == 0 or step + 1 == config.sft.steps):
                save_checkpoint(folder, step + 1, model, optimizer)
    model.eval()


def run(config: Config, resume: bool = False) -> tuple[Transformer, Tokenizer, Path]:
    """The whole job: base and fresh adapters, traces (those that are missing are written), training, the adapter saved."""
    model, tokenizer = load_student(config)
    folder = start_run(config, resume)
    traces = make_traces(model, tokenizer, config)
    train(model, traces, config, folder)
    if is_main():
        save_adapter(model, folder / "adapter")
    barrier()
    return model, tokenizer, folder
