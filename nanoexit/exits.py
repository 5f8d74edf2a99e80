"""Exit heads, stick-breaking, exit targets, the policies that decide where a token exits, and caps.

Contract. The head of depth d reads the residual after d blocks (model.py defines depth). Heads act
in order of depth: each gives the chance that a token exits there, *given that it got that far*. The
deepest depth D, which is L or the cap, takes the rest:

    log p(exit at d) = logsigmoid(z_d) + sum over earlier heads of logsigmoid(-z),

in float32. With E heads below D there are E + 1 outcomes; heads at D and beyond are not asked.

Decisions. Heads read the residual divided by its RMS, so that one learning rate suits all depths
(residuals grow with depth). Generation, scoring and training all use the same `stop`, `Ask`.

Shortcuts. With `exits.shortcuts`, affine maps stand in for the blocks that an exit skips. One, the
tuned lens, leads to what is read out at once. Another, at each later exit depth, moves the frozen
residual on, for later tokens attend to its keys and values in every block. Opaque serial depth is
what it was: neither attention nor an MLP runs.

Stick-breaking: PonderNet (Banino et al. 2021). `confidence`: CALM (Schuster et al. 2022). Lens:
Belrose et al. 2023; other shortcuts: Din et al. 2023 (Jump to Conclusions)."""

import contextlib
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoexit.config import LoRAConfig, Rule, UserError, check_value, nearest, show
from nanoexit.lora import adapters_off, attach_lora, linear_maps
from nanoexit.model import Transformer, unit

FIRST_BIAS = -2.0  # a fresh head exits with chance sigmoid(-2) = 0.12
POLICIES = ["full", "head", "head:THRESHOLD", "fixed:DEPTH", "kl:STRENGTH", "confidence:THRESHOLD"]


class Shortcut(nn.Linear):
    """An affine map in place of skipped blocks: h -> x + A x + b, x = h / rms(h); at first x."""

    def reset_parameters(self) -> None:
        for p in self.parameters():
            nn.init.zeros_(p)

    def forward(self, h: Tensor) -> Tensor:
        x = unit(h)
        return (x + super().forward(x)).to(h.dtype)


class ExitHeads(nn.Module):
    """For each exit depth, a scalar of x = h / rms(h): w . x + b, or an MLP D -> 2D -> 1. With
    `affine`, a lens of h is read out instead, and a shortcut leads from each depth to the next."""

    def __init__(self, width: int, layers: Sequence[int], kind: str, affine: bool, seed: int = 0):
        super().__init__()
        self.layers, self.kind = tuple(layers), kind
        generator = torch.Generator().manual_seed(seed)
        self.heads = nn.ModuleDict({str(d): _head(width, kind, generator) for d in layers})
        ends = (layers, layers[1:]) if affine else ((), ())
        self.lenses, self.shortcuts = (
            nn.ModuleDict({str(d): Shortcut(width, width) for d in depths}) for depths in ends
        )

    def forward(self, depth: int, h: Tensor) -> Tensor:
        """Residuals h [n, D] after `depth` blocks -> float32 log-odds [n] of exiting there."""
        return self.heads[str(depth)](unit(h)).squeeze(-1)


def _head(width: int, kind: str, generator: torch.Generator) -> nn.Module:
    last = nn.Linear(width if kind == "linear" else 2 * width, 1)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, FIRST_BIAS)
    if kind == "linear":
        return last
    first = nn.Linear(width, 2 * width)
    nn.init.normal_(first.weight, std=width**-0.5, generator=generator)
    nn.init.zeros_(first.bias)
    return nn.Sequential(first, nn.SiLU(), last)


