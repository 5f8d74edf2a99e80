"""One token a row, fast: the same blocks as model.py's, with their maps joined and only the tokens that still run.

Contract. `DecodeStep(model)(ids, positions, cache, stop, alive)` is `model.run` for one token a row, to rounding error, for
inference; tests hold one against the other. Make a new one when adapters change.

What makes it fast. q, k and v are one product, gate and up another, adapters of such a group two more. Rotation turns q, k
and v together (values by no angle), and what goes into the cache is one copy. Rows that exited leave the call, and their
debts are paid by one product for all later blocks: the frozen residual is normalized once, the norms' weights are folded
into the stacked k and v maps.

Host syncs: one a depth where somebody may exit, to know who runs on.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoexit.cache import Cache
from nanoexit.layout import Product, laid_out
from nanoexit.model import Block, Linear, Run, Shape, Stop, Transformer, attend, rotate, turns


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
        self.before, self.between = block.input_layernorm, block.post_attention_layernorm
        self.qk_norm, self.eps = None, self.before.eps
        if a.q_norm is not None:
            self.qk_norm = torch.stack([a.q_norm.weight] * a.heads + [a.k_norm.weight] * a.kv_heads)  # [H + K, head_dim]

    def __call__(self, h: Tensor, step: "Step", layer: int) -> Tensor:
        """Residuals h [n, D] of the rows that run -> the same after this block; their keys and values go into the cache."""
        qkv = self.qkv(F.rms_norm(h, h.shape[-1:], self.before.weight, self.eps)).unflatten(-1, (-1, self.head_dim))
        if self.qk_norm is not None:
            qk = qkv[:, : self.heads + self.kv_heads]
            qkv[:, : self.heads + self.kv_heads] = F.rms_norm(qk, (self.head_dim,), None, self.eps) * self.qk_norm
        qkv = torch.addcmul(qkv * step.cos, qkv.roll(self.head_dim // 2, -1), step.sin)  # [n, H + 2 K, head_dim]
        y = step.attend(layer, qkv[:, : self.heads], qkv[:, self.heads :].unflatten(1, (2, -1)))
        h = h + self.o(y)
        gate, up = self.gate_up(F.rms_norm(h, h.shape[-1:], self.between.weight, self.eps)).chunk(2, -1)
        return h + self.down(F.silu(gate) * up)


class Step:
    """Where one call's tokens stand, and their part of the cache. `keep` narrows it to the rows that run on."""

    def __init__(self, shape: Shape, positions: Tensor, cache: Cache, rows: Tensor | None, dtype: torch.dtype):
        self.positions, self.cache, self.rows = positions, cache, rows  # [B]; rows [n], None: all
        aligned = cache.start is not None
        cos, sin = turns(shape, positions[:1] if aligned else positions if rows is None else positions[rows], dtype)
        still = (len(cos), shape.kv_heads, shape.head_dim)  # values turn by no angle
        self.cos = torch.cat((torch.cat((cos, cos), -1).expand(-1, shape.heads + shape.kv_heads, -1), cos.new_ones(still)), 1)
        self.sin = torch.cat((torch.cat((-sin, sin), -1).expand(-1, shape.heads + shape.kv_heads, -1), sin.new_zeros(still)), 1)
        self.keys, self.values = (x[..., : cache.span, :].unbind(0) for x in (cache.k, cache.v))
        self.slots = None if not aligned else cache.kv[..., cache.start, :].unbind(0)
        self.mask = None
        if not aligned:
            self.mask = (torch.arange(cache.span, device=positions.device) <= positions[:, None])[:, None, None]

    def attend(self, layer: int, q: Tensor, new: Tensor) -> Tensor:
        """Queries q [n, H, d] of the running rows, their new keys and values [n, 2, K, d] -> [n, H * d]."""
        if self.rows is None and self.slots is not None:
            self.slots[layer].copy_(new)
        elif self.rows is None:
            self.cache.kv[layer][torch.arange(len(q), device=q.device), :, :, self.positions] = new
        else:
            self.cache.kv[layer][self.rows, :, :, self.positions[self.rows]] = new
            q = q.new_zeros(len(self.positions), *q.shape[1:]).index_copy(0, self.rows, q)  # cheaper than picking rows of the cache
        y = attend(q[:, :, None], self.keys[layer], self.values[layer], self.mask, False).flatten(1)
        return y if self.rows is None else y[self.rows]

    def keep(self, staying: Tensor) -> None:
        """staying: places [m] among the n running rows."""
        self.rows = staying if self.rows is None else self.rows[staying]
        if len(self.cos) > 1:
            self.cos, self.sin = self.cos[staying], self.sin[staying]


