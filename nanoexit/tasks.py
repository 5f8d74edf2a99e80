"""Tasks and their verifiers: what counts as a right answer, and which written steps are true.

Contract. A checker takes a prompt and the text of a response and returns a `Verdict`. It never guesses: what it cannot read is
wrong. The response is split at `</think>`: reasoning before, conclusion after.

The clock task is the project's own: chains of operations, left to right, where only the last digit is kept (a clock with
ten hours). `7 +3 *9` has the values 0 and 0. The factors 3, 7 and 9 permute the digits, so no step can be forgotten, and the
answer cannot be guessed better than one time in ten.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from nanoexit.errors import UserError

OPERATIONS = [f"+{n}" for n in range(1, 10)] + ["*3", "*7", "*9"]
LONGEST_CHAIN = 6
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Prompt:
    """A question. `group` names the row of an accuracy table that it belongs to."""

    id: str
    prompt: str
    answer: str | None = None
    system: str | None = None
    checker: str = "none"
    group: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a checker found. `correct` is strict; `lenient` also accepts a right answer in the wrong format."""

    correct: bool
    lenient: bool
    well_formed: bool = True  # reasoning, </think>, conclusion
    steps: list[bool] = field(default_factory=list)  # for each written step: is it true?
    expected_steps: int = 0  # how many steps a full reasoning has; 0 where the task does not say


# --- clock chains ----------------------------------------------------------------------------------------------------


def clock_values(chain: str) -> list[int]:
    """'7 +3 *9', or '7+3*9' -> [0, 0], the value after each operation. Raises UserError for what is not a chain."""
    words = re.sub(r"\s*([+*])\s*", r" \1", chain).split()
    if len(words) < 2 or not re.fullmatch(r"\d", words[0]) or any(w not in OPERATIONS for w in words[1:]):
        raise UserError(f"{chain!r} is no clock chain: expected a digit and operations such as 7 +3 *9 (+1..+9, *3, *7, *9)")
    value, values = int(words[0]), []
    for word in words[1:]:
        operand = int(word[1:])
        value = (value + operand if word[0] == "+" else value * operand) % 10
        values.append(value)
    return values


def clock_chain(rng: np.random.Generator, operations: int) -> str:
    """A random chain of that many operations."""
    return " ".join([str(rng.integers(10)), *(OPERATIONS[i] for i in rng.integers(len(OPERATIONS), size=operations))])


def clock_prompts(seed: int | list[int], shortest: int = 1, longest: int = LONGEST_CHAIN) -> Iterator[Prompt]:
    """Endless chains; lengths in proportion to the number of operations. The same seed gives the same chains."""
    rng = np.random.default_rng(seed)
    lengths = np.arange(shortest, longest + 1)
    while True:
        k = int(rng.choice(lengths, p=lengths / lengths.sum()))
        chain = clock_chain(rng, k)
        yield Prompt(chain, chain, str(clock_values(chain)[-1]), checker="clock", group=f"{k} step{'s' * (k > 1)}")


def check_clock(prompt: Prompt, response: str) -> Verdict:
    """Written values are compared, in order, with the chain's; the conclusion is the one word after </think>."""
    values = clock_values(prompt.prompt)
    reasoning, conclusion, well_formed = split_response(response)
    written = reasoning.split()
    steps = [i < len(values) and word == str(values[i]) for i, word in enumerate(written)]
    correct = conclusion == str(values[-1])
    return Verdict(correct, correct, well_formed and len(conclusion.split()) == 1, steps, len(values))


# --- other tasks -----------------------------------------------------------------------------------------------------


def check_gsm8k(prompt: Prompt, response: str) -> Verdict:
    """GSM8K (Cobbe et al. 2021): strict is the number after the last ####, lenient the last number of the text."""
    target = _number(str(prompt.answer).split("####")[-1])
    _, conclusion, well_formed = split_response(response)
    _, marker, after = conclusion.rpartition("####")
    strict = bool(marker) and target is not None and _number(after, last=False) == target
    return Verdict(strict, strict or (target is not None and _number(conclusion) == target), well_formed)


def check_exact(prompt: Prompt, response: str) -> Verdict:
    """Strict: what follows the last 'Answer:' (or the whole conclusion) is the answer. Lenient: the last line contains it."""
    target = _plain(str(prompt.answer))
    _, conclusion, well_formed = split_response(response)
    stated = re.split(r"answer\s*:", conclusion, flags=re.IGNORECASE)[-1]
    strict = _plain(stated.strip().split("\n")[0]) == target
    last = _plain(conclusion.strip().rsplit("\n", 1)[-1])
    return Verdict(strict, strict or f" {target} " in f" {last} ", well_formed)


def check_nothing(prompt: Prompt, response: str) -> Verdict:
    """For prompts without an answer."""
    return Verdict(False, False, split_response(response)[2])


CHECKERS: dict[str, Callable[[Prompt, str], Verdict]] = {
    "clock": check_clock, "gsm8k": check_gsm8k, "exact": check_exact, "none": check_nothing,
}


def check(prompt: Prompt, response: str) -> Verdict:
    """Verify a response by the prompt's own checker. `response` is the decoded text without the end-of-text token."""
    return CHECKERS[prompt.checker](prompt, response)


def stated_answer(prompt: Prompt, text: str) -> str | None:
    """What a conclusion answers, or what a reasoning has come to: the last word of a clock chain, the last number of GSM8K, what
    follows the last 'Answer:' (or is the last line) elsewhere. None where nothing is stated."""
    if prompt.checker == "clock":
        return text.split()[-1] if text.split() else None
    if prompt.checker == "gsm8k":
        number = _number(text)
        return None if number is None else f"{number:g}"
    stated = re.split(r"answer\s*:", text, flags=re.IGNORECASE)[-1].strip()
    return _plain(stated.split("\n")[-1]) or None


def split_response(response: str) -> tuple[str, str, bool]:
    """-> (reasoning, conclusion, whether there is exactly one </think> between them). Without one, all of it is conclusion."""
    reasoning, marker, conclusion = response.rpartition("</think>")
    return reasoning.removeprefix("<think>").strip(), conclusion.strip(), bool(marker) and "</think>" not in reasoning


def _number(text: str, last: bool = True) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1 if last else 0].replace(",", "")) if found else None


def _plain(text: str) -> str:
    """Case, punctuation and spacing do not count."""
    return " ".join(re.sub(r"[^\w\s./:-]", " ", text.casefold()).split()).strip(" .:")