def attach(
    model: Transformer,
    exit_layers: Sequence[int],
    head: str = "linear",
    shortcuts: bool = False,
    lora: LoRAConfig | None = None,
    cap: int | None = None,
    seed: int = 0,
) -> None:
    """Attach exit heads at these depths ([]: none), adapters if `lora` is given, and a cap; freeze
    the base. UserError for a depth that repeats or is outside 1..L-1, and a cap outside 1..L."""
    L, layers = model.full_depth, list(exit_layers)
    if sorted({*layers} & {*range(1, L)}) != sorted(layers):
        expected = f"expected different depths from 1 to {L - 1}"
        raise UserError(f"exits.layers: {expected}, found {layers}")
    check_cap(model, cap)
    detach(model)
    model.requires_grad_(False)
    model.cap = cap
    if layers:
        heads = ExitHeads(model.shape.width, sorted(layers), head, shortcuts, seed)
        model.exits = heads.to(model.device).train(model.training)
    if lora is not None:
        attach_lora(model, lora, seed)


def detach(model: Transformer) -> None:
    """Remove heads, adapters and cap: the base model again, bit for bit."""
    model.exits = model.cap = None
    for _, linear in linear_maps(model):
        linear.adapter = None


def check_cap(model: Transformer, cap: int | None, key: str = "exits.cap") -> None:
    """Raise UserError for a cap outside 1..L."""
    if cap is not None and not 1 <= cap <= model.full_depth:
        raise UserError(f"{key}: expected a depth from 1 to {model.full_depth}, found {show(cap)}")


@contextlib.contextmanager
def capped(model: Transformer, cap: int | None) -> Iterator[None]:
    """Inside the `with`, the model has this cap instead of its own; None removes it."""
    check_cap(model, cap)
    before, model.cap = model.cap, cap
    try:
        yield
    finally:
        model.cap = before


@contextlib.contextmanager
def as_base(model: Transformer) -> Iterator[None]:
    """Inside the `with`, the model is its base, the teacher: adapters off, no cap."""
    with adapters_off(model), capped(model, None):
        yield


def exit_depths(model: Transformer) -> tuple[int, ...]:
    """Depths of the active heads, in order: those below the cap."""
    layers = () if model.exits is None else model.exits.layers
    return tuple(depth for depth in layers if depth < model.deepest)


def path_logprob(z: Tensor, depths: Tensor, layers: Sequence[int], deepest: int) -> Tensor:
    """log p(exit at depths) [...] under log-odds z [..., E]; entries beyond the exit are not read.
    It is -inf for a depth without a head, other than `deepest`: no sample can exit there."""
    at, d = torch.tensor(layers, device=z.device), depths[..., None]
    terms = torch.where(at == d, F.logsigmoid(z), torch.where(at < d, F.logsigmoid(-z), 0.0))
    possible = (at == d).any(-1) | (depths == deepest)
    return terms.sum(-1).masked_fill(~possible, -torch.inf)


def delay_kl(z: Tensor, before: Tensor) -> Tensor:
    """KL(now || before) of chances to exit, nats [...], from log-odds [...]; 0 where z grew."""
    return (z < before) * (z.sigmoid() * (z - before) + F.softplus(before) - F.softplus(z))


def target_chance(kl: Tensor, strength: float) -> Tensor:
    """KL(P || Q_d) in nats -> the chance 2 (1 - sigmoid(s KL)) to exit where d is reached."""
    return 2 * torch.sigmoid(-strength * kl)


class Asked(NamedTuple):
    """n tokens that have reached a depth where they may exit."""

    model: Transformer
    depth: int
    at: Tensor  # [n] their indices into B*T
    h: Tensor  # [n, D] residuals
    z: Any  # [n] log-odds of the head at this depth; None without one
    u: Tensor  # [n] uniform noise


class Policy:
    """Decides which tokens exit: see parse_policy. A subclass overrides `exits`, maybe `layers`."""

    def __init__(self, name: str = "full", value: Any = None, chance: Any = None):
        self.name, self.value, self.chance = name, value, chance  # for kl: Asked -> chances [n]

    def layers(self, model: Transformer) -> tuple[int, ...]:
        """The depths at which this policy decides."""
        if self.name == "full":
            return ()
        if self.name == "fixed":
            return (int(self.value),) if self.value < model.deepest else ()
        heads = exit_depths(model)
        return heads if self.name == "head" or heads else tuple(range(1, model.deepest))

    def exits(self, asked: Asked) -> Tensor:
        """Which of the tokens exit, [n] bool."""
        if self.name == "fixed":
            return torch.ones_like(asked.at, dtype=torch.bool)
        if self.name == "confidence":
            h = asked.model.lensed(asked.h, asked.depth)
            return asked.model.readout(h).float().softmax(-1).amax(-1) >= self.value
        if self.chance:
            return asked.u < self.chance(asked)
        p = torch.sigmoid(asked.z)
        return asked.u < p if self.value is None else p > self.value


