"""Optional: a fused `model.run` for one token per row. It computes the same results, faster.

Contract. `FastModel(model, rows)` has `run` and `readout` with the model's own arguments, for
inference with one token per row. Tests check that results equal the model's to rounding error.
generate.py selects it in one line. Build a new one when the adapters or the cap change.

What makes it fast.
1. On a CPU, a second copy of the weights, laid out for a handful of rows. Decoding reads every
   weight once per token, and `F.linear` on weights as stored reaches about half the bandwidth.
2. q, k and v are one product, gate and up another; each group's adapters are two more. One rotation
   turns q, k and v together (values by angle zero), and one copy writes to the cache.
3. Rows that exit keep their places and stay in the joint q, k, v product while any row still runs:
   they need keys and values, and cutting out their queries costs more than it saves. Attention
   output and MLP run only for the other rows. So does attention on a CPU, where that saves reading.
4. Once every row has exited, nothing more is computed. The frozen residuals wait as debts until a
   later token runs the deeper blocks, where they join its q, k, v product.
5. On CUDA, the blocks between two exits are replayed as one graph.

Host syncs: one at each depth where a row may exit, one if some rows are idle, one for new debts."""

import functools
import gc
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoexit.cache import Cache
from nanoexit.lora import LoRA
from nanoexit.model import Block, Linear, Run, Stop, Transformer, rope_frequencies

Product = Callable[[Tensor], Tensor]  # [n, in] -> [n, out]
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]  # see capture_cuda
COPY_LIMIT = 2 * 2**30  # bytes: a larger model is not copied on a CPU
ATTENTION_CALL = 2**14  # cache entries that a CPU reads in about the time of an attention call


