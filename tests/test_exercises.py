"""Solutions of the first three exercises of EXERCISES.md."""

import math

import numpy as np
import pytest
import torch

from nanoexit.config import ROOT
from nanoexit.exits import Asked, Policy, exit_depths, target_chance
from nanoexit.generate import generate
from nanoexit.model import Transformer
from nanoexit.tasks import Prompt, Task
from nanoexit.tokenizer import load_tokenizer
from nanoexit.weights import load_model


def test_1_the_kl_at_which_the_target_is_a_half():
    """Catches: a target rule that the exercise no longer describes: sigmoid(ln 3) is 3/4."""
    for strength in (1, 40):
        kl = torch.tensor(math.log(3) / strength)
        assert target_chance(kl, strength).item() == pytest.approx(0.5)


class Settled(Policy):
    """Exit where the likeliest token is the same as at the depth before."""

    def __init__(self) -> None:
        super().__init__("settled")
        self.before: dict[int, int] = {}

    def layers(self, model: Transformer) -> tuple[int, ...]:
        return exit_depths(model) or tuple(range(1, model.deepest))

    def exits(self, asked: Asked) -> torch.Tensor:
        likeliest = asked.model.readout(asked.h).argmax(-1)
        first = asked.depth == self.layers(asked.model)[0]
        before = [self.before.get(at, -1) for at in asked.at.tolist()]
        self.before = dict(zip(asked.at.tolist(), likeliest.tolist()))
        same = likeliest == torch.tensor(before, device=likeliest.device)
        return same & (not first)


def test_2_a_policy_without_touching_the_model():
    """Catches: a seam that needs more than a subclass of Policy."""
    model, tokenizer = load_model(ROOT / "data/tiny"), load_tokenizer(ROOT / "data/tiny")
    ids = [tokenizer.prompt_ids(chain) for chain in ("7 +3 *9", "5 *9 +7 +1")]
    rows = generate(model, ids, Settled(), 12, 0.0)
    depths = [d for row in rows for d in row.depths]
    assert min(depths) >= 2 and np.mean(depths) < 8


class Backwards(Task):
    """`stone` -> `e n o t s . enots`: one step per letter, then the word."""

    def __init__(self) -> None:
        super().__init__("backwards", "a word", ".", r"\.")

    def target(self, prompt: Prompt) -> str:
        return prompt.prompt[::-1]

    def steps(self, prompt: Prompt) -> list[str]:
        return [*self.target(prompt)]

    def claims(self, text: str) -> list[str]:
        return text.split()


def test_3_another_task():
    """Catches: a task that needs more than its own class."""
    task, prompt = Backwards(), Prompt("1", "stone")
    assert task.verify(prompt, "e n o t s . enots").written == 1
    silent = task.verify(prompt, ". enots")
    assert silent.correct and silent.written == 0
    assert not task.verify(prompt, "e n o t s . stone").correct
    assert task.verify(prompt, "e n . enots").written == pytest.approx(0.4)
