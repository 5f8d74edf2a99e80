"""Keys and values of earlier tokens, preallocated; and the debts that early exits leave.

Contract. Row i of the batch keeps the key of its token at position p in slot p of row i: positions are explicit, rows may
have any lengths. `write` stores what one block made for this call's tokens and returns everything that can be attended to.

Debts. A token that exits owes its later blocks their keys and values. They are made from the frozen residual only when
some later token reaches such a block: then for all later blocks at once, and for all tokens that exited at the same depth
in one product. A run of shallow tokens therefore never touches the deep blocks at all.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nanoexit.model import Places, Shape

Fill = Callable[[int, Tensor, Tensor], Tensor]  # Transformer.keys_values_above, or a faster way to the same


class Cache:
    """kv: [L, B, 2, K, capacity, head_dim], keys before values; k and v are views of it."""

    def __init__(self, shape: Shape, rows: int, capacity: int, device: torch.device, dtype: torch.dtype):
        self.kv = torch.zeros(shape.blocks, rows, 2, shape.kv_heads, capacity, shape.head_dim, device=device, dtype=dtype)
        self.span = 0  # positions 0..span-1 may hold something, in any row
        self.start: int | None = 0  # where this call's tokens begin, when that is the same in every row
        self.debts: list[tuple[int, Tensor, Tensor, Tensor]] = []  # blocks that ran, residuals [n, D], rows [n], positions [n]

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
        self.debts.append((depth, h, rows, positions))

    def settle(self, blocks: int, fill: Fill) -> None:
        """Pay what tokens that ran through at most `blocks` blocks owe: call it before the next block runs."""
        due = [debt for debt in self.debts if debt[0] <= blocks]
        if not due:
            return
        self.debts = [debt for debt in self.debts if debt[0] > blocks]
        for depth in {debt[0] for debt in due}:
            h, rows, positions = (torch.cat(parts) for parts in zip(*(debt[1:] for debt in due if debt[0] == depth)))
            self.kv[depth:][:, rows, :, :, positions] = fill(depth, h, positions).transpose(0, 1)

    def select(self, rows: Tensor) -> None:
        """Keep these rows only, in this order. Debts must be settled."""
        self.kv = self.kv[:, rows]

    def admit(self, rows: Tensor, other: "Cache") -> None:
        """Put the rows of another cache in place of these. Debts of both must be settled."""
        self.kv[:, rows, :, :, : other.span] = other.kv[..., : other.span, :]
