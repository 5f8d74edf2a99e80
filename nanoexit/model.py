"""The transformer: Llama, Qwen2 and Qwen3 from one set of blocks, and one forward that knows depths.

Contract. `model(ids)` gives logits at full depth. `model.run(ids, stop=...)` asks `stop` after chosen blocks which tokens
exit there; such a token's residual is frozen. In every later block it still leaves keys and values, made from the frozen
residual by that block's own input norm and projections, and runs nothing else: no query, no attention output, no MLP.

Depth, defined once for the whole project: the number of blocks that a token runs through. *Exit at depth d* means that
blocks 0..d-1 run for this token and blocks d..L-1 do not; its next-token distribution is lm_head(final_norm(h_d)), with
h_d the residual after d blocks. Full depth is L.

Decisions. The model obeys `stop` and knows no policies. Parameter names are those of the Hugging Face checkpoints, so
that loading is a check and a copy. The attributes `exits` and `Linear.adapter` are places for what exits.py and lora.py
attach; both are None in a plain model.

Letters: B batch, T positions (tokens of this call), S positions that can be attended to, n tokens picked out of B*T,
D width, F feed-forward width, H heads, K kv heads, V vocabulary, L blocks, E exits.

Papers: Touvron et al. 2023 (LLaMA), Zhang & Sennrich 2019 (RMSNorm), Su et al. 2021 (RoPE), Ainslie et al. 2023 (grouped
queries), Shazeer 2020 (SwiGLU); freezing and filling keys: Elbayad et al. 2020, Schuster et al. 2022 (CALM).
"""

import functools
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Llama3Rope(NamedTuple):
    """Llama 3's stretching of RoPE to longer contexts; the names are those of the checkpoints' rope_scaling."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Shape:
    """The sizes and switches that tell one checkpoint's architecture from another's."""

    family: str  # model_type of config.json: llama, qwen2 or qwen3
    vocab: int
    width: int
    ffn: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: Llama3Rope | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    max_positions: int = 2048


class Stop(Protocol):
    """Who may end a token's computation. Asked at depth d in `layers` (1 <= d < L) with h [n, D], the residuals after d
    blocks of the n tokens still running, and index [n], their places in B*T (None: all of them, in order). Answers
    which exit here, [n] bool, or None for nobody."""

    layers: Collection[int]

    def __call__(self, depth: int, h: Tensor, index: Tensor | None) -> Tensor | None: ...


class Run(NamedTuple):
    hidden: Tensor  # [B, T, D] residual of each token at its own depth, before the final norm
    depths: Tensor  # [B, T] int64; 0 where the caller kept a token out from the start (padding)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Linear(nn.Linear):
    """A linear map that an adapter may add to (lora.py)."""

    def __init__(self, width_in: int, width_out: int, bias: bool):
        super().__init__(width_in, width_out, bias)
        self.adapter: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y + self.adapter(x) if self.adapter is not None and self.adapter.enabled else y


class Places(NamedTuple):
    """Where the tokens of one call stand: made once a call, read by every block."""

    positions: Tensor  # [B, T] absolute positions
    cos: Tensor  # [B, T, 1, head_dim / 2]
    sin: Tensor
    mask: Tensor | None  # [B, 1, T, S] True where a query may look; None where causality or a single query needs no mask
    causal: bool


class Live(NamedTuple):
    """The tokens that run on when some have exited. Queries are padded to [B, width] for attention, nothing else is."""

    index: Tensor  # [n] places in B*T
    slots: Tensor  # [n] places in B*width
    width: int  # most live tokens of any row
    mask: Tensor  # [B, 1, width, S]


def rope_frequencies(shape: Shape, device: torch.device) -> Tensor:
    """[head_dim / 2] float32 radians a position; Llama 3 divides the slow ones by `factor`, with a ramp between."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=device) / shape.head_dim
    freq = 1.0 / (shape.rope_theta**exponents)
    if shape.rope_scaling is None:
        return freq
    factor, low, high, original = shape.rope_scaling
    turns = original * freq / (2 * math.pi)  # full turns within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * freq + (1 - keep) * freq / factor


_frequencies = functools.lru_cache(maxsize=8)(rope_frequencies)


