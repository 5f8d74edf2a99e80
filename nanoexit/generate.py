"""Generation: prefill, decode, sample, in batches of ragged rows that are replaced as they finish.

Contract. Ragged prompts in, one `Generation` per prompt out, in the same order. The noise of row i
is a function of (seed, i) and is drawn before the row starts, so a row writes the same text alone
or in a batch of any size. Every readout chooses its depth, including the first. So prefill runs the
prompt except for its last token, which is decoded like all later ones.
Decisions. Equal prompts in a batch are prefilled once; forced tokens are read in one forward. A
token is drawn by inverting the cumulative distribution at one uniform number. Host syncs per step:
those of the model's `run`, one for the tokens, and one if some rows are idle."""

import functools
import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanoexit.cache import Cache
from nanoexit.config import Rule, UserError, check_values
from nanoexit.exits import Ask, Asked, Policy, parse_policy, target_chance
from nanoexit.fast import FastModel
from nanoexit.model import Transformer
from nanoexit.score import Rows, pad, readout_kl


@dataclass
class Generation:
    """One response. Log p is the model's own: temperature 1, nothing truncated; 0 if forced."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    exit_logprobs: list[float] = field(default_factory=list)  # log p(exit at depths[i]), or 0
    finish: str = ""  # "stop" (the last token is one of stop_ids) or "length"; "" in progress


@dataclass(frozen=True)
class Sampling:
    """Further settings of `generate`."""

    top_p: float = 1.0  # (0, 1]: sample from the smallest set of tokens with this probability
    top_k: int = 0  # sample from the k likeliest tokens; 0 is off
    stop_ids: Collection[int] | None = None  # tokens that end a row; None: the model's own
    batch_size: int | None = None  # rows that decode together; None: all
    forced: Rows = ()  # first tokens of each response, given instead of drawn
    streams: Sequence[int] = ()  # the number of each row's noise; default 0, 1, ...
    on_finish: Callable[[], object] = lambda: None  # called when a row ends
    fast: bool = True  # decode with fast.py


@dataclass
class Row:
    """A prompt and its response so far."""

    number: int
    prompt: Sequence[int]
    forced: Sequence[int]
    noise: np.ndarray  # [max_new_tokens, 1 + depths of the policy] uniform in [0, 1)
    out: Generation

    @property
    def last(self) -> int:
        """The token that the next step reads."""
        return (self.out.tokens or self.prompt)[-1]

    @property
    def position(self) -> int:
        """The position of `last`."""
        return len(self.prompt) - 1 + len(self.out.tokens)


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Rows,
    policy: str | Policy = "full",
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int | Sequence[int] = 0,
    settings: Sampling = Sampling(),
) -> list[Generation]:
    """Continue every prompt (token ids) by up to max_new_tokens tokens.
    policy: see exits.parse_policy. temperature 0 takes the likeliest token. UserError for a prompt
    that is empty or too long, a value out of range, and logits that are not finite."""
    policy = parse_policy(policy, model) if isinstance(policy, str) else policy
    seeds = seed if isinstance(seed, Sequence) else [seed]
    decoder = _Decoder(model, policy, prompts, max_new_tokens, temperature, seeds, settings)
    while decoder.waiting or decoder.rows:
        decoder.admit()
        if decoder.rows:
            decoder.step()
    return decoder.results


@dataclass
class _Decoder:
    """The rows in progress. A slot is a place in the batch and the cache; free slots idle."""

    model: Transformer
    policy: Policy
    prompts: Rows
    max_new_tokens: int
    temperature: float
    seed: Sequence[int]
    settings: Sampling

    def __post_init__(self) -> None:
        self.check_settings()
        self.check_prompts()
        size = min(self.settings.batch_size or len(self.prompts), len(self.prompts))
        self.results = [Generation() for _ in self.prompts]
        self.waiting = deque(range(len(self.prompts)))
        self.slots: list[Row | None] = [None] * size
        longest = max(map(len, self.prompts), default=0)
        self.cache = self.new_cache(size, longest + self.max_new_tokens)
        self.engine = FastModel(self.model, size) if self.settings.fast else self.model

    def check_settings(self) -> None:
        rules = {"max_new_tokens": Rule(int, 1), "batch_size": Rule(int | None, 1)}
        rules |= {"temperature": Rule(float), "top_k": Rule(int), "top_p": Rule(float, 1e-9, 1)}
        check_values({**vars(self.settings), **vars(self)}, rules, "generate")

    def check_prompts(self) -> None:
        most, vocab = self.model.shape.max_positions, self.model.shape.vocab
        for row, prompt in enumerate(self.prompts):
            if not len(prompt):
                raise UserError(f"prompt {row} is empty: expected at least one token")
            if not 0 <= min(prompt) <= max(prompt) < vocab:
                raise UserError(f"prompt {row} has a token outside 0..{vocab - 1}")
            if len(prompt) + self.max_new_tokens > most:
                found = f"{len(prompt)} tokens, plus up to {self.max_new_tokens} to generate"
                raise UserError(f"prompt {row} has {found}; the model has only {most} positions")

    @property
    def rows(self) -> list[Row]:
        return [row for row in self.slots if row is not None]

    def admit(self) -> None:
        """Fill free slots, several with one prefill; with nothing waiting, shrink the batch."""
        free = [slot for slot, row in enumerate(self.slots) if row is None]
        if self.waiting and len(free) >= max(1, len(self.slots) // 4):
            slots = free[: len(self.waiting)]
            for slot in slots:
                self.slots[slot] = self.new_row(self.waiting.popleft())
            self.prefill(slots)
        elif not self.waiting and len(free) >= len(self.slots) / 2:
            taken = [slot for slot, row in enumerate(self.slots) if row is not None]
            self.cache.select(torch.tensor(taken, device=self.model.device))
            self.slots = list(self.rows)

    def new_row(self, number: int) -> Row:
        settings = self.settings
        stream = settings.streams[number] if settings.streams else number
        size = (self.max_new_tokens, 1 + len(self.policy.layers(self.model)))
        noise = np.random.default_rng([*self.seed, stream]).random(size, dtype=np.float32)
        forced = settings.forced[number][: self.max_new_tokens] if settings.forced else ()
        return Row(number, self.prompts[number], forced, noise, self.results[number])

    def new_cache(self, rows: int, capacity: int) -> Cache:
        model, s = self.model, self.model.shape
        size = (model.deepest, rows, 2, s.kv_heads, capacity, s.head_dim)
        return Cache(torch.zeros(size, device=model.device, dtype=model.dtype))

    def prefill(self, slots: list[int]) -> None:
        """Run prompts but for their last tokens, to the deepest depth; then read forced tokens."""
        device, rows = self.model.device, [row for i in slots if (row := self.slots[i])]
        prompts = [tuple(row.prompt[:-1]) for row in rows]
        distinct, F = list(dict.fromkeys(prompts)), max(len(row.forced) for row in rows)
        T = max(map(len, distinct))
        cache = self.new_cache(len(distinct), T + F)
        cache.span = T
        if T:
            self.model.run(pad(distinct, device), cache=cache)
        cache.select(torch.tensor([distinct.index(prompt) for prompt in prompts], device=device))
        if F:
            alive = pad([[1] * len(row.forced) for row in rows], device).bool()
            exits = self.run(self.model, rows, F, cache, alive)[2:]  # depths, log p(exit)
            tokens = pad([row.forced for row in rows], device)[alive]
            owners = [row for row in rows for _ in row.forced]
            self.note(owners, tokens, torch.zeros_like(exits[1]), *exits)  # their log p is 0
        self.cache.admit(torch.tensor(slots, device=device), cache)

    def step(self) -> None:
        """One token for every row in progress."""
        rows, alive = self.rows, None
        batch = [row or rows[0] for row in self.slots]  # a free slot writes where no row reads
        if len(rows) < len(batch):
            alive = pad([[row is not None] for row in self.slots], self.model.device)
        u, hidden, *exits = self.run(self.engine, batch, 1, self.cache, alive)
        p = self.engine.readout(hidden).float().softmax(-1)  # [n, V]
        tokens = sample(p, u, self.temperature, self.settings.top_p, self.settings.top_k)
        self.note(rows, tokens, p.gather(-1, tokens[:, None])[:, 0].log(), *exits)

    def run(self, engine: Any, batch: list[Row], T: int, cache: Cache, alive: Any) -> tuple:
        """Feed each row its next T tokens under the policy; alive [B, T]: None is all. Of the n
        alive -> noise to draw a token [n], what is read out [n, D], depths [n], log p(exit) [n]."""
        device, starts = self.model.device, [row.position for row in batch]
        cache.span, cache.aligned = max(starts) + T, len(set(starts)) == 1
        ids = pad([[row.last, *row.forced][:T] for row in batch], device)
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(T, device=device)
        noise = np.concatenate([row.noise[len(row.out.tokens) :][:T] for row in batch])
        u = torch.from_numpy(noise).to(device)  # [B * T, 1 + depths of the policy]
        run = functools.partial(engine.run, ids, positions, cache, alive=alive)
        policy = self.policy
        if policy.name == "kl":
            final = run(stop=None).hidden.flatten(0, 1)  # first to the end, forced tokens together

            def chance(asked: Asked) -> Tensor:
                early = asked.model.lensed(asked.h, asked.depth)
                kl = readout_kl(asked.model, final[asked.at], early)
                return target_chance(kl, self.policy.value)

            policy = Policy("kl", policy.value, chance)
        ask = Ask(self.model, policy, len(u), u[:, 1:])
        hidden, depths = (x.flatten(0, 1) for x in run(stop=ask))
        n: Any = slice(None) if alive is None else alive.flatten().nonzero()[:, 0]  # host sync
        return u[n, 0], hidden[n], depths[n], ask.logprobs(depths)[n]

    def note(self, rows: list[Row], *columns: Tensor) -> None:
        """Add tokens, their log p, depths and log p(exit), each [n], to their rows; end rows."""
        own, found = self.settings.stop_ids, torch.stack(columns).tolist()  # host sync
        for row, token, logp, depth, exit_logp in zip(rows, *found):  # exact up to 2**24
            out = row.out
            if out.finish:  # forced tokens after the end
                continue
            if math.isnan(logp):  # some logit is nan or infinite
                where = f"prompt {row.number}: the logits of token {len(out.tokens)}"
                raise UserError(f"{where} are not finite")
            out.tokens.append(int(token))
            out.depths.append(int(depth))
            out.token_logprobs.append(logp)
            out.exit_logprobs.append(exit_logp)
            stopped = token in (self.model.stop_ids if own is None else own)
            if stopped or len(out.tokens) == self.max_new_tokens:
                out.finish = "stop" if stopped else "length"
                self.settings.on_finish()
        self.slots = [None if row is None or row.out.finish else row for row in self.slots]


def sample(p: Tensor, u: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Probabilities p [n, V] float32 and uniform numbers u [n] in [0, 1) -> tokens [n].
    top_k applies first, then top_p (Holtzman et al. 2020); the likeliest token is always kept."""
    if temperature == 0:
        return p.argmax(-1)
    if temperature != 1:  # divided by the largest first, a low temperature cannot overflow
        p = (p / p.amax(-1, keepdim=True)).log().div_(temperature).softmax(-1)
    order = None
    if top_k or top_p < 1:
        p, order = p.sort(-1, descending=True)
        p = p[:, : top_k or None]
        before = p.cumsum(-1) - p
        p = p.where(before < top_p * p.sum(-1, keepdim=True), 0.0)
    cdf = p.cumsum(-1)
    choice = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)
    choice = choice.clamp(max=cdf.shape[-1] - 1)
    return (choice if order is None else order.gather(-1, choice)).squeeze(-1)
