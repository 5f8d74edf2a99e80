"""One token a row, fast: the same blocks as model.py's, with their maps joined, and little done for tokens that exited.

Contract. `DecodeStep(model)(ids, positions, cache, stop, rows)` is `model.run` for one token a row, to rounding error, for
inference; tests hold one against the other. Make a new one when adapters change.

What makes it fast. q, k and v are one product, gate and up another, adapters of such a group two more. Rotation turns q, k
and v together (values by no angle), and what goes into the cache is one copy. Rows that exit stay in their places and in the
q, k and v product for as long as somebody runs (they owe keys and values; cutting their q out costs more than it saves);
attention's output map and the MLP run for the others alone, and on a CPU attention too, where that saves reading. Idle
rows are kept like those that exited. Tokens that exited in earlier steps go along for keys and values alone: the k and v
maps are read once for those who run and those who owe.

Host syncs: one a depth where somebody may exit, to know who runs on; one where some rows are idle; one where depths differ.
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
from nanoexit.layout import Product, laid_out
from nanoexit.model import Block, Linear, RMSNorm, Run, Shape, Stop, Transformer, turns

ATTENTION_CALL = 2**14  # numbers of keys and values that a CPU reads in about the time that one more call of attention takes


class Joined:
    """Linear maps of one input as one product: [n, in] -> [n, sum of out], adapters included."""

    def __init__(self, base: Product, *maps: Linear):
        self.base, self.down, self.up = base, *joined_adapters(maps)

    def __call__(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y if self.down is None else y + F.linear(F.linear(x, self.down), self.up)


def joined_adapters(maps: Sequence[Linear]) -> tuple[Tensor | None, Tensor | None]:
    """The maps' adapters as one: down [sum of r, in], up [sum of out, sum of r], scaled; None where none is on."""
    on = [m.adapter if m.adapter is not None and m.adapter.enabled else None for m in maps]
    if not any(a is not None for a in on):
        return None, None
    down = torch.cat([a.lora_A for a in on if a is not None])
    up = torch.block_diag(*(m.weight.new_zeros(m.out_features, 0) if a is None else a.lora_B * a.scale for m, a in zip(maps, on)))
    return down.to(maps[0].weight.dtype), up.to(maps[0].weight.dtype)


