"""Prompts, tasks and verifiers: what is asked, which answers are right, which steps are written.

A `Task` verifies responses. It may also generate prompts, list the steps of a full reasoning, and
change one written value. A verifier never guesses: what it cannot read is wrong. Answers are
compared in a canonical form, so 72.0 equals 72. One hash of a prompt's text decides whether it is
held out, another its place: a split never changes, and its first prompts are a fair sample."""

import csv
import io
import itertools
import re
import unicodedata
import zlib
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

import numpy as np

from nanoexit.config import Config, UserError, find_file, read_json_lines, read_text, show
from nanoexit.generate import Generation

Split = namedtuple("Split", "reasoning marker conclusion")  # marker "": it never ends
Change = namedtuple("Change", "text stay follow")  # text up to a changed value; two answers


def mean(values: Sequence) -> float | None:
    """The mean, which for booleans is the share of True; None if there are no values."""
    return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Prompt:
    """A question. `checker` names its task, `group` its row in the accuracy table."""

    id: str
    prompt: str
    answer: str | None = None
    system: str | None = None
    checker: str = "none"
    group: str = ""
    where: str = ""  # file and line; empty for a generated prompt


@dataclass(frozen=True)
class Verdict:
    """What a task found in a response."""

    correct: bool
    steps: Sequence[bool] = ()  # each expected step: is it written, true and in order?
    claimed: int = 0  # how many steps are written, true or not
    answer: str | None = None  # what the response concludes, in canonical form

    @property
    def written(self) -> float | None:
        """Share of the expected steps that are written; None where the task lists none."""
        return mean(self.steps)

    @property
    def unwritten_run(self) -> int | None:
        """The longest run of expected steps left unwritten; None where the task lists none."""
        runs = "".join("x" if written else "." for written in self.steps).split("x")
        return max(map(len, runs)) if self.steps else None


@dataclass
class Response:
    """One response to a prompt: its tokens with their depths, its text, what the task found."""

    prompt: Prompt
    prompt_ids: list[int]
    generation: Generation
    text: str
    verdict: Verdict


