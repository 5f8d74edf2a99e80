"""Keys and values of earlier tokens, preallocated; and the debts that early exits leave.

Contract. Row i of the batch keeps the key of its token at position p in slot p of row i: positions are explicit, rows may
have any lengths. `write` stores what one block made for this call's tokens and returns everything that can be attended to.

Debts. When no token of a call runs on, the block loop ends, and the later blocks are owed that call's keys and values. They
are made from the frozen residuals only when some later token reaches such a block, many tokens in one product. A run of
shallow tokens therefore never touches the deep blocks at all.
"""

import torch
from torch import Tensor

from nanoexit.model import Places, Shape


class Cache:
    """k and v: [L, B, K, capacity, head_dim]."""

    def __init__(self, shape: Shape, rows: int, capacity: int, device: torch.device, dtype: torch.dtype):
        size = (shape.blocks, rows, shape.kv_heads, capacity, shape.head_dim)
        self.k = torch.zeros(size, device=device, dtype=dtype)
        self.v = torch.zeros(size, device=device, dtype=dtype)
        self.span = 0  # positions 0..span-1 may hold something, in any row
        self.start: int | None = 0  # where this call's tokens begin, when that is the same in every row
        self.debts: list[tuple[int, Tensor, Places]] = []  # (blocks that ran, residuals [B, T, D], where they stand)
        self.paid = [0] * shape.blocks  # how many debts each block has settled

    def place(self, start: int | None, span: int) -> None:
        """Announce the next call: its tokens lie below `span`, beginning at `start` in every row (None: they differ)."""
        self.start, self.span = start, span

    def write(self, layer: int, block, places: Places, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, K, T, head_dim] of this call in one block -> all of that block, [B, K, span, head_dim]."""
        self.settle(layer, block)
        if self.start is None:
            self._put(layer, places.positions, k, v)
        else:
            end = self.start + k.shape[2]
            self.k[layer, :, :, self.start : end] = k
            self.v[layer, :, :, self.start : end] = v
        return self.k[layer, :, :, : self.span], self.v[layer, :, :, : self.span]

    def owe(self, layer: int, h: Tensor, places: Places) -> None:
        """Remember residuals h [B, T, D] that stopped before block `layer`."""
        self.debts.append((layer, h, places))

    def settle(self, layer: int, block) -> None:
        """Make the keys and values that are owed to one block, all in one product."""
        due = [debt for debt in self.debts[self.paid[layer] :] if debt[0] <= layer]
        self.paid[layer] = len(self.debts)
        if not due:
            return
        h, cos, sin, positions = (torch.cat(parts, dim=1) for parts in zip(*((h, p.cos, p.sin, p.positions) for _, h, p in due)))
        self._put(layer, positions, *block.keys_values(h, cos, sin))

    def settle_all(self, blocks) -> None:
        """Pay every debt, so that rows can change places."""
        for layer, block in enumerate(blocks):
            self.settle(layer, block)
        self.debts.clear()
        self.paid = [0] * len(self.paid)

    def select(self, rows: Tensor) -> None:
        """Keep these rows only, in this order. Debts must be settled."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]

    def admit(self, rows: Tensor, other: "Cache") -> None:
        """Put the rows of another cache in place of these. Debts of both must be settled."""
        self.k[:, rows, :, : other.span] = other.k[:, :, :, : other.span]
        self.v[:, rows, :, : other.span] = other.v[:, :, :, : other.span]

    def _put(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> None:
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.k[layer].transpose(1, 2)[rows, positions] = k.transpose(1, 2)  # [B, T, K, head_dim]
        self.v[layer].transpose(1, 2)[rows, positions] = v.transpose(1, 2)
