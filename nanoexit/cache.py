"""Keys and values of earlier tokens, preallocated.

Contract. Row i of the batch keeps the key of its token at position p in slot p. Positions are
explicit, so rows may differ in length. `write` stores one block's keys and values for the tokens of
this call, and returns everything that they can attend to. A token that exits leaves its keys and
values in the later blocks too, within the same call or, in fast.py, before they are read."""

import torch
from torch import Tensor


class Cache:
    """kv: [L, B, 2, K, capacity, head_dim], keys before values, zero at first. Set before a call:
    `span`, the first positions that it can attend to; `aligned`: it begins at one position."""

    def __init__(self, kv: Tensor):
        self.kv, self.span, self.aligned = kv, kv.shape[-2], True
        self.names = torch.arange(kv.shape[1], device=kv.device)  # [B]: they move with their rows

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, K, T, head_dim] of this call -> the block's [B, K, span, head_dim]."""
        rows = torch.arange(len(k), device=k.device)[:, None]
        both = torch.stack((k, v), 1).permute(0, 3, 1, 2, 4)  # [B, T, 2, K, head_dim]
        self.kv[layer][rows, :, :, positions] = both
        return self.kv[layer, :, 0, :, : self.span], self.kv[layer, :, 1, :, : self.span]

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        self.kv, self.names = self.kv[:, rows], self.names[rows]

    def admit(self, rows: Tensor, other: "Cache") -> None:
        """Replace these rows with those of another cache."""
        self.kv[:, rows, :, :, : other.span] = other.kv[..., : other.span, :]
        new = self.names.max() + 1 + torch.arange(len(rows), device=rows.device)
        self.names = self.names.index_copy(0, rows, new)