class Norm:
    """model.RMSNorm, in fewer steps than F.rms_norm takes on a CPU, which has no kernel of its own for it."""

    def __init__(self, norm: RMSNorm):
        self.weight, self.eps = norm.weight, norm.eps
        self.floor = torch.tensor(norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D], the mean square in float32."""
        if not x.is_cpu:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self.floor, length, length, value=1 / x.shape[-1]).rsqrt_()
        return torch.mul(x, scale, out=torch.empty_like(x)).mul_(self.weight)  # rounded to x's type once


class DecodeBlock:
    """model.Block for one token a row."""

    def __init__(self, block: Block, products: Sequence[Product], q_and_kv: Callable[[], tuple[Product, Product]]):
        a, m, (qkv, o, gate_up, down) = block.self_attn, block.mlp, products
        self.heads, self.kv_heads, self.head_dim = a.heads, a.kv_heads, a.head_dim
        self.qkv, self.o = Joined(qkv, a.q_proj, a.k_proj, a.v_proj), Joined(o, a.o_proj)
        self.gate_up, self.down = Joined(gate_up, m.gate_proj, m.up_proj), Joined(down, m.down_proj)
        self.before, self.between, self.eps = Norm(block.input_layernorm), Norm(block.post_attention_layernorm), block.input_layernorm.eps
        self.qk_norm = None
        if a.q_norm is not None:
            self.qk_norm = torch.stack([a.q_norm.weight] * a.heads + [a.k_norm.weight] * a.kv_heads)  # [H + K, head_dim]

        @functools.cache  # laid out only where somebody owes
        def apart() -> tuple[Joined, Joined]:
            q, kv = q_and_kv()
            return Joined(q, a.q_proj), Joined(kv, a.k_proj, a.v_proj)

        self.q_and_kv = apart

    def __call__(self, h: Tensor, on: Tensor, step: "Step", layer: int) -> Tensor:
        """Residuals h [B, D] of all rows, of which `on` [n, D] run on -> `on` after this block; all rows leave keys and values."""
        q, kv = self.ask(h, step)
        on = self.o(step.attend(layer, q, kv)).add_(on)
        gate, up = self.gate_up(self.between(on)).chunk(2, -1)
        return self.down(F.silu(gate, inplace=True).mul_(up)).add_(on)  # in place: every product is a tensor of its own

    def ask(self, h: Tensor, step: "Step") -> tuple[Tensor, Tensor]:
        """-> queries [B, H, head_dim]; keys and values [B + m, 2 K, head_dim], behind the rows' own those of the m tokens that owe them."""
        if step.due is None:
            y = self.qkv(self.before(h))
        else:
            x = self.before(torch.cat((h, step.due.h)))
            q, kv = self.q_and_kv()
            y = torch.cat((F.pad(q(x[: len(h)]), (0, 0, 0, len(x) - len(h))), kv(x)), -1)  # who owes asks nothing
        y = y.view(len(y), -1, self.head_dim)  # [B + m, H + 2 K, head_dim]
        if self.qk_norm is not None:
            n = len(self.qk_norm)
            y[:, :n] = F.rms_norm(y[:, :n], (self.head_dim,), None, self.eps) * self.qk_norm
        cos, sin = step.turns
        y = (y * cos).addcmul_(y.roll(self.head_dim // 2, -1), sin)
        return y[: len(h), : self.heads], y[:, self.heads :]


class Step:
    """Where one call's tokens stand, and the cache that they read and write.

    positions [B]; span: how many positions are read; aligned: whether all rows write the same one; going [n]: the rows that
    run on, None for all; due: tokens of earlier steps that owe keys and values to the blocks that run. `keep` sets `going` and `due`.
    """

    def __init__(self, shape: Shape, positions: Tensor, cache: Cache, span: int, aligned: bool, dtype: torch.dtype):
        self.shape, self.dtype = shape, dtype
        self.own_turns = self.turns_of(positions[:1] if aligned else positions)
        self.keys, self.values = cache.k[..., :span, :].unbind(0), cache.v[..., :span, :].unbind(0)
        self.capacity = cache.kv.shape[-2]
        self.slots = cache.kv.view(len(cache.kv), -1, shape.head_dim).unbind(0)  # of each block [B * 2 K * capacity, head_dim]
        self.planes = torch.arange(2 * shape.kv_heads, device=positions.device)  # of a row: its heads' keys, then their values
        self.own_places = self.places_of(torch.arange(len(positions), device=positions.device), positions)
        self.mask = None if aligned else (torch.arange(span, device=positions.device) <= positions[:, None])[:, None, None]

    def turns_of(self, positions: Tensor) -> list[Tensor]:
        """Positions [n] -> cos and sin for all heads of q, k and v, [n, H + 2 K, head_dim]; values turn by no angle."""
        s, (cos, sin) = self.shape, turns(self.shape, positions, self.dtype)
        turned, still = (-1, s.heads + s.kv_heads, -1), (len(cos), s.kv_heads, s.head_dim)
        return [torch.cat((torch.cat((cos, cos), -1).expand(turned), cos.new_ones(still)), 1),
                torch.cat((torch.cat((-sin, sin), -1).expand(turned), sin.new_zeros(still)), 1)]

    def places_of(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Where tokens of these rows [n] and positions [n] leave keys and values: indices [n * 2 K] into `slots`."""
        return ((rows[:, None] * len(self.planes) + self.planes) * self.capacity + positions[:, None]).view(-1)

    def keep(self, going: Tensor | None, due: Debt | None) -> "Step":
        self.going, self.due, self.runs = going, due, self._runs(going)
        self.places, self.turns = self.own_places, self.own_turns
        if due is not None:
            own = [turn.expand(len(self.keys[0]), -1, -1) for turn in self.own_turns]
            self.turns = [torch.cat(both) for both in zip(own, self.turns_of(due.positions))]
            self.places = torch.cat((self.own_places, self.places_of(due.rows, due.positions)))
        return self

    def _runs(self, going: Tensor | None) -> list[tuple[int, int]] | None:
        """The runs [start, end) of neighbours among the rows that go on; None where all go on, not on a CPU, and where a call for
        each run costs more than to attend for all."""
        if going is None or not going.is_cpu:
            return None
        runs: list[tuple[int, int]] = []
        for row in going.tolist():
            start = runs.pop()[0] if runs and runs[-1][1] == row else row
            runs.append((start, row + 1))
        spared = (len(self.keys[0]) - len(going)) * self.keys[0][0].numel() * 2
        return runs if spared > len(runs) * ATTENTION_CALL else None

    def attend(self, layer: int, q: Tensor, new: Tensor) -> Tensor:
        """Queries q [B, H, d], new keys and values [B + m, 2 K, d] -> [n, H * d] of the rows that run on."""
        B, H, d = q.shape
        self.slots[layer].index_copy_(0, self.places, new.reshape(-1, d))
        q, k, v, mask = q.reshape(B, self.shape.kv_heads, -1, d), self.keys[layer], self.values[layer], self.mask
        if self.runs is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, H * d)
            return y if self.going is None else y.index_select(0, self.going)
        return torch.cat([F.scaled_dot_product_attention(q[a:b], k[a:b], v[a:b], attn_mask=mask if mask is None else mask[a:b])
                          for a, b in self.runs]).view(-1, H * d)


class DecodeStep:
    """`model.run` for one token a row; adapters are read when it is made."""

    def __init__(self, model: Transformer, rows: int, pack: str = "auto", cuda_graphs: bool = True):
        self.model = model
        laid = laid_out(model, rows, pack)
        self.blocks = [DecodeBlock(block, products, functools.partial(laid.q_and_kv, model, layer))
                       for layer, (block, products) in enumerate(zip(model.model["layers"], laid.blocks))]
        self._readout, self._norm = laid.readout, Norm(model.model["norm"])
        self.graphs = Graphs(self) if cuda_graphs and model.device.type == "cuda" else None

    def readout(self, h: Tensor) -> Tensor:
        """Residuals [n, D] -> logits [n, V], as `Transformer.readout`."""
        return self._readout(self._norm(h))

    def __call__(self, ids: Tensor, positions: Tensor, cache: Cache, stop: Stop | None = None, rows: Tensor | None = None) -> Run:
        """ids, positions [B, 1]; only `rows` (one at least) run, default all. The others' depth is 0, their residual means
        nothing, and they leave rubbish at their positions, which must lie in the cache. See Transformer.run."""
        B, L, at = len(ids), len(self.blocks), positions[:, 0]
        h = self.model.model["embed_tokens"](ids[:, 0])  # [B, D]
        run, going = self._stretches(at, cache), rows
        live = list(range(B)) if rows is None else rows.tolist()
        depths = [0] * B
        asked = set() if stop is None else {d for d in stop.layers if d < L}
        bounds = sorted({*asked, *cache.debts} - {L})
        for start, depth in zip([0, *bounds], [*bounds, L]):
            due = cache.due(start)
            h = run(start, depth, h, going, due)
            if due is not None:
                cache.paid(due, start, depth)
            leaves = stop(depth, h if going is None else h[going], going) if depth in asked else None
            leaving = [] if leaves is None else leaves.tolist()  # host sync: which rows run on decides the shapes of the next block
            if not any(leaving):
                continue
            for row, leave in zip(live, leaving):
                depths[row] = depth if leave else 0
            live = [row for row in live if not depths[row]]
            if not live:
                cache.owe(depth, *((h, torch.arange(B, device=h.device), at) if rows is None else (h[rows], rows, at[rows])))
                break
            going = torch.tensor(live, device=h.device)
        for row in live:
            depths[row] = L
        if len(set(depths)) == 1:  # as mostly: without a copy from the host, which would be a sync
            return Run(h[:, None], torch.full_like(ids, depths[0]))
        return Run(h[:, None], torch.tensor(depths, device=h.device)[:, None])

    def _stretches(self, positions: Tensor, cache: Cache) -> Callable[[int, int, Tensor, Tensor | None, Debt | None], Tensor]:
        """-> f(start, end, h [B, D], rows that run on [n] or None for all, due): blocks start..end-1, between which nobody exits."""
        if self.graphs is not None:
            return functools.partial(self.graphs, positions, cache)
        step = Step(self.model.shape, positions, cache, cache.span, cache.start is not None, self.model.dtype)
        return lambda start, end, h, going, due: self.stretch(start, end, h, step.keep(going, due))

    def stretch(self, start: int, end: int, h: Tensor, step: Step) -> Tensor:
        """Residuals h [B, D] -> those after blocks start..end-1, of the rows that run on; the others' as they were."""
        on = h
        if step.going is not None:
            h, on = h.clone(), h[step.going]  # a `stop` may have kept h
        for layer in range(start, end):
            on = self.blocks[layer](h, on, step, layer)
            h = on if step.going is None else h.index_copy_(0, step.going, on)
        return h


class Given(NamedTuple):
    """What changes from one replay to the next."""

    positions: Tensor
    h: Tensor
    going: Tensor | None
    due: Debt | None

    def tensors(self) -> list[Tensor]:
        return [x for x in (*self[:3], *(self.due or ())) if x is not None]

    def clone(self) -> "Given":
        return Given(*(x if x is None else x.clone() for x in self[:3]), self.due and Debt(*(x.clone() for x in self.due)))


class Graphs:
    """CUDA graphs of the stretches between exits: shapes stand still in there, so a whole stretch is one launch.

    The rows that run on, and the tokens that owe, are padded to a power of two by repeating the last one, which computes and
    writes the same again; the positions that are read are padded to SPAN and masked. A stretch that comes WARM times in one
    shape is captured then, for this cache.
    """

    SPAN, WARM = 256, 3

    def __init__(self, steps: DecodeStep):
        self.steps, self.memory = weakref.proxy(steps), None
        self.seen: Counter[tuple[int, ...]] = Counter()
        self.captured: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Given, Tensor]] = {}

    def __call__(self, positions: Tensor, cache: Cache, start: int, end: int, h: Tensor, going: Tensor | None, due: Debt | None) -> Tensor:
        """Blocks start..end-1 for residuals h [B, D], of which the rows `going` run on."""
        memory = cache.kv.data_ptr(), cache.kv.shape
        if self.memory != memory:  # rows left, so the cache was made anew
            self.memory = memory
            self.seen.clear()
            self.captured.clear()
        span = min(-(-cache.span // self.SPAN) * self.SPAN, cache.kv.shape[-2])
        given = Given(positions, h, None if going is None else _pad(len(h), going)[0], None if due is None else Debt(*_pad(None, *due)))
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
        step = Step(self.steps.model.shape, given.positions, cache, span, False, given.h.dtype)
        return self.steps.stretch(start, end, given.h, step.keep(given.going, given.due))


def _pad(most: int | None, *tensors: Tensor) -> list[Tensor]:
    """Tensors [n, ...] -> [the next power of two, at most `most`, ...]: the last of each is repeated."""
    n = len(tensors[0])
    size = min(1 << (n - 1).bit_length(), most or math.inf)
    return list(tensors) if size == n else [x[torch.arange(size, device=x.device).clamp(max=n - 1)] for x in tensors]

