"""data/reasoning.jsonl: made by its generator, with answers that a second reading of the text agrees with."""

import datetime
import json
import re
import sys

import pytest

from nanoexit.config import ROOT, DataConfig, load_config
from nanoexit.data import is_held_out, load_prompts
from nanoexit.tasks import check

sys.path.insert(0, str(ROOT / "scripts"))
import make_prompts

FILE = ROOT / "data" / "reasoning.jsonl"
ROWS = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def kind(name: str) -> list[tuple[str, str]]:
    return [(r["prompt"].split("\n")[0], r["answer"]) for r in ROWS if r["group"] == name]


def test_the_generator_writes_this_file():
    """Bug: the file was edited by hand, or the generator draws from an unseeded source."""
    assert make_prompts.prompts(100, 0) == ROWS
    assert make_prompts.prompts(5, 1) != make_prompts.prompts(5, 0)


def test_prompts_differ_and_their_answers_are_accepted():
    """Bug: duplicates, or a format that the checker does not accept, or accepts for a wrong answer."""
    assert len({r["prompt"] for r in ROWS}) == len(ROWS) == 400
    prompts = load_prompts(DataConfig(prompts=str(FILE)), "train") + load_prompts(DataConfig(prompts=str(FILE)), "held_out")
    assert {p.group for p in prompts if is_held_out(p.prompt)} == {"arithmetic", "dates", "tracking", "belief"}
    for p in prompts:
        assert check(p, f"<think>so</think>Well.\nAnswer: {p.answer}").correct
        assert not check(p, f"<think>{p.answer}</think>Answer: {p.answer}0").correct


def test_arithmetic():
    """Bug: a story and its formula disagree."""
    formulas = {"Together they give": lambda n, m, k: n + n * m - k, "bags with": lambda m, n, k, n2: m * n - k + n2,
                "A train": lambda m, n, k, more: m * n - k - more, "pages": lambda n, m, k: n * m - k * m,
                "third of": lambda n, m, k: n * m - k // 3, "share": lambda m, total, k: total // m + k}
    for text, answer in kind("arithmetic"):
        formula = next(f for mark, f in formulas.items() if mark in text)
        assert formula(*map(int, re.findall(r"\d+", text))) == int(answer), text


def test_dates():
    """Bug: off by one, the wrong direction, or a day of the week that is not that date's."""
    for text, answer in kind("dates"):
        found = [datetime.datetime.strptime(d, "%B %d, %Y").date() for d in re.findall(r"[A-Z][a-z]+ \d+, \d{4}", text)]
        days = re.search(r"(\d+) days", text)
        if text.startswith("Today"):
            assert WEEK[(WEEK.index(text.split()[2].strip(".")) + int(days[1])) % 7] == answer
        elif "days before" in text:
            assert found[0].strftime("%A") in text and (found[0] - datetime.timedelta(int(days[1]))).strftime("%A") == answer
        elif "days after" in text:
            assert (found[0] + datetime.timedelta(int(days[1]))).isoformat() == answer
        else:
            assert (found[1] - found[0]).days == int(answer)


WEEK = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def test_tracking():
    """Bug: a swap is told but not made."""
    for text, answer in kind("tracking"):
        holds = dict(re.findall(r"(\w+) has the (\w+) ball", text))
        for a, b in re.findall(r"(\w+) and (\w+) swap", text):
            holds[a], holds[b] = holds[b], holds[a]
        assert holds[re.search(r"that (\w+) has now", text)[1]] == answer, text


def test_belief():
    """Bug: who is away learns of a move, or who is told does not."""
    kinds = set()
    for text, answer in kind("belief"):
        present, believed, place = True, None, None
        for sentence in re.split(r"[.;] ", text):
            if put := re.search(r"(?:puts|moves) the .* (?:into|to) the (\w+)", sentence):
                place = put[1]
            present = present and "leaves" not in sentence or "comes back" in sentence
            moved_unseen = not present and "moves" in sentence
            believed = place if (put and present) or "truthfully" in sentence else believed
            kinds.add("unseen" if moved_unseen else "told" if "truthfully" in sentence else "seen")
        assert believed == answer, text
    assert kinds == {"unseen", "told", "seen"}


@pytest.mark.parametrize("name, blocks", [("deepseek", 28), ("qwen3", 28), ("llama3", 16), ("smollm2", 30)])
def test_exits_fit_the_models_of_the_configs(name, blocks):
    """Bug: an exit depth that the model of the config does not have (numbers of blocks: their public config.json)."""
    config = load_config(f"configs/{name}.yaml")
    assert config.exits.layers == sorted(set(config.exits.layers)) and 1 <= config.exits.layers[0] and config.exits.layers[-1] < blocks
    assert config.data.prompts == "data/reasoning.jsonl" and config.generation.max_new_tokens == 400
