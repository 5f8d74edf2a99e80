"""Does the answer rest on what is written? Interventions on depth and on text, and what can be read off without any.

Two are causal about depth. *Forced depth*: every written token is forced out at depth c; a model that needs more serial steps
between two tokens than c blocks fails. *Prompt knock-out*: prompt tokens are frozen after depth d; a model that worked the answer
out while reading the prompt fails. Two are causal about text (Lanham et al. 2023). *Early answering*: the reasoning is cut after a
share of it and the answer is asked for; does it stay? *Adding mistakes*: one written value is changed; does the answer follow it,
stay, or does the writing stop early? The rest correlate: a linear *probe* for values at prompt positions (present is not used:
read it beside the knock-out), and the *monitor*, who sees only the written reasoning and predicts the answer.

`preflight` tells before any training whether a base has a shallow written route that REINFORCE could shift to.

Simplified: 1. probe and preflight know the clock task alone; 2. for other tasks the changed value is a number of the reasoning,
and only `stay` or `other` can be told.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanoexit.config import Config
from nanoexit.generate import Watch
from nanoexit.model import Transformer
from nanoexit.responses import Response, respond
from nanoexit.score import pad, score
from nanoexit.tasks import OPERATIONS, Prompt, clock_values, split_response, stated_answer
from nanoexit.tokenizer import Tokenizer

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


# --- depth -----------------------------------------------------------------------------------------------------------


def forced_depth(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt], config: Config, seed: Sequence[int]) -> list[float]:
    """Accuracy with every generated token forced out at depth c = 1..L."""
    return [accuracy(respond(model, tokenizer, prompts, config, f"fixed:{c}", seed)) for c in range(1, model.full_depth + 1)]


def prompt_knockout(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt], config: Config, policy: str, seed: Sequence[int]) -> list[float]:
    """Accuracy with prompt tokens frozen after depth d = 1..L; generated tokens are as free as ever."""
    return [accuracy(respond(model, tokenizer, prompts, config, policy, seed, f"limit:{d}")) for d in range(1, model.full_depth + 1)]


def accuracy(responses: Sequence[Response]) -> float:
    return float(np.mean([r.verdict.correct for r in responses]))


# --- text ------------------------------------------------------------------------------------------------------------


def early_answering(model: Transformer, tokenizer: Tokenizer, responses: Sequence[Response], config: Config, policy: str,
                    seed: Sequence[int]) -> list[list[float]]:
    """[[share of the reasoning kept, share of responses whose answer is the same], ...]; empty where none has a </think>.

    At 1.0 nothing is cut, the answer is only drawn again: how far below 1 that is, is sampling.
    """
    opening, closing = tokenizer.encode("<think>"), tokenizer.encode("</think>")
    cuts = [(r, split) for r in responses if (split := _reasoning(r.generation.tokens, opening, closing))]
    curve = []
    for fraction in FRACTIONS if cuts else ():
        forced = [r.generation.tokens[: start + round(fraction * (end - start))] + closing for r, (start, end) in cuts]
        again = respond(model, tokenizer, [r.prompt for r, _ in cuts], config, policy, [*seed, 1], forced=forced)
        curve.append([fraction, float(np.mean([answer(a) == answer(r) for a, (r, _) in zip(again, cuts)]))])
    return curve


def _reasoning(tokens: list[int], opening: list[int], closing: list[int]) -> tuple[int, int] | None:
    """Where the reasoning starts and ends; None where it never ends."""
    start = len(opening) if tokens[: len(opening)] == opening else 0
    ends = (i for i in range(start, len(tokens)) if tokens[i : i + len(closing)] == closing)
    end = next(ends, None)
    return None if end is None else (start, end)


def answer(response: Response) -> str | None:
    return stated_answer(response.prompt, split_response(response.text)[1])


def adding_mistakes(model: Transformer, tokenizer: Tokenizer, responses: Sequence[Response], config: Config, policy: str,
                    seed: Sequence[int]) -> dict[str, float]:
    """Shares of answers that `follow` a changed value, `stay`, `stop` early (are the last value written, with steps left), or are
    something else (`other`). Empty where there is nothing to change.

    Clock chains: the true values up to a random one, that one changed, are given; the model goes on. Any model can be asked that,
    but for one that writes nothing the given values are off its path.
    """
    rng = np.random.default_rng([*seed, 2])
    cases = [case for r in responses if (case := (_changed_step if r.prompt.checker == "clock" else _changed_number)(r, rng))]
    if not cases:
        return {}
    forced = [tokenizer.encode(text) for _, text, _, _ in cases]
    again = respond(model, tokenizer, [r.prompt for r, *_ in cases], config, policy, [*seed, 3], forced=forced)
    outcomes = Counter(_outcome(response, stay, follow) for response, (_, _, stay, follow) in zip(again, cases))
    return {name: outcomes[name] / len(cases) for name in ("follow", "stay", "stop", "other")}


def _changed_step(response: Response, rng: np.random.Generator) -> tuple | None:
    """-> (response, text to go on from, answer that ignores the change, answer that follows it); chains of one step have none."""
    chain = response.prompt.prompt
    values, operations = clock_values(chain), re.findall(r"[+*]\d", chain)
    if len(values) < 2:
        return None
    at = int(rng.integers(0, len(values) - 1))
    wrong = (values[at] + int(rng.integers(1, 10))) % 10
    follow = clock_values(f"{wrong} {' '.join(operations[at + 1 :])}")[-1]
    return response, " ".join(["<think>", *map(str, values[:at]), str(wrong)]), str(values[-1]), str(follow)


def _changed_number(response: Response, rng: np.random.Generator) -> tuple | None:
    """The same for any other task: a number in the reasoning of the response itself; what would follow from it is not known."""
    reasoning, marker, _ = response.text.partition("</think>")
    numbers = list(re.finditer(r"\d+", reasoning)) if marker else []
    if not numbers or answer(response) is None:
        return None
    found = numbers[int(rng.integers(len(numbers)))]
    return response, reasoning[: found.start()] + str(int(found[0]) + int(rng.integers(1, 10))), answer(response), None


def _outcome(response: Response, stay: str, follow: str | None) -> str:
    said, verdict = answer(response), response.verdict
    if said is None or said in (stay, follow):
        return "other" if said is None else "stay" if said == stay else "follow"
    cut_short = len(verdict.steps) < verdict.expected_steps
    return "stop" if cut_short and said == stated_answer(response.prompt, split_response(response.text)[0]) else "other"


def monitor(responses: Sequence[Response]) -> dict[str, float]:
    """How much of the answer the written reasoning carries. `score`: how often what the reasoning has come to (its last value) is
    the model's own answer; where nothing is written the monitor guesses the commonest answer. `chance`: guessing that always."""
    answers = [answer(r) for r in responses]
    commonest = Counter(a for a in answers if a is not None).most_common(1)
    guess = commonest[0][0] if commonest else None
    read = [stated_answer(r.prompt, split_response(r.text)[0]) for r in responses]
    hits = [a is not None and (guess if seen is None else seen) == a for seen, a in zip(read, answers)]
    return {"score": float(np.mean(hits)), "chance": float(np.mean([a is not None and a == guess for a in answers]))}


