"""Exit heads, stick-breaking, the teacher's targets, and the policies that decide where a token exits.

Contract. The head of depth d reads the residual after d blocks (model.py defines depth). Heads act in order of depth, each
with the chance that the token exits there *given that it came so far*; full depth takes what is left:
    log p(exit at d) = logsigmoid(z_d) + sum over earlier heads of logsigmoid(-z).
All of it in log space and float32. With E heads there are E + 1 outcomes.

Decisions. Heads read the residual divided by its RMS, so that one learning rate serves all depths (residuals grow with
depth). A policy sees one exit depth at a time and answers for the tokens that are still running; the model obeys.

Sources: stick-breaking as in PonderNet (Banino et al. 2021); `confidence` is CALM's rule (Schuster et al. 2022).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoexit.config import LoRAConfig
from nanoexit.errors import UserError, nearest
from nanoexit.lora import attach_lora, detach_lora
from nanoexit.model import Transformer

FIRST_BIAS = -2.0  # a fresh head exits with chance sigmoid(-2) = 0.12
POLICIES = ["full", "head", "head:THRESHOLD", "head-floor:P", "fixed:D", "kl:S", "confidence:T"]


class ExitHeads(nn.Module):
    """One scalar readout for each exit depth. `linear`: w . x + b; `mlp`: D -> 2D -> 1 with SiLU; x is h / rms(h)."""

    def __init__(self, width: int, layers: Sequence[int], kind: str = "linear", seed: int = 0):
        super().__init__()
        self.layers, self.kind = tuple(layers), kind
        generator = torch.Generator().manual_seed(seed)
        self.heads = nn.ModuleDict({str(depth): _head(width, kind, generator) for depth in layers})

    def forward(self, depth: int, h: Tensor) -> Tensor:
        """h [n, D], residuals after `depth` blocks -> z [n] float32, the log-odds of exiting there."""
        x = F.rms_norm(h.float(), h.shape[-1:])
        return self.heads[str(depth)](x).squeeze(-1)


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


def attach(model: Transformer, exit_layers: Sequence[int], head: str = "linear", lora: LoRAConfig | None = None, seed: int = 0) -> None:
    """Give a model exit heads at these depths (none: no exits), and adapters where `lora` is given. The base's weights stay untouched.

    Raises UserError for a depth outside 1..L-1, a repeated depth, or an unknown kind of head.
    """
    bad = [d for d in exit_layers if not 1 <= d < model.full_depth]
    if bad:
        raise UserError(f"exits.layers: {bad[0]} is not an exit depth of this model: it has {model.full_depth} blocks, "
                        f"so exits lie from 1 to {model.full_depth - 1}")
    if len(set(exit_layers)) < len(exit_layers):
        raise UserError(f"exits.layers: expected different depths, found {list(exit_layers)}")
    if head not in ("linear", "mlp"):
        raise UserError(f"exits.head: {head!r} is not one of linear, mlp")
    detach(model)
    model.requires_grad_(False)
    model.exits = ExitHeads(model.shape.width, sorted(exit_layers), head, seed).to(model.device) if exit_layers else None
    if lora is not None:
        attach_lora(model, lora, seed)


def detach(model: Transformer) -> None:
    """Take heads and adapters off: the base model again, bit for bit."""
    model.exits = None
    detach_lora(model)


# --- the mathematics -------------------------------------------------------------------------------------------------


def stick_breaking(z: Tensor) -> Tensor:
    """Log-odds z [..., E] -> log p [..., E + 1] of exiting at each head, then of full depth; exp of it sums to 1."""
    stay = F.logsigmoid(-z).cumsum(-1)
    before = F.pad(stay, (1, 0))  # log of the chance that each head, and then full depth, is reached
    return before + F.pad(F.logsigmoid(z), (0, 1))


def path_logprob(z: Tensor, depths: Tensor, layers: Sequence[int], full_depth: int) -> Tensor:
    """log p(exit at depths) [...] under log-odds z [..., E]; entries of z beyond the exit are not read.

    A depth with no head, and not full depth, could not have been sampled: -inf.
    """
    at = torch.tensor(layers, device=z.device)
    d = depths[..., None]
    terms = torch.where(at == d, F.logsigmoid(z), torch.where(at < d, F.logsigmoid(-z), 0.0))
    possible = (at == d).any(-1) | (depths == full_depth)
    return terms.sum(-1).masked_fill(~possible, -torch.inf)


def teacher_chance(kl: Tensor, strength: float) -> Tensor:
    """KL(P || Q_d) in nats, any shape -> the target chance to exit at d given that d is reached: 2 (1 - sigmoid(s kl))."""
    return 2 * torch.sigmoid(-strength * kl)


def sample_depths(chance: Tensor, u: Tensor, layers: Sequence[int], full_depth: int) -> Tensor:
    """Chances and uniform noise [..., E] -> depths [...]: the first head whose chance exceeds its noise, else full depth."""
    options = torch.tensor([*layers, full_depth], device=chance.device)
    leaves = F.pad(u < chance, (0, 1), value=True)
    return options[leaves.int().argmax(-1)]


# --- policies --------------------------------------------------------------------------------------------------------


@dataclass
class Policy:
    """Never exits (`full`); the others inherit. `layers` are the depths where it wants to be asked."""

    layers: Collection[int] = ()
    foresees = False  # needs chances [B, E] worked out by a run to full depth before each token (kl)

    def exits(self, depth: int, h: Tensor, z: Tensor | None, u: Tensor, chance: Tensor | None) -> Tensor:
        """Residuals h [n, D], head log-odds z [n], noise u [n], foreseen chances [n] -> who exits at `depth`, [n] bool."""
        return torch.zeros_like(u, dtype=torch.bool)


@dataclass
class Head(Policy):
    """Sample the heads. `threshold` makes it deterministic; `floor` raises every chance to at least that (the original's
    0.1 floor: no likelihood knows it, so REINFORCE refuses it)."""

    threshold: float | None = None
    floor: float = 0.0

    def exits(self, depth, h, z, u, chance):
        p = torch.sigmoid(z)
        return p > self.threshold if self.threshold is not None else u < p.clamp(min=self.floor)


@dataclass
class Fixed(Policy):
    """Every token exits at one depth, head or no head there."""

    def exits(self, depth, h, z, u, chance):
        return torch.ones_like(u, dtype=torch.bool)


@dataclass
class KL(Policy):
    """The untrained teacher rule as an oracle: each token is first run to full depth to know what exiting would lose."""

    strength: float = 1.0
    foresees = True

    def exits(self, depth, h, z, u, chance):
        return u < chance


@dataclass
class Confidence(Policy):
    """Exit where the early readout gives its best token at least this probability."""

    threshold: float = 0.9
    readout: Transformer | None = None

    def exits(self, depth, h, z, u, chance):
        return self.readout.readout(h).float().softmax(-1).amax(-1) >= self.threshold


def parse_policy(text: str | Policy, model: Transformer) -> Policy:
    """`full`, `head`, `head:0.5`, `head-floor:0.1`, `fixed:3`, `kl:2`, `confidence:0.9` -> a Policy for this model.

    kl and confidence are asked at the model's exit depths, or after every block where it has none.
    """
    if isinstance(text, Policy):
        return text
    name, _, argument = text.partition(":")
    layers = tuple(range(1, model.full_depth)) if model.exits is None else model.exits.layers
    if name in ("head", "head-floor") and model.exits is None:
        raise UserError(f"policy {text!r}: this model has no exit heads; load an adapter with heads, or use full, fixed:D, kl:S, confidence:T")
    if name == "full" and not argument:
        return Policy()
    if name == "head":
        return Head(layers, threshold=_number(text, argument, 0, 1) if argument else None)
    if name == "head-floor":
        return Head(layers, floor=_number(text, argument, 0, 1))
    if name == "fixed":
        depth = _number(text, argument, 1, model.full_depth)
        if depth != int(depth):
            raise UserError(f"policy {text!r}: a depth is a whole number from 1 to {model.full_depth}")
        return Fixed((int(depth),))
    if name == "kl":
        return KL(layers, _number(text, argument, 0, float("inf")))
    if name == "confidence":
        return Confidence(layers, _number(text, argument, 0, 1), model)
    raise UserError(f"policy {text!r} is not one of {', '.join(POLICIES)}{nearest(text, POLICIES)}")


def _number(text: str, argument: str, low: float, high: float) -> float:
    try:
        value = float(argument)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise UserError(f"policy {text!r}: expected a number from {low} to {high} after the colon, found {argument!r}")
    return value