def choose_layout(model: Transformer, rows: int, copy_limit: int = COPY_LIMIT) -> str:
    """The fastest of PyTorch's products for this many rows, as measured by scripts/bench.py decode.
    apart: as stored, no copy. joined: maps that share an input as one. transposed (float32, one
    row): [in, out] for maps that widen. onednn: blocked, by a private operator, if present."""
    if model.device.type != "cpu":
        return "joined"
    if sum(p.nbytes for p in model.parameters()) > copy_limit:
        return "apart"
    if model.dtype == torch.float32 and rows == 1:
        return "transposed"
    return "onednn" if has_onednn(model.dtype) else "joined"


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether this build and processor have the private operators for this dtype."""
    ops = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(ops, name) for name in names):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())


def lay_out(layout: str, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Product:
    """Maps [out, in] that share an input -> their product: x [n, in] -> their outputs, joined."""
    if layout == "apart" and len(weights) > 1:
        pairs = list(zip(weights, biases))
        return lambda x: torch.cat([F.linear(x, w, b) for w, b in pairs], -1)
    weight = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
    bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
    if layout == "transposed" and weight.shape[0] > weight.shape[1]:
        weight = weight.t().contiguous().t()  # F.linear then multiplies by [in, out]
    if layout == "onednn":
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        multiply = torch.ops.mkldnn._linear_pointwise
        return lambda x: multiply(x, packed, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)


def base_product(model: Transformer, layout: str, *maps: Any) -> Product:
    """Maps that share an input, without adapters -> one product with their outputs side by side. On
    a CPU the model keeps it until the layout or a weight changes. Weights made under inference_mode
    have no version counter, so a new object, unequal to any other, stands for it."""
    weights, biases = [m.weight for m in maps], [getattr(m, "bias", None) for m in maps]
    made_of = [x for x in (*weights, *biases) if x is not None]
    versions = [object() if x.is_inference() else x._version for x in made_of]
    state = [layout, *versions, *(x.data_ptr() for x in made_of)]
    kept = model.fast_products.get(maps)
    if kept is None or kept[0] != state:
        held = [x.detach() for x in made_of]  # so that their memory is not reused
        kept = state, lay_out(layout, [w.detach() for w in weights], biases), held
        if model.device.type == "cpu":
            model.fast_products[maps] = kept
    return kept[1]


def joined(model: Transformer, layout: str, *maps: Linear) -> Product:
    """Maps that share an input, as one product [n, in] -> [n, sum of out] with their adapters."""
    base, dtype = base_product(model, layout, *maps), model.dtype
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for linear in maps:
        adapter = linear.adapter
        if isinstance(adapter, LoRA) and adapter.enabled:
            downs.append(adapter.lora_A)
            ups.append(adapter.lora_B * adapter.scale)
        else:
            ups.append(torch.zeros(linear.out_features, 0, device=model.device))
    if not downs:
        return base
    down = torch.cat(downs).to(dtype)  # [sum of r, in]
    up = torch.block_diag(*ups).to(dtype)  # [sum of out, sum of r]
    return lambda x: base(x) + F.linear(F.linear(x, down), up)


def fast_norm(norm: nn.RMSNorm) -> Product:
    """The norm; on a CPU, which has no fused kernel, in fewer steps than F.rms_norm takes."""
    weight, floor = norm.weight, torch.tensor(norm.eps)
    if not weight.is_cpu:
        return norm

    def on_cpu(x: Tensor) -> Tensor:  # [..., D], the mean square in float32
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(floor, length, length, value=1 / x.shape[-1]).rsqrt_()
        return torch.mul(x, scale, out=torch.empty_like(x)).mul_(weight)  # rounds once

    return on_cpu


class FastBlock:
    """model.Block for one token per row."""

    def __init__(self, model: Transformer, layout: str, block: Block):
        a, m = block.self_attn, block.mlp
        self.heads, self.head_dim = a.heads, a.head_dim
        join = functools.partial(joined, model, layout)
        self.qkv, self.o = join(a.q_proj, a.k_proj, a.v_proj), join(a.o_proj)
        self.gate_up, self.down = join(m.gate_proj, m.up_proj), join(m.down_proj)
        self.before = fast_norm(block.input_layernorm)
        self.between = fast_norm(block.post_attention_layernorm)
        self.eps, self.qk_norm = block.input_layernorm.eps, None
        if a.q_norm is not None and a.k_norm is not None:
            weights = (*[a.q_norm.weight] * a.heads, *[a.k_norm.weight] * a.kv_heads)
            self.qk_norm = torch.stack(weights)  # [H + K, head_dim]

    def __call__(self, h: Tensor, on: Tensor, step: "Step", layer: int) -> Tensor:
        """Residuals h [B + m, D] of rows and debts, `on` [n, D] of running rows -> the new `on`."""
        y = self.qkv(self.before(h)).view(len(h), -1, self.head_dim)  # [B + m, H + 2 K, head_dim]
        if self.qk_norm is not None:
            n = len(self.qk_norm)
            y[:, :n] = F.rms_norm(y[:, :n], (self.head_dim,), None, self.eps) * self.qk_norm
        cos, sin = step.turns
        y = (y * cos).addcmul_(y.roll(self.head_dim // 2, -1), sin)
        on = self.o(step.attend(layer, y[:, : self.heads], y[:, self.heads :])).add_(on)
        gate, up = self.gate_up(self.between(on)).chunk(2, -1)
        return self.down(F.silu(gate, inplace=True).mul_(up)).add_(on)


class Debt(NamedTuple):
    """Tokens that still lack keys and values in the deeper blocks."""

    h: Tensor  # [m, D] frozen residuals
    rows: Tensor  # [m] rows of the batch
    positions: Tensor  # [m]


class Step:
    """Where the tokens of one call are, and the cache that they read and write. positions [B]; kv:
    the cache's tensor; span: how many positions are read; aligned: all rows write at one position.
    `keep` sets `going` [n], the running rows (None: all), and adds m debts."""

    def __init__(self, fast: "FastModel", positions: Tensor, kv: Tensor, span: int, aligned: bool):
        _, B, _, self.kv_heads, capacity, head_dim = kv.shape
        self.fast = fast
        self.own_turns = fast.turns(positions[:1] if aligned else positions)
        self.keys = kv[:, :, 0, :, :span].unbind(0)  # of each block [B, K, span, head_dim]
        self.values = kv[:, :, 1, :, :span].unbind(0)
        self.slots = kv.view(len(kv), -1, head_dim).unbind(0)  # [B * 2 K * capacity, head_dim]
        planes = torch.arange(0, B * 2 * self.kv_heads * capacity, capacity, device=kv.device)
        self.planes = planes.view(B, -1)  # where the 2 K planes of each row begin
        self.own_places = (self.planes + positions[:, None]).view(-1)  # [B * 2 K] in `slots`
        self.mask = None
        if not aligned:
            seen = torch.arange(span, device=kv.device) <= positions[:, None]
            self.mask = seen[:, None, None]  # [B, 1, 1, span]

    def keep(self, going: Tensor | None, due: Debt | None) -> None:
        self.going, self.places, self.turns = going, self.own_places, self.own_turns
        if due is not None:
            own = [turn.expand(len(self.planes), -1, -1) for turn in self.own_turns]
            self.turns = [torch.cat(both) for both in zip(own, self.fast.turns(due.positions))]
            places = (self.planes[due.rows] + due.positions[:, None]).view(-1)
            self.places = torch.cat((self.own_places, places))
        self.apart: list[slice] = []  # rows whose attention runs one by one
        if going is not None and going.is_cpu:  # only if it costs less than attention for all
            saved = (len(self.keys[0]) - len(going)) * self.keys[0][0].numel() * 2
            if saved > len(going) * self.fast.attention_call:
                self.apart = [slice(row, row + 1) for row in going.tolist()]

    def attend(self, layer: int, q: Tensor, new: Tensor) -> Tensor:
        """q [B + m, H, d], new keys and values [B + m, 2 K, d] -> [n, H * d] of running rows."""
        B, (_, H, d) = len(self.planes), q.shape
        self.slots[layer].index_copy_(0, self.places, new.reshape(-1, d))
        q = q[:B].reshape(B, self.kv_heads, -1, d)  # a group's heads as queries
        k, v, mask = self.keys[layer], self.values[layer], self.mask
        if self.apart:
            parts = [
                F.scaled_dot_product_attention(q[i], k[i], v[i], None if mask is None else mask[i])
                for i in self.apart
            ]
            return torch.cat(parts).view(-1, H * d)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, H * d)
        return y if self.going is None else y.index_select(0, self.going)


class FastModel:
    """`run` and `readout` of a Transformer, for one token per row and one cache. capture: turns a
    function into a graph (default: CUDA graphs on CUDA, otherwise none)."""

    def __init__(self, model: Transformer, rows: int, capture: Capture | None = None):
        self.model, self.dtype, layout = model, model.dtype, choose_layout(model, rows)
        self.blocks = [FastBlock(model, layout, b) for b in model.blocks[: model.deepest]]
        self._readout = base_product(model, layout, model.lm_head or model.model.embed_tokens)
        self._norm = fast_norm(model.model.norm)
        s, freq = model.shape, rope_frequencies(model.shape, model.device)
        turned = torch.cat((-freq, freq)).expand(s.heads + s.kv_heads, -1)  # of q and k
        still = freq.new_zeros(s.kv_heads, s.head_dim)  # of v
        self.frequencies = torch.cat((turned, still))  # angles per position
        self.attention_call = ATTENTION_CALL
        if capture is None and model.device.type == "cuda":
            capture = capture_cuda
        self.graphs = None if capture is None else Graphs(capture)
        self.debts: dict[int, list[Debt]] = defaultdict(list)  # by the first block that lacks them
        self.names = torch.empty(0)  # the rows' ids, as in the cache

    def turns(self, positions: Tensor) -> list[Tensor]:
        """Positions [n] -> cos and sin for all heads of q, k and v, [n, H + 2 K, head_dim]."""
        angles = positions[:, None, None].float() * self.frequencies
        return [angles.cos().to(self.dtype), angles.sin().to(self.dtype)]

    def readout(self, h: Tensor) -> Tensor:
        """Residuals [n, D] -> logits [n, V]."""
        return self._readout(self._norm(h))

    def run(
        self, ids: Tensor, positions: Tensor, cache: Cache, stop: Stop | None, alive: Tensor | None
    ) -> Run:
        """See Transformer.run; ids, positions, alive [B, 1]. Rows that are not alive get depth 0
        and a meaningless residual. They write at their position, so the cache must have it."""
        self.follow(cache.names)
        D, at = len(self.blocks), positions[:, 0]
        depths = torch.full_like(at, D) if alive is None else alive[:, 0] * D
        going = None if alive is None else alive[:, 0].nonzero()[:, 0]  # host sync
        h = self.model.model.embed_tokens(ids[:, 0])  # [B, D]
        if self.graphs is None:
            step = Step(self, at, cache.kv, cache.span, cache.aligned)
            blocks = functools.partial(self.stretch, step)
        else:
            blocks = functools.partial(self.graphs, self, cache, at)
        asked = set() if stop is None else {depth for depth in stop.layers if depth < D}
        ends = map(int, self.model.exits.shortcuts if self.model.exits else ())  # of shortcuts
        bounds = sorted({*asked, *self.debts, *(depth for depth in ends if depth < D)})
        passed = {}
        for start, depth in zip([0, *bounds], [*bounds, D]):
            due = self.pay(start, depth)
            if due is not None and going is None:
                going = torch.arange(len(h), device=h.device)
            h = self.model.carried(blocks(start, depth, h, going, due), depths, depth)
            if stop is None or depth not in asked:
                continue
            leaves = stop(depth, h if going is None else h[going], going)
            if leaves is None:
                continue
            stay = leaves.logical_not().nonzero()[:, 0]  # host sync
            if len(stay) == len(leaves):
                continue
            depths[slice(None) if going is None else going] = torch.where(leaves, depth, D)
            going = stay if going is None else going[stay]
            passed[depth] = h
            if not len(going):
                rows = depths.nonzero()[:, 0]
                self.debts[depth].append(Debt(h[rows], rows, at[rows]))
                break
        return Run(self.model.read_from(passed | {D: h}, depths)[:, None], depths[:, None])

    def pay(self, start: int, end: int) -> Debt | None:
        """The debts due at block `start`; blocks start..end-1 now make their keys and values."""
        depths = [depth for depth in self.debts if depth <= start]
        owed = [debt for depth in depths for debt in self.debts.pop(depth)]
        if not owed:
            return None
        due = Debt(*map(torch.cat, zip(*owed)))
        if end < len(self.blocks):
            h = self.model.carried(due.h, 0 * due.rows, end)  # all exited before
            self.debts[end].append(due._replace(h=h))
        return due

    def follow(self, names: Tensor) -> None:
        """Move the debts with their rows, now ordered as `names`; drop those of rows that left."""
        if names is self.names:
            return
        debts, self.debts = self.debts, defaultdict(list)
        for depth, owed in debts.items():
            h, rows, positions = map(torch.cat, zip(*owed))
            stay, rows = (self.names[rows, None] == names).nonzero(as_tuple=True)  # host sync
            if len(rows):
                self.debts[depth].append(Debt(h[stay], rows, positions[stay]))
        self.names = names

    def stretch(
        self, step: Step, start: int, end: int, h: Tensor, going: Tensor | None, due: Debt | None
    ) -> Tensor:
        """Residuals h [B, D] -> after blocks start..end-1, between which no row exits.
        going [n]: the running rows; None: all. due: debts that are paid along with them."""
        step.keep(going, due)
        B, on = len(h), h
        if going is not None:
            h, on = torch.cat((h, h[:0] if due is None else due.h)), h[going]
        for layer in range(start, end):
            on = self.blocks[layer](h, on, step, layer)
            h = on if going is None else h.index_copy_(0, going, on)
        return h[:B]


def capture_cuda(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """-> a function that repeats the kernels of `run` on the same memory, and their output. Freeing
    another graph would spoil the capture, so the garbage collector waits."""
    graph = torch.cuda.CUDAGraph()
    gc.disable()
    try:
        with torch.cuda.graph(graph):
            out = run()
    finally:
        gc.enable()
    return graph.replay, out


class Graphs:
    """Graphs of the stretches between exits, one launch each. Running rows and debts are padded to
    a power of two by repeating the last one, which writes the same values again; the span is
    rounded up to a multiple of SPAN and masked. A shape is captured the third time (WARM)."""

    SPAN, WARM = 256, 3

    def __init__(self, capture: Capture):
        self.capture = capture
        self.kv: Tensor | None = None
        self.seen: Counter[tuple[int, ...]] = Counter()
        self.captured: dict[tuple[int, ...], tuple[Callable[[], object], Tensor, list[Tensor]]] = {}

    def __call__(
        self,
        fast: FastModel,
        cache: Cache,
        positions: Tensor,
        start: int,
        end: int,
        h: Tensor,
        going: Tensor | None,
        due: Debt | None,
    ) -> Tensor:
        """See FastModel.stretch."""
        kv = cache.kv
        if self.kv is not kv:  # rows were removed, so the cache is a new tensor
            self.kv = kv
            self.seen.clear()
            self.captured.clear()
        span = min(-(-cache.span // self.SPAN) * self.SPAN, kv.shape[-2])
        given = [positions, h]
        if going is not None:
            given += [_pad(going)[: len(h)], *map(_pad, due or ())]

        def run(positions: Tensor, h: Tensor, going: Any = None, *due: Tensor) -> Tensor:
            step = Step(fast, positions, kv, span, aligned=False)
            return fast.stretch(step, start, end, h, going, Debt(*due) if due else None)

        key = (start, end, span, *map(len, given))
        self.seen[key] += 1
        if self.seen[key] < self.WARM:
            return run(*given)
        if key not in self.captured:
            fixed = [x.clone() for x in given]
            self.captured[key] = (*self.capture(functools.partial(run, *fixed)), fixed)
        replay, out, fixed = self.captured[key]
        for x, now in zip(fixed, given):
            x.copy_(now)
        replay()
        return out.clone()  # the next replay writes there


def _pad(x: Tensor) -> Tensor:
    """[n, ...] -> [the next power of two, ...], by repeating the last."""
    size = 1 << (len(x) - 1).bit_length()
    return torch.cat((x, x[-1:].expand(size - len(x), *x.shape[1:])))
