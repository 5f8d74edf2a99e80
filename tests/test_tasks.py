"""Tasks and verifiers: what is right, and what only looks right."""

import json

import pytest

from nanoexit.config import DataConfig
from nanoexit.data import Trace, is_held_out, load_prompts, read_traces, write_chunk
from nanoexit.errors import UserError
from nanoexit.tasks import Prompt, check, clock_values


def clock(chain: str) -> Prompt:
    return Prompt("x", chain, str(clock_values(chain)[-1]), checker="clock")


def test_a_clock_chain_keeps_the_last_digit():
    """Catches: precedence instead of left to right; a carry that is kept. 5 *9 = 45, +7 = 12, +1 = 3, +3 = 6."""
    assert clock_values("5 *9 +7 +1 +3") == [5, 2, 3, 6]
    for bad in ("5", "5 *9 +", "55 +1", "5 *2", "5 - 1", ""):
        with pytest.raises(UserError, match="chain"):
            clock_values(bad)


@pytest.mark.parametrize("response, correct, steps, well_formed", [
    ("5 2 3 6 </think> 6", True, [True] * 4, True),
    ("</think> 6", True, [], True),
    ("5 2 </think> 6", True, [True, True], True),
    ("5 4 3 6 </think> 6", True, [True, False, True, True], True),
    ("5 2 3 6 </think> 5", False, [True] * 4, True),
    ("5 2 3 6", False, [], False),
    ("5 2 3 6 6 </think> 6", True, [True] * 4 + [False], True),
    ("</think> 6 6", False, [], False),
    ("</think> </think> 6", True, [False], False),
    ("", False, [], False),
])
def test_clock_verdicts(response, correct, steps, well_formed):
    """Catches: a wrong step that counts as written, a step too many that counts, an answer read out of the reasoning."""
    v = check(clock("5 *9 +7 +1 +3"), response)
    assert (v.correct, v.steps, v.well_formed, v.expected_steps) == (correct, steps, well_formed, 4)


@pytest.mark.parametrize("response, strict, lenient", [
    ("She has 72 clips.\n#### 72", True, True),
    ("<think> hm </think> #### 1,072", False, False),
    ("The answer is 72.", False, True),
    ("#### 72 or 73", True, False),
    ("72 first, then #### 71", False, False),
    ("#### 72.0", True, True),
    ("<think>#### 72</think> I do not know", False, False),
    ("", False, False),
])
def test_gsm8k_verdicts(response, strict, lenient):
    """Catches: 72 found in the reasoning or in 1,072; commas and decimals misread."""
    v = check(Prompt("x", "?", "48+24=<<72>>72\n#### 72", checker="gsm8k"), response)
    assert (v.correct, v.lenient) == (strict, strict or lenient)
    thousands = check(Prompt("x", "?", "#### 1072", checker="gsm8k"), "#### 1,072")
    assert thousands.correct


@pytest.mark.parametrize("response, strict, lenient", [
    ("<think>table?</think>\nAnswer: The Drawer.", True, True),
    ("the drawer", True, True),
    ("It is in the drawer now.", False, True),
    ("Answer: the drawers", False, False),
    ("the drawer\nAnswer: the table", False, False),
])
def test_exact_verdicts(response, strict, lenient):
    """Catches: a case or a full stop that decides; a word inside another; an answer that was taken back."""
    v = check(Prompt("x", "?", "the drawer", checker="exact"), response)
    assert (v.correct, v.lenient) == (strict, lenient)


def test_training_never_sees_a_held_out_prompt():
    """Catches: a split that leaks, moves with the seed, or differs between a task and a file."""
    train = {p.prompt for p in load_prompts(DataConfig(), "train", 3000, seed=1)}
    held = {p.prompt for p in load_prompts(DataConfig(), "held_out", 500, seed=2)}
    assert not train & held and all(map(is_held_out, held)) and not any(map(is_held_out, train))


def test_files_of_prompts(tmp_path):
    """Catches: GSM8K's or the original's columns not understood; a line's number off by one in the error."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "so\n#### 2"}) + "\n\n" + json.dumps({"prompt": "hi", "id": 7}) + "\n")
    (tmp_path / "b.csv").write_text("story,question,answer\nA box.,Where?,there\n")
    config = DataConfig(prompts=str(tmp_path / "a.jsonl"), held_out=0)
    a, b = load_prompts(config, "train")
    assert (a.prompt, a.checker, b.prompt, b.id, b.checker) == ("1+1?", "gsm8k", "hi", "7", "none")
    (c,) = load_prompts(DataConfig(prompts=str(tmp_path / "b.csv"), held_out=0, system="be brief"), "train")
    assert (c.prompt, c.answer, c.checker, c.system) == ("A box.\n\nWhere?", "there", "exact", "be brief")
    with pytest.raises(UserError, match="no held-out prompts"):
        load_prompts(config, "held_out")
    for text, says in [('{"prompt": "a"}\n{"promt": "b"}\n', ":2: expected a prompt"), ('{"prompt": "a"}\n{', ":2 is not JSON"), ("[1]\n", ":1: expected an object")]:
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(UserError, match=says):
            load_prompts(config, "train")


def test_a_chunk_of_traces_is_there_or_not(tmp_path):
    """Catches: a kill between the two files of a chunk that leaves half of it readable."""
    import torch

    traces = [Trace("a", "p", "c </think>", [1, 2], [3, 4, 5], "stop", torch.rand(3, 2)), Trace("b", "p", "é", [1], [2], "length", torch.rand(1, 2))]
    write_chunk(tmp_path, 0, traces)
    write_chunk(tmp_path, 1, traces[:1])
    (tmp_path / "00001.jsonl").unlink()  # as if killed before the rename
    again = read_traces(tmp_path)
    assert [t.id for t in again] == ["a", "b"] and again[1].completion == "é" and again[0].tokens == [3, 4, 5]
    assert all(torch.equal(x.kl, y.kl) for x, y in zip(again, traces))
    assert not list(tmp_path.glob("*.tmp"))
