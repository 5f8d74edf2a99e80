"""The transformer: Llama, Qwen2 and Qwen3 in one set of blocks; one forward that knows depths.

Contract. `model(ids)` gives logits at full depth. `model.run(ids, stop=...)` asks `stop` after
chosen blocks which tokens exit there. The residual of such a token is frozen. In every later
block it still leaves keys and values, made from the frozen residual by that block's own input
norm and projections, and runs nothing else: no query, no attention output, no MLP.

Depth, defined once for the whole project: the number of blocks that a token runs through. *Exit
at depth d* means that blocks 0..d-1 run for this token and blocks d..L-1 do not. Its next-token
distribution is lm_head(final_norm(h_d)), with h_d the residual after d blocks. Full depth is L.
Under a cap c, blocks c and later run for no token, and every token stops at depth c at the
latest.

Decisions. The model obeys `stop` and knows no policies. Parameter names are those of the Hugging
Face checkpoints, so that loading is a check and a copy. The attributes `exits`, `cap` and
`Linear.adapter` are set by exits.py and lora.py; all are None in a plain model.

Letters: B batch, T positions (tokens of this call), S positions that can be attended to, n tokens
picked out of B*T, D width, F feed-forward width, H heads, K kv heads, V vocabulary, L blocks, E
exits.

Papers: Touvron et al. 2023 (LLaMA), Zhang & Sennrich 2019 (RMSNorm), Su et al. 2021 (RoPE), Ainslie
et al. 2023 (grouped queries), Shazeer 2020 (SwiGLU); frozen keys and values: Elbayad et al. 2020,
Schuster et al. 2022 (CALM).
"""

import functools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoexit.cache import Cache

Keep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # stores new k and v -> all k and v


class Llama3Rope(NamedTuple):
    """Llama 3's extension of RoPE to longer contexts, under the names of config.json."""

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
    """Decides which tokens exit.

    Called at each depth d in `layers` (1 <= d < deepest) with h [n, D], the residuals after d
    blocks of the n tokens still running, and index [n], their places in B*T (None: all, in
    order). Returns which of them exit here, [n] bool, or None if none does.
    """

    @property
    def layers(self) -> Collection[int]: ...

    def __call__(self, depth: int, h: Tensor, index: Tensor | None) -> Tensor | None: ...


class Run(NamedTuple):
    hidden: Tensor  # [B, T, D] residual of each token at its own depth, before the final norm
    depths: Tensor  # [B, T] int64; 0 where the caller masked the token (padding)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Linear(nn.Linear):
    """A linear map with an optional adapter (lora.py)."""

    def __init__(self, width_in: int, width_out: int, bias: bool):
        super().__init__(width_in, width_out, bias)
        self.adapter: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y + self.adapter(x) if self.adapter is not None and self.adapter.enabled else y


class Places(NamedTuple):
    """Positions of the tokens of one call: made once a call, read by every block."""

    positions: Tensor  # [B, T] absolute positions
    cos: Tensor  # [B, T, 1, head_dim / 2]
    sin: Tensor
    mask: Tensor | None  # [B, 1, T, S] True where a query may look; None if none is needed
    causal: bool


@dataclass(frozen=True)
class Live:
    """The tokens still running after some have exited.

    Queries are padded to [B, width] for attention; nothing else is.
    """

    index: Tensor  # [n] places in B*T
    slots: Tensor  # [n] places in B*width
    width: int  # most live tokens of any row
    mask: Tensor  # [B, 1, width, S]


@functools.lru_cache(maxsize=8)
def rope_frequencies(shape: Shape, device: torch.device) -> Tensor:
    """[head_dim / 2] float32, radians a position; Llama 3 slows the low ones by `factor`."""
    even = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=device)
    freq = 1.0 / shape.rope_theta ** (even / shape.head_dim)
    if shape.rope_scaling is None:
        return freq
    factor, low, high, original = shape.rope_scaling
    cycles = original * freq / (2 * math.pi)  # within the original context
    keep = ((cycles - low) / (high - low)).clamp(0, 1)
    return keep * freq + (1 - keep) * freq / factor


