"""Scoring: what `generate` sampled, one forward re-scores, with gradients.

Contract. Tokens and depths in; out come, for every input position, the residual that is read out, the log-odds of every exit
head on its way, and the log-probability of exiting where it did. Teacher, student and REINFORCE all read from here, so
generation and training cannot come to mean different things.

Alignment. Position t of the input predicts token t + 1. To re-score a generation feed ids = prompt + tokens[:-1] with depths
prompt_depths + depths[1:]; row len(prompt) - 1 + i is the distribution that tokens[i] was drawn from.

Memory. Logits are large (V may be 152,000), so losses never hold all of them: `through_readout` takes a chunk of
residuals through the final norm and lm_head, applies a function to the logits of each row, and keeps only its value and its
gradient with respect to the residuals. Rows do not mix, so this is exact, and each chunk's logits are made once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoexit.exits import path_logprob
from nanoexit.model import Transformer


@dataclass
class Score:
    """B rows, T input positions. Nothing on padding (depth 0) means anything but that it is 0 in exit_logprobs."""

    model: Transformer
    hidden: Tensor  # [B, T, D] residual that each position is read out from
    depths: Tensor  # [B, T]
    head_logits: Tensor | None  # [B, T, E] float32 log-odds of each head that was asked, 0 elsewhere; None without heads
    exit_logprobs: Tensor  # [B, T] float32 log p(exit at that depth); 0 on the prompt and padding, and without heads

    @property
    def logits(self) -> Tensor:
        """[B, T, V]. For tests and short texts; losses use `through_readout`."""
        return self.model.readout(self.hidden)


class Prescribed:
    """The `stop` of model.run that obeys given depths [B, T], and asks the heads on the way."""

    def __init__(self, model: Transformer, depths: Tensor):
        self.heads, self.flat = model.exits, depths.reshape(-1)
        self.head_logits: list[Tensor] = []  # one [B * T] a head, in order of depth
        used = set(depths.unique().tolist()) - {0, model.full_depth}
        self.layers = used | set(self.heads.layers if self.heads is not None else ())

    def __call__(self, depth: int, h: Tensor, index: Tensor | None) -> Tensor:
        if self.heads is not None and depth in self.heads.layers:
            z = self.heads(depth, h)
            self.head_logits.append(z if index is None else z.new_zeros(len(self.flat)).index_copy(0, index, z))
        return (self.flat if index is None else self.flat[index]) == depth


def score(model: Transformer, ids: Tensor, depths: Tensor, prompt_lens: Sequence[int] | Tensor, freeze: bool = True,
          prompt_exits: bool = False) -> Score:
    """ids [B, T] right-padded, depths [B, T] of the input positions (0 on padding), prompt_lens [B].

    prompt_exits: the prompt sampled its exits too, so they count in exit_logprobs.
    """
    stop = Prescribed(model, depths)
    padded = bool((depths == 0).any())
    run = model.run(ids, stop=stop, alive=depths > 0 if padded else None, freeze=freeze)
    if model.exits is None:
        return Score(model, run.hidden, depths, None, torch.zeros(ids.shape, device=ids.device))
    missing = len(model.exits.layers) - len(stop.head_logits)  # heads that nobody reached
    columns = stop.head_logits + [torch.zeros(ids.numel(), device=ids.device)] * missing
    z = torch.stack(columns, -1).unflatten(0, ids.shape)  # [B, T, E]
    logp = path_logprob(z, depths, model.exits.layers, model.full_depth)
    counted = depths > 0
    if not prompt_exits:
        starts = torch.as_tensor(prompt_lens, device=ids.device)[:, None]
        counted = counted & (torch.arange(ids.shape[1], device=ids.device) >= starts)
    return Score(model, run.hidden, depths, z, logp.where(counted, 0.0))


def pad(rows: Sequence[Sequence[int]], device: torch.device, value: int = 0) -> Tensor:
    """Rows of ints -> [B, longest] int64, right-padded."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *([value] * (width - len(row)))] for row in rows], device=device)


# --- through the readout, a chunk at a time ---------------------------------------------------------------------------


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, function, chunk):
        outputs, slopes = [], []
        for start in range(0, len(h), chunk):
            rows = slice(start, start + chunk)
            with torch.set_grad_enabled(h.requires_grad):
                piece = h[rows].detach().requires_grad_(h.requires_grad)
                value = function(piece, rows)
                if h.requires_grad:
                    slopes.append(torch.autograd.grad(value.sum(), piece)[0])
            outputs.append(value.detach())
        ctx.save_for_backward(torch.cat(slopes) if slopes else None)
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx, grad):
        (slopes,) = ctx.saved_tensors
        return grad[:, None].to(slopes.dtype) * slopes, None, None


def through_readout(h: Tensor, function: Callable[[Tensor, slice], Tensor], chunk: int) -> Tensor:
    """h [n, D] -> [n] float32. function(h[rows], rows) -> one value a row, each depending on its own row of h only.

    The gradient reaches h and nothing else: lm_head and the final norm are frozen.
    """
    return _Chunked.apply(h, function, chunk) if len(h) else h.new_zeros(0, dtype=torch.float32)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(P || Q) in nats, [...], from logits [..., V] of any float dtype, in float32."""
    p, q = F.log_softmax(p.float(), -1), F.log_softmax(q.float(), -1)
    return (p.exp() * (p - q)).sum(-1)


def readout_kl(model: Transformer, student: Tensor, teacher: Tensor, chunk: int, direction: str = "student_teacher") -> Tensor:
    """Residuals [n, D] of both -> KL(student || teacher) [n] in nats, or the other direction."""

    def kl(h: Tensor, rows: slice) -> Tensor:
        ours, theirs = model.readout(h), model.readout(teacher[rows])
        return divergence(ours, theirs) if direction == "student_teacher" else divergence(theirs, ours)

    return through_readout(student, kl, chunk)


def readout_logprobs(model: Transformer, h: Tensor, tokens: Tensor, chunk: int) -> Tensor:
    """Residuals [n, D] and the tokens [n] drawn from them -> log p(token) [n]."""
    return through_readout(h, lambda piece, rows: token_logprob(model.readout(piece), tokens[rows]), chunk)


def token_logprob(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logits [n, V], tokens [n] -> log p(token) [n] float32, of the model's own distribution (temperature 1)."""
    logits = logits.float()
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)
