"""Keys and values of earlier tokens, preallocated; and the debts that early exits leave.

Contract. Row i of the batch keeps the key of its token at position p in slot p of row i: positions are explicit, rows may
have any lengths. `write` stores what one block made for this call's tokens and returns everything that can be attended to.

Debts. A token that exits owes its later blocks their keys and values. While another row of the batch runs on, they are made
beside it. Once nobody does, the frozen residual waits here until a later token goes that deep, and many tokens are paid for in
one product: for all later blocks at once (`settle`), or block by block, beside the token that is there (`due`, `paid`).
A run of shallow tokens therefore never touches the deep blocks at all.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanoexit.model import Places, Shape

Fill = Callable[[int, Tensor, Tensor], Tensor]  # Transformer.keys_values_above


class Debt(NamedTuple):
    """Tokens that owe keys and values: frozen residuals h [n, D], their rows [n], their positions [n]."""

    h: Tensor
    rows: Tensor
    positions: Tensor


class Cache:
    """kv: [L, B, 2, K, capacity, head_dim], keys before values; k and v are views of it."""

    def __init__(self, shape: Shape, rows: int, capacity: int, device: torch.device, dtype: torch.dtype):
        self.kv = torch.zeros(shape.blocks, rows, 2, shape.kv_heads, capacity, shape.head_dim, device=device, dtype=dtype)
        self.span = 0  # positions 0..span-1 may hold something, in any row
        self.start: int | None = 0  # where this call's tokens begin, when that is the same in every row
        self.debts: dict[int, list[Debt]] = defaultdict(list)  # by the blocks that have their keys and values

    @property
    def k(self) -> Tensor:
        return self.kv[:, :, 0]

    @property
    def v(self) -> Tensor:
        return self.kv[:, :, 1]

    def place(self, start: int | None, span: int) -> None:
        """Announce the next call: its tokens lie below `span`, beginning at `start` in every row (None: they differ)."""
        self.start, self.span = start, span

    def write(self, layer: int, places: Places, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, K, T, head_dim] of this call in one block -> all of that block, [B, K, span, head_dim]."""
        here = self.kv[layer]
        if self.start is None:
            rows = torch.arange(len(k), device=k.device)[:, None]
            here[rows, :, :, places.positions] = torch.stack((k, v), 1).permute(0, 3, 1, 2, 4)  # [B, T, 2, K, head_dim]
        else:
            end = self.start + k.shape[2]
            here[:, 0, :, self.start : end] = k
            here[:, 1, :, self.start : end] = v
        return here[:, 0, :, : self.span], here[:, 1, :, : self.span]

    def owe(self, depth: int, h: Tensor, rows: Tensor, positions: Tensor) -> None:
        """Remember residuals h [n, D] frozen after `depth` blocks, in these rows, at these positions."""
        self.debts[depth].append(Debt(h, rows, positions))

    def due(self, depth: int) -> Debt | None:
        """What is owed to the blocks after the first `depth`, which are about to run."""
        owed = [debt for d in self.debts if d <= depth for debt in self.debts[d]]
        return _join(owed) if owed else None

    def paid(self, due: Debt, start: int, end: int) -> None:
        """`due(start)` has left its keys and values in blocks start..end-1."""
        self.debts = defaultdict(list, {d: owed for d, owed in self.debts.items() if d > start})
        if end < len(self.kv):
            self.debts[end].append(due)

    def settle(self, blocks: int, fill: Fill) -> None:
        """Pay what tokens that ran through at most `blocks` blocks owe to all others: call it before the next block runs."""
        for depth in [d for d in self.debts if d <= blocks]:
            h, rows, positions = _join(self.debts.pop(depth))
            self.kv[depth:][:, rows, :, :, positions] = fill(depth, h, positions).transpose(0, 1)

    def select(self, rows: Tensor) -> None:
        """Keep these rows only, in this order."""
        self._move({old: new for new, old in enumerate(rows.tolist())})
        self.kv = self.kv[:, rows]

    def admit(self, rows: Tensor, other: "Cache") -> None:
        """Put the rows of another cache in place of these."""
        here = rows.tolist()
        self._move({row: row for row in range(self.kv.shape[1]) if row not in here})
        other._move(dict(enumerate(here)))
        for depth, owed in other.debts.items():
            self.debts[depth] += owed
        self.kv[:, rows, :, :, : other.span] = other.kv[..., : other.span, :]

    def _move(self, places: dict[int, int]) -> None:
        """Debts of row i are row places[i]'s from now on; those of rows that are not there are forgiven. Host sync: one a depth."""
        debts, self.debts = self.debts, defaultdict(list)
        for depth, owed in debts.items():
            h, rows, positions = _join(owed)
            moved = [places.get(row) for row in rows.tolist()]
            stay = [i for i, row in enumerate(moved) if row is not None]
            if stay:
                self.owe(depth, h[stay], torch.tensor([moved[i] for i in stay], device=rows.device), positions[stay])


def _join(debts: Sequence[Debt]) -> Debt:
    return debts[0] if len(debts) == 1 else Debt(*map(torch.cat, zip(*debts)))
