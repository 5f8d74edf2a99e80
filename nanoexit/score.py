"""Scoring: one forward re-scores what `generate` sampled, with gradients.

Alignment, defined once. `depths[i]` is the depth of the readout that produced `tokens[i]`. To
re-score a response, feed ids = prompt + tokens[:-1], with depths [L] * (len(prompt) - 1) + depths.
Position len(prompt) - 1 + i of the result gives the distribution that tokens[i] was drawn from, and
`exit_logprobs` there belongs to its exit. `align` makes these tensors for a batch; teacher, SFT,
REINFORCE and evaluation all use it.

Memory. Logits are large (V may be 152,000), so losses never hold all of them. `through_readout`
reads out a chunk of residuals at a time, and keeps only one value per row and its gradient with
respect to the residual. Rows do not mix, so this is exact."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoexit.exits import Ask, Policy, Prescribed
from nanoexit.model import Transformer

Rows = Sequence[Sequence[int]]


@dataclass
class Aligned:
    """Responses as input for re-scoring: B rows, T positions, right-padded."""

    ids: Tensor  # [B, T]
    depths: Tensor  # [B, T] int64; 0 on padding
    prompt_lens: list[int]
    counts: list[int]  # tokens of each response
    at: Tensor  # [n] indices of the readouts into B*T, response after response
    tokens: Tensor  # [n] the token that each readout produced
    positions: Tensor | None = None  # [B, T]; None: 0..T-1
    sees: Tensor | None = None  # [B, T, T] bool: what a token may look at; None: all before it

    @property
    def rows(self) -> Tensor:
        """[n] the response of each readout."""
        counts = torch.tensor(self.counts, device=self.at.device)
        return torch.arange(len(counts), device=self.at.device).repeat_interleave(counts)


def align(
    model: Transformer, prompts: Rows, responses: Rows, depths: Rows = (), together: int = 1
) -> Aligned:
    """Token ids of prompts and responses, a depth for each response token; (): full depth.
    together: how many adjacent responses to one prompt share a row. The row holds the prompt once,
    except for its last token, which each response repeats as its first readout."""
    device, full_depth = model.device, model.full_depth
    counts = [*map(len, responses)]
    chosen = depths or [[full_depth] * n for n in counts]
    starts = []
    rows: list[tuple] = []
    for first in range(0, len(prompts), together):
        *row, last = prompts[first]
        n = len(row)
        depth, place, part = [full_depth] * n, [*range(n)], [1] * n  # part 1 is the prompt
        for i in range(first, first + together):
            starts.append((len(rows), len(row)))
            row += [last, *responses[i][:-1]]
            depth += chosen[i]
            place += range(n, n + counts[i])
            part += [2 + i - first] * counts[i]
        rows.append((row, depth, place, part))
    ids, path, positions, parts = (pad(column, device) for column in zip(*rows))
    at = [torch.arange(n) + row * ids.shape[1] + i for (row, i), n in zip(starts, counts)]
    found = torch.tensor([token for response in responses for token in response], device=device)
    lens = [*map(len, prompts[::together])]
    aligned = Aligned(ids, path, lens, counts, torch.cat(at).to(device), found)
    if together > 1:
        keys, queries = parts[:, None], parts[:, :, None]
        before = positions[:, None] <= positions[:, :, None]
        aligned.sees = before & ((keys == 1) | (keys == queries))
        aligned.positions = positions
    return aligned


def pad(rows: Rows, device: torch.device) -> Tensor:
    """Rows of ints -> [B, longest] int64, zeros on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)


