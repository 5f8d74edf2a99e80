"""One token a row, fast: the same blocks as model.py's, with their maps joined and only the tokens that still run.

Contract. `DecodeStep(model)(ids, positions, cache, stop, rows)` is `model.run` for one token a row, to rounding error, for
inference; tests hold one against the other. Make a new one when adapters change.

What makes it fast. q, k and v are one product, gate and up another, adapters of such a group two more. Rotation turns q, k
and v together (values by no angle), and what goes into the cache is one copy. Rows that exited leave the call, and their
debts are paid by one product for all later blocks: the frozen residual is normalized once, the norms' weights are folded
into the stacked k and v maps.

Host syncs: one a depth where somebody may exit, to know who runs on.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoexit.cache import Cache
from nanoexit.layout import LaidOut, Product, laid_out
from nanoexit.model import Block, Linear, Run, Shape, Stop, Transformer, rotate, turns


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


class DecodeBlock:
    """model.Block for one token a row."""

    def __init__(self, block: Block, qkv: Product, o: Product, gate_up: Product, down: Product):
        a, m = block.self_attn, block.mlp
        self.heads, self.kv_heads, self.head_dim = a.heads, a.kv_heads, a.head_dim
        self.qkv, self.o = Joined(qkv, a.q_proj, a.k_proj, a.v_proj), Joined(o, a.o_proj)
        self.gate_up, self.down = Joined(gate_up, m.gate_proj, m.up_proj), Joined(down, m.down_proj)
        self.before, self.between, self.eps = block.input_layernorm.weight, block.post_attention_layernorm.weight, block.input_layernorm.eps
        self.qk_norm = None
        if a.q_norm is not None:
            self.qk_norm = torch.stack([a.q_norm.weight] * a.heads + [a.k_norm.weight] * a.kv_heads)  # [H + K, head_dim]

    def __call__(self, h: Tensor, step: "Step", layer: int) -> Tensor:
        """Residuals h [n, D] of the rows that run -> the same after this block; their keys and values go into the cache."""
        n, turned = len(h), self.heads + self.kv_heads
        qkv = self.qkv(F.rms_norm(h, h.shape[1:], self.before, self.eps)).view(n, -1, self.head_dim)  # [n, H + 2 K, head_dim]
        if self.qk_norm is not None:
            qkv[:, :turned] = F.rms_norm(qkv[:, :turned], (self.head_dim,), None, self.eps) * self.qk_norm
        qkv = (qkv * step.cos).addcmul_(qkv.roll(self.head_dim // 2, -1), step.sin)
        h = self.o(step.attend(layer, qkv[:, : self.heads], qkv[:, self.heads :].view(n, 2, self.kv_heads, self.head_dim))).add_(h)
        gate, up = self.gate_up(F.rms_norm(h, h.shape[1:], self.between, self.eps)).chunk(2, -1)
        return self.down(F.silu(gate, inplace=True).mul_(up)).add_(h)  # in place: every product is a tensor of its own


class Step:
    """Where one call's tokens stand, and the cache that they read and write.

    positions [B]; span: how many positions are read; start: the one that is written, where it is the same in all rows;
    rows [n]: those that run, None for all, set by `keep`.
    """

    def __init__(self, shape: Shape, positions: Tensor, cache: Cache, span: int, start: int | None, dtype: torch.dtype):
        self.positions, self.cache, self.rows = positions, cache, None
        cos, sin = turns(shape, positions if start is None else positions[:1], dtype)
        turned, still = (-1, shape.heads + shape.kv_heads, -1), (len(cos), shape.kv_heads, shape.head_dim)  # values turn by no angle
        cos = torch.cat((torch.cat((cos, cos), -1).expand(turned), cos.new_ones(still)), 1)
        sin = torch.cat((torch.cat((-sin, sin), -1).expand(turned), sin.new_zeros(still)), 1)
        self.turns = self.cos, self.sin = cos, sin  # [B or 1, H + 2 K, head_dim]; cos and sin are those of `rows`
        self.keys, self.values = cache.k[..., :span, :].unbind(0), cache.v[..., :span, :].unbind(0)
        self.slots = self.mask = self.padded = None
        if start is not None:
            self.slots = cache.kv[..., start, :].unbind(0)
        else:
            at = torch.arange(max(span, len(positions)), device=positions.device)
            self.mask = (at[:span] <= positions[:, None])[:, None, None]
            self.places = (at[: len(positions)], slice(None), slice(None), positions)  # where the running rows write

    def keep(self, rows: Tensor | None) -> "Step":
        if rows is not self.rows:
            self.rows = rows
            if self.slots is None:
                self.places = rows, slice(None), slice(None), self.positions[rows]
                self.cos, self.sin = (x[rows] for x in self.turns)
        return self

    def attend(self, layer: int, q: Tensor, new: Tensor) -> Tensor:
        """Queries q [n, H, d] of the running rows, their new keys and values [n, 2, K, d] -> [n, H * d]."""
        _, H, d = q.shape
        if self.slots is None:
            self.cache.kv[layer][self.places] = new
        elif self.rows is None:
            self.slots[layer].copy_(new)
        else:
            self.slots[layer].index_copy_(0, self.rows, new)
        if self.rows is not None:  # rows that are done ask something old: cheaper than picking rows of the cache
            self.padded = q.new_zeros(len(self.positions), H, d) if self.padded is None else self.padded
            q = self.padded.index_copy_(0, self.rows, q)
        k = self.keys[layer]
        y = F.scaled_dot_product_attention(q.reshape(len(q), k.shape[1], -1, d), k, self.values[layer], attn_mask=self.mask)
        y = y.reshape(len(q), H * d)
        return y if self.rows is None else y[self.rows]


class DecodeStep:
    """`model.run` for one token a row; adapters are read when it is made."""

    def __init__(self, model: Transformer, rows: int, pack: str = "auto", cuda_graphs: bool = True):
        self.model = model
        laid = laid_out(model, rows, pack)
        self.blocks = [DecodeBlock(block, *products) for block, products in zip(model.model["layers"], laid.blocks)]
        self._readout = laid.readout
        self.above = model.keys_values_above if laid.layout == "apart" else KeysValuesAbove(model, laid)
        self.graphs = Graphs(self) if cuda_graphs and model.device.type == "cuda" else None

    def readout(self, h: Tensor) -> Tensor:
        """Residuals [n, D] -> logits [n, V], as `Transformer.readout`."""
        return self._readout(self.model.model["norm"](h))

    def __call__(self, ids: Tensor, positions: Tensor, cache: Cache, stop: Stop | None = None, rows: Tensor | None = None) -> Run:
        """ids, positions [B, 1]; only `rows` run and leave anything, default all. See Transformer.run."""
        B, L, at = len(ids), len(self.blocks), positions[:, 0]
        h = self.model.model["embed_tokens"](ids[:, 0] if rows is None else ids[rows, 0])  # [n, D] of the rows that run
        run = self._stretches(at, cache)
        hidden, depths = h.new_zeros(B, h.shape[1]), torch.zeros_like(at)
        asked = [] if stop is None else sorted(d for d in stop.layers if d < L)
        for start, depth in zip([0, *asked], [*asked, L]):
            if cache.debts:
                cache.settle(depth - 1, self.above)
            h = run(start, depth, h, rows)
            leaves = None if depth == L else stop(depth, h, rows)
            leaving = [] if leaves is None else leaves.tolist()  # host sync: which rows run on decides the shapes of the next block
            if not any(leaving):
                continue
            if all(leaving) and rows is None:  # everybody, here: nothing to sort out
                cache.owe(depth, h, torch.arange(B, device=h.device), at)
                return Run(h[:, None], depths[:, None].fill_(depth))
            go, stay = (torch.tensor([i for i, leave in enumerate(leaving) if leave is way], device=h.device) for way in (True, False))
            gone = go if rows is None else rows[go]
            hidden[gone], depths[gone] = h[go], depth
            cache.owe(depth, h[go], gone, at[gone])
            if not len(stay):
                return Run(hidden[:, None], depths[:, None])
            rows, h = stay if rows is None else rows[stay], h[stay]
        if rows is None:
            return Run(h[:, None], depths[:, None].fill_(L))
        hidden[rows], depths[rows] = h, L
        return Run(hidden[:, None], depths[:, None])

    def _stretches(self, positions: Tensor, cache: Cache) -> Callable[[int, int, Tensor, Tensor | None], Tensor]:
        """-> f(start, end, h [n, D], rows [n] or None for all): blocks start..end-1, between which nobody exits."""
        if self.graphs is not None:
            return functools.partial(self.graphs, positions, cache)
        step = Step(self.model.shape, positions, cache, cache.span, cache.start, self.model.dtype)
        return lambda start, end, h, rows: self.stretch(start, end, h, step.keep(rows))

    def stretch(self, start: int, end: int, h: Tensor, step: Step) -> Tensor:
        for layer in range(start, end):
            h = self.blocks[layer](h, step, layer)
        return h


class Graphs:
    """CUDA graphs of the stretches between exits: shapes stand still in there, so a whole stretch is one launch.

    Rows are padded to a power of two by repeating the last one, which computes and writes the same again; the positions that
    are read are padded to SPAN and masked. A stretch that comes WARM times in one shape is captured then, for this cache.
    """

    SPAN, WARM = 256, 3

    def __init__(self, steps: DecodeStep):
        self.steps, self.memory = weakref.proxy(steps), None
        self.seen: Counter[tuple[int, int, int, int]] = Counter()
        self.captured: dict[tuple[int, int, int, int], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, positions: Tensor, cache: Cache, start: int, end: int, h: Tensor, rows: Tensor | None) -> Tensor:
        """Blocks start..end-1 for residuals h [n, D] of these rows."""
        if self.memory != cache.kv.data_ptr():  # rows left, so the cache was made anew
            self.memory = cache.kv.data_ptr()
            self.seen.clear()
            self.captured.clear()
        B, n = len(positions), len(h)
        size = min(1 << (n - 1).bit_length(), B)
        span = min(-(-cache.span // self.SPAN) * self.SPAN, cache.kv.shape[-2])
        if rows is None:
            rows = torch.arange(B, device=h.device)
        if size > n:
            fill = torch.arange(size, device=h.device).clamp(max=n - 1)
            h, rows = h[fill], rows[fill]
        key, given = (start, end, size, span), [h, positions, rows]
        self.seen[key] += 1
        if self.seen[key] < self.WARM:
            return self._run(cache, *key, *given)[:n]
        if key not in self.captured:
            fixed, graph = [x.clone() for x in given], torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self._run(cache, *key, *fixed)
            self.captured[key] = graph, fixed, out
        graph, fixed, out = self.captured[key]
        for x, now in zip(fixed, given):
            x.copy_(now)
        graph.replay()
        return out[:n].clone()  # the next replay writes there

    def _run(self, cache: Cache, start: int, end: int, size: int, span: int, h: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        step = Step(self.steps.model.shape, positions, cache, span, None, h.dtype)
        return self.steps.stretch(start, end, h, step.keep(rows))


class KeysValuesAbove:
    """`Transformer.keys_values_above` in one product for all blocks."""

    def __init__(self, model: Transformer, laid: LaidOut):
        self.model, self.laid = model, laid
        blocks = model.model["layers"]
        self.k_norm = None if not model.shape.qk_norm else torch.stack([b.self_attn.k_norm.weight for b in blocks])[:, None, None]
        adapters = [joined_adapters((b.self_attn.k_proj, b.self_attn.v_proj)) for b in blocks]
        self.down = self.up = None
        if adapters[0][0] is not None:  # [L, r, D], the norms folded in; [L, 2 K head_dim, r]
            self.down = torch.stack([down * b.input_layernorm.weight for (down, _), b in zip(adapters, blocks)])
            self.up = torch.stack([up for _, up in adapters])

    def __call__(self, depth: int, h: Tensor, positions: Tensor) -> Tensor:
        """Residuals h [n, D], positions [n] -> [L - depth, n, 2, K, head_dim]."""
        s, blocks = self.model.shape, self.model.full_depth - depth
        x = F.rms_norm(h, h.shape[-1:], None, s.norm_eps)
        kv = self.laid.above(self.model, depth)(x).unflatten(-1, (blocks, -1)).transpose(0, 1)  # [L - depth, n, 2 K head_dim]
        if self.down is not None:
            low = F.linear(x, self.down[depth:].flatten(0, 1)).unflatten(-1, (blocks, -1)).transpose(0, 1)
            kv = torch.baddbmm(kv, low, self.up[depth:].mT)
        kv = kv.unflatten(-1, (2, s.kv_heads, s.head_dim))
        k = kv[:, :, 0] if self.k_norm is None else F.rms_norm(kv[:, :, 0], (s.head_dim,), None, s.norm_eps) * self.k_norm[depth:]
        return torch.stack((rotate(k, *turns(s, positions, h.dtype)), kv[:, :, 1]), 2)
