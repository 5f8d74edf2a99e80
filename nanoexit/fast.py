"""Optional: `model.run` for one token a row, fused. Nothing here changes what is computed.

Contract. `FastModel(model, rows)` offers `run` and `readout` with the arguments of the model's own,
for one token a row and inference, and gives the same results to rounding error; tests hold one
against the other. generate.py chooses it in one line. Make a new one when adapters change.

What makes it fast.
1. Weights laid out for a handful of rows (`LaidOut`, a second copy of them). Decoding reads every
   weight once a token, and `F.linear` as stored reaches about half of a CPU's memory bandwidth.
2. q, k and v are one product, gate and up another; adapters of such a group are two more. Rotation
   turns q, k and v together (values by angle zero), and one copy writes to the cache.
3. Rows that exit keep their places and stay in the joint q, k, v product as long as some row runs:
   they need keys and values, and cutting out their queries costs more than it saves. Attention
   output and MLP run for the other rows alone; on a CPU attention too, where that saves reading.
4. Debts of earlier steps join the same products: the k and v maps are read once.
5. On CUDA, the blocks between two exits are replayed as one graph.

Host syncs: one at each depth where a row may exit, one if some rows are idle, one if depths differ.
"""

import functools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoexit.cache import Cache, Debt
from nanoexit.lora import LoRA
from nanoexit.model import Block, Linear, RMSNorm, Run, Shape, Stop, Transformer, rotations

Product = Callable[[Tensor], Tensor]  # [n, in] -> [n, out]
COPY_LIMIT = 2 * 2**30  # bytes: a larger model is not copied on a CPU
ATTENTION_CALL = 2**14  # cache entries a CPU reads in about the time of one more attention call


# --- weights laid out -------------------------------------------------------------------------


def choose_layout(model: Transformer, rows: int) -> str:
    """The best of PyTorch's own products for this many rows, measured by scripts/bench.py decode.

    apart: as stored, no copy. joined: maps of one input as one. transposed (float32, one row): [in,
    out] for maps that widen. onednn: blocked, by a private operator of PyTorch's, if present.
    """
    if model.device.type != "cpu":
        return "joined"
    if sum(p.nbytes for p in model.model.parameters()) > COPY_LIMIT:
        return "apart"
    if model.dtype == torch.float32 and rows == 1:
        return "transposed"
    return "onednn" if _has_onednn(model.dtype) else "joined"


def _has_onednn(dtype: torch.dtype) -> bool:
    ops = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(ops, name) for name in names):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())