def batches(items: Sequence, size: int) -> list:
    """The items in pieces of `size`; the last piece may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]


@dataclass
class Score:
    """B rows, T input positions. Values on padding (depth 0) are meaningless but finite."""

    model: Transformer
    hidden: Tensor  # [B, T, D] the residual that each position is read out from
    depths: Tensor  # [B, T]
    head_logits: Tensor  # [B, T, E] float32, 0 for heads not asked; E is 0 without heads
    exit_logprobs: Tensor  # [B, T] float32 log p(exit at that depth); 0 where nothing was chosen

    @property
    def logits(self) -> Tensor:
        """[B, T, V]. For tests and short texts; losses use `through_readout`."""
        return self.model.readout(self.hidden)


def score(
    model: Transformer,
    ids: Tensor,
    depths: Tensor,
    prompt_lens: Sequence[int] | Tensor,
    positions: Tensor | None = None,
    sees: Tensor | None = None,
    policy: Policy | None = None,
    noise: Tensor | None = None,
) -> Score:
    """One forward over ids [B, T], right-padded, in which each token exits at its given depth.
    depths [B, T]: of the input positions, 0 on padding; above the cap they count as the cap.
    prompt_lens [B]: no exit is chosen before the last prompt position. positions, sees: as in
    Aligned. policy: decides the exits instead, with this noise; depths then only mark padding."""
    alive = depths > 0
    ask = Ask(model, policy or Prescribed(depths), ids.numel(), noise)
    padding = not bool(alive.all())  # host sync
    run = model.run(ids, positions, None, ask, alive if padding else None, sees)
    z = ask.head_logits.unflatten(0, ids.shape)
    logp = ask.logprobs(run.depths.flatten()).view(ids.shape)
    first = torch.as_tensor(prompt_lens, device=ids.device)[:, None] - 1
    chosen = alive & (torch.arange(ids.shape[1], device=ids.device) >= first)
    return Score(model, run.hidden, run.depths, z, logp.where(chosen, 0.0))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, function, chunk):
        values, slopes = [], []
        for start in range(0, len(h), chunk):
            rows = slice(start, start + chunk)
            piece = h[rows].detach().requires_grad_(h.requires_grad)
            with torch.set_grad_enabled(h.requires_grad):
                value = function(piece, rows)
                if h.requires_grad:
                    slopes += torch.autograd.grad(value.sum(), piece)
            values.append(value.detach())
        ctx.save_for_backward(torch.cat(slopes) if slopes else None)
        return torch.cat(values)

    @staticmethod
    def backward(ctx, grad):
        (slopes,) = ctx.saved_tensors
        return grad[:, None].to(slopes.dtype) * slopes, None, None


def through_readout(h: Tensor, function: Callable[[Tensor, slice], Tensor], chunk: int) -> Tensor:
    """h [n, D] -> [n] float32: function(h[rows], rows), whose values depend on their own row only.
    The gradient reaches only h: lm_head and the final norm are frozen."""
    if not len(h):
        return h.new_zeros(0, dtype=torch.float32)
    return _Chunked.apply(h, function, chunk)


def divergence(p: Tensor, q: Tensor, of: Any = ...) -> Tensor:
    """KL(P || Q) in nats, [...] float32, from logits [..., V] of any dtype. of: each Q's P."""
    p, q = F.log_softmax(p.float(), -1)[of], F.log_softmax(q.float(), -1)
    return (p.exp() * (p - q)).sum(-1)


def readout_kl(model: Transformer, teacher: Tensor, student: Tensor, of: Any = None) -> Tensor:
    """Residuals [n, D] of both -> KL(teacher || student) [n], nats; gradient to the student's.
    of [n]: the teacher's row for each of the student's, ascending; it is read out once (syncs)."""

    def kl(h: Tensor, i: slice) -> Tensor:
        used, at = (i, ...) if of is None else of[i].unique_consecutive(return_inverse=True)
        return divergence(model.readout(teacher[used]), model.readout(h), at)

    return through_readout(student, kl, model.logits_chunk)


def readout_logprobs(model: Transformer, h: Tensor, tokens: Tensor) -> Tensor:
    """Residuals [n, D] and the tokens [n] drawn from them -> log p(token) [n] float32."""
    read, chunk = model.readout, model.logits_chunk
    return through_readout(
        h, lambda x, i: -F.cross_entropy(read(x).float(), tokens[i], reduction="none"), chunk
    )
