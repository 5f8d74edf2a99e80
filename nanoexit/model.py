"""The transformer: Llama, Qwen2 and Qwen3 in one set of blocks; one forward with early exits.

Contract. `model(ids)` gives logits at full depth. `model.run(ids, stop=...)` asks `stop`, after the
blocks that it chooses, which tokens exit there. The residual of such a token is frozen. In every
later block the token still leaves keys and values, made from its frozen residual by that block's
own input norm and projections. Nothing else runs: no query, no attention output, no MLP. (With
`exits.shortcuts`, an affine map moves the frozen residual on at each later exit depth: exits.py.)

Depth, defined once for the whole project: the number of blocks that a token runs through. *Exit
at depth d* means that blocks 0..d-1 run for this token and blocks d..L-1 do not. Its next-token
distribution is lm_head(final_norm(h_d)), with h_d the residual after d blocks. Full depth is L.
Under a cap c, every token stops at depth c at the latest.

Decisions. The model obeys `stop` and knows no policies. Parameter names are those of the Hugging
Face checkpoints, so that loading is a check and a copy. The attributes `exits`, `cap` and
`Linear.adapter` are set by exits.py and lora.py and are None in a plain model.

Letters: B batch, T positions of this call, S positions that can be attended to, n tokens selected
from B*T, D width, H heads, K kv heads, d head_dim, V vocabulary, L blocks, E exits.

Papers: Touvron et al. 2023 (LLaMA), Su et al. 2021 (RoPE), Ainslie et al. 2023 (grouped queries),
Shazeer 2020 (SwiGLU); frozen keys and values: Elbayad et al. 2020, Schuster et al. 2022 (CALM)."""

import functools
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoexit.cache import Cache


