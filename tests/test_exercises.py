"""Solutions of the first three exercises of EXERCISES.md."""

import math

import numpy as np
import pytest
import torch

from nanoexit.config import ROOT, Config
from nanoexit.exits import Asked, Policy, exit_depths, target_chance
from nanoexit.generate import Sampling, generate
from nanoexit.model import Transformer
from nanoexit.tasks import Prompt, Task, load_prompts, task_of
from nanoexit.tokenizer import load_tokenizer
from nanoexit.weights import load_model


def test_1_the_kl_at_which_the_target_is_a_half():
    """Catches: a target rule that the exercise no longer describes: sigmoid(ln 3) is 3/4."""
    for strength in (1, 8):
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
    prompts = load_prompts(Config(), "held_out", 100)
    ids, found = [tokenizer.prompt_ids(p.prompt) for p in prompts], {}
    for name, policy in (("settled", Settled()), ("confident", "confidence:0.9")):
        rows = generate(model, ids, policy, 24, 0.0, settings=Sampling(batch_size=100))
        texts = [tokenizer.decode(row.tokens, True) for row in rows]
        right = [task_of(p).verify(p, text).correct for p, text in zip(prompts, texts)]
        found[name] = np.mean([d for row in rows for d in row.depths]), np.mean(right)
    (settled, rarely_right), (confident, often_right) = found.values()
    assert 2 <= settled < confident < 4  # the same token twice is soon found
    assert rarely_right < 0.3 and often_right > 0.9  # but two early readouts agree on nonsense


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