SPELLINGS = (  # (pattern, replacement), applied in order; no symbol with a meaning is lost
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
WHOLE = rf"(?x)\s*{NUMBER}\s*"
# At the start of a text: a number, not followed by a letter, operator, range, number or scale.
FIRST = rf"""(?x)[\s:=(\[{{"'≈~$*_`]*(?:(?:the\s|final\s)*answer(?:\sis)?[\s:=$*]*)?{NUMBER}\s?%?
    (?![\w^!(]|[ \t]*(?:[-—~+*/×÷·=:.,<>]+|\\times|(?:to|or|and|x|times|through|until|by)\b)?
    [ \t]*[-+]?\$?\.?\d|[ \t]*(?:hundred|[mb]illion|thousand|trillion|dozen|and\sa)\b|-\w)"""


def normal(text: str) -> str:
    """Unify spellings that mean the same in Unicode, LaTeX and Markdown."""
    text = re.sub("(?<![⁰-₉¹²³])(?=[⁰-₉¹²³])", "^", re.sub("(?=[¼-¾⅐-⅞])", " ", text))
    text = unicodedata.normalize("NFKC", text)
    for pattern, new in SPELLINGS:
        text = re.sub(pattern, new, text)
    return text


def number(found: re.Match | None) -> str | None:
    """The number that WHOLE or FIRST matched, as an exact fraction: .5 and 2/4 are 1/2."""
    return str(Fraction(re.sub(r"[\s$,]", "", found[1]))) if found else None


def canonical(text: str) -> str | None:
    """The form in which answers are compared: numbers by value; other text without case, final full
    stop and outer quotes or brackets. None if nothing is left."""
    text = " ".join(normal(text).casefold().split())
    text = re.sub(r"""(?<=[^.])\.(?=["'”’]?$)""", "", text)
    inner = re.fullmatch(r"""(["'“‘])(.*\w.*)["'”’]|\(?(\w+)\)""", text)
    text = inner[2] or inner[3] if inner else text
    return number(re.fullmatch(WHOLE, text)) or text or None


class Task:
    """What all tasks share. By itself, the checkers `none` and `exact`, which compares what
    follows the last `Answer:`, or else the whole conclusion, word for word."""

    opening = "<think>"
    words: Sequence[str] = ()  # of its prompts and steps, for a word-level tokenizer

    def __init__(self, name: str, expects: str = "", closing: str = "</think>", mark: str = "(?!)"):
        self.name, self.expects = name, expects  # a prompt's answer; empty: none is right
        self.closing, self.mark = closing, mark  # what introduces the answer: as text, as a pattern

    def split(self, response: str) -> Split:
        """Split at the first </think>, else at the task's mark. An open <think> never ends."""
        thinks = "think>" in response
        parts = re.split("(</think>)" if thinks else f"({self.mark})", response, maxsplit=1)
        if len(parts) == 1:
            return Split(response, "", "") if thinks else Split("", "", response)
        return Split(*parts)

    def read(self, text: str) -> str | None:
        """The answer that a conclusion states, in canonical form; None if it states none."""
        text = normal(text)
        found = re.search(self.mark, text)
        return canonical(text[found.end() :].strip().split("\n")[0] if found else text)

    def target(self, prompt: Prompt) -> str | None:
        """The right answer in canonical form; None if there is none to compare with."""
        return canonical(prompt.answer or "") if self.expects else None

    def reached(self, prompt: Prompt, reasoning: str) -> str | None:
        """The last number stated in a reasoning, or its last line if the answer is not a number."""
        numeric = re.fullmatch(r"-?\d+(/\d+)?", self.target(prompt) or "")
        values = re.findall(FREE_NUMBER if numeric else r"\S[^\n]*", normal(reasoning))
        return canonical(values[-1].removeprefix("<think>")) if values else None

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """Verify the decoded text of a response, without its end-of-text token."""
        part, target = self.split(response), self.target(prompt)
        said = self.read(part.conclusion if "think>" in response else response)
        expected = self.claims(" ".join(self.steps(prompt)))
        claims = self.claims(part.reasoning)
        steps = [False] * len(expected)
        for at, _, n in SequenceMatcher(None, expected, claims, False).get_matching_blocks():
            steps[at : at + n] = [True] * n
        return Verdict(target is not None and said == target, steps, len(claims), said)

    def claims(self, text: str) -> list[str]:
        """The steps written in a text, each in a standard spelling; [] if the task lists none."""
        return []

    def steps(self, prompt: Prompt) -> list[str]:
        """The text of each step of a full reasoning; [] if the task lists none."""
        return []

    def written(self, prompt: Prompt, n: int) -> str:
        """The first `n` true steps as the model writes them, including the opening."""
        return " ".join([self.opening, *self.steps(prompt)[:n]])

    def response(self, prompt: Prompt, n: int) -> str:
        """A right response with `n` steps written."""
        return f"{self.written(prompt, n)} {self.closing} {self.target(prompt)}"

    def change(self, prompt: Prompt, rng: np.random.Generator) -> Change | None:
        """A response up to one changed value; None if the effect of a change is not known."""
        return None

    def key(self, prompt: Prompt) -> str:
        """The text whose hash decides whether a prompt is held out."""
        return prompt.prompt


class GSM8K(Task):
    """The number after `####` (Cobbe et al. 2021), else in \\boxed{}. If there are several, they
    must agree. Anything after a further question is ignored."""

    def target(self, prompt: Prompt) -> str | None:
        return self.first((prompt.answer or "").rpartition("####")[2])

    def first(self, text: str) -> str | None:
        """The number that a text begins with."""
        text = re.sub("[€£¥]", "$", re.sub("<<[^<>]*>>", "", normal(text))).lower()
        return number(re.match(FIRST, text))

    def read(self, text: str) -> str | None:
        stated = text if "####" in text else text.replace("\\boxed", "####\\boxed")
        before_question = re.split(r"\?|\bQuestion\b|\bQ:", stated.partition("####")[2])[0]
        values = {self.first(piece) for piece in before_question.split("####")} - {None}
        return values.pop() if len(values) == 1 else None


class Made(Task):
    """A task that generates its prompts: a start, then operations that each lead to a new value."""

    longest: int  # the most operations in a prompt
    numbers: Sequence[str]  # every value, as a word
    chain: str  # pattern of a prompt: (its start)(its operations)
    operation: str  # pattern of one operation
    step: str  # form of a written step: {0} the start before the first, {1} operation, {2} value
    claim: str  # pattern of a written step, true or not
    after: Callable[[str, str], str | None]  # the value after an operation; None if out of range
    draw: Callable[[np.random.Generator, int], str]  # a random prompt of that many operations

    def parse(self, text: str) -> list[str]:
        """The start and the operations of a prompt; [] if the text is not a prompt."""
        found = re.fullmatch(self.chain, text.strip())
        return [found[1], *re.findall(self.operation, found[2])] if found else []

    def values(self, text: str) -> list[str]:
        """The value after each operation of a prompt; [] if the text is not a prompt."""
        start, *operations = self.parse(text) or [""]
        return self.follow(start, operations)

    def follow(self, start: str, operations: Sequence[str]) -> list[str]:
        """The value after each of these operations; [] if one goes out of range."""
        values = [start]
        for operation in operations:
            after = self.after(values[-1], operation)
            if after is None:
                return []
            values.append(after)
        return values[1:]

    def steps(self, prompt: Prompt) -> list[str]:
        start, *operations = self.parse(prompt.prompt) or [""]
        parts = enumerate(zip(operations, self.values(prompt.prompt)))
        return [self.step.format("" if i else f"{start} ", *part) for i, part in parts]

    def claims(self, text: str) -> list[str]:
        return re.findall(self.claim, " ".join(text.replace("<think>", " ").split()))

    def prompts(self, rng: np.random.Generator) -> Iterator[Prompt]:
        """Endless prompts; those of n operations come up in proportion to n."""
        lengths = np.arange(1, self.longest + 1)
        for i in itertools.count():
            operations = int(rng.choice(lengths, p=lengths / lengths.sum()))
            yield replace(self.make(rng, operations), id=f"{self.name}-{i}")

    def make(self, rng: np.random.Generator, operations: int) -> Prompt:
        """A random prompt of that many operations."""
        text, group = self.draw(rng, operations), f"{operations} step{'s' * (operations > 1)}"
        return Prompt(text, text, self.values(text)[-1], checker=self.name, group=group)

    def target(self, prompt: Prompt) -> str | None:
        values = self.values(prompt.prompt)
        return values[-1] if values and prompt.answer in (None, values[-1]) else None

    def change(self, prompt: Prompt, rng: np.random.Generator) -> Change | None:
        """True steps, whatever the response wrote, up to a random one whose value is changed. None
        for one operation, whose value is the answer, or if other values only lead out of range."""
        operations, values = self.parse(prompt.prompt)[1:], self.values(prompt.prompt)
        if len(values) < 2:
            return None
        at = int(rng.integers(len(values) - 1))
        place = self.numbers.index(values[at])
        others = [*self.numbers[place + 1 :], *self.numbers[:place]]
        ends = [(other, self.follow(other, operations[at + 1 :])) for other in others]
        possible = [(other, end[-1]) for other, end in ends if end]
        if not possible:
            return None
        wrong, follow = possible[int(rng.integers(len(possible)))]
        text = self.written(prompt, at + 1).rpartition(values[at])[0] + wrong
        return Change(text, values[-1], follow)


class Chains(Made):
    """A digit and up to six operations, left to right. Each operation permutes the ten digits, so
    every step matters, and a guessed answer is right one time in ten.
    `clock` adds and multiplies, and keeps the last digit: `5 *9 +7` has the values 5 and 2, written
    as `5 *9 5 +7 2`. A chain of any length equals one of 40 maps. Each letter of `permute` agrees
    with any of these on three digits at most, and letters do not compose to anything shorter."""

    longest, numbers, step = 6, "0123456789", "{0}{1} {2}"

    def __init__(self, name: str, table: dict[str, str]):
        super().__init__(name, f"a chain of a digit and {', '.join(table)}; any answer its value")
        self.table, self.words = table, [*self.numbers, *table]
        self.operation = "|".join(map(re.escape, table))
        self.chain = rf"([0-9])((?:\s*(?:{self.operation}))+)"
        self.claim = rf"(?<!\S)(?:{self.operation}) [0-9](?!\S)"

    def after(self, value: str, operation: str) -> str:
        return self.table[operation][int(value)]

    def draw(self, rng: np.random.Generator, operations: int) -> str:
        drawn = rng.choice([*self.table], operations)
        return " ".join([str(rng.integers(10)), *drawn])


class Values(Chains):
    """The control `clock-values`: a step is a value alone, which claims the step in its place."""

    step = "{2}"

    def claims(self, text: str) -> list[str]:
        return [f"{i} {word}" for i, word in enumerate(text.replace("<think>", " ").split())]


class Words(Made):
    """Chains in English, for models that can read: `Start with three. Ann adds one. Bob takes two.`
    is answered with ` So two` or ` three Ann adds one makes four. Bob takes two makes two. So two`.
    Values stay between zero and seven. Names do not affect whether a chain is held out."""

    longest, opening, step = 3, "", "{0}{1} makes {2}."
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven"]
    names = ["Ann", "Bob", "Tom", "Sam", "Eva", "Max", "Joe", "Kim", "Dan", "Amy", "Ben", "Leo"]
    words = [*numbers, *names, "adds", "takes", "makes"]
    operation = rf"[A-Z]\w* (?:adds|takes) (?:{'|'.join(numbers)})"
    chain = rf"Start with ({'|'.join(numbers)})((?:\. {operation})+)\.?"
    claim = r"\w+ (?:adds|takes) \w+ makes \w+"

    def after(self, value: str, operation: str) -> str | None:
        _, verb, n = operation.split()
        size = self.numbers.index(n)
        at = self.numbers.index(value) + (size if verb == "adds" else -size)
        return self.numbers[at] if 0 <= at < len(self.numbers) else None

    def draw(self, rng: np.random.Generator, operations: int) -> str:
        value = int(rng.integers(len(self.numbers)))
        text = f"Start with {self.numbers[value]}."
        for name in rng.choice(self.names, operations, replace=False):
            old, new = value, int(rng.integers(len(self.numbers) - 1))
            value = new + (new >= old)
            verb = "adds" if value > old else "takes"
            text += f" {name} {verb} {self.numbers[abs(value - old)]}."
        return text

    def key(self, prompt: Prompt) -> str:
        return re.sub(r"\w+ (?=adds|takes)", "", prompt.prompt)

    def reached(self, prompt: Prompt, reasoning: str) -> str | None:
        return (re.findall(r"makes (\w+)", reasoning) or [None])[-1]


CLOCK = {f"+{n}": "".join(str((d + n) % 10) for d in range(10)) for n in range(1, 10)}
CLOCK |= {f"*{n}": "".join(str(d * n % 10) for d in range(10)) for n in (3, 7, 9)}
DRAWN = """2734860915 4210693875 5748309621 7268031954 8049375261 8476501923
5786039214 7964832051 3792610854 7895604213 8591374602 2961548307"""
TASKS: dict[str, Task] = {
    "clock": Chains("clock", CLOCK),
    "clock-values": Values("clock-values", CLOCK),
    "permute": Chains("permute", dict(zip("abcdefghijkl", DRAWN.split()))),
    "words": Words("words", "a start value and who adds or takes what", "So", r"\bSo\b"),
    "gsm8k": GSM8K("gsm8k", "a number, alone or after ####", "####", r"####(?=\W*(?:boxed\W)?\d)"),
    "exact": Task("exact", "an answer", "Answer:", r"(?is:answer\s*:(?!.*answer\s*:))"),
    "none": Task("none"),
}


def task_of(prompt: Prompt) -> Task:
    """The task that verifies a prompt."""
    return TASKS[prompt.checker]


def load_prompts(config: Config, split: str, count: int | None = None) -> list[Prompt]:
    """The `train` or `held_out` prompts in a fair order, as many as the config says, or `count`.
    Generated prompts depend on run.seed. UserError for any fault, and for an empty split."""
    data, held_out = config.data, split == "held_out"
    count = count or (config.evaluate.count if held_out else data.count)
    task = TASKS.get(data.prompts)
    source: Iterable[Prompt]
    if isinstance(task, Made):
        if data.checker not in ("auto", task.name):
            raise UserError(f"data.checker: expected auto or {task.name}, found {data.checker!r}")
        count = count or 8192
        made = task.prompts(np.random.default_rng([config.run.seed, zlib.crc32(split.encode())]))
        source = itertools.islice(made, 10_000 + 250 * count)
    else:
        source = sorted(read_prompts(config), key=lambda p: sha256(p.prompt.encode()).digest())
    wanted = (p for p in source if is_held_out(p, data.held_out) == held_out)
    prompts = [replace(p, system=p.system or data.system) for p in itertools.islice(wanted, count)]
    if not prompts:
        raise UserError(f"data.held_out = {data.held_out}: no {split} prompts in {data.prompts}")
    return prompts


def is_held_out(prompt: Prompt, share: float = 0.1) -> bool:
    """Whether a prompt is kept for evaluation, by a hash of its text: it never changes."""
    return zlib.crc32(task_of(prompt).key(prompt).encode()) % 10000 < share * 10000


def read_prompts(config: Config) -> list[Prompt]:
    """Every prompt of a JSONL or CSV file, in order."""
    path = find_file(config.data.prompts, "data.prompts: neither a task nor a file:")
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else read_json_lines(path)
    prompts: dict[str, Prompt] = {}
    for line, row in rows:
        prompt = _prompt(row, f"{path}:{line}", config.data.checker)
        if prompts.setdefault(prompt.id, prompt) is not prompt:
            raise UserError(f"{path}:{line}: expected every id once, found {show(prompt.id)} again")
    return [*prompts.values()]


def _csv_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(the line where it ends, row) of every row that is not blank."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    line = 0
    try:
        names = [name.strip().lower() for name in reader.fieldnames or []]
        if len({*names}) < len(names):
            raise UserError(f"{path}:1: expected every column once, found {show(names)}")
        for row in reader:
            line = reader.line_num
            if None in [*row, *row.values()]:  # DictReader's mark of missing or extra cells
                raise UserError(f"{path}:{line}: expected {len(names)} cells, as in line 1")
            yield line, row
    except csv.Error as error:
        raise UserError(f"{path}:{line + 1}: not CSV: {error}; is a quote left open?") from None


def _prompt(row: dict, where: str, checker: str) -> Prompt:
    """A row as a prompt; `where` is its file and line, which serve as its id if it has none."""
    row = {key.strip().lower(): value for key, value in row.items()}
    names = ("id", "prompt", "question", "answer", "system", "checker", "group")
    id, prompt, question, answer, system, own, group = [_text(row, n, where) for n in names]
    text = prompt or question
    if not text:
        keys = show(", ".join(row))
        raise UserError(f"{where}: expected prompt or question, found the keys {keys}")
    guess = "gsm8k" if re.search(r"####[^\n]*\s*$", answer or "") else "exact" if answer else "none"
    name = (own if checker == "auto" else checker) or guess
    if name not in TASKS:
        raise UserError(f"{where}: checker {show(name)}: expected one of {', '.join(TASKS)}")
    task = TASKS[name]
    made = Prompt(id or Path(where).name, text, answer, system, name, group or "", where)
    if task.expects and task.target(made) is None:
        found = f"{show(text)} with the answer {show(answer)}"
        raise UserError(f"{where}: checker {name}: expected {task.expects}, found {found}")
    return made


def _text(row: dict, name: str, where: str) -> str | None:
    """A field as text; None if it is missing or blank."""
    value = row.get(name)
    text = "" if value is None else str(value) if type(value) in (int, float) else value
    if not isinstance(text, str) or re.search("[\0\ud800-\udfff]", text):
        expected = "expected text without NUL or surrogate"
        raise UserError(f"{where}: {name}: {expected}, found {show(value)}")
    return text if text.strip() else None
