"""Generation: prefill, decode a step, sample; batched, ragged, rows leave when they are done and others take their place.

Contract. Ragged prompts in, one `Generation` a prompt out, in the same order. Row i's noise comes from (seed, i) and is drawn
before it starts, so a row writes the same text alone and in company, whatever the batch size.

Alignment, once and for all: depths[i] is the depth of the readout that produced tokens[i]. The first is read from the last
prompt token, so it is that token's depth (L unless exits.prompt says otherwise). score.py says how to re-score.

Decisions. Tokens are drawn by inverting the cumulative distribution at one uniform number. Host syncs of a decode step: those
that decode.py tells, and one to hand over the tokens (only the host knows who is done).
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nanoexit.cache import Cache
from nanoexit.decode import DecodeStep
from nanoexit.errors import UserError
from nanoexit.exits import Fixed, Head, Policy, parse_policy, path_logprob, teacher_chance
from nanoexit.model import Transformer
from nanoexit.score import divergence, pad, token_logprob


@dataclass
class Generation:
    """One row. Log-probabilities are those of the model's own distributions: temperature 1, nothing truncated."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    exit_logprobs: list[float] = field(default_factory=list)  # log p(exit at depths[i]); 0 for the first, and without heads
    finish: str = "length"  # or "stop": the last token is one of stop_ids
    prompt_depths: list[int] = field(default_factory=list)
    prompt_exit_logprobs: list[float] = field(default_factory=list)  # 0 unless the prompt sampled its exits