def lay_out(layout: str, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Product:
    """Maps [out, in] of one input -> x [n, in] -> their outputs side by side."""
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


class LaidOut:
    """The base maps of a model in one layout; a copy is kept until the weights change."""

    def __init__(self, model: Transformer, layout: str):
        self.layout, self.seen = layout, _fingerprint(model)
        self.blocks: list[list[Product]] = []
        for block in model.blocks:
            a, m = block.self_attn, block.mlp
            groups = [[a.q_proj, a.k_proj, a.v_proj], [a.o_proj]]
            groups += [[m.gate_proj, m.up_proj], [m.down_proj]]
            self.blocks.append([self.product(maps) for maps in groups])
        self.readout = lay_out(layout, [model.readout_weight.detach()], [None])

    def product(self, maps: Sequence[Linear]) -> Product:
        weights = [m.weight.detach() for m in maps]
        return lay_out(self.layout, weights, [m.bias for m in maps])

    def holds(self, model: Transformer, layout: str) -> bool:
        """Whether this is still a copy of the model's weights."""
        pairs = zip(self.seen, _fingerprint(model))
        same = all(a.data_ptr() == b.data_ptr() and m == n for (a, m), (b, n) in pairs)
        return layout == self.layout and same

    @staticmethod
    def of(model: Transformer, rows: int) -> "LaidOut":
        """The copy kept with the model, or a new one."""
        layout, kept = choose_layout(model, rows), model.fast_copy
        if not isinstance(kept, LaidOut) or not kept.holds(model, layout):
            kept = LaidOut(model, layout)
            model.fast_copy = kept if model.device.type == "cpu" else None
        return kept


def _fingerprint(model: Transformer) -> list[tuple[Tensor, float]]:
    """Each base weight (held, so that its memory is not reused) and how often it was written to.

    nan, which equals nothing, for weights made under inference_mode: their writes are not counted.
    """
    base = [*model.model.parameters(), model.readout_weight]
    return [(p.detach(), math.nan if p.is_inference() else p._version) for p in base]


class Joined:
    """Linear maps of one input as one product [n, in] -> [n, sum of out], adapters included."""

    def __init__(self, base: Product, *maps: Linear):
        self.base = base
        self.adapters = join_adapters(maps)

    def __call__(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.adapters is None:
            return y
        down, up = self.adapters
        return y + F.linear(F.linear(x, down), up)


def join_adapters(maps: Sequence[Linear]) -> tuple[Tensor, Tensor] | None:
    """Adapters as one: down [sum of r, in], up [sum of out, sum of r], scaled; None if all are
    off.
    """
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for linear in maps:
        adapter, out = linear.adapter, linear.out_features
        if isinstance(adapter, LoRA) and adapter.enabled:
            downs.append(adapter.lora_A)
            ups.append(adapter.lora_B * adapter.scale)
        else:
            ups.append(linear.weight.new_zeros(out, 0, dtype=torch.float32))
    if not downs:
        return None
    dtype = maps[0].weight.dtype
    return torch.cat(downs).to(dtype), torch.block_diag(*ups).to(dtype)


class Norm:
    """model.RMSNorm in fewer steps than F.rms_norm takes on a CPU, which has no kernel for it."""

    def __init__(self, norm: RMSNorm):
        self.weight, self.eps = norm.weight, norm.eps
        self.floor = torch.tensor(norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D], the mean square in float32."""
        if not x.is_cpu:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self.floor, length, length, value=1 / x.shape[-1]).rsqrt_()
        return torch.mul(x, scale, out=torch.empty_like(x)).mul_(self.weight)  # rounds once


# --- one block, one step ----------------------------------------------------------------------


class FastBlock:
    """model.Block for one token a row."""

    def __init__(self, block: Block, laid: LaidOut, layer: int):
        a, m = block.self_attn, block.mlp
        qkv, o, gate_up, down = laid.blocks[layer]
        self.heads, self.kv_heads, self.head_dim = a.heads, a.kv_heads, a.head_dim
        self.qkv, self.o = Joined(qkv, a.q_proj, a.k_proj, a.v_proj), Joined(o, a.o_proj)
        self.gate_up, self.down = Joined(gate_up, m.gate_proj, m.up_proj), Joined(down, m.down_proj)
        self.before, self.between = (
            Norm(block.input_layernorm),
            Norm(block.post_attention_layernorm),
        )
        self.eps, self.qk_norm = block.input_layernorm.eps, None
        if a.q_norm is not None and a.k_norm is not None:
            weights = (*[a.q_norm.weight] * a.heads, *[a.k_norm.weight] * a.kv_heads)
            self.qk_norm = torch.stack(weights)  # [H + K, head_dim]

        @functools.cache  # laid out only once there is a debt
        def apart() -> tuple[Joined, Joined]:
            q, kv = laid.product([a.q_proj]), laid.product([a.k_proj, a.v_proj])
            return Joined(q, a.q_proj), Joined(kv, a.k_proj, a.v_proj)

        self.q_and_kv = apart

    def __call__(self, h: Tensor, on: Tensor, step: "Step", layer: int) -> Tensor:
        """Residuals h [B, D] of all rows, of which `on` [n, D] run -> `on` after this block."""
        q, kv = self.queries_keys_values(h, step)
        on = self.o(step.attend(layer, q, kv)).add_(on)
        gate, up = self.gate_up(self.between(on)).chunk(2, -1)
        return self.down(F.silu(gate, inplace=True).mul_(up)).add_(on)

    def queries_keys_values(self, h: Tensor, step: "Step") -> tuple[Tensor, Tensor]:
        """-> q [B, H, head_dim]; k and v [B + m, 2 K, head_dim], those of m debts behind the
        rows'.
        """
        B = len(h)
        if step.due is None:
            y = self.qkv(self.before(h))
        else:
            x = self.before(torch.cat((h, step.due.h)))
            q, kv = self.q_and_kv()
            y = torch.cat((F.pad(q(x[:B]), (0, 0, 0, len(x) - B)), kv(x)), -1)
        y = y.view(len(y), -1, self.head_dim)  # [B + m, H + 2 K, head_dim]
        if self.qk_norm is not None:
            n = len(self.qk_norm)
            y[:, :n] = F.rms_norm(y[:, :n], (self.head_dim,), None, self.eps) * self.qk_norm
        cos, sin = step.turns
        y = (y * cos).addcmul_(y.roll(self.head_dim // 2, -1), sin)
        return y[:B, : self.heads], y[:, self.heads :]


class Step:
    """Where the tokens of one call are, and the cache that they read and write.

    positions [B]; span: how many positions are read; aligned: all rows write the same position.
    `keep` sets `going` [n], the rows that run on (None: all), and `due`, debts paid beside them.
    """

    def __init__(
        self, shape: Shape, positions: Tensor, cache: Cache, span: int, aligned: bool, call: int
    ):
        self.shape, self.dtype, self.call = shape, cache.kv.dtype, call
        self.own_turns = self.turns_of(positions[:1] if aligned else positions)
        self.keys = cache.kv[:, :, 0, :, :span].unbind(0)
        self.values = cache.kv[:, :, 1, :, :span].unbind(0)
        self.capacity = cache.kv.shape[-2]
        flat = cache.kv.view(len(cache.kv), -1, shape.head_dim)  # [L, B * 2 K * capacity, head_dim]
        self.slots = flat.unbind(0)
        self.planes = torch.arange(2 * shape.kv_heads, device=positions.device)
        rows = torch.arange(len(positions), device=positions.device)
        self.own_places = self.places_of(rows, positions)
        self.mask = None
        if not aligned:
            seen = torch.arange(span, device=positions.device) <= positions[:, None]
            self.mask = seen[:, None, None]

    def turns_of(self, positions: Tensor) -> list[Tensor]:
        """Positions [n] -> cos and sin for all heads of q, k and v, [n, H + 2 K, head_dim]."""
        s, (cos, sin) = self.shape, rotations(self.shape, positions, self.dtype)
        turned, still = (-1, s.heads + s.kv_heads, -1), (len(cos), s.kv_heads, s.head_dim)
        cos = torch.cat((torch.cat((cos, cos), -1).expand(turned), cos.new_ones(still)), 1)
        sin = torch.cat((torch.cat((-sin, sin), -1).expand(turned), sin.new_zeros(still)), 1)
        return [cos, sin]

    def places_of(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Rows [n], positions [n] -> indices [n * 2 K] into `slots` of their keys and values."""
        planes = rows[:, None] * len(self.planes) + self.planes
        return (planes * self.capacity + positions[:, None]).view(-1)

    def keep(self, going: Tensor | None, due: Debt | None) -> "Step":
        self.going, self.due, self.runs = going, due, self._runs(going)
        self.places, self.turns = self.own_places, self.own_turns
        if due is not None:
            own = [turn.expand(len(self.keys[0]), -1, -1) for turn in self.own_turns]
            self.turns = [torch.cat(both) for both in zip(own, self.turns_of(due.positions))]
            self.places = torch.cat((self.own_places, self.places_of(due.rows, due.positions)))
        return self

    def _runs(self, going: Tensor | None) -> list[slice] | None:
        """The runs of neighbours among the rows that run on.

        None if all run, on other devices than a CPU, and where a call for each run costs more than
        attention for all rows.
        """
        if going is None or not going.is_cpu:
            return None
        rows = going.tolist()
        starts = [row for i, row in enumerate(rows) if not i or rows[i - 1] != row - 1]
        ends = [row + 1 for i, row in enumerate(rows) if row + 1 not in rows[i + 1 : i + 2]]
        saved = (len(self.keys[0]) - len(rows)) * self.keys[0][0].numel() * 2
        return list(map(slice, starts, ends)) if saved > len(starts) * self.call else None

    def attend(self, layer: int, q: Tensor, new: Tensor) -> Tensor:
        """q [B, H, d], new keys and values [B + m, 2 K, d] -> [n, H * d] of the rows that run on.
        """
        B, H, d = q.shape
        self.slots[layer].index_copy_(0, self.places, new.reshape(-1, d))
        q = q.reshape(B, self.shape.kv_heads, -1, d)  # the group takes the place of queries
        k, v, mask = self.keys[layer], self.values[layer], self.mask
        if self.runs is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, H * d)
            return y if self.going is None else y.index_select(0, self.going)
        parts = [
            F.scaled_dot_product_attention(q[r], k[r], v[r], None if mask is None else mask[r])
            for r in self.runs
        ]
        return torch.cat(parts).view(-1, H * d)


class FastModel:
    """`run` and `readout` of a Transformer, for one token a row."""

    def __init__(
        self,
        model: Transformer,
        rows: int,
        graphs: bool = True,
        attention_call: int = ATTENTION_CALL,
    ):
        self.model, self.attention_call = model, attention_call
        laid = LaidOut.of(model, rows)
        self.blocks = [FastBlock(block, laid, i) for i, block in enumerate(model.blocks)]
        self._readout, self._norm = laid.readout, Norm(model.model.norm)
        self.graphs = Graphs(self) if graphs and model.device.type == "cuda" else None

    def readout(self, h: Tensor) -> Tensor:
        """Residuals [n, D] -> logits [n, V]."""
        return self._readout(self._norm(h))

    def run(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: Cache,
        stop: Stop | None = None,
        alive: Tensor | None = None,
    ) -> Run:
        """ids, positions, alive [B, 1]; see Transformer.run.

        Rows that are not alive have depth 0 and a meaningless residual, and write to their
        position, which must be in the cache.
        """
        D, at = self.model.deepest, positions[:, 0]
        going = None if alive is None else alive[:, 0].nonzero()[:, 0]  # host sync
        live = list(range(len(ids))) if going is None else going.tolist()
        depths = [0] * len(ids)
        h = self.model.model.embed_tokens(ids[:, 0])  # [B, D]
        run = self._stretches(at, cache)
        asked = set() if stop is None else {depth for depth in stop.layers if depth < D}
        bounds = sorted({*asked, *cache.debts} - {0, D})
        for start, depth in zip([0, *bounds], [*bounds, D]):
            due = cache.due(start)
            h = run(start, depth, h, going, due)
            if due is not None:
                cache.paid(due, depth)
            leaves = None
            if stop is not None and depth in asked:
                leaves = stop(depth, h if going is None else h[going], going)
            leaving = [] if leaves is None else leaves.tolist()  # host sync
            if not any(leaving):
                continue
            for row, leave in zip(live, leaving):
                depths[row] = depth if leave else 0
            live = [row for row in live if not depths[row]]
            if not live:
                _owe(cache, depth, h, at, alive)
                break
            going = torch.tensor(live, device=h.device)
        for row in live:
            depths[row] = D
        if len(set(depths)) == 1:  # mostly: without a copy from the host, which would be a sync
            return Run(h[:, None], torch.full_like(ids, depths[0]))
        return Run(h[:, None], torch.tensor(depths, device=h.device)[:, None])

    def _stretches(self, positions: Tensor, cache: Cache) -> Callable[..., Tensor]:
        """-> f(start, end, h [B, D], going, due): blocks start..end-1, where no row exits
        between.
        """
        if self.graphs is not None:
            return functools.partial(self.graphs, positions, cache)
        aligned = cache.start is not None
        step = Step(self.model.shape, positions, cache, cache.span, aligned, self.attention_call)

        def run(start: int, end: int, h: Tensor, going: Tensor | None, due: Debt | None) -> Tensor:
            return self.stretch(start, end, h, step.keep(going, due))

        return run

    def stretch(self, start: int, end: int, h: Tensor, step: Step) -> Tensor:
        """Residuals h [B, D] -> after blocks start..end-1, for the rows that run on."""
        on = h
        if step.going is not None:
            h, on = h.clone(), h[step.going]  # a `stop` may have kept h
        for layer in range(start, end):
            on = self.blocks[layer](h, on, step, layer)
            h = on if step.going is None else h.index_copy_(0, step.going, on)
        return h


def _owe(cache: Cache, depth: int, h: Tensor, positions: Tensor, alive: Tensor | None) -> None:
    rows = torch.arange(len(h), device=h.device)
    if alive is not None:
        rows = rows[alive[:, 0]]
        h, positions = h[rows], positions[rows]
    cache.owe(depth, h, rows, positions)


# --- CUDA graphs ------------------------------------------------------------------------------


class Given(NamedTuple):
    """What changes from one replay to the next."""

    positions: Tensor
    h: Tensor
    going: Tensor | None
    due: Debt | None

    def tensors(self) -> list[Tensor]:
        return [x for x in (*self[:3], *(self.due or ())) if x is not None]

    def clone(self) -> "Given":
        due = None if self.due is None else Debt(*(x.clone() for x in self.due))
        going = None if self.going is None else self.going.clone()
        return Given(self.positions.clone(), self.h.clone(), going, due)


class Graphs:
    """CUDA graphs of the stretches between exits: fixed shapes, so a stretch is one launch.

    Rows that run on, and debts, are padded to a power of two by repeating the last one, which
    computes and writes the same again. The span read is padded to SPAN and masked. A stretch that
    comes WARM times in one shape is captured, for this cache.
    """

    SPAN, WARM = 256, 3

    def __init__(self, fast: FastModel):
        self.fast = weakref.proxy(fast)  # no cycle: captured memory is freed with the model's
        self.memory: tuple | None = None
        self.seen: Counter[tuple[int, ...]] = Counter()
        self.captured: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Given, Tensor]] = {}

    def __call__(
        self,
        positions: Tensor,
        cache: Cache,
        start: int,
        end: int,
        h: Tensor,
        going: Tensor | None,
        due: Debt | None,
    ) -> Tensor:
        """Blocks start..end-1 for residuals h [B, D], of which the rows `going` run on."""
        memory = cache.kv.data_ptr(), cache.kv.shape
        if self.memory != memory:  # rows were removed, so the cache is a new tensor
            self.memory = memory
            self.seen.clear()
            self.captured.clear()
        span = min(-(-cache.span // self.SPAN) * self.SPAN, cache.kv.shape[-2])
        padded = None if going is None else _pad(len(h), going)[0]
        given = Given(positions, h, padded, None if due is None else Debt(*_pad(None, *due)))
        key = (start, end, span, *map(len, given.tensors()))
        self.seen[key] += 1
        if self.seen[key] < self.WARM:
            return self._run(cache, start, end, span, given)
        if key not in self.captured:
            fixed, graph = given.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self._run(cache, start, end, span, fixed)
            self.captured[key] = graph, fixed, out
        graph, fixed, out = self.captured[key]
        for x, now in zip(fixed.tensors(), given.tensors()):
            x.copy_(now)
        graph.replay()
        return out.clone()  # the next replay writes there

    def _run(self, cache: Cache, start: int, end: int, span: int, given: Given) -> Tensor:
        shape, call = self.fast.model.shape, self.fast.attention_call
        step = Step(shape, given.positions, cache, span, False, call)
        return self.fast.stretch(start, end, given.h, step.keep(given.going, given.due))


def _pad(most: int | None, *tensors: Tensor) -> list[Tensor]:
    """Tensors [n, ...] -> [the next power of two, at most `most`, ...]: the last is repeated."""
    n = len(tensors[0])
    size = 1 << (n - 1).bit_length()
    size = size if most is None else min(size, most)
    if size == n:
        return list(tensors)
    last = torch.arange(size, device=tensors[0].device).clamp(max=n - 1)
    return [x[last] for x in tensors]
