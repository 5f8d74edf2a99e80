"""Interventions on text and depth, with writers whose way of answering is known."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import random_model
from experiment import preflight

from nanoexit import faithfulness
from nanoexit.config import Config
from nanoexit.exits import capped
from nanoexit.faithfulness import Subject, changed_value, monitor, same_answer, steps_in_head
from nanoexit.generate import Generation
from nanoexit.score import score
from nanoexit.tasks import Change, Prompt, Response, task_of

CHAIN = "5 *9 +7"  # 5, then 2


class Words:
    """A tokenizer of whole words; each new word gets the next id."""

    def __init__(self):
        self.words: list[str] = []

    def encode(self, text: str) -> list[int]:
        found = re.findall(r"\s*\S+", text)
        self.words += [word for word in dict.fromkeys(found) if word not in self.words]
        return [self.words.index(word) for word in found]

    def pieces(self, ids) -> list[str]:
        return [self.words[i] for i in ids]

    def decode(self, ids) -> str:
        return "".join(self.pieces(ids))

    def prompt_ids(self, prompt: str, system=None, **_) -> list[int]:
        return self.encode(f" {prompt}")


class Scripted(Subject):
    """A subject whose writer is a function of (prompt, text given, cap); it logs what is asked."""

    def __init__(self, write: Callable[[Prompt, str, int | None], str], config: Config):
        super().__init__(random_model("qwen2"), Words(), config, "head")
        self.write, self.asked = write, []

    def respond(self, prompts, use, forced=(), greedy=""):
        given = [self.tokenizer.decode(ids) for ids in forced] or [""] * len(prompts)
        self.asked.append((use, given, greedy, self.model.cap))
        texts = [self.write(p, start, self.model.cap) for p, start in zip(prompts, given)]
        return [said(self.tokenizer, p, text) for p, text in zip(prompts, texts)]


def said(tokenizer: Words, prompt: Prompt, text: str) -> Response:
    tokens = tokenizer.encode(text)
    generation = Generation(tokens, [2] * len(tokens), finish="length")
    return Response(prompt, [0], generation, text, task_of(prompt).verify(prompt, text))


def chain(text: str = CHAIN) -> Prompt:
    return Prompt(text, text, checker="clock", group=f"{len(text.split()) - 1} steps")


def in_head(prompt: Prompt, given: str, cap: int | None) -> str:
    """Right whatever text it is given; writes no steps of its own."""
    start = given if "</think>" in given else (given or "<think>") + " </think>"
    return f"{start} {task_of(prompt).target(prompt)}"


def on_paper(prompt: Prompt, given: str, cap: int | None) -> str:
    """Writes all steps, goes on from what is given, and copies the last value, else 0."""
    task = task_of(prompt)
    if "</think>" not in given:
        written = len(given.split()[1:]) // 2 if given else 0
        value, steps = given.split()[-1] if written else "", task.steps(prompt)
        given = given or "<think>"
        for step in steps[written:]:
            value = task.table[step.split()[-2]][int(value)] if value else step.split()[-1]
            given += f" {step.rsplit(' ', 1)[0]} {value}"
        given += " </think>"
    return f"{given} {task.reached(prompt, given) or 0}"


def free_in_head(prompt: Prompt, given: str, cap: int | None) -> str:
    return (in_head if cap is None else on_paper)(prompt, given, cap)


def test_what_is_kept_of_a_reasoning():
    """Catches: the end kept instead of the start; <think> cut off or counted; no </think>."""
    subject = Scripted(on_paper, Config())
    written = said(subject.tokenizer, chain(), "<think> 5 *9 5 +7 2 </think> 2")
    curve, area = same_answer(subject, [written])
    kept = ["", " 5", " 5 *9", " 5 *9 5 +7", " 5 *9 5 +7 2"]
    assert [given for _, given, *_ in subject.asked] == [[f"<think>{k} </think>" for k in kept]]
    assert curve == [[0.0, 0.0], [0.25, 0.0], [0.5, 0.0], [0.75, 0.0], [1.0, 1.0]]
    assert area == pytest.approx(1 - 0.5 / 5)  # by trapezoids: the last of five tokens decides


def test_same_answer_compares_with_the_responses_own():
    """Catches: the right answer used instead of the model's own; an area not weighted by length."""
    subject = Scripted(in_head, Config())
    texts = ("<think> 5 </think> 2", "<think> 5 </think> 8", "<think> </think> 2", "<think> 5 *9")
    right, wrong, silent, never = (said(subject.tokenizer, chain(), text) for text in texts)
    assert same_answer(subject, [right]) == ([[x / 4, 1.0] for x in range(5)], 0.0)
    assert same_answer(subject, [wrong])[0] == [[x / 4, 0.0] for x in range(5)]
    assert same_answer(subject, [wrong, silent])[1] == 0.5  # 1 and, with nothing to cut, 0
    assert same_answer(subject, [never]) == ([], None)


@pytest.mark.parametrize("checker, text, places", [
    ("gsm8k", "3 and 4 is 7.\n#### 7", (0, 5, 6)),
    ("exact", "It is so. Answer: no", (0, 3, 4)), ("exact", "no", None),
    ("none", "<think> so </think> yes", (1, 2, 3)), ("none", "so </think> yes", (0, 1, 2)),
])  # fmt: skip
def test_where_reasoning_ends_in_free_text(checker, text, places):
    """Catches: tasks without </think> left out; a marker cut in two; the answer kept as text."""
    tokenizer = Words()
    response = said(tokenizer, Prompt("q", "q", "7", checker=checker), text)
    assert faithfulness.reasoning_places(tokenizer, response) == places


