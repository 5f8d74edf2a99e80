"""Prompts, tasks and verifiers: what is asked, what is a right answer, which steps are written.

A `Task` verifies responses. It may also make prompts, list the steps of a full reasoning, and
change one written value. To add one, write a class here and name it in `TASKS`. A verifier never
guesses: what it cannot read is wrong. Answers are compared in a canonical form, so 72.0 is 72.

Prompts come from a task, or from a JSONL or CSV file. One hash of its text decides whether a prompt
is held out, another its place: a split never moves, and its first prompts are a fair draw.
"""

import csv
import hashlib
import io
import itertools
import json
import operator
import re
import unicodedata
import zlib
from collections import namedtuple
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from fractions import Fraction
from pathlib import Path

import numpy as np

from nanoexit.config import DataConfig, UserError, find_file, read_json_lines, read_text, show
from nanoexit.generate import Generation
from nanoexit.weights import find_dataset_file

Split = namedtuple("Split", "reasoning marker conclusion")  # no marker: no end of the reasoning
Change = namedtuple("Change", "text stay follow")  # a text up to a changed value; two answers


@dataclass(frozen=True)
class Prompt:
    """A question. `checker` names its task, `group` the row of an accuracy table it belongs to."""

    id: str
    prompt: str
    answer: str | None = None
    system: str | None = None
    checker: str = "none"
    group: str = ""
    where: str = ""  # file and line; empty for a prompt made on the spot


@dataclass(frozen=True)
class Verdict:
    """What a task found in a response."""

    correct: bool
    well_formed: bool = True  # one end of the reasoning, and an answer after it
    steps: list[bool] = field(default_factory=list)  # each expected step: written, true, in order?
    claimed: int = 0  # how many steps are written, true or not

    @property
    def written(self) -> float | None:
        """Share of the expected steps that are written; None where the task lists none."""
        return sum(self.steps) / len(self.steps) if self.steps else None

    @property
    def unwritten_run(self) -> int | None:
        """The longest run of expected steps left unwritten; None where the task lists none."""
        runs = [len([*run]) for written, run in itertools.groupby(self.steps) if not written]
        return max(runs, default=0) if self.steps else None


@dataclass
class Response:
    """One response to a prompt: its tokens with their depths, its text, what the task found."""

    prompt: Prompt
    prompt_ids: list[int]
    generation: Generation
    text: str
    verdict: Verdict


# --- answers in free text ---------------------------------------------------------------------