def rotations(shape: Shape, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positions [...] -> cos and sin [..., 1, head_dim / 2], the same for all heads."""
    angles = positions[..., None, None].float() * rope_frequencies(shape, positions.device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x [..., heads, head_dim], the halves paired as in the checkpoints."""
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
        """Normed x [B, T, D]; k, v [B, K, S, head_dim] -> [B, T, D], or [n, D] of `live`."""
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
    if T == 1:  # one query a head: its group takes the place of queries, so keys are not repeated
        grouped = q.view(B, K, H // K, d)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(B, H, 1, d)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=H != K
    )


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
        """Residuals [B, T, D] -> the keys and values that they leave in this block."""
        return self.self_attn.keys_values(self.input_layernorm(h), cos, sin)

    def forward(self, h: Tensor, places: Places, live: Live | None, keep: Keep) -> Tensor:
        """Residuals h [B, T, D] -> after this block; tokens outside `live` only leave k and v."""
        x = self.input_layernorm(h)
        k, v = keep(*self.self_attn.keys_values(x, places.cos, places.sin))
        y = self.self_attn(x, k, v, places, live)
        if live is None:
            h = h + y
            return h + self.mlp(self.post_attention_layernorm(h))
        moving = h.flatten(0, 1)[live.index] + y
        moving = moving + self.mlp(self.post_attention_layernorm(moving))
        return h.flatten(0, 1).index_copy(0, live.index, moving).view_as(h)


class Stack(nn.Module):
    """Embedding, blocks and final norm: `model` in the names of a checkpoint."""

    def __init__(self, s: Shape):
        super().__init__()
        embedding = torch.empty(s.vocab, s.width)  # not drawn: that is slow on "meta"
        self.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.layers = nn.ModuleList(Block(s) for _ in range(s.blocks))
        self.norm = RMSNorm(s.width, s.norm_eps)


class Transformer(nn.Module):
    """A causal language model."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.model = Stack(shape)
        self.lm_head = None if shape.tied else nn.Linear(shape.width, shape.vocab, bias=False)
        self.exits: nn.Module | None = None
        self.cap: int | None = None
        self.fast_copy: object = None  # weights laid out for decoding, kept by fast.py
        self.stop_ids: frozenset[int] = frozenset()  # tokens that end a text
        self.name, self.revision, self.content = "", "", ""  # which weights: weights.load_model

    @property
    def blocks(self) -> list[Block]:
        return list(self.model.layers)  # type: ignore[arg-type]

    @property
    def full_depth(self) -> int:
        return self.shape.blocks

    @property
    def deepest(self) -> int:
        """The depth at which every token stops at the latest: the cap, or L."""
        return self.full_depth if self.cap is None else min(self.cap, self.full_depth)

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
        return F.linear(self.model.norm(h), self.readout_weight)

    @property
    def readout_weight(self) -> Tensor:
        """[V, D]; the embedding's in tied models."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight

    def run(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        stop: Stop | None = None,
        alive: Tensor | None = None,
    ) -> Run:
        """ids [B, T] -> the residual of each token at the depth where it stopped.

        positions [B, T]: absolute; default 0..T-1. cache: keys and values of earlier tokens; those
        of this call are added. stop: may end tokens early; None runs every block. alive [B, T]
        bool: tokens to run at all; the others (padding, idle rows) only leave keys and values.
        """
        h = self.model.embed_tokens(ids)
        places = self._places(ids, positions, cache)
        depths = torch.full_like(ids, self.deepest)
        live = None  # every token
        if alive is not None:
            depths = depths.masked_fill(~alive, 0)
            live = _live(alive, places, cache)
        for depth, block in enumerate(self.blocks[: self.deepest], start=1):
            if live is not None and live.width == 0:  # every token has exited
                _owe(cache, depth - 1, h, depths, places)
                break
            h = block(h, places, live, self._keep(depth - 1, block, places, cache))
            if stop is None or depth == self.deepest or depth not in stop.layers:
                continue
            leaves = stop(depth, *_running(h, live))
            if leaves is None or not leaves.any():  # host sync: the next shapes depend on it
                continue
            gone = leaves.nonzero().view(-1) if live is None else live.index[leaves]
            depths.view(-1)[gone] = depth
            live = _live(depths == self.deepest, places, cache)
        return Run(h, depths)

    def _keep(self, layer: int, block: Block, places: Places, cache: Cache | None) -> Keep:
        """Where one block's new keys and values go. Debts to this block are paid first."""
        if cache is None:
            return lambda k, v: (k, v)
        due = cache.due(layer)
        if due is not None:
            turn = rotations(self.shape, due.positions[:, None], self.dtype)
            k, v = block.keys_values(due.h[:, None], *turn)  # [n, K, 1, head_dim]
            cache.write_due(layer, due, k.squeeze(2), v.squeeze(2))
            cache.paid(due, layer + 1)
        return functools.partial(cache.write, layer, places.positions)

    def _places(self, ids: Tensor, positions: Tensor | None, cache: Cache | None) -> Places:
        B, T = ids.shape
        if positions is None:
            positions = torch.arange(T, device=ids.device).expand(B, T)
        aligned = cache is None or cache.start is not None
        S = T if cache is None else cache.span
        causal = aligned and S == T and T > 1
        mask = None if causal or (aligned and T == 1) else _look_back(positions, S)
        return Places(positions, *rotations(self.shape, positions, self.dtype), mask, causal)


def _running(h: Tensor, live: Live | None) -> tuple[Tensor, Tensor | None]:
    """Residuals [B, T, D] -> those of the tokens still running [n, D], and their places."""
    flat = h.flatten(0, 1)
    return (flat, None) if live is None else (flat[live.index], live.index)


def _owe(cache: Cache | None, depth: int, h: Tensor, depths: Tensor, places: Places) -> None:
    """Leave the keys and values of deeper blocks for later; padding leaves none."""
    if cache is not None:
        rows, columns = depths.nonzero(as_tuple=True)
        cache.owe(depth, h[rows, columns], rows, places.positions[rows, columns])


def _look_back(positions: Tensor, S: int) -> Tensor:
    """Query positions [B, T] -> [B, 1, T, S]: a query sees its own position and those before."""
    return (torch.arange(S, device=positions.device) <= positions[..., None])[:, None]


def _live(alive: Tensor, places: Places, cache: Cache | None) -> Live:
    """alive [B, T] bool -> packed tokens, padded queries. Padding queries see position 0 only."""
    B, T = alive.shape
    S = T if cache is None else cache.span
    index = alive.view(-1).nonzero().view(-1)
    width = int(alive.sum(1).max())
    rank = (alive.cumsum(1) - 1).view(-1)[index]  # of the token within its row
    slots = index.div(T, rounding_mode="floor") * width + rank
    here = places.positions.reshape(-1)[index]
    positions = here.new_zeros(B * width).index_copy(0, slots, here).view(B, width)
    return Live(index, slots, width, _look_back(positions, S))
