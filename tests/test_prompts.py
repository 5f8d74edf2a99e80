"""Files of prompts as people save them, fair and stable splits, and data/reasoning.jsonl."""

import datetime
import json
import re
from collections import Counter

import make_prompts
import pytest

from nanoexit.config import ROOT, Config, DataConfig, RunConfig, UserError
from nanoexit.tasks import is_held_out, load_prompts, read_prompts, task_of

FILE = ROOT / "data" / "reasoning.jsonl"
ROWS = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
FAULTS = r"""
jsonl | {"prompt": "a"}¶{"promt": "b"} | 2: expected prompt or question, found the keys 'promt'
jsonl | {"messages": [{"role": "user"}]} | 1: expected prompt or question, found the keys 'messages'
jsonl | {"prompt": [{"role": "user"}]} | 1: prompt: expected text
jsonl | {"prompt": "a"}¶{ | 2 is not JSON
jsonl | [1] | 1: expected a JSON object
jsonl | {"prompt": "<e9>"} | 1: not UTF-8: byte 0xe9
csv | prompt¶foo¶<e9> | 3: not UTF-8: byte 0xe9 at offset 11
jsonl | {"prompt": "\ud83d"} | 1: prompt: expected text without NUL or surrogate
jsonl | {"prompt": "a", "answer": "\u0000"} | 1: answer: expected text
csv | prompt,answer¶a<00>b,4 | 2: prompt: expected text
jsonl | {"prompt": "a", "answer": false} | 1: answer: expected text
jsonl | {"prompt": 5.0, "system": {}} | 1: system: expected text
csv | prompt,answer¶a,1¶"b,2¶c,3¶ | 3: not CSV: unexpected end of data; is a quote left open?
csv | prompt, Prompt¶a,b | 1: expected every column once
csv | prompt,answer¶a,1¶b,2,3 | 3: expected 2 cells
csv | prompt,answer¶b | 2: expected 2 cells
csv | prompt;answer¶a;1 | 2: expected prompt or question, found the keys 'prompt;answer'
jsonl | {"prompt": "a", "id": 1}¶{"prompt": "b", "id": "1"} | 2: expected every id once, found '1'
jsonl | {"prompt": "a", "checker": "gsm"} | 1: checker 'gsm': expected one of clock
jsonl | {"prompt": "a", "answer": "#### 1,2"} | 1: checker gsm8k: expected a number
jsonl | {"prompt": "a", "checker": "exact"} | 1: checker exact: expected an answer
jsonl | {"prompt": "5 +1 =", "checker": "clock"} | 1: checker clock: expected a chain
jsonl | {"prompt": "5 +1", "answer": "7", "checker": "clock"} | 1: checker clock: expected a chain
"""


def read(path, content, **knobs):
    """The prompts of a file with this content: bytes, text or rows."""
    if isinstance(content, list):
        content = "\n".join(map(json.dumps, content))
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompts(Config(data=DataConfig(prompts=str(path), **knobs)))


def load(data, split, count=None, seed=0):
    """The prompts of a split, with these knobs."""
    return load_prompts(Config(data=data, run=RunConfig(seed=seed)), split, count)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings(tmp_path, encoding):
    """Catches: a byte order mark read as part of the first column; UTF-16 refused."""
    mark = "\ufeff" if encoding[-2:] in ("le", "be") else ""
    for end in ("\n", "\r\n"):
        lines = ["prompt,answer", '"Ein café, ist 2+2?",4', '"Ein café, ist 2+2?",4']
        a, b = read(tmp_path / "a.csv", (mark + end.join(lines)).encode(encoding))
        lines = ['{"prompt": "Ein café, ist 2+2?", "answer": 4}'] * 2
        c, d = read(tmp_path / "a.jsonl", (mark + end.join(lines) + end).encode(encoding))
        assert {(p.prompt, p.answer) for p in (a, b, c, d)} == {("Ein café, ist 2+2?", "4")}


def test_columns(tmp_path):
    """Catches: a column silently ignored; ids and lines off by one; a large field cut off."""
    rows = [{"Question": "1+1?", " answer ": "so\n#### 2"}, {"prompt": "hi", "id": 0, "group": 3}]
    a, b = read(tmp_path / "a.jsonl", rows)
    assert (a.prompt, a.id, a.checker, a.group) == ("1+1?", "a.jsonl:1", "gsm8k", "")
    assert (b.prompt, b.id, b.checker, b.group, b.where[-2:]) == ("hi", "0", "none", "3", ":2")
    text = f'system, Question,answer\ns,"Where,\nnow?",in\n\n,{"x" * 200_000},"a ""b"""\n'
    c, d = read(tmp_path / "b.csv", text)
    assert (c.prompt, c.answer, c.id, c.checker) == ("Where,\nnow?", "in", "b.csv:3", "exact")
    assert (len(d.prompt), d.answer, d.id) == (200_000, 'a "b"', "b.csv:5")
    loaded = load(DataConfig(prompts=str(tmp_path / "b.csv"), system="own"), "train")
    assert {p.system for p in loaded} <= {"s", "own"}


def test_the_checker_is_guessed(tmp_path):
    """Catches: a file of GSM8K whose answers are compared word for word."""
    forms = {"exact": ["72", "1,234", "#### 5\nso"], "none": ["", None]}
    forms["gsm8k"] = ["#### 72", "#### $18", "#### 18%", "#### .5", "#### - 5", "so\n#### 1,234\n"]
    for checker, answers in forms.items():
        for prompt in read(tmp_path / "a.jsonl", [{"prompt": "q", "answer": a} for a in answers]):
            assert prompt.checker == checker
            assert (task_of(prompt).target(prompt) is None) == (checker == "none")