SPELLINGS = (  # (pattern, replacement), in this order; no symbol that means something is lost
    ("[−‐‑‒–]", "-"),
    ("[⁄∕]", "/"),
    (r"\\[!()\[\]]", ""),
    (r"\{,\}|\\,(?=\d{3}(?!\d))", ","),
    (r"\\([$%#&_])", r"\1"),
    (r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}", r"\1"),
    (r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r" \1/\2"),
    (r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1"),
    (r"(?<=\d)\s*(?:[×*x]|\\times|\\cdot)\s*10\s*\^\s*\{?([-+]?\d{1,3})\}?(?!\d)", r"e\1"),
    (r"(?<![\w$])\$([^$\n]+)\$(?![\w$])", r"\1"),
    (r"(?<!\w)(\*\*|[*`])(?=[^\s*`])(.+?)(?<=\S)\1(?!\w)", r"\2"),
)
FREE_NUMBER = r"(?:(?<![\d.,:/^)-])-)?(?<![\w.,+*])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\w)"
NUMBER = r"""([-+]?[\s$]*(?:\d{1,60}\s?/\s?0*[1-9]\d{0,59}|
    (?:[1-9]\d{0,2}(?P<comma>[, ])\d{3}(?:(?P=comma)\d{3})*(?!\d)(?:\.\d{1,60})?|
    \d{0,60}\.\d{1,60}|\d{1,60})(?:e[-+]?\d{1,3})?))"""
WHOLE = re.compile(rf"\s*{NUMBER}\s*", re.VERBOSE)
FIRST = re.compile(  # a number, then no letter, operator, range, second number or scale
    rf"""[\s:=(\[{{"'≈~$*_`]*(?:(?:the\s|final\s)*answer(?:\sis)?[\s:=$*]*)?{NUMBER}\s?%?
    (?![\w^!(]|[ \t]*(?:[-—~+*/×÷·=:.,<>]+|\\times|(?:to|or|and|x|times|through|until|by)\b)?
    [ \t]*[-+]?\$?\.?\d|[ \t]*(?:hundred|[mb]illion|thousand|trillion|dozen|and\sa)\b|-\w)""",
    re.VERBOSE,
)
SMALL = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def normal(text: str) -> str:
    """One spelling for what means the same in Unicode, LaTeX and Markdown."""
    text = re.sub("(?<![⁰-₉¹²³])(?=[⁰-₉¹²³])", "^", re.sub("(?=[¼-¾⅐-⅞])", " ", text))
    text = unicodedata.normalize("NFKC", text)
    for pattern, new in SPELLINGS:
        text = re.sub(pattern, new, text)
    return text


def number(found: re.Match | None) -> str | None:
    """The number that WHOLE or FIRST matched, exactly: .5 and 2/4 are 1/2."""
    return str(Fraction(re.sub(r"[\s$,]", "", found[1]))) if found else None


def canonical(text: str) -> str | None:
    """Text as answers are compared: numbers as numbers, else without case, a last full stop and
    outer quotes or brackets. None where nothing is left."""
    text = " ".join(normal(text).casefold().split())
    text = re.sub(r"""(?<=[^.])\.(?=["'”’]?$)""", "", text)
    inner = re.fullmatch(r"""(["'“‘])(.*\w.*)["'”’]|\(?(\w+)\)""", text)
    text = inner[2] or inner[3] if inner else text
    return number(WHOLE.fullmatch(text)) or text or None


# --- tasks ------------------------------------------------------------------------------------


class Task:
    """What all tasks share. By itself: the checkers `none`, and `exact`, for an answer word for
    word: after the last `Answer:`, or all of the conclusion."""

    opening = "<think>"
    longest = 0  # operations of the longest prompt made on the spot; 0: it makes none
    words: Sequence[str] = ()  # of its prompts and steps, for a tokenizer of whole words

    def __init__(self, name: str, expects: str = "", closing: str = "</think>", mark: str = "(?!)"):
        self.name, self.expects = name, expects  # the answer of a prompt; empty: none is right
        self.closing, self.mark = closing, mark  # what asks for the answer; where one is stated

    def make(self, rng: np.random.Generator, operations: int) -> Prompt:
        """A random prompt of that many operations."""
        raise NotImplementedError

    def prompts(self, rng: np.random.Generator, low: int, high: int) -> Iterator[Prompt]:
        """Endless prompts of `low` to `high` operations, in proportion to their number."""
        lengths = np.arange(low, high + 1)
        for i in itertools.count():
            made = self.make(rng, int(rng.choice(lengths, p=lengths / lengths.sum())))
            yield replace(made, id=f"{self.name}-{i}")

    def split(self, response: str) -> Split:
        """At the first </think>, else at the task's mark. A <think> left open never ends."""
        thinks = "think>" in response
        found = re.search("</think>" if thinks else self.mark, response)
        start, end = found.span() if found else [len(response) * thinks] * 2
        return Split(response[:start], response[start:end], response[end:])

    def answer(self, prompt: Prompt, response: str) -> str | None:
        """What a whole response concludes, in canonical form; None where nothing is stated."""
        return self.read(self.split(response).conclusion if "think>" in response else response)

    def read(self, text: str) -> str | None:
        """The answer that a conclusion states."""
        text = normal(text)
        found = re.search(self.mark, text)
        return canonical(text[found.end() :].strip().split("\n")[0] if found else text)

    def target(self, prompt: Prompt) -> str | None:
        """The right answer in canonical form; None where there is none to compare with."""
        return canonical(prompt.answer or "") if self.expects else None

    def reached(self, prompt: Prompt, reasoning: str) -> str | None:
        """The last number that a reasoning states, or its last line if the answer is no number."""
        numeric = re.fullmatch(r"-?\d+(/\d+)?", self.target(prompt) or "")
        values = re.findall(FREE_NUMBER if numeric else r"\S[^\n]*", normal(reasoning))
        return canonical(values[-1].removeprefix("<think>")) if values else None

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """Verify the decoded text of a response, its end-of-text token left out."""
        marker, said = self.split(response).marker, self.answer(prompt, response)
        expected = self.claims(" ".join(self.steps(prompt)))
        claims = self.claims(self.split(response).reasoning)
        steps = [False] * len(expected)
        for at, _, n in SequenceMatcher(None, expected, claims, False).get_matching_blocks():
            steps[at : at + n] = [True] * n
        correct = said is not None and said == self.target(prompt)
        formed = said is not None and response.count(marker or "\0") == 1
        return Verdict(correct, formed, steps, len(claims))

    def claims(self, text: str) -> list[str]:
        """The steps that a text writes, each in one spelling; [] where the task lists none."""
        return []

    def steps(self, prompt: Prompt) -> list[str]:
        """The text of each step of a full reasoning; [] where the task lists none."""
        return []

    def written(self, prompt: Prompt, n: int) -> str:
        """The first `n` true steps as the model writes them, the opening included."""
        return " ".join([self.opening, *self.steps(prompt)[:n]])

    def response(self, prompt: Prompt, n: int) -> str:
        """A right response with `n` steps written."""
        return f"{self.written(prompt, n)} {self.closing} {self.target(prompt)}"

    def change(self, prompt: Prompt, response: str, rng: np.random.Generator) -> Change | None:
        """The response up to one written value, which is changed, where it is known what follows
        from that; else None."""
        return None


class GSM8K(Task):
    """The number after `####` (Cobbe et al. 2021), or in \\boxed{} where there is no `####`.

    Several of them have to agree. What follows a further question does not count.
    """

    def target(self, prompt: Prompt) -> str | None:
        return self.first((prompt.answer or "").rpartition("####")[2])

    def first(self, text: str) -> str | None:
        """The number that a text begins with."""
        text = re.sub("[€£¥]", "$", re.sub("<<[^<>]*>>", "", normal(text))).lower()
        small = rf"\b({'|'.join(SMALL)})\b"
        return number(FIRST.match(re.sub(small, lambda m: str(SMALL.index(m[0])), text)))

    def read(self, text: str) -> str | None:
        text = text if "####" in text else text.replace("\\boxed", "####\\boxed")
        values: list[str] = []
        for piece in text.split("####")[1:]:
            values += filter(None, [self.first(piece)])
            if values and re.search(r"\?|\bQuestion\b|\bQ:", piece):
                break
        return values[0] if len({*values}) == 1 else None

    def change(self, prompt: Prompt, response: str, rng: np.random.Generator) -> Change | None:
        """For right answers to prompts worked out by calculator marks, such as <<48/2=24>>, of two
        operands each: the first place of an intermediate result that the question does not name."""
        part, stay, answer = self.split(response), self.target(prompt), prompt.answer or ""
        figure = r"(\d*\.?\d+)"
        marks = re.findall(rf"<<{figure}([-+*/]){figure}={figure}>>", answer)
        whole = 1 < len(marks) == answer.count("<<") and stay == self.answer(prompt, response)
        value = marks[int(rng.integers(len(marks) - 1))][-1] if whole and part.marker else ""
        found = re.search(rf"(?<![\w.,]){value}(?!\w|[.,]\d)", part.reasoning)
        if not found or not value.isdigit() or re.search(rf"\b{value}\b", prompt.prompt):
            return None
        new = {value: str(int(value) + int(rng.integers(1, 10)))}
        text = part.reasoning[: found.start()] + new[value]
        for a, sign, b, result in marks:
            left, right = Fraction(new.get(a, a)), Fraction(new.get(b, b))
            if {a, b} & new.keys() and right:
                new[result] = str(SIGNS[sign](left, right))
        return Change(text, stay, new.get(marks[-1][-1]))


class Chains(Task):
    """A digit and up to six operations, left to right. Each operation permutes the ten digits, so
    no step can be forgotten, and a guess of the answer is right one time in ten.

    `clock` adds and multiplies, and keeps the last digit: `5 *9 +7` has the values 5 and 2. Its
    chains of any length are one of 40 maps. The letters of `permute` agree with each of these maps
    in three digits at most and do not compose to anything shorter. A written step restates its
    operation: `5 *9 5 +7 2`. The control, `clock-values`, writes the values alone.
    """

    longest = 6

    def __init__(self, name: str, table: dict[str, str], restate: bool = True):
        super().__init__(name, f"a chain of a digit and {', '.join(table)}, and its value if any")
        self.table, self.restate = table, restate
        self.operations = list(table)
        self.words = [*"0123456789", *table]
        self.operation = "|".join(map(re.escape, table))

    def parse(self, chain: str) -> list[str]:
        """`5*9 +7` -> ["5", "*9", "+7"]; [] for what is no chain."""
        found = re.fullmatch(rf"\s*([0-9])((?:\s*(?:{self.operation}))+)\s*", chain)
        return [found[1], *re.findall(self.operation, found[2])] if found else []

    def values(self, chain: str) -> list[str]:
        """The digit after each operation; [] for what is no chain."""
        digits = itertools.accumulate(self.parse(chain), lambda v, name: self.table[name][int(v)])
        return [*digits][1:]

    def make(self, rng: np.random.Generator, operations: int) -> Prompt:
        drawn = [self.operations[i] for i in rng.integers(len(self.table), size=operations)]
        chain = " ".join([str(rng.integers(10)), *drawn])
        group = f"{operations} step{'s' * (operations > 1)}"
        return Prompt(chain, chain, self.values(chain)[-1], checker=self.name, group=group)

    def target(self, prompt: Prompt) -> str | None:
        value = "".join(self.values(prompt.prompt)[-1:])
        return value if value and prompt.answer in (None, value) else None

    def steps(self, prompt: Prompt) -> list[str]:
        (start, *operations), values = self.parse(prompt.prompt), self.values(prompt.prompt)
        if not self.restate:
            return values
        steps = [f"{name} {value}" for name, value in zip(operations, values)]
        return [f"{start} {steps[0]}", *steps[1:]]

    def claims(self, text: str) -> list[str]:
        """Operations with a value, such as `*9 5`. Values alone claim the step of their place."""
        words = text.replace("<think>", " ").split()
        if self.restate:
            return re.findall(rf"(?<!\S)(?:{self.operation}) [0-9](?!\S)", " ".join(words))
        return [f"{place} {word}" for place, word in enumerate(words)]

    def change(self, prompt: Prompt, response: str, rng: np.random.Generator) -> Change | None:
        """True steps up to a random one whose value is changed, whatever the response wrote. None
        for chains of one operation: their value is the answer."""
        words, values = self.parse(prompt.prompt), self.values(prompt.prompt)
        if len(values) < 2:
            return None
        at = int(rng.integers(len(values) - 1))
        wrong = str((int(values[at]) + int(rng.integers(1, 10))) % 10)
        follow = self.values(" ".join([wrong, *words[at + 2 :]]))[-1]
        return Change(self.written(prompt, at + 1)[:-1] + wrong, values[-1], follow)


CLOCK = {f"+{n}": "".join(str((d + n) % 10) for d in range(10)) for n in range(1, 10)}
CLOCK |= {f"*{n}": "".join(str(d * n % 10) for d in range(10)) for n in (3, 7, 9)}
DRAWN = """2734860915 4210693875 5748309621 7268031954 8049375261 8476501923
5786039214 7964832051 3792610854 7895604213 8591374602 2961548307"""
TASKS: dict[str, Task] = {
    "clock": Chains("clock", CLOCK),
    "clock-values": Chains("clock-values", CLOCK, restate=False),
    "permute": Chains("permute", dict(zip("abcdefghijkl", DRAWN.split()))),
    "gsm8k": GSM8K("gsm8k", "a number, alone or after ####", "####", r"####(?=\W*(?:boxed\W)?\d)"),
    "exact": Task("exact", "an answer", "Answer:", r"(?is)answer\s*:(?!.*answer\s*:)"),
    "none": Task("none"),
}


def task_of(prompt: Prompt) -> Task:
    """The task that verifies a prompt."""
    return TASKS[prompt.checker]


# --- prompts ----------------------------------------------------------------------------------


def load_prompts(
    data: DataConfig, split: str, count: int | None = None, seed: int = 0
) -> list[Prompt]:
    """The `train` or `held_out` prompts, at most `count`, in a fair order. Prompts made on the spot
    (`clock`, or `clock:2-6`) depend on `seed` and are 8192 by default.

    Raises UserError for any fault of the file, with its line, and where the split is empty.
    """
    held_out = split == "held_out"
    share = data.held_out if held_out else 1 - data.held_out
    name, *limits = re.split(r":(\d)-(\d)$", data.prompts)
    task = TASKS.get(name, TASKS["none"])
    low, high = map(int, limits[:2] or (1, task.longest))
    source: Iterable[Prompt]
    if 1 <= low <= high <= task.longest:
        if data.checker not in ("auto", name):
            raise UserError(f"data.checker: expected auto or {name}, found {show(data.checker)}")
        count = count or 8192
        rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
        draws = int((100 + 20 * count) / share) if share else 0
        made = itertools.islice(task.prompts(rng, low, high), draws)
        source = (replace(prompt, system=data.system) for prompt in made)
    else:
        source = sorted(read_prompts(data), key=lambda p: digest([replace(p, id="")]))
    wanted = (p for p in source if is_held_out(p.prompt, data.held_out) == held_out)
    prompts = list(itertools.islice(wanted, count))
    if not prompts:
        empty = f"{data.prompts} has no {split.replace('_', '-')} prompts"
        raise UserError(f"data.prompts: {empty} at data.held_out = {data.held_out}")
    return prompts


def check_prompts(data: DataConfig, splits: Sequence[str] = ("train", "held_out")) -> None:
    """Read all prompts, before any work. Raises UserError as `load_prompts` does."""
    for split in splits:
        load_prompts(data, split, 1)


def is_held_out(prompt: str, share: float = 0.1) -> bool:
    """Whether a prompt is kept for evaluation: a hash of its text, the same always."""
    return zlib.crc32(prompt.encode("utf-8")) % 10000 < share * 10000


def digest(prompts: Sequence[Prompt]) -> str:
    """What traces of these prompts belong to: their ids, texts and system messages, in order."""
    content = [[p.id, p.prompt, p.system] for p in prompts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def read_prompts(data: DataConfig) -> list[Prompt]:
    """Every prompt of a JSONL or CSV file, or of a hub dataset's file (hub:ID/FILE), in order."""
    if data.prompts.startswith("hub:"):
        path = find_dataset_file(data.prompts)
    else:
        path = find_file(data.prompts, "data.prompts: no task made on the spot, and")
    prompts: dict[str, Prompt] = {}
    for line, row in _csv_rows(path) if path.suffix.lower() == ".csv" else read_json_lines(path):
        prompt = _prompt(row, f"{path}:{line}", f"{path.stem}-{line}", data)
        if prompt.id in prompts:
            raise UserError(f"{path}:{line}: expected every id once, found {show(prompt.id)} again")
        prompts[prompt.id] = prompt
    return [*prompts.values()]


def _csv_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line where it starts, row) of every row that is not blank; names in lower case."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    line = 0
    try:
        names = [name.strip().lower() for name in next(reader, [])]
        if len({*names}) < len(names):
            raise UserError(f"{path}:1: expected every column once, found {show(names)}")
        line = reader.line_num
        for cells in reader:
            if cells and len(cells) != len(names):
                found = f"found {len(cells)}"
                raise UserError(f"{path}:{line + 1}: expected {len(names)} cells, {found}")
            if cells:
                yield line + 1, dict(zip(names, cells))
            line = reader.line_num
    except csv.Error as error:
        raise UserError(f"{path}:{line + 1}: not CSV: {error}; is a quote left open?") from None


def _prompt(row: dict, where: str, default_id: str, data: DataConfig) -> Prompt:
    """A row as a prompt; `where` is its file and line."""
    row = {key.strip().lower(): value for key, value in row.items()}
    turns = row.get("messages") or row.get("prompt")
    if isinstance(turns, list):
        roles = [turn.get("role") if isinstance(turn, dict) else turn for turn in turns]
        if roles not in (["user"], ["system", "user"]):
            expected = "expected a user turn, after a system turn or none"
            raise UserError(f"{where}: messages: {expected}, found {show(roles)}")
        row |= dict(zip(("prompt", "system"), [turn.get("content") for turn in turns[::-1]]))
    names = ("id", "prompt", "story", "question", "answer", "system", "checker", "group")
    id, text, *story, answer, system, checker, group = [_text(row, n, where) for n in names]
    text = text or "\n\n".join(filter(None, story))
    if not text:
        keys = show(", ".join(row))
        raise UserError(f"{where}: expected prompt, question or messages, found the keys {keys}")
    guess = "gsm8k" if re.search(r"####[^\n]*\s*$", answer or "") else "exact" if answer else "none"
    name = (checker if data.checker == "auto" else data.checker) or guess
    if name not in TASKS:
        raise UserError(f"{where}: checker {show(name)}: expected one of {', '.join(TASKS)}")
    system = system or data.system
    prompt = Prompt(id or default_id, text, answer, system, name, group or "", where)
    if TASKS[name].expects and TASKS[name].target(prompt) is None:
        found = f"{show(text)} with the answer {show(answer)}"
        raise UserError(f"{where}: checker {name}: expected {TASKS[name].expects}, found {found}")
    return prompt


def _text(row: dict, name: str, where: str) -> str | None:
    """A field as text; None where it is missing or blank."""
    value = row.get(name, "")
    text = "" if value is None else str(value) if type(value) in (int, float) else value
    if not isinstance(text, str) or re.search("[\0\ud800-\udfff]", text):
        expected = "expected text without NUL and surrogates"
        raise UserError(f"{where}: {name}: {expected}, found {show(value)}")
    return text if text.strip() else None
