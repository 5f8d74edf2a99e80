"""Weights laid out for decoding: the same products for a handful of rows, from a second copy of the weights.

Decoding reads every weight once a token, so what counts is how fast one matrix meets a few rows. `F.linear` as stored reaches
about half of what a CPU's memory gives. Measured (scripts/bench.py decode), the best of PyTorch's own:
    float32, one row     [in, out] and x @ W for maps that widen; those that narrow stay as they are stored
    otherwise on a CPU   oneDNN's blocked layout: a private operator of PyTorch's, so used only where it is there
    elsewhere            as stored, maps of one input joined
Without a copy (`generation.pack: never`) maps stay apart and as stored.
"""

import math
import weakref
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoexit.model import Transformer

Product = Callable[[Tensor], Tensor]  # [n, in] -> [n, out]
AUTO_LIMIT = 2 * 2**30  # bytes: on a CPU, `auto` copies models up to this size


def choose(model: Transformer, rows: int, pack: str) -> str:
    """-> apart, joined, transposed or onednn: the layout for this many rows."""
    device, dtype = model.device.type, model.dtype
    if pack == "never" or (pack == "auto" and device == "cpu" and sum(p.nbytes for p in model.model.parameters()) > AUTO_LIMIT):
        return "apart"
    if device != "cpu":
        return "joined"
    if dtype == torch.float32 and rows == 1:
        return "transposed"
    return "onednn" if _has_onednn(dtype) else "joined"


def _has_onednn(dtype: torch.dtype) -> bool:
    ops = torch.ops.mkldnn
    there = torch.backends.mkldnn.is_available() and hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
    return there and (dtype == torch.float32 or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported()))


def lay_out(layout: str, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Product:
    """Maps [out, in] of one input -> x [n, in] -> their outputs side by side."""
    if layout == "apart" and len(weights) > 1:
        return lambda x: torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases)], -1)
    weight = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
    bias = biases[0] if len(weights) == 1 or biases[0] is None else torch.cat(tuple(biases))
    if layout == "transposed" and weight.shape[0] > weight.shape[1]:
        weight = weight.t().contiguous().t()  # F.linear then multiplies by [in, out]
    if layout == "onednn":
        packed, multiply = torch.ops.mkldnn._reorder_linear_weight(weight), torch.ops.mkldnn._linear_pointwise
        return lambda x: multiply(x, packed, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)


class LaidOut:
    """A model's base maps in one layout: for each block q+k+v, o, gate+up, down; and the readout."""

    def __init__(self, model: Transformer, layout: str):
        self.layout, self.seen = layout, _fingerprint(model)
        self.blocks: list[list[Product]] = []
        for block in model.model["layers"]:
            a, m = block.self_attn, block.mlp
            groups = ((a.q_proj, a.k_proj, a.v_proj), (a.o_proj,), (m.gate_proj, m.up_proj), (m.down_proj,))
            self.blocks.append([lay_out(layout, [g.weight.detach() for g in maps], [g.bias for g in maps]) for maps in groups])
        self.readout = lay_out(layout, [model.readout_weight.detach()], [None])
        self._parts: dict[int, tuple[Product, Product]] = {}

    def q_and_kv(self, model: Transformer, layer: int) -> tuple[Product, Product]:
        """q, and k+v, of one block: two products, where some tokens leave keys and values and ask nothing."""
        if layer not in self._parts:
            a = model.model["layers"][layer].self_attn
            groups = (a.q_proj,), (a.k_proj, a.v_proj)
            self._parts[layer] = tuple(lay_out(self.layout, [m.weight.detach() for m in maps], [m.bias for m in maps]) for maps in groups)
        return self._parts[layer]

    def holds(self, model: Transformer, layout: str) -> bool:
        """Whether this is still a copy of these weights."""
        now = _fingerprint(model)
        return layout == self.layout and all(a.data_ptr() == b.data_ptr() and m == n for (a, m), (b, n) in zip(self.seen, now))


def _fingerprint(model: Transformer) -> list[tuple[Tensor, float]]:
    """Each weight, held so that its memory is not given to another, and how often it was written to: nan, so never the same, where
    that is not counted (weights made under inference_mode)."""
    return [(p.detach(), math.nan if p.is_inference() else p._version) for n, p in model.named_parameters() if ".adapter." not in n and not n.startswith("exits.")]


_kept: weakref.WeakKeyDictionary[Transformer, LaidOut] = weakref.WeakKeyDictionary()


def laid_out(model: Transformer, rows: int, pack: str = "auto") -> LaidOut:
    """The model's maps for this many rows. A copy on the CPU is kept until the weights change: making it takes as long as some tokens."""
    layout = choose(model, rows, pack)
    kept = _kept.get(model)
    if kept is None or not kept.holds(model, layout):
        kept = LaidOut(model, layout)
        if model.device.type == "cpu":
            _kept[model] = kept
    return kept
