"""SFT: the student learns to write the teacher's text while spending less depth.

One forward a step. Exits are drawn as it runs: by the student's own heads, as in generation, and
uniformly over the exit depths in some rows, so that every early readout keeps learning. At each
head that a token reaches, the residual there gives an early readout Q_d, and with P the teacher's
distribution the head's target is the chance 2 (1 - sigmoid(s KL(P || Q_d))). The loss is

    KL(P || student's readout at its exit), mean over response tokens,
  + the cross-entropy of every head that was reached against its target, mean over response tokens.

Steps: for the first `sft.explore` of them all rows draw uniformly, later a share `sft.broad`.
`sft.targets: base` is the rule of the original instead: Q_d is the readout of the *base*, exits are
drawn from the targets. On a model whose early readouts were never trained these targets are 0.

Simplified against the original: 1. the teacher's residuals are recomputed each step from frozen
weights, not stored; 2. the early readout uses the final norm, in targets, training and generation
alike; 3. KL from float32 log-softmax, without epsilons.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanoexit.adapters import save_adapter
from nanoexit.config import Config
from nanoexit.exits import Ask, Policy, Watch, as_base, exit_depths, target_chance
from nanoexit.model import Transformer
from nanoexit.score import Aligned, align, readout_kl, run_and_score
from nanoexit.teacher import Trace, make_traces
from nanoexit.tokenizer import Tokenizer
from nanoexit.training import (
    Metrics,
    barrier,
    batch_at,
    cosine_share,
    is_main,
    load_checkpoint,
    make_optimizer,
    mine,
    progress,
    save_checkpoint,
    seed_torch,
    stream,
    total,
    trained,
    update,
)


class Draw(Policy):
    """Draws exits while a training step runs, and keeps what each head saw.

    uniform [N]: tokens that exit at each depth alike; others follow their heads, or chance [N, E]
    where it is given. free [N]: tokens that may exit.
    """

    def __init__(self, free: Tensor, uniform: Tensor, chance: Tensor | None = None):
        super().__init__("draw")
        self.free, self.uniform, self.chance = free, uniform, chance
        self.depths: tuple[int, ...] = ()
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}  # depth -> residuals [n, D], places [n]

    def layers(self, model: Transformer) -> tuple[int, ...]:
        self.depths = exit_depths(model)
        return self.depths

    def exits(self, ask: Ask, depth: int, h: Tensor, z: Any, u: Tensor, at: Tensor) -> Tensor:
        self.seen[depth] = h.detach(), at
        column = self.depths.index(depth)
        chance = z.detach().sigmoid() if self.chance is None else self.chance[at, column]
        left = len(self.depths) + 1 - column  # depths still to choose from
        chance = torch.where(self.uniform[at], 1 / left, chance)
        return (u < chance) & self.free[at]


@dataclass
class Losses:
    """Sums over the response tokens of one forward; dividing by their number makes means."""

    kl: Tensor
    exit: Tensor
    depth: Tensor
    reached: Tensor  # [E] how many tokens reached each head
    target: Tensor  # [E] sum of the targets there
    chance: Tensor  # [E] sum of the heads' chances there


def student_losses(
    model: Transformer, a: Aligned, teacher: Tensor, draw: Draw, noise: Tensor, config: Config
) -> Losses:
    """One forward with drawn exits. teacher [n, D]: the teacher's residuals at a.at."""
    alive = a.depths > 0
    scored = run_and_score(model, a.ids, draw, alive, a.prompt_lens, noise)
    chunk = config.model.logits_chunk
    kl = readout_kl(model, teacher, scored.hidden.flatten(0, 1)[a.at], chunk)
    targets, reached = exit_targets(model, a, teacher, draw, config)
    assert scored.head_logits is not None
    z = scored.head_logits.flatten(0, 1)[a.at]  # [n, E]
    cross = F.binary_cross_entropy_with_logits(z, targets, reduction="none") * reached
    return Losses(
        kl.sum(),
        cross.sum(),
        scored.depths.flatten()[a.at].sum(),
        reached.sum(0),
        (targets * reached).sum(0),
        (z.detach().sigmoid() * reached).sum(0),
    )


@torch.no_grad()
def exit_targets(
    model: Transformer, a: Aligned, teacher: Tensor, draw: Draw, config: Config
) -> tuple[Tensor, Tensor]:
    """-> the target of each head at each readout [n, E], 0 where not reached; reached [n, E]."""
    order = torch.full((a.ids.numel(),), -1, device=a.ids.device)
    order[a.at] = torch.arange(len(a.at), device=a.ids.device)
    targets = teacher.new_zeros(len(a.at), len(draw.depths), dtype=torch.float32)
    reached = torch.zeros_like(targets, dtype=torch.bool)
    for column, depth in enumerate(draw.depths):
        if depth not in draw.seen:
            continue
        h, at = draw.seen[depth]
        rows = order[at]
        h, rows = h[rows >= 0], rows[rows >= 0]
        reached[rows, column] = True
        if draw.chance is not None:
            targets[rows, column] = draw.chance[a.at[rows], column]
        else:
            kl = readout_kl(model, teacher[rows], h, config.model.logits_chunk)
            targets[rows, column] = target_chance(kl, config.teacher.kl_strength)
    return targets, reached


