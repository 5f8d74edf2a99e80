"""SFT: the student learns to write the teacher's text while spending less depth.

Exits are drawn during the forward: by the student's own heads, as in generation, except in a share
`sft.broad` of the rows, where they are drawn uniformly over the exit depths so that every early
readout keeps learning. At each head that a token reaches, the residual gives an early readout Q_d.
With P the teacher's distribution, p the head's chance and s = teacher.kl_strength, the loss is

    KL(P || student's readout at its exit)
  + sum over heads reached of  KL(P || Q_d) p + (p log p + (2 - p) log(2 - p)) / s,

averaged over response tokens. A head's part is least at p = 2 (1 - sigmoid(s KL)), the original's
target chance. If the residual does not reveal which tokens an exit would spoil, it is least at the
target of their *mean* KL; cross-entropy would average the targets, and exit too often. The KL in a
head's part is clamped at 2 nats.

With `sft.price`, heads learn what an exit costs for each block that it saves: c = KL / (blocks
saved) stands in place of KL, also in the target. A head's part is m - c log m, up to a constant the
Poisson deviance of m, the cost whose target chance is p. Its slope does not vanish as p nears 0, so
heads learn sooner. It also moves the residuals that heads read, so adapters need a low rate.

`sft.early` w adds - 2 w log(1 + exp(-KL(P || Q_d))) for each of these heads, here with a gradient
to Q_d. Its slope, 2 w sigmoid(-KL), is small where KL is large, so it trains the early readouts
that are nearly good enough.

The affine maps of `exits.shortcuts` (exits.py) start as least-squares fits to base residuals.

`sft.targets: base` takes the *base's* readout for Q_d, as the original does. On a model whose early
readouts were never trained these targets are 0, and the heads learn never to exit.

Simpler than the original: 1. the teacher's residuals stay in memory if they fit, and are never
written to disk; 2. early readouts always use the final norm: in targets, training and generation;
3. KL is computed from a float32 log-softmax, without epsilons."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanoexit import training
from nanoexit.adapters import save_adapter
from nanoexit.config import Config
from nanoexit.exits import Asked, Policy, Watch, as_base, exit_depths, target_chance
from nanoexit.model import Transformer, unit
from nanoexit.score import Aligned, batches, readout_kl, score
from nanoexit.teacher import Teacher, make_traces
from nanoexit.tokenizer import Tokenizer

MOST_KL = 2.0
FITTED, RIDGE = 256, 10.0  # traces that shortcuts start from; how strongly to prefer no change


class Draw(Policy):
    """Draws exits while a training step runs, and keeps what each exit would read out."""

    def __init__(self, model: Transformer, a: Aligned, uniform: Tensor):
        """uniform [n]: readouts that ignore their heads."""
        super().__init__("head")  # it decides at the depths of the heads
        self.uniform, n, device = uniform, len(a.at), model.device
        self.slot = torch.full_like(a.ids, -1).flatten()  # the readout at each index
        self.slot[a.at] = torch.arange(n, device=device)
        size = n, len(exit_depths(model)), model.shape.width
        self.h = torch.zeros(size, dtype=model.dtype, device=device)  # 0 where not reached

    def exits(self, asked: Asked) -> Tensor:
        depths, slot = exit_depths(asked.model), self.slot[asked.at]
        column = depths.index(asked.depth)
        response = slot >= 0  # prompt tokens before the first readout do not exit
        self.h[slot[response], column] = asked.model.lensed(asked.h[response], asked.depth)
        left = len(depths) + 1 - column  # depths still to choose from
        chance = torch.where(self.uniform[slot], 1 / left, asked.z.detach().sigmoid())
        return response & (asked.u < chance)


def exit_loss(z: Tensor, cost: Tensor, strength: float, price: bool) -> Tensor:
    """Log-odds z of exiting, its cost c -> c p + (p log p + (2 - p) log(2 - p)) / s, or
    m - c log m, where m is the cost whose target chance is p."""
    p = z.sigmoid()
    if price:
        m = F.softplus(math.log(2) - z) / strength + 1e-6
        return m - cost * m.log()
    entropy = p * F.logsigmoid(z) + (2 - p) * (2 - p).log()
    return cost * p + entropy / strength


def student_losses(
    model: Transformer, a: Aligned, known: list[Tensor], draw: Draw, noise: Tensor, config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """One forward with drawn exits -> its loss and figures, both sums over readouts. For each head
    [E]: how often it was reached, the target chances there, and its own chances. known: the
    teacher's residuals [n, D] and, if used instead of the student's own, divergences [n, E]."""
    early, teacher, exit_kl = config.sft.early, known[0], known[-1]
    strength, price = config.teacher.kl_strength, config.sft.price
    scored = score(model, a.ids, a.depths, a.prompt_lens, policy=draw, noise=noise)
    parts = scored.hidden, scored.head_logits, scored.depths
    student, z, depths = (x.flatten(0, 1)[a.at] for x in parts)
    layers = torch.tensor(exit_depths(model), device=z.device)
    reached = depths[:, None] >= layers
    kl = readout_kl(model, teacher, student).sum()
    if len(known) == 1:
        h, of = draw.h[reached], reached.nonzero()[:, 0]
        exit_kl = readout_kl(model, teacher, h if early else h.detach(), of)
        exit_kl = torch.zeros_like(z).masked_scatter(reached, exit_kl)
    costs = exit_kl.detach().clamp(max=MOST_KL) / (model.deepest - layers if price else 1)
    heads = (exit_loss(z, costs, strength, price) * reached).sum()
    gain = (F.softplus(-exit_kl) * reached).sum()
    return kl + heads - 2 * early * gain, {
        "kl": kl,
        "exit_loss": heads,
        "mean_depth": depths.sum(),
        "reached": reached.sum(0),
        "target_exit": (target_chance(costs, strength) * reached).sum(0),
        "student_exit": (z.sigmoid() * reached).sum(0),
    }


def draw_noise(
    a: Aligned, places: Sequence[int], exits: int, config: Config, step: int
) -> tuple[Tensor, Tensor]:
    """-> noise [B*T, E] for exits; which readouts [n] draw uniformly. A row's draws depend only on
    its place in the step, however rows are split into batches."""
    noise, device = torch.ones(a.ids.numel(), exits), a.ids.device
    who = ("exits", config.run.seed, step)
    rngs = [np.random.default_rng(training.stream(*who, place)) for place in places]
    broad = torch.tensor([rng.random() < config.sft.broad for rng in rngs])
    drawn = [rng.random((count, exits), dtype=np.float32) for rng, count in zip(rngs, a.counts)]
    noise[a.at.cpu()] = torch.from_numpy(np.concatenate(drawn))
    return noise.to(device), broad.to(device)[a.rows]


def step_losses(
    model: Transformer, teacher: Teacher, chosen: Sequence[int], config: Config, step: int
) -> dict[str, Any]:
    """Backward through one step's traces, a micro-batch at a time -> the step's mean figures."""
    exits = len(exit_depths(model))
    tokens = sum(len(teacher.traces[i].tokens) for i in chosen)
    names = ("kl", "exit_loss", "mean_depth", "reached", "target_exit", "student_exit")
    sizes = dict.fromkeys(names[:3], ()) | dict.fromkeys(names[3:], (exits,))
    sums = {name: torch.zeros(size, device=model.device) for name, size in sizes.items()}
    for piece in training.my_batches(len(chosen), config.sft.micro_batch):
        a, known = teacher([chosen[i] for i in piece])
        noise, uniform = draw_noise(a, piece, exits, config, step)
        draw = Draw(model, a, uniform)
        loss, figures = student_losses(model, a, known, draw, noise, config)
        (loss / tokens).backward()
        sums = {name: value + figures[name].detach() for name, value in sums.items()}
    sums = {name: training.total(value) for name, value in sums.items()}
    reached = sums.pop("reached").clamp(min=1)  # each head has its own count
    return {n: (v / (reached if v.dim() else tokens)).tolist() for n, v in sums.items()}


@torch.no_grad()
def fit_shortcuts(model: Transformer, teacher: Teacher, rows: int) -> None:
    """Start lenses and shortcuts as least-squares maps from residuals of the base to deeper ones,
    all divided by their RMS, over FITTED traces, `rows` of them at a time."""
    exits = model.exits
    watch, count, L = Watch(exits.layers), min(FITTED, len(teacher.traces)), model.full_depth
    maps = {(int(start), L): lens for start, lens in exits.lenses.items()}
    maps |= dict(zip(itertools.pairwise(exits.layers), exits.shortcuts.values()))
    sums: dict[tuple[int, int], Any] = dict.fromkeys(maps, 0.0)
    for piece in batches(range(count), rows):
        a, (last, *_) = teacher(piece)
        with as_base(model):
            model.run(a.ids, stop=watch)
        seen = {depth: unit(h[a.at]) for depth, h in watch.seen.items()} | {L: unit(last)}
        for pair in maps:
            x, y = (seen[depth] for depth in pair)
            one = F.pad(x, (0, 1), value=1.0)
            sums[pair] += one.T @ torch.cat((one, y - x), 1)
    for pair, products in sums.items():
        xx, xy = products.split([len(products), model.shape.width], 1)
        xx.diagonal().add_(RIDGE)
        a_b = torch.linalg.solve(xx, xy)
        maps[pair].weight.copy_(a_b[:-1].T)
        maps[pair].bias.copy_(a_b[-1])


def run_sft(model: Transformer, tokenizer: Tokenizer, config: Config, folder: Path) -> None:
    """The whole job, from folder/checkpoint on: write missing traces; pick, step, log, save."""
    sft, traces = config.sft, make_traces(model, tokenizer, config)
    teacher = Teacher(model, traces, config)
    optimizer = training.make_optimizer(model, sft.lr)
    done = training.load_checkpoint(folder, model, optimizer)
    if config.exits.shortcuts and not done and not config.run.init:
        fit_shortcuts(model, teacher, sft.micro_batch)
    metrics = training.Metrics(folder / "metrics.jsonl", done)
    with training.progress(sft.steps, "SFT", "step", done) as bar:
        for step in range(done, sft.steps):
            chosen = training.batch_at(step, len(traces), sft.batch_size, config.run.seed)
            figures = step_losses(model, teacher, chosen, config, step)
            lr = sft.lr * training.cosine_share(step, sft.steps)
            norm = training.clip_and_step(optimizer, lr)
            metrics.write(step + 1, **figures, grad_norm=norm, lr=lr)
            bar.set_postfix({n: f"{figures[n]:.3f}" for n in ("kl", "mean_depth")}, refresh=False)
            bar.update()
            if training.is_main() and ((step + 1) % sft.save_every == 0 or step + 1 == sft.steps):
                training.save_checkpoint(folder, step + 1, model, optimizer)
    if training.is_main():
        save_adapter(model, folder / "adapter")
    training.barrier()