class Prescribed(Policy):
    """Every token exits at its given depth, with or without a head there."""

    def __init__(self, depths: Tensor):
        super().__init__("prescribed")
        self.depths = depths.reshape(-1)  # [N], one for each token of the call

    def layers(self, model: Transformer) -> tuple[int, ...]:
        used = self.depths.unique().tolist()  # host sync
        return tuple(depth for depth in used if 0 < depth < model.deepest)

    def exits(self, asked: Asked) -> Tensor:
        return self.depths[asked.at] == asked.depth


def parse_policy(text: str, model: Transformer | None = None, where: str = "") -> Policy:
    """Text -> Policy. Raises UserError, prefixed by `where`; without a model it checks syntax only.
    full           no token exits
    head           sample the heads; head:0.5 exits where the chance exceeds 0.5
    fixed:3        every token is forced to exit at depth 3, with or without a head there
    kl:2           the target rule with s = 2, as an oracle: run each token to the end first
    confidence:0.9 exit if the early readout gives its likeliest token this probability

    kl and confidence act at the exit depths of the model, or after every block if it has no heads.
    """
    name, colon, argument = text.partition(":")
    if name == "head" and model is not None and model.exits is None:
        raise UserError(f"policy {text!r}: the model has no exit heads; load an adapter with heads")
    if text in ("full", "head"):
        return Policy(text)
    share, L = Rule(float, 0, 1), math.inf if model is None else model.full_depth
    rules = {"head": share, "confidence": share, "kl": Rule(float), "fixed": Rule(int, 1, L)}
    if name not in rules or not colon:
        close = nearest(text, POLICIES)
        raise UserError(f"{where}policy {show(text)} is not one of {', '.join(POLICIES)}{close}")
    value: Any = argument
    with contextlib.suppress(ValueError):
        value = rules[name].hint(argument)
    check_value(value, rules[name], f"{where}policy {show(text)}, after the colon")
    return Policy(name, value)


class Ask:
    """Asks the heads, lets the policy decide, and records the log-odds of every head asked."""

    def __init__(self, model: Transformer, policy: Policy, tokens: int, noise: Any = None):
        """tokens: N = B*T of the call. noise: [N, depths of the policy], uniform in [0, 1)."""
        self.model, self.policy, self.noise = model, policy, noise
        self.decides = {depth: column for column, depth in enumerate(policy.layers(model))}
        self.heads = exit_depths(model)
        self.layers = {*self.decides, *self.heads}
        self.head_logits = torch.zeros(tokens, len(self.heads), device=model.device)  # 0: not asked

    def __call__(self, depth: int, h: Tensor, index: Tensor | None) -> Tensor | None:
        at = torch.arange(len(h), device=h.device) if index is None else index
        z = None
        if depth in self.heads:
            z = self.model.exits(depth, h)
            self.head_logits[at, self.heads.index(depth)] = z
        if depth not in self.decides:
            return None
        u = h.new_zeros(len(at)) if self.noise is None else self.noise[at, self.decides[depth]]
        return self.policy.exits(Asked(self.model, depth, at, h, z, u))

    def logprobs(self, depths: Tensor) -> Tensor:
        """depths [N] -> log p(exit there) [N] float32; 0 without heads."""
        if not self.heads:
            return torch.zeros(len(depths), device=depths.device)
        return path_logprob(self.head_logits, depths, self.heads, self.model.deepest)


class Watch:
    """Stops no token and keeps the residuals [n, D] at each of its depths."""

    def __init__(self, layers: Collection[int]):
        self.layers = layers
        self.seen: dict[int, Tensor] = {}

    def __call__(self, depth: int, h: Tensor, index: Tensor | None) -> None:
        self.seen[depth] = h
