"""SFT: the student learns to write the teacher's text while spending less depth.

One forward a step. Exits are drawn as it runs: by the student's own heads, as in generation, and
uniformly over the exit depths in some rows, so that every early readout keeps learning. At each
head that a token reaches, the residual there gives an early readout Q_d, and with P the teacher's
distribution the head's target is the chance 2 (1 - sigmoid(s KL(P || Q_d))). The loss is

    KL(P || student's readout at its exit), mean over response tokens,
  + the cross-entropy of every head that was reached against its target, mean over response tokens.

`sft.broad` is the share of rows that draw uniformly. `sft.targets: base` is the rule of the
original instead: Q_d is the readout of the *base*, exits are drawn from the targets. On a model
whose early readouts were never trained these targets are 0.

Simplified against the original: 1. the teacher's residuals are recomputed each step from frozen
weights, not stored; 2. the early readout uses the final norm, in targets, training and generation
alike; 3. KL from float32 log-softmax, without epsilons.
"""

from collections.abc import Sequence
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


def student_losses(
    model: Transformer, a: Aligned, teacher: Tensor, draw: Draw, noise: Tensor, config: Config
) -> dict[str, Tensor]:
    """One forward with drawn exits -> sums over its readouts: kl, exit, depth; by head [E]:
    reached, target, chance. teacher [n, D]: the teacher's residuals at a.at.
    """
    scored = run_and_score(model, a.ids, draw, a.depths > 0, a.prompt_lens, noise)
    student = scored.hidden.flatten(0, 1)[a.at]
    kl = readout_kl(model, teacher, student, config.model.logits_chunk)
    target, reached = exit_targets(model, a, teacher, draw, config)
    assert scored.head_logits is not None
    z = scored.head_logits.flatten(0, 1)[a.at]  # [n, E]
    cross = F.binary_cross_entropy_with_logits(z, target, reduction="none")
    return {
        "kl": kl.sum(),
        "exit": (cross * reached).sum(),
        "depth": scored.depths.flatten()[a.at].sum(),
        "reached": reached.sum(0),
        "target": (target * reached).sum(0),
        "chance": (z.detach().sigmoid() * reached).sum(0),
    }


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
    share = config.sft.broad if config.sft.targets == "student" else 0.0
    noise = torch.ones(*a.ids.shape, exits)
    uniform = torch.zeros(a.ids.shape, dtype=torch.bool)
    for row, (place, n, m) in enumerate(zip(places, a.prompt_lens, a.counts)):
        rng = np.random.default_rng(stream("exits", config.run.seed, step, place))
        uniform[row] = rng.random() < share
        drawn = rng.random((n + m - 1, exits), dtype=np.float32)
        noise[row, : n + m - 1] = torch.from_numpy(drawn)
    return noise.flatten(0, 1).to(a.ids.device), uniform.flatten().to(a.ids.device)


def step_losses(model: Transformer, traces: Sequence[Trace], config: Config, step: int) -> dict:
    """Backward through one step's traces, a micro-batch at a time -> the step's mean figures."""
    size, exits = config.sft.micro_batch, len(exit_depths(model))
    places = mine(range(len(traces)))
    tokens = sum(len(trace.tokens) for trace in traces)
    sums = {name: torch.zeros((), device=model.device) for name in ("kl", "exit", "depth")}
    sums |= {n: torch.zeros(exits, device=model.device) for n in ("reached", "target", "chance")}
    for piece in [places[i : i + size] for i in range(0, len(places), size)]:
        batch = [traces[i] for i in piece]
        prompts, responses = [t.prompt_ids for t in batch], [t.tokens for t in batch]
        a = align(prompts, responses, None, model.full_depth, model.device)
        teacher, chance = teacher_pass(model, a, config)
        noise, uniform = draw_noise(a, piece, exits, config, step)
        draw = Draw(torch.zeros_like(uniform).index_fill(0, a.at, True), uniform, chance)
        seed_torch("dropout", config.run.seed, step, piece[0])
        losses = student_losses(model, a, teacher, draw, noise, config)
        ((losses["kl"] + losses["exit"]) / tokens).backward()
        sums = {name: value + losses[name].detach() for name, value in sums.items()}
    sums = {name: total(value) for name, value in sums.items()}
    reached = sums["reached"].clamp(min=1)
    return {
        "loss": ((sums["kl"] + sums["exit"]) / tokens).item(),
        "kl": (sums["kl"] / tokens).item(),
        "exit_loss": (sums["exit"] / tokens).item(),
        "mean_depth": (sums["depth"] / tokens).item(),
        "target_exit": (sums["target"] / reached).tolist(),
        "student_exit": (sums["chance"] / reached).tolist(),
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