def turns(shape: Shape, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positions [...] -> cos and sin [..., 1, head_dim / 2], one for all heads."""
    angles = positions[..., None, None].float() * _frequencies(shape, positions.device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, halves paired as in the checkpoints: x [..., heads, head_dim], cos and sin [..., 1, head_dim / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = s.heads, s.kv_heads, s.head_dim
        self.q_proj = Linear(s.width, s.heads * s.head_dim, bias=s.qkv_bias)
        self.k_proj = Linear(s.width, s.kv_heads * s.head_dim, bias=s.qkv_bias)
        self.v_proj = Linear(s.width, s.kv_heads * s.head_dim, bias=s.qkv_bias)
        self.o_proj = Linear(s.heads * s.head_dim, s.width, bias=s.o_bias)
        self.q_norm = RMSNorm(s.head_dim, s.norm_eps) if s.qk_norm else None
        self.k_norm = RMSNorm(s.head_dim, s.norm_eps) if s.qk_norm else None

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized residuals [B, T, D] -> keys and values, each [B, K, T, head_dim]."""
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        k = k if self.k_norm is None else self.k_norm(k)
        return rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[..., D] -> [..., H, head_dim]."""
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        q = q if self.q_norm is None else self.q_norm(q)
        return rotate(q, cos, sin)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, places: Places, live: Live | None) -> Tensor:
        """Normalized residuals x [B, T, D]; k, v [B, K, S, head_dim] -> [B, T, D], or [n, D] where only `live` ask."""
        cos, sin = places.cos, places.sin
        if live is None:
            q = self.queries(x, cos, sin)  # [B, T, H, head_dim]
            y = attend(q.transpose(1, 2), k, v, places.mask, places.causal)
            return self.o_proj(y.transpose(1, 2).flatten(2))
        cos, sin = cos.flatten(0, 1)[live.index], sin.flatten(0, 1)[live.index]
        q = self.queries(x.flatten(0, 1)[live.index], cos, sin)  # [n, H, head_dim]
        padded = q.new_zeros(x.shape[0] * live.width, *q.shape[1:]).index_copy(0, live.slots, q)
        y = attend(padded.unflatten(0, (-1, live.width)).transpose(1, 2), k, v, live.mask, False)
        return self.o_proj(y.transpose(1, 2).flatten(0, 1)[live.slots].flatten(1))  # [n, D]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Softmax attention with grouped queries: q [B, H, T, d]; k, v [B, K, S, d] -> [B, H, T, d]."""
    B, H, T, d = q.shape
    K = k.shape[1]
    if T == 1:  # one query a head: its group can stand where queries stand, so keys are never repeated
        return F.scaled_dot_product_attention(q.view(B, K, H // K, d), k, v, attn_mask=mask).reshape(B, H, 1, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=H != K)


class MLP(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.gate_proj = Linear(s.width, s.ffn, bias=s.mlp_bias)
        self.up_proj = Linear(s.width, s.ffn, bias=s.mlp_bias)
        self.down_proj = Linear(s.ffn, s.width, bias=s.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.input_layernorm = RMSNorm(s.width, s.norm_eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = RMSNorm(s.width, s.norm_eps)
        self.mlp = MLP(s)

    def keys_values(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals [B, T, D] -> what they leave in this block for later tokens."""
        return self.self_attn.keys_values(self.input_layernorm(h), cos, sin)

    def forward(self, h: Tensor, places: Places, live: Live | None, write) -> Tensor:
        """Residuals h [B, T, D] -> the same after this block; tokens outside `live` leave keys and values, no more."""
        x = self.input_layernorm(h)
        k, v = write(*self.self_attn.keys_values(x, places.cos, places.sin))
        y = self.self_attn(x, k, v, places, live)
        if live is None:
            h = h + y
            return h + self.mlp(self.post_attention_layernorm(h))
        moving = h.flatten(0, 1)[live.index] + y
        moving = moving + self.mlp(self.post_attention_layernorm(moving))
        return h.flatten(0, 1).index_copy(0, live.index, moving).view_as(h)


class Transformer(nn.Module):
    """A causal language model. `exits` holds its exit heads where some are attached, `stop_ids` the tokens that end a text."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding.from_pretrained(torch.empty(shape.vocab, shape.width), freeze=False),  # not drawn: that is slow on "meta"
            "layers": nn.ModuleList(Block(shape) for _ in range(shape.blocks)),
            "norm": RMSNorm(shape.width, shape.norm_eps),
        })
        self.lm_head = None if shape.tied else nn.Linear(shape.width, shape.vocab, bias=False)
        self.exits: nn.Module | None = None
        self.stop_ids: frozenset[int] = frozenset()
        self.name, self.revision = "", ""  # where the weights came from, and which they are; set by weights.load_model

    @property
    def full_depth(self) -> int:
        return self.shape.blocks

    @property
    def device(self) -> torch.device:
        return self.model["norm"].weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model["norm"].weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> logits [B, T, V], every token at full depth."""
        return self.readout(self.run(ids).hidden)

    def readout(self, h: Tensor) -> Tensor:
        """Residuals [..., D] of any depth -> logits [..., V]."""
        return F.linear(self.model["norm"](h), self.readout_weight)

    @property
    def readout_weight(self) -> Tensor:
        """[V, D], the embedding's where they are tied."""
        return self.model["embed_tokens"].weight if self.lm_head is None else self.lm_head.weight

    def run(self, ids: Tensor, positions: Tensor | None = None, cache=None, stop: Stop | None = None,
            alive: Tensor | None = None, freeze: bool = True) -> Run:
        """ids [B, T] -> each token's residual at the depth where it ended.

        positions [B, T]: absolute, default 0..T-1. cache (cache.Cache): keys and values of earlier tokens; this call's are
        added. stop: may end tokens early; None is full depth. alive [B, T] bool: tokens to run at all, default all; the
        others (padding, rows that finished) only leave keys and values. freeze=False is the `unfrozen` ablation:
        the readout is taken at the exit, but the residual goes on to full depth.
        """
        h = self.model["embed_tokens"](ids)
        places = self._places(ids, positions, cache)
        depths = torch.full_like(ids, self.full_depth)
        live = asked = None  # None: every token
        if alive is not None:
            depths = depths.masked_fill(~alive, 0)
            live = asked = _live(alive, places, cache)
        early = []  # of the unfrozen ablation: (places, residuals at the exit)
        for depth, block in enumerate(self.model["layers"], start=1):
            if live is not None and live.width == 0:  # nobody runs on: the cache owes the rest of their keys and values
                if cache is not None:
                    rows, columns = depths.nonzero(as_tuple=True)  # not padding
                    cache.owe(depth - 1, h[rows, columns], rows, places.positions[rows, columns])
                break
            if cache is not None:
                cache.settle(depth - 1, self.keys_values_above)
            h = block(h, places, live, functools.partial(cache.write, depth - 1, places) if cache else _pass)
            if stop is None or depth == self.full_depth or depth not in stop.layers or (asked and asked.width == 0):
                continue
            residual = h.flatten(0, 1) if asked is None else h.flatten(0, 1)[asked.index]  # [n, D]
            leaves = stop(depth, residual, None if asked is None else asked.index)
            if leaves is None or not leaves.any():  # host sync: which tokens run on decides the shapes of the next block
                continue
            gone = leaves.nonzero().view(-1) if asked is None else asked.index[leaves]
            depths.view(-1)[gone] = depth
            asked = _live(depths == self.full_depth, places, cache)
            live = asked if freeze else live
            early += [] if freeze else [(gone, residual[leaves])]
        for gone, residual in early:
            h = h.flatten(0, 1).index_copy(0, gone, residual).view_as(h)
        return Run(h, depths)

    def keys_values_above(self, depth: int, h: Tensor, positions: Tensor) -> Tensor:
        """What residuals h [n, D] frozen after `depth` blocks leave at positions [n] in the others: [L - depth, n, 2, K, head_dim]."""
        cos, sin = turns(self.shape, positions[:, None], self.dtype)  # [n, 1, 1, head_dim / 2]
        made = [torch.stack(block.keys_values(h[:, None], cos, sin), 1) for block in self.model["layers"][depth:]]  # [n, 2, K, 1, head_dim]
        return torch.stack(made).squeeze(-2)

    def _places(self, ids: Tensor, positions: Tensor | None, cache) -> Places:
        B, T = ids.shape
        if positions is None:
            positions = torch.arange(T, device=ids.device).expand(B, T)
        aligned = cache is None or cache.start is not None
        S = T if cache is None else cache.span
        causal = aligned and S == T and T > 1
        mask = None if causal or (aligned and T == 1) else _look_back(positions, S)
        return Places(positions, *turns(self.shape, positions, self.dtype), mask, causal)


def _look_back(positions: Tensor, S: int) -> Tensor:
    """Query positions [B, T] -> [B, 1, T, S]: a query sees the keys at its own position and before."""
    return (torch.arange(S, device=positions.device) <= positions[..., None])[:, None]


def _pass(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k, v


def _live(alive: Tensor, places: Places, cache) -> Live:
    """alive [B, T] bool -> the packed tokens and their padded queries. Padding queries look at position 0 only."""
    B, T = alive.shape
    S = T if cache is None else cache.span
    if T == 1:
        index = alive.view(-1).nonzero().view(-1)
        mask = _look_back(places.positions, S) if places.mask is None else places.mask
        return Live(index, index, 1 if len(index) else 0, mask)
    index = alive.view(-1).nonzero().view(-1)
    width = int(alive.sum(1).max())
    rank = (alive.cumsum(1) - 1).view(-1)[index]  # the how-manieth live token of its row
    slots = index.div(T, rounding_mode="floor") * width + rank
    positions = places.positions.new_zeros(B * width).index_copy(0, slots, places.positions.reshape(-1)[index])
    return Live(index, slots, width, _look_back(positions.view(B, width), S))