class DecodeStep:
    """`model.run` for one token a row; adapters are read when it is made."""

    def __init__(self, model: Transformer, rows: int, pack: bool | str = "auto"):
        self.model, self.shape = model, model.shape
        laid = laid_out(model, rows, pack)
        self.blocks = [DecodeBlock(block, *products) for block, products in zip(model.model["layers"], laid.blocks)]
        self._readout = laid.readout
        self.above = KeysValuesAbove(model)

    def readout(self, h: Tensor) -> Tensor:
        """Residuals [n, D] -> logits [n, V], as `Transformer.readout`."""
        return self._readout(self.model.model["norm"](h))

    def __call__(self, ids: Tensor, positions: Tensor, cache: Cache, stop: Stop | None = None, alive: Tensor | None = None) -> Run:
        """ids, positions [B, 1]; rows that are not alive neither run nor leave anything. See Transformer.run."""
        B, L = len(ids), len(self.blocks)
        at, everyone = positions[:, 0], torch.arange(B, device=ids.device)
        rows = None if alive is None else alive[:, 0].nonzero()[:, 0]
        running = slice(None) if rows is None else rows
        h = self.model.model["embed_tokens"](ids[running, 0])  # [n, D] of the rows that run
        step = Step(self.shape, at, cache, rows, h.dtype)
        hidden, depths = h.new_zeros(B, h.shape[1]), torch.zeros_like(at)
        for depth, block in enumerate(self.blocks, start=1):
            if cache.debts:
                cache.settle(depth - 1, self.above)
            h = block(h, step, depth - 1)
            if stop is None or depth == L or depth not in stop.layers:
                continue
            leaves = stop(depth, h, step.rows)
            leaving = [] if leaves is None else leaves.tolist()  # host sync: which rows run on decides the shapes of the next block
            if not any(leaving):
                continue
            go, stay = (torch.tensor([i for i, leave in enumerate(leaving) if leave is way], device=ids.device) for way in (True, False))
            gone = go if step.rows is None else step.rows[go]
            hidden[gone], depths[gone] = h[go], depth
            cache.owe(depth, h[go], gone, at[gone])
            if not len(stay):
                return Run(hidden[:, None], depths[:, None])
            step.keep(stay)
            h = h[stay]
        running = everyone if step.rows is None else step.rows
        hidden[running], depths[running] = h, L
        return Run(hidden[:, None], depths[:, None])


class KeysValuesAbove:
    """`Transformer.keys_values_above` in one product: k and v maps of all blocks stacked, the norms' weights folded in."""

    def __init__(self, model: Transformer):
        self.model, self.weight = model, None

    def _stack(self) -> None:
        """weight [L, 2 K head_dim, D]; bias [L, 1, 2 K head_dim]; the adapters' down [L, r, D] and up [L, 2 K head_dim, r]."""
        blocks = self.model.model["layers"]
        maps = [(b.self_attn.k_proj, b.self_attn.v_proj) for b in blocks]
        norms = torch.stack([b.input_layernorm.weight for b in blocks])[:, None]
        self.weight = torch.stack([torch.cat((k.weight, v.weight)) for k, v in maps]) * norms
        self.bias = None if maps[0][0].bias is None else torch.stack([torch.cat((k.bias, v.bias)) for k, v in maps])[:, None]
        self.k_norm = None if blocks[0].self_attn.k_norm is None else torch.stack([b.self_attn.k_norm.weight for b in blocks])[:, None, None]
        downs, ups = zip(*map(joined_adapters, maps))
        self.down = None if downs[0] is None else torch.stack(downs) * norms
        self.up = None if ups[0] is None else torch.stack(ups)

    def __call__(self, depth: int, h: Tensor, positions: Tensor) -> Tensor:
        """Residuals h [n, D], positions [n] -> [L - depth, n, 2, K, head_dim]."""
        if self.weight is None:
            self._stack()
        s, n = self.model.shape, len(h)
        x = F.rms_norm(h, h.shape[-1:], None, s.norm_eps)
        kv = F.linear(x, self.weight[depth:].flatten(0, 1)).view(n, s.blocks - depth, -1).transpose(0, 1)
        if self.bias is not None:
            kv = kv + self.bias[depth:]
        if self.down is not None:
            low = F.linear(x, self.down[depth:].flatten(0, 1)).view(n, s.blocks - depth, -1).transpose(0, 1)
            kv = torch.baddbmm(kv, low, self.up[depth:].mT)
        k, v = kv.unflatten(-1, (2, s.kv_heads, s.head_dim)).unbind(2)  # [L - depth, n, K, head_dim]
        if self.k_norm is not None:
            k = F.rms_norm(k, (s.head_dim,), None, s.norm_eps) * self.k_norm[depth:]
        return torch.stack((rotate(k, *turns(s, positions, h.dtype)), v), 2)