class Llama3Rope(NamedTuple):
    """Llama 3's extension of RoPE to longer contexts, under the names of config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Shape:
    """The sizes and switches that distinguish one architecture from another."""

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
    """Decides which tokens exit.
    Called at each depth d in `layers` (1 <= d < deepest) with h [n, D], the residuals after d
    blocks of the n tokens still running, and index [n], their indices into B*T (None: all, in
    order). Returns which of them exit here, [n] bool, or None if none do."""

    @property
    def layers(self) -> Collection[int]: ...

    def __call__(self, depth: int, h: Tensor, index: Tensor | None) -> Tensor | None: ...


class Run(NamedTuple):
    hidden: Tensor  # [B, T, D] what each token is read out from: its residual, or a lens of it
    depths: Tensor  # [B, T] int64; 0 where the caller masked the token (padding)


class Linear(nn.Linear):
    """A linear map with an optional adapter (lora.py)."""

    def __init__(self, width_in: int, width_out: int, bias: bool):
        super().__init__(width_in, width_out, bias)
        self.adapter: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.adapter is not None and self.adapter.enabled:
            y += self.adapter(x)
        return y


def unit(h: Tensor) -> Tensor:
    """Residuals [..., D] divided by their RMS, float32."""
    return F.rms_norm(h.float(), h.shape[-1:])


@functools.cache
def rope_frequencies(shape: Shape, device: torch.device) -> Tensor:
    """[d / 2] float32, radians per position; Llama 3 divides the low ones by `factor`."""
    even = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=device)
    freq = 1.0 / shape.rope_theta ** (even / shape.head_dim)
    if shape.rope_scaling is None:
        return freq
    factor, low, high, original = shape.rope_scaling
    cycles = original * freq / (2 * math.pi)  # within the original context
    keep = ((cycles - low) / (high - low)).clamp(0, 1)
    return keep * freq + (1 - keep) * freq / factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x [..., heads, head_dim], the halves paired as in the checkpoints."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Places(NamedTuple):
    """Where the tokens of one call are, what they see, and which of them still run."""

    positions: Tensor  # [B, T] absolute
    cos: Tensor  # [B, T, 1, head_dim / 2], the same for all heads
    sin: Tensor
    cache: Cache | None
    mask: Tensor | None  # [B, 1, T, S] bool: what a query sees; None: itself and all before
    at: Tensor | None  # [n] indices into B*T of the tokens that still run; None: all of them

    @property
    def ended(self) -> bool:
        """Whether every token has exited."""
        return self.at is not None and not len(self.at)

    def pick(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> the running tokens [n, ...], or x itself if all run."""
        return x if self.at is None else x.flatten(0, 1)[self.at]

    def put(self, x: Tensor, h: Tensor) -> Tensor:
        """Running tokens x -> h [B, T, ...] with x in their places."""
        return x if self.at is None else h.flatten(0, 1).index_copy(0, self.at, x).view_as(h)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention with grouped queries: q [B, T, H, d]; k, v [B, K, S, d] -> [B, T, H, d]."""
    if q.requires_grad and v.dtype == torch.bfloat16 and v.is_cpu:
        with torch.autocast("cpu", enabled=False):  # in bfloat16, gradients take up to 10 x longer
            return attend(q.float(), k.float(), v.float(), mask).to(v.dtype)
    (_, T, H, _), K, q = q.shape, k.shape[1], q.transpose(1, 2)
    causal = mask is None and T > 1
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=H != K)
    return y.transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = s.heads, s.kv_heads, s.head_dim
        self.q_proj = Linear(s.width, s.heads * s.head_dim, bias=s.qkv_bias)
        self.k_proj = Linear(s.width, s.kv_heads * s.head_dim, bias=s.qkv_bias)
        self.v_proj = Linear(s.width, s.kv_heads * s.head_dim, bias=s.qkv_bias)
        self.o_proj = Linear(s.heads * s.head_dim, s.width, bias=s.o_bias)
        self.q_norm = nn.RMSNorm(s.head_dim, s.norm_eps) if s.qk_norm else None
        self.k_norm = nn.RMSNorm(s.head_dim, s.norm_eps) if s.qk_norm else None

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized residuals [B, T, D] -> keys and values, each [B, K, T, head_dim]."""
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        k = k if self.k_norm is None else self.k_norm(k)
        return rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        """Normalized residuals x [..., D] of running tokens; k, v [B, K, S, d] -> [..., D]."""
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        q = q if self.q_norm is None else self.q_norm(q)
        q = rotate(q, places.pick(places.cos), places.pick(places.sin))
        if places.at is not None:  # other tokens get a zero query, whose output is not used
            q = places.put(q, q.new_zeros(*places.positions.shape, self.heads, self.head_dim))
        y = attend(q, k, v, places.mask)
        return self.o_proj(places.pick(y).flatten(-2))


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
        self.input_layernorm = nn.RMSNorm(s.width, s.norm_eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = nn.RMSNorm(s.width, s.norm_eps)
        self.mlp = MLP(s)

    def forward(self, h: Tensor, layer: int, places: Places) -> Tensor:
        """Residuals h [B, T, D] -> after this block; tokens that exited only leave k and v."""
        x = self.input_layernorm(h)
        k, v = self.self_attn.keys_values(x, places.cos, places.sin)  # of this call's tokens
        if places.cache is not None:
            k, v = places.cache.write(layer, places.positions, k, v)  # all that they may attend to
        if places.ended:
            return h
        moving = places.pick(h) + self.self_attn(places.pick(x), k, v, places)
        moving = moving + self.mlp(self.post_attention_layernorm(moving))
        return places.put(moving, h)


class Stack(nn.Module):
    """Embedding, blocks and final norm, which checkpoints call `model`."""

    def __init__(self, s: Shape):
        super().__init__()
        embedding = torch.empty(s.vocab, s.width)  # not initialized: slow on "meta"
        self.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.layers = nn.ModuleList(Block(s) for _ in range(s.blocks))
        self.norm = nn.RMSNorm(s.width, s.norm_eps)


class Transformer(nn.Module):
    """A causal language model."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.model = Stack(shape)
        self.lm_head = None if shape.tied else nn.Linear(shape.width, shape.vocab, bias=False)
        self.exits: Any = None
        self.cap: int | None = None
        self.logits_chunk = 1024  # tokens whose logits a loss holds in memory at once
        self.fast_products: dict[Any, Any] = {}  # weights laid out for decoding: fast.py
        self.stop_ids: frozenset[int] = frozenset()  # tokens that end a text
        self.name = self.revision = self.content = ""  # which weights: weights.load_model

    @property
    def blocks(self) -> list[Block]:
        return list(self.model.layers)  # type: ignore[arg-type]

    @property
    def full_depth(self) -> int:
        return self.shape.blocks

    @property
    def deepest(self) -> int:
        """The largest depth of a token: the cap, or L."""
        return self.cap or self.full_depth

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> logits [B, T, V], every token at full depth (or at the cap)."""
        return self.readout(self.run(ids).hidden)

    def readout(self, h: Tensor) -> Tensor:
        """Residuals [..., D] of any depth -> logits [..., V]."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(self.model.norm(h), head.weight)

    def run(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        stop: Stop | None = None,
        alive: Tensor | None = None,
        sees: Tensor | None = None,
    ) -> Run:
        """ids [B, T] -> the residual of each token at the depth where it stopped.
        positions [B, T]: absolute; default 0..T-1. cache: keys and values of earlier tokens; those
        of this call are added. stop: None runs every block. alive [B, T] bool: the tokens to run;
        others (padding, idle rows) only leave keys and values. sees [B, T, T] bool, for calls
        without a cache: what each token may look at; None: itself and all before it."""
        T, device = ids.shape[1], ids.device
        if positions is None:
            positions = torch.arange(T, device=device).expand(ids.shape)
        span, aligned = (T, True) if cache is None else (cache.span, cache.aligned)
        if sees is None and not (aligned and T in (1, span)):
            sees = torch.arange(span, device=device) <= positions[..., None]
        mask = None if sees is None else sees[:, None]
        angles = positions[..., None, None].float() * rope_frequencies(self.shape, device)
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        depths, at = torch.full_like(ids, self.deepest), None
        if alive is not None:
            depths, at = depths.masked_fill(~alive, 0), alive.flatten().nonzero()[:, 0]  # host sync
        places = Places(positions, cos, sin, cache, mask, at)
        h = self.model.embed_tokens(ids)
        passed = {}  # residuals at the depths where tokens exited, before they are carried on
        for depth, block in enumerate(self.blocks[: self.deepest], start=1):
            if cache is None and places.ended:
                break  # no token is left to read what later blocks would store
            h = self.carried(block(h, depth - 1, places), depths, depth)
            if stop is None or places.ended or depth == self.deepest or depth not in stop.layers:
                continue
            leaves = stop(depth, places.pick(h).flatten(0, -2), places.at)
            if leaves is None or not leaves.any():  # host sync: the next shapes depend on it
                continue
            # Until the loop ends, the depth of a token still running is `deepest`.
            depths[depths == self.deepest] = torch.where(leaves, depth, self.deepest)
            passed[depth] = h
            places = places._replace(at=(depths == self.deepest).flatten().nonzero()[:, 0])
        return Run(self.read_from(passed | {self.deepest: h}, depths), depths)

    def read_from(self, passed: dict[int, Tensor], depths: Tensor) -> Tensor:
        """Residuals [..., D] at these depths, and where tokens stop [...] -> what is read out."""
        *_, h = passed.values()
        for depth, x in passed.items() if self.exits and self.exits.lenses else ():
            at = (depths == depth).nonzero(as_tuple=True)
            h = h.index_put(at, self.lensed(x[at], depth))
        return h

    def lensed(self, h: Tensor, depth: int) -> Tensor:
        """Residuals h [n, D] at this depth -> what is read out: h, or its lens if there is one."""
        lenses = self.exits.lenses if self.exits else {}
        return lenses[str(depth)](h) if str(depth) in lenses else h

    def carried(self, h: Tensor, depths: Tensor, depth: int) -> Tensor:
        """Residuals h [..., D] at this depth, of tokens that stop at depths [...] -> the same, but
        tokens that exited before take the shortcut that ends here, if there is one."""
        if self.exits is None or str(depth) not in self.exits.shortcuts:
            return h
        at = (depths < depth).nonzero(as_tuple=True)
        return h.index_put(at, self.exits.shortcuts[str(depth)](h[at]))