@torch.no_grad()
def teacher_pass(model: Transformer, a: Aligned, config: Config) -> tuple[Tensor, Tensor | None]:
    """-> the teacher's residuals at the readouts [n, D]; with sft.targets=base, chances [B*T, E].
    """
    depths = exit_depths(model)
    watch = Watch(depths if config.sft.targets == "base" else ())
    with as_base(model):
        teacher = model.run(a.ids, stop=watch).hidden.flatten(0, 1)[a.at]
    if config.sft.targets != "base":
        return teacher, None
    chance = torch.zeros(a.ids.numel(), len(depths), device=a.ids.device)
    for column, depth in enumerate(depths):
        kl = readout_kl(model, teacher, watch.seen[depth][a.at], config.model.logits_chunk)
        chance[a.at, column] = target_chance(kl, config.teacher.kl_strength)
    return teacher, chance


def draw_noise(
    a: Aligned, places: Sequence[int], exits: int, config: Config, step: int
) -> tuple[Tensor, Tensor]:
    """-> noise [B*T, E] for exits, and which tokens [B*T] draw uniformly.

    A row's draws depend on its place in the step alone, however rows are split up.
    """
    B, T = a.ids.shape
    exploring = config.sft.targets == "student" and step < config.sft.explore * config.sft.steps
    share = 1.0 if exploring else config.sft.broad if config.sft.targets == "student" else 0.0
    noise = np.ones((B, T, exits), dtype=np.float32)
    uniform = np.zeros((B, T), dtype=bool)
    for row, (place, n, m) in enumerate(zip(places, a.prompt_lens, a.counts)):
        rng = np.random.default_rng(stream("exits", config.run.seed, step, place))
        uniform[row] = rng.random() < share
        noise[row, : n + m - 1] = rng.random((n + m - 1, exits), dtype=np.float32)
    drawn = torch.from_numpy(noise).flatten(0, 1), torch.from_numpy(uniform).flatten()
    return drawn[0].to(a.ids.device), drawn[1].to(a.ids.device)


def step_losses(model: Transformer, traces: Sequence[Trace], config: Config, step: int) -> dict:
    """Backward through one step's traces, a micro-batch at a time -> the step's mean figures."""
    size, depths = config.sft.micro_batch, exit_depths(model)
    places = mine(range(len(traces)))
    tokens = max(1, sum(len(trace.tokens) for trace in traces))
    sums = torch.zeros(3 + 3 * len(depths), device=model.device)
    for piece in [places[i : i + size] for i in range(0, len(places), size)]:
        batch = [traces[i] for i in piece]
        prompts, responses = [t.prompt_ids for t in batch], [t.tokens for t in batch]
        a = align(prompts, responses, None, model.full_depth, model.device)
        teacher, chance = teacher_pass(model, a, config)
        noise, uniform = draw_noise(a, piece, len(depths), config, step)
        free = torch.zeros_like(uniform).index_fill(0, a.at, True)
        seed_torch("dropout", config.run.seed, step, piece[0])
        draw = Draw(free, uniform, chance)
        losses = student_losses(model, a, teacher, draw, noise, config)
        ((losses.kl + losses.exit) / tokens).backward()
        parts = torch.stack([losses.kl, losses.exit, losses.depth]).detach()
        sums += torch.cat([parts, losses.reached, losses.target, losses.chance])
    kl, exit_loss, depth = (total(sums)[:3] / tokens).tolist()
    reached, target, chances = sums[3:].view(3, -1)
    return {
        "loss": kl + exit_loss,
        "kl": kl,
        "exit_loss": exit_loss,
        "mean_depth": depth,
        "target_exit": (target / reached.clamp(min=1)).tolist(),
        "student_exit": (chances / reached.clamp(min=1)).tolist(),
    }


def train(model: Transformer, traces: Sequence[Trace], config: Config, folder: Path) -> None:
    """The loop: draw traces, losses, step, log, save. Continues from folder/checkpoint."""
    sft = config.sft
    optimizer = make_optimizer(trained(model).values(), sft.lr)
    done = load_checkpoint(folder, model, optimizer)
    metrics = Metrics(folder, done, config)
    model.train()
    with progress(sft.steps, "SFT", "step", done) as bar:
        for step in range(done, sft.steps):
            chosen = batch_at(step, len(traces), sft.batch_size, config.run.seed)
            figures = step_losses(model, [traces[i] for i in chosen], config, step)
            lr = sft.lr * cosine_share(step, sft.steps)
            norm = update(optimizer, lr)
            metrics.write(step + 1, **figures, grad_norm=norm, lr=lr)
            depth = f"{figures['mean_depth']:.2f}/{model.full_depth}"
            bar.set_postfix(kl=f"{figures['kl']:.3f}", depth=depth, refresh=False)
            bar.update()
            if is_main() and ((step + 1) % sft.save_every == 0 or step + 1 == sft.steps):
                save_checkpoint(folder, step + 1, model, optimizer)
    model.eval()


def run_sft(model: Transformer, tokenizer: Tokenizer, config: Config, folder: Path) -> None:
    """The whole job: traces (those that are missing are written), training, the adapter saved."""
    train(model, make_traces(model, tokenizer, config), config, folder)
    if is_main():
        save_adapter(model, folder / "adapter")
    barrier()