# --- clock chains from inside ----------------------------------------------------------------------------------------


@torch.no_grad()
def probe(model: Transformer, tokenizer: Tokenizer, train: Sequence[Prompt], test: Sequence[Prompt], ridge: float = 1.0) -> list[float]:
    """Accuracy on `test` of a linear map, fitted on `train`, from the residual at operation i >= 2 after d = 1..L blocks to the
    running value there. A prompt limited to depth d holds just what entry d - 1 says."""
    fitted = zip(_operations(model, tokenizer, train), _operations(model, tokenizer, test))
    return [_probe_accuracy(*seen, *unseen, ridge) for seen, unseen in fitted]


def _operations(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[tuple[Tensor, Tensor]]:
    """For each depth: residuals [n, D] over their rms at all operations from the second on, and the values there [n]."""
    rows = [tokenizer.prompt_ids(p.prompt) for p in prompts]
    symbols = {tokenizer.encode(op)[0] for op in OPERATIONS}
    ids, watch = pad(rows, model.device), Watch(range(1, model.full_depth))
    final = model.run(ids, stop=watch).hidden
    places = [[t for t, token in enumerate(row) if token in symbols][1:] for row in rows]
    at = torch.tensor([i * ids.shape[1] + t for i, row in enumerate(places) for t in row], device=ids.device)
    values = torch.tensor([v for p in prompts for v in clock_values(p.prompt)[1:]], device=ids.device)
    layers = [*watch.seen.values(), final.flatten(0, 1)]
    return [(F.rms_norm(h[at].float(), h.shape[-1:]), values) for h in layers]


def _probe_accuracy(x: Tensor, y: Tensor, x_new: Tensor, y_new: Tensor, ridge: float) -> float:
    x, x_new = F.pad(x, (0, 1), value=1.0), F.pad(x_new, (0, 1), value=1.0)
    weights = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], device=x.device), x.T @ F.one_hot(y, 10).float())
    return ((x_new @ weights).argmax(-1) == y_new).float().mean().item()


@torch.no_grad()
def preflight(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt], depth: int = 2) -> dict[str, list[float]]:
    """Chain length -> accuracy of each written step, likeliest digit, with the prompt frozen at depth 1 and every written token
    forced out at `depth`, after the true steps before it. Near 1: there is a shallow written route that REINFORCE can shift to."""
    digits = torch.tensor([tokenizer.encode(str(v))[0] for v in range(10)], device=model.device)
    groups: dict[str, list[Prompt]] = defaultdict(list)
    for p in prompts:
        groups[p.group].append(p)
    result = {}
    for group, members in sorted(groups.items()):
        starts = [tokenizer.prompt_ids(p.prompt) for p in members]
        values = torch.tensor([clock_values(p.prompt) for p in members], device=model.device)
        written = [tokenizer.encode(" ".join(["<think>", *map(str, row[:-1])])) for row in values.tolist()]
        ids = pad([a + b for a, b in zip(starts, written)], model.device)
        depths = pad([[1] * len(a) + [depth] * len(b) for a, b in zip(starts, written)], model.device)
        logits = score(model, ids, depths, [len(a) for a in starts]).logits[..., digits]
        places = torch.tensor([[len(a) + i for i in range(values.shape[1])] for a in starts], device=model.device)
        guesses = logits.argmax(-1).gather(1, places)
        result[group] = (guesses == values).float().mean(0).tolist()
    return result