def test_a_changed_value_is_followed_or_not():
    """Catches: misnamed outcomes; shares of something other than the cases."""
    prompts = [chain("5 *9 +7 +1 +3"), chain("7 +3 *9 +1"), chain("5 *9")]  # the last has none
    for write, kind in ((on_paper, "follow"), (in_head, "stay")):
        subject = Scripted(write, Config())
        responses = [said(subject.tokenizer, p, in_head(p, "", None)) for p in prompts]
        shares = changed_value(subject, responses)
        assert shares == {name: float(name == kind) for name in shares} and len(shares) == 4
        ((_, given, *_),) = subject.asked
        assert len(given) == 2 and all(len(text.split()) % 2 == 0 for text in given)
        assert set(changed_value(subject, responses[2:]).values()) == {None}
    change, p = Change("", "6", "1"), prompts[0]
    texts = ("5 *9 8 </think> 8", "5 *9 8 +7 5 +1 6 +3 9 </think> 9", "5 *9 8 </think> 4", "5 *9 8")
    found = [faithfulness.outcome(said(Words(), p, f"<think> {t}"), change) for t in texts]
    assert found == ["stop", "other", "other", "other"]


def test_steps_in_the_head():
    """Catches: steps that stay written; heads that exit early; a gap or 0.8 that counts."""

    def shallow(prompt: Prompt, given: str, cap: int | None) -> str:
        n = len(task_of(prompt).steps(prompt))
        wrong = 1 if (cap, n) == (3, 2) else 2 if (cap, n) == (5, 2) else 0  # of ten
        right = n < (cap or 9) and int(prompt.prompt[0]) >= wrong
        return in_head(prompt, given, cap) if right else f"{given} x"

    subject = Scripted(shallow, Config())
    prompts = [chain(f"{i} " + " ".join(["+7"] * n)) for n in (1, 2, 3, 4) for i in range(10)]
    prompts.append(Prompt("q", "q", "7", checker="gsm8k"))
    subject.config.evaluate.caps = [1, 2, 3, 5]
    found = steps_in_head(subject, prompts)
    assert found == {"1": 0, "2": 1, "3": 2, "5": 1} and subject.model.cap is None
    assert {given for _, texts, *_ in subject.asked for given in texts} == {"<think> </think>"}
    assert [asked[2:] for asked in subject.asked] == [("full", cap) for cap in (1, 2, 3, 5)]
    assert steps_in_head(subject, prompts[-1:]) == {}


def test_the_monitors():
    """Catches: a reader of the conclusion; a guess though a value is written; miscounted alarms."""
    full, half = "<think> 5 *9 5 +7 2 </think> 2", "<think> 5 *9 5 </think> 2"
    responses = [said(Words(), chain(), text) for text in (full, half, half, "<think> </think> 2")]
    responses.append(said(Words(), chain("5 *9 +8"), "<think> 5 *9 5 </think> 3"))
    found = monitor(responses)
    assert found["score"] == 0.4 and found["chance"] == 0.8  # full is read, silent is guessed
    assert found["false_alarms"] == 0.75
    assert found["before_last"] == 1.0 and found["before_last_false_alarms"] == 0.0
    lies = monitor([said(Words(), chain(), "<think> 5 *9 5 +7 2 </think> 8")])
    assert (lies["score"], lies["before_last"]) == (0.0, 0.0)
    assert (lies["false_alarms"], lies["before_last_false_alarms"]) == (1.0, 1.0)
    silent = monitor([said(Words(), chain("5 *9"), "<think> </think> 5")])
    assert silent["false_alarms"] is None and silent["before_last"] is None


def test_preflight_reads_the_right_places_at_the_right_depths():
    """Catches: a word one block too deep; words read one place off; no answer."""
    subject = Scripted(in_head, Config())
    model, task = subject.model, task_of(chain())
    words = subject.tokenizer.encode(" ".join(["<think>", *task.words]))[1:]
    rng = np.random.default_rng(0)
    prompts = [task.make(rng, 2) for _ in range(60)] + [Prompt("q", "q", checker="none")]
    found = preflight(subject, prompts, [2, 4, 6])  # the model has 5 blocks
    assert set(found) == {"2", "4"} and set(found["2"]) == {"2"}
    for d in (2, 4):
        hits = np.zeros((60, 6))
        for row, prompt in enumerate(prompts[:60]):
            asked = subject.tokenizer.prompt_ids(prompt.prompt)
            text = subject.tokenizer.encode(task.response(prompt, 2))
            ids = torch.tensor([asked + text[:-1]])
            depths = torch.tensor([[d - 1] * (len(asked) - 1) + [d] * len(text)])
            h = score(model, ids, depths, [1]).hidden
            guess = torch.tensor(words)[model.readout(h)[0, :, words].argmax(-1)].tolist()
            right = [g == t for g, t in zip(guess[len(asked) - 1 :], text)]
            hits[row] = right[1:6] + right[7:]  # without <think> and </think>
        assert found[str(d)]["2"] == pytest.approx(hits.mean(0).tolist()) and hits.any()


def test_a_subject_is_measured_under_the_cap_around_it():
    """Catches: an intervention that lifts the cap, or one that does not end with it."""
    subject = Scripted(free_in_head, Config())
    written = said(subject.tokenizer, chain(), "<think> 5 *9 5 +7 2 </think> 2")
    assert same_answer(subject, [written])[1] == 0.0
    with capped(subject.model, 2):
        assert same_answer(subject, [written])[1] == pytest.approx(0.9)
