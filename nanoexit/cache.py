"""Keys and values of earlier tokens, preallocated, and the debts that early exits leave.

Contract. Row i of the batch keeps the key of its token at position p in slot p. Positions are
explicit, so rows may have any lengths. `write` stores what one block made for the tokens of this
call and returns all that they can attend to.

Debts. A token that exits at depth d still leaves keys and values in blocks d and later, made from
its frozen residual, beside those of the tokens that run on. Once the last token of a call has
exited, nothing more is computed: the residuals wait here as a debt until a later token runs those
blocks. A run of shallow tokens therefore never touches the deep blocks.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Debt(NamedTuple):
    """Tokens without keys and values in the deeper blocks."""

    h: Tensor  # [n, D] frozen residuals
    rows: Tensor  # [n] rows of the batch
    positions: Tensor  # [n]


class Cache:
    """kv: [L, B, 2, K, capacity, head_dim], keys before values."""

    def __init__(
        self,
        blocks: int,
        rows: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        size = (blocks, rows, 2, kv_heads, capacity, head_dim)
        self.kv = torch.zeros(size, device=device, dtype=dtype)
        self.span = 0  # positions 0..span-1 may be set, in any row
        self.start: int | None = 0  # first position of this call, if it is the same in every row
        self.debts: dict[int, list[Debt]] = defaultdict(list)  # by the first block without them

    def place(self, start: int | None, span: int) -> None:
        """Announce the next call: its tokens begin at `start` in every row (None: they differ)."""
        self.start, self.span = start, span

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, K, T, head_dim] of this call -> the block's, [B, K, span, head_dim]."""
        here = self.kv[layer]
        if self.start is None:
            rows = torch.arange(len(k), device=k.device)[:, None]
            both = torch.stack((k, v), 1).permute(0, 3, 1, 2, 4)  # [B, T, 2, K, head_dim]
            here[rows, :, :, positions] = both
        else:
            end = self.start + k.shape[2]
            here[:, 0, :, self.start : end] = k
            here[:, 1, :, self.start : end] = v
        return here[:, 0, :, : self.span], here[:, 1, :, : self.span]

    # --- debts --------------------------------------------------------------------------------

    def owe(self, depth: int, h: Tensor, rows: Tensor, positions: Tensor) -> None:
        """Remember residuals h [n, D], frozen after `depth` blocks, in these rows and positions."""
        if depth < len(self.kv):
            self.debts[depth].append(Debt(h, rows, positions))

    def pay(self, start: int, end: int) -> Debt | None:
        """The debts of block `start`, for which blocks start..end-1 now make keys and values."""
        owed = [
            debt for depth in list(self.debts) if depth <= start for debt in self.debts.pop(depth)
        ]
        if not owed:
            return None
        due = join(owed)
        self.owe(end, *due)
        return due

    def write_due(self, layer: int, due: Debt, k: Tensor, v: Tensor) -> None:
        """Store the keys and values [n, K, 1, head_dim] of `due` in one block."""
        both = torch.cat((k, v), 2).transpose(1, 2)  # [n, 2, K, head_dim]
        self.kv[layer][due.rows, :, :, due.positions] = both

    # --- rows ---------------------------------------------------------------------------------

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be repeated only while there are no debts."""
        places = torch.full((self.kv.shape[1],), -1, device=rows.device)
        places[rows] = torch.arange(len(rows), device=rows.device)
        self._move(places)
        self.kv = self.kv[:, rows]

    def admit(self, rows: Tensor, other: "Cache") -> None:
        """Put the rows of another cache, which has no debts, in the place of these rows."""
        places = torch.arange(self.kv.shape[1], device=rows.device)
        places[rows] = -1
        self._move(places)
        self.kv[:, rows, :, :, : other.span] = other.kv[..., : other.span, :]

    def _move(self, places: Tensor) -> None:
        """Debts of row i become debts of row places[i]; at -1 they are dropped."""
        debts, self.debts = self.debts, defaultdict(list)
        for depth, owed in debts.items():
            h, rows, positions = join(owed)
            stay = places[rows] >= 0
            if stay.any():  # host sync: one a depth
                self.owe(depth, h[stay], places[rows[stay]], positions[stay])


def join(debts: Sequence[Debt]) -> Debt:
    """Several debts as one."""
    return debts[0] if len(debts) == 1 else Debt(*map(torch.cat, zip(*debts)))