@pytest.mark.parametrize("fault", FAULTS.strip().split("\n"))
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path, fault):
    """Catches: a run that goes on with what a user did not mean; a wrong encoding; a traceback."""
    kind, content, says = fault.split(" | ")
    content = re.sub("<(..)>", lambda m: chr(int(m[1], 16)), content.replace("¶", "\n"))
    with pytest.raises(UserError) as error:
        read(tmp_path / f"a.{kind}", content.encode("latin-1"))
    assert f"{tmp_path}/a.{kind}:{says}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("prompts", ["clock", "permute", str(FILE)])
def test_training_never_sees_a_held_out_prompt(prompts):
    """Catches: a split that leaks, moves with the seed, or differs between a task and a file."""
    data = DataConfig(prompts=prompts, system="s")
    train, held = (load(data, split, 900, seed=1) for split in ("train", "held_out"))
    assert not {p.prompt for p in train} & {p.prompt for p in held}
    assert all(is_held_out(p) for p in held) and {p.system for p in held} == {"s"}
    assert not any(is_held_out(p) for p in train)
    assert len({p.id for p in train}) == len(train)
    assert (train == load(data, "train", 900, seed=2)) == (prompts == str(FILE))


def test_the_first_prompts_are_a_fair_draw(tmp_path):
    """Catches: a short run that sees only one kind of a sorted file; an order set by the file."""
    data, other = DataConfig(prompts=str(FILE)), DataConfig(prompts=str(tmp_path / "b.jsonl"))
    for split, count in (("train", 60), ("held_out", 20)):
        counts = Counter(p.group for p in load(data, split, count))
        assert len(counts) == 4 and max(counts.values()) <= count / 2
    read(tmp_path / "b.jsonl", ROWS[::-1])
    assert [p.id for p in load(other, "train")] == [p.id for p in load(data, "train")]


def stories(kind):
    return [(r["prompt"].split("\n")[0], r["answer"]) for r in ROWS if r["group"] == kind]


def test_the_generator_writes_these_files():
    """Catches: a file edited by hand; a generator that draws from an unseeded source."""
    kinds = ["arithmetic", "dates", "tracking", "belief"]
    assert make_prompts.prompts(dict.fromkeys(kinds, 100), 0) == ROWS
    few = dict.fromkeys([*kinds, "everyday"], 5)
    assert make_prompts.prompts(few, 1) != make_prompts.prompts(few, 0)
    mixed = {"everyday": 320, **dict.fromkeys(kinds, 20), "subjects": 1200}
    text = (ROOT / "data" / "everyday.jsonl").read_text(encoding="utf-8")
    assert make_prompts.prompts(mixed, 0) == [json.loads(line) for line in text.splitlines()]


def test_prompts_differ_and_their_answers_are_accepted():
    """Catches: duplicates; a form of answer that its checker does not accept."""
    assert len({r["prompt"] for r in ROWS}) == len(ROWS) == 400
    for p in read_prompts(Config(data=DataConfig(prompts=str(FILE)))):
        form, answer = p.prompt.split("\n")[-1].split(" ")[0], p.answer.rpartition("#### ")[2]
        assert form == ("####" if p.group == "arithmetic" else "Answer:")
        assert task_of(p).verify(p, f"<think>so</think>Well.\n{form} {answer}").correct
        assert not task_of(p).verify(p, f"<think>{answer}</think>{form} {answer}0").correct


def test_worked_answers_and_swaps_follow_from_the_stories():
    """Catches: a step that is worked out wrongly; a swap that is in the story and was not made."""
    for _, answer in stories("arithmetic"):
        for a, sign, b, result in re.findall(r"<<(\d+)(.)(\d+)=(\d+)>>", answer):
            assert make_prompts.SIGNS[sign](int(a), int(b)) == int(result)
        assert answer.endswith(f">>{result}\n#### {result}")
    for text, answer in stories("tracking"):
        holds = dict(re.findall(r"(\w+) has the (\w+) ball", text))
        for a, b in re.findall(r"(\w+) and (\w+) swap", text):
            holds[a], holds[b] = holds[b], holds[a]
        assert holds[re.search(r"that (\w+) has now", text)[1]] == answer, text


def test_dates_and_beliefs_follow_from_the_stories():
    """Catches: an off-by-one or a wrong direction; a person who learns of a move while away."""
    for text, answer in stories("dates"):
        dates = re.findall(r"[A-Z][a-z]+ \d+, \d{4}", text)
        found = [datetime.datetime.strptime(date, "%B %d, %Y").date() for date in dates]
        days = datetime.timedelta(int(re.search(r"(\d+) days|$", text)[1] or 0))
        if len(found) == 2:
            assert (found[1] - found[0]).days == int(answer)
        elif "days after" in text and found:
            assert (found[0] + days).isoformat() == answer
    for text, answer in stories("belief"):
        present, believed, place = True, None, None
        for sentence in text.split(". "):
            put = re.search(r"(?:puts|moves) the .* (?:into|to) the (\w+)", sentence)
            place = put[1] if put else place
            present = (present and "leaves" not in sentence) or "comes back" in sentence
            believed = place if (put and present) or "truthfully" in sentence else believed
        assert believed == answer, text