@torch.inference_mode()
def generate(model: Transformer, prompts: Sequence[Sequence[int]], policy: str | Policy = "full", max_new_tokens: int = 64,
             temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, seed: int | Sequence[int] = 0,
             stop_ids: Collection[int] | None = None, batch_size: int | None = None, prompt_exits: str = "full",
             freeze: bool = True, forced: Sequence[Sequence[int]] | None = None,
             on_finish: Callable[[int, Generation], None] | None = None, pack: str = "auto",
             cuda_graphs: bool = True) -> list[Generation]:
    """Continue every prompt (lists of token ids, ragged) by up to max_new_tokens tokens.

    policy: see exits.parse_policy. stop_ids: tokens that end a row, default the model's own. batch_size: rows at once, default
    all. prompt_exits: full, limit:D or head. freeze=False: the `unfrozen` ablation. forced: the first tokens of each
    response, given instead of drawn; they choose their exits like any other. on_finish(row, generation): called as rows end.
    pack: auto, always or never decode from a second copy of the weights (layout.py). cuda_graphs: see decode.py.
    Raises UserError for an empty prompt, or one that leaves no room below the model's longest position.
    """
    _check(model, prompts, max_new_tokens)
    was_training = model.training
    model.eval()
    try:
        size = min(batch_size or len(prompts), len(prompts))
        decoder = _Decoder(model, prompts, parse_policy(policy, model), parse_prompt_exits(prompt_exits, model), max_new_tokens,
                           (temperature, top_p, top_k), seed, model.stop_ids if stop_ids is None else stop_ids, freeze, forced, on_finish,
                           DecodeStep(model, size, pack, cuda_graphs))
        waiting = deque(range(len(prompts)))
        while waiting or decoder.active:
            free = size - len(decoder.active)
            if waiting and free >= max(1, size // 4):  # a few at a time: one prefill serves them all
                decoder.admit([waiting.popleft() for _ in range(min(free, len(waiting)))])
            elif not waiting:
                decoder.shrink()
            decoder.step()
        return decoder.results
    finally:
        model.train(was_training)


def _check(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {row} is empty: expected at least one token")
        if len(prompt) + max_new_tokens > model.shape.max_positions:
            raise UserError(f"prompt {row} has {len(prompt)} tokens and {max_new_tokens} more may come: this model knows "
                            f"{model.shape.max_positions} positions; shorten it or lower generation.max_new_tokens")


def parse_prompt_exits(text: str, model: Transformer) -> Policy | None:
    """`full` -> None; `limit:D` -> every prompt token exits at depth D; `head` -> prompt tokens sample the heads."""
    name, _, depth = text.partition(":")
    if text == "full":
        return None
    if text == "head":
        return parse_policy("head", model)
    if name == "limit" and depth.isdigit() and 1 <= int(depth) <= model.full_depth:
        return Fixed((int(depth),))
    raise UserError(f"exits.prompt: {text!r} is not one of full, head, limit:D with D from 1 to {model.full_depth}")


class _Ask:
    """The `stop` of model.run while generating: asks heads and policy, and remembers the heads' log-odds [N, E]."""

    def __init__(self, model: Transformer, policy: Policy, noise: Tensor, chance: Tensor | None = None):
        self.heads, self.policy, self.noise, self.chance = model.exits, policy, noise, chance
        self.columns = {depth: column for column, depth in enumerate(sorted(policy.layers))}
        self.full_depth = model.full_depth
        self.layers = set(policy.layers) | set(self.heads.layers if self.heads is not None else ())
        self.z = None if self.heads is None else noise.new_zeros(len(noise), len(self.heads.layers))

    def __call__(self, depth: int, h: Tensor, index: Tensor | None) -> Tensor | None:
        rows = slice(None) if index is None else index
        z = None
        if self.heads is not None and depth in self.heads.layers:
            z = self.heads(depth, h)
            self.z[rows, self.heads.layers.index(depth)] = z
        if depth not in self.columns:
            return None
        column = self.columns[depth]
        chance = None if self.chance is None else self.chance[rows, column]
        return self.policy.exits(depth, h, z, self.noise[rows, column], chance)

    def logprobs(self, depths: Tensor) -> Tensor:
        """depths [N] -> log p(exit there) [N]; 0 without heads."""
        if self.z is None:
            return torch.zeros(len(depths), device=depths.device)
        return path_logprob(self.z, depths, self.heads.layers, self.full_depth)


class Watch:
    """A `stop` that lets everyone pass and keeps the residuals [n, D] at each depth."""

    def __init__(self, layers: Collection[int]):
        self.layers, self.seen = layers, {}

    def __call__(self, depth: int, h: Tensor, index: Tensor | None) -> None:
        self.seen[depth] = h


class _Decoder:
    """The rows under way. A slot is a row's place in the batch and the cache; free slots stay idle until they are filled."""

    def __init__(self, model, prompts, policy, prompt_policy, max_new_tokens, sampling, seed, stop_ids, freeze, forced, on_finish, steps):
        self.model, self.prompts, self.policy, self.prompt_policy = model, prompts, policy, prompt_policy
        self.max_new_tokens, self.sampling, self.stop_ids = max_new_tokens, sampling, frozenset(stop_ids)
        self.seed = list(seed) if isinstance(seed, Sequence) else [seed]
        self.freeze, self.forced, self.on_finish = freeze, forced, on_finish
        self.steps: DecodeStep = steps
        self.results: list[Generation] = [Generation() for _ in prompts]
        self.capacity = max((len(p) for p in prompts), default=0) + max_new_tokens
        self.cache: Cache | None = None
        self.rows: list[int | None] = []  # the prompt in each slot
        self.lengths: list[int] = []  # positions that each slot's row has filled
        self.last = self.noise = None  # [B] newest tokens; [B, max_new_tokens, 1 + exits] uniform noise

    @property
    def active(self) -> list[int]:
        return [slot for slot, row in enumerate(self.rows) if row is not None]

    def admit(self, rows: list[int]) -> None:
        """Prefill these prompts, put them into free slots, and draw their first tokens."""
        prompts = [self.prompts[row] for row in rows]
        ids, noise = pad(prompts, self.model.device), self._noise(rows)
        B, T = ids.shape
        cache = self._cache(B, self.capacity if self.cache is None else T)
        cache.place(0, T)
        ask = alive = None
        if self.prompt_policy is not None:
            ask = _Ask(self.model, self.prompt_policy, self._prompt_noise(rows, T))
            alive = torch.arange(T, device=ids.device) < torch.tensor([len(p) for p in prompts], device=ids.device)[:, None]
        run = self.model.run(ids, cache=cache, stop=ask, alive=alive, freeze=self.freeze)
        slots = self._seat(rows, cache, ids.new_zeros(B), noise)
        ends = torch.tensor([len(p) - 1 for p in prompts], device=ids.device)
        self._note_prompts(rows, run.depths, ask)
        at = torch.arange(B, device=ids.device)
        self._draw(slots, run.hidden[at, ends], run.depths[at, ends], torch.zeros(B, device=ids.device))

    def step(self) -> None:
        """One token for every active row."""
        slots = self.active
        if not slots:
            return
        B = len(self.rows)
        lengths = [self.lengths[slots[0]] if row is None else self.lengths[slot] for slot, row in enumerate(self.rows)]
        counts = [0 if row is None else len(self.results[row].tokens) for row in self.rows]
        aligned = len(set(lengths)) == 1
        device = self.last.device
        ids = self.last[:, None]
        positions = torch.full((B, 1), lengths[0], device=device) if aligned else torch.tensor(lengths, device=device)[:, None]
        self.cache.place(lengths[0] if aligned else None, max(lengths) + 1)
        everyone = len(slots) == B
        rows = None if everyone else torch.tensor(slots, device=device)
        chosen = slice(None) if everyone else rows
        noise = self.noise[:, counts[0]] if len(set(counts)) == 1 else self.noise[torch.arange(B, device=device), torch.tensor(counts, device=device)]
        chance = self._foresee(ids, positions, rows) if self.policy.foresees else None
        ask = _Ask(self.model, self.policy, noise[:, 1:], chance)
        stop = ask if ask.layers else None
        if self.freeze:
            run = self.steps(ids, positions, self.cache, stop, rows)
        else:
            alive = None if everyone else torch.zeros_like(ids, dtype=torch.bool).index_fill(0, rows, True)
            run = self.model.run(ids, positions, self.cache, stop, alive, freeze=False)
        for slot in slots:
            self.lengths[slot] += 1
        depths = run.depths[:, 0]
        self._draw(slots, run.hidden[chosen, 0], depths[chosen], ask.logprobs(depths)[chosen], noise[chosen, 0])

    def shrink(self) -> None:
        """With nobody waiting, rows that are done leave the batch once they are half of it."""
        slots = self.active
        if slots and len(slots) <= len(self.rows) // 2:
            keep = torch.tensor(slots, device=self.last.device)
            self.cache.select(keep)
            self.last, self.noise = self.last[keep], self.noise[keep]
            self.rows, self.lengths = [self.rows[s] for s in slots], [self.lengths[s] for s in slots]

    def _draw(self, slots: list[int], h: Tensor, depths: Tensor, exit_logprobs: Tensor, u: Tensor | None = None) -> None:
        """Read out residuals h [n, D] of these slots, sample their next tokens, and note what was drawn."""
        logits = self.steps.readout(h).float()
        tokens = sample(logits, self.noise[slots, 0, 0] if u is None else u, *self.sampling)
        for i, slot in enumerate(slots if self.forced else ()):
            given, n = self.forced[self.rows[slot]], len(self.results[self.rows[slot]].tokens)
            if n < len(given):
                tokens[i] = given[n]
        if len(slots) == len(self.rows):
            self.last.copy_(tokens)
        else:
            self.last[slots] = tokens
        drawn = torch.stack([tokens, depths, token_logprob(logits, tokens), exit_logprobs])  # float32 holds integers up to 2**24
        for slot, token, depth, logp, exit_logp in zip(slots, *drawn.tolist()):
            self._note(slot, int(token), int(depth), logp, exit_logp)

    def _note(self, slot: int, token: int, depth: int, logp: float, exit_logp: float) -> None:
        row = self.rows[slot]
        g = self.results[row]
        g.tokens.append(token)
        g.depths.append(depth)
        g.token_logprobs.append(logp)
        g.exit_logprobs.append(exit_logp)
        if token in self.stop_ids or len(g.tokens) == self.max_new_tokens:
            g.finish = "stop" if token in self.stop_ids else "length"
            self.rows[slot] = None
            if self.on_finish:
                self.on_finish(row, g)

    def _note_prompts(self, rows: list[int], depths: Tensor, ask: _Ask | None) -> None:
        sampled = ask is not None and isinstance(self.prompt_policy, Head)
        logp = ask.logprobs(depths.view(-1)).view(depths.shape).tolist() if sampled else None
        for i, (row, all_depths) in enumerate(zip(rows, depths.tolist())):
            n = len(self.prompts[row])
            self.results[row].prompt_depths = all_depths[:n]
            self.results[row].prompt_exit_logprobs = logp[i][:n] if sampled else [0.0] * n

    def _seat(self, rows: list[int], cache: Cache, last: Tensor, noise: Tensor) -> list[int]:
        """Give freshly prefilled rows their slots."""
        lengths = [len(self.prompts[row]) for row in rows]
        if self.cache is None:
            self.cache, self.last, self.noise = cache, last, noise
            self.rows, self.lengths = list(rows), lengths
            return list(range(len(rows)))
        slots = [slot for slot, row in enumerate(self.rows) if row is None][: len(rows)]
        self.cache.admit(torch.tensor(slots, device=last.device), cache)
        self.noise[slots] = noise
        for slot, row, length in zip(slots, rows, lengths):
            self.rows[slot], self.lengths[slot] = row, length
        return slots

    def _foresee(self, ids: Tensor, positions: Tensor, rows: Tensor | None) -> Tensor:
        """Run this step to full depth -> the teacher rule's chances [B, E] at the policy's depths."""
        watch = Watch(self.policy.layers)
        run = self.steps(ids, positions, self.cache, watch, rows)
        chosen = slice(None) if rows is None else rows
        final = self.steps.readout(run.hidden[chosen, 0])
        kl = torch.stack([divergence(final, self.steps.readout(watch.seen[d])) for d in sorted(watch.seen)], -1)
        chance = kl.new_zeros(len(ids), kl.shape[-1])
        chance[chosen] = teacher_chance(kl, self.policy.strength)
        return chance

    def _cache(self, rows: int, capacity: int) -> Cache:
        return Cache(self.model.shape, rows, capacity, self.model.device, self.model.model["norm"].weight.dtype)

    def _noise(self, rows: list[int]) -> Tensor:
        size = (self.max_new_tokens, 1 + len(self.policy.layers))
        draws = [np.random.default_rng([*self.seed, row]).random(size, dtype=np.float32) for row in rows]
        return torch.from_numpy(np.stack(draws)).to(self.model.device)

    def _prompt_noise(self, rows: list[int], width: int) -> Tensor:
        """[B * width, E]: a stream of its own, so that a longer response leaves it as it is."""
        E = len(self.prompt_policy.layers)
        noise = np.ones((len(rows), width, E), dtype=np.float32)
        for i, row in enumerate(rows):
            n = len(self.prompts[row])
            noise[i, :n] = np.random.default_rng([*self.seed, row, 1]).random((n, E), dtype=np.float32)
        return torch.from_numpy(noise).flatten(0, 1).to(self.model.device)


def sample(logits: Tensor, u: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Logits [n, V] float32 and uniform numbers u [n] in [0, 1) -> tokens [n]. Temperature 0 is the most likely token.

    top_k and top_p (Holtzman et al. 2020) keep the likeliest tokens; the most likely one always stays.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits / temperature).softmax(-1)
    order = None
    if top_k or top_p < 1:
        p, order = p.sort(-1, descending=True)
        p = p.where(p.cumsum(-1) - p < top_p, 0.0)
        p = p if not top_k else p[:, :top_k]
    cdf = p.cumsum(-1)
    choice = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).clamp(max=cdf.shape[-1] - 1)
    return (choice if order is None else order.gather(-1, choice)).squeeze(-1)
