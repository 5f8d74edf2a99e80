"""REINFORCE: the estimator against the exact gradient, on a model small enough to enumerate."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import scramble
from torch.distributions import Bernoulli, kl_divergence

from nanoexit.config import Config, LoRAConfig
from nanoexit.exits import attach
from nanoexit.generate import Generation, Sampling, generate
from nanoexit.model import Shape, Transformer
from nanoexit.reinforce import Rollout, accumulate, copy_trained, leave_one_out, reward_parts
from nanoexit.score import score
from nanoexit.tasks import Prompt, Response, Verdict
from nanoexit.training import trained

STOP, LONGEST, K = 2, 3, 4
PROMPT = [0, 1]


def small_model(cap: int | None) -> Transformer:
    """3 words, 3 blocks, exits at 1 and 2: a few hundred rollouts are all there are."""
    model = Transformer(Shape("qwen2", 3, 8, 8, 3, 2, 1, 4, qkv_bias=True, tied=True))
    scramble(model.named_parameters(), 0)
    attach(model, [1, 2], lora=LoRAConfig(r=1, alpha=1, targets=["q_proj", "down_proj"]), cap=cap)
    scramble(((n, p) for n, p in model.named_parameters() if "lora_B" in n or "exits" in n), 1)
    return model


def reward(tokens, depths) -> float:
    """An arbitrary function of everything that was sampled."""
    value = sum((i + 1) * t for i, t in enumerate(tokens)) - 0.7 * sum(depths)
    return value + 2.0 * (tokens[-1] == STOP)


def every_rollout(deepest: int):
    """(tokens, depths): texts up to LONGEST tokens that end at STOP, every pattern of exits."""
    for n in range(1, LONGEST + 1):
        for tokens in itertools.product(range(3), repeat=n):
            if STOP in tokens[:-1] or (n < LONGEST and tokens[-1] != STOP):
                continue
            for depths in itertools.product(range(1, deepest + 1), repeat=n):
                yield list(tokens), list(depths)


def exact_gradient(model: Transformer) -> torch.Tensor:
    """The gradient of the sum over all rollouts of p(rollout) times its reward."""
    expected, mass = torch.zeros(()), 0.0
    for tokens, depths in every_rollout(model.deepest):
        ids = torch.tensor([PROMPT + tokens[:-1]])
        out = score(model, ids, torch.tensor([[3, *depths]]), [2])
        logp = out.logits[0, 1:].log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
        p = (logp.sum() + out.exit_logprobs.sum()).exp()
        expected, mass = expected + p * reward(tokens, depths), mass + p.item()
    assert mass == pytest.approx(1, abs=1e-4), "every rollout, once"
    return flat(torch.autograd.grad(expected, list(trained(model).values()), allow_unused=True))


def flat(gradients) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradients if g is not None])


def estimate(model: Transformer, groups: int, seed: int, baseline: bool) -> torch.Tensor:
    """One estimate from groups x K rollouts, by the code that trains."""
    settings = Sampling(stop_ids=[STOP])
    gens = generate(model, [PROMPT] * (groups * K), "head", LONGEST, 1.0, seed, settings)
    rewards = torch.tensor([reward(g.tokens, g.depths) for g in gens])
    advantages = leave_one_out(rewards.view(-1, K)).flatten() if baseline else rewards
    responses = [Response(Prompt("x", "x"), PROMPT, g, "", Verdict(False)) for g in gens]
    rollouts = [Rollout(r, {}, a) for r, a in zip(responses, advantages.tolist())]
    model.zero_grad()
    accumulate(model, rollouts, replace(Config().rl, prompts=groups, rollouts=K))
    return -flat([p.grad for p in trained(model).values()])


@pytest.mark.parametrize("cap", [None, 2])
def test_the_estimator_is_unbiased_and_the_baseline_helps(cap):
    """Catches: a factor in the advantage; a token or an exit left out or counted twice."""
    model, spread = small_model(cap), {}
    exact = exact_gradient(model)
    directions = torch.randn(6, len(exact), generator=torch.Generator().manual_seed(0))
    directions[0] = exact / exact.norm()
    for baseline in (True, False):
        runs = torch.stack([estimate(model, 64, seed, baseline) for seed in range(80)])
        runs = runs @ directions.T
        error = (runs.mean(0) - directions @ exact).abs() / (runs.std(0) / len(runs) ** 0.5)
        assert (error < 3.5).all(), error
        spread[baseline] = runs.var(0).sum()
        noise = runs[:, 0].std() / len(runs) ** 0.5
        assert not baseline or exact.norm() > 8 * noise, "the gradient must exceed the noise"
    assert spread[True] < 0.8 * spread[False]
    assert leave_one_out(torch.tensor([[6, 0, 3.0], [1] * 3])).tolist() == [[4.5, -4.5, 0], [0] * 3]


def test_rollouts_of_several_prompts_are_a_sum():
    """Catches: a row shared by rollouts of different prompts; a flat group kept or mixed up."""
    model, config = small_model(None), Config()
    config.rl.prompts, config.rl.rollouts, gradients, rollouts = 1, K, [], []
    for prompt, scale in (([0, 1], 1.0), ([1], 0.0), ([1, 0, 0], -2.0)):
        gens = generate(model, [prompt] * K, "head", LONGEST, 1.0, 3, Sampling(stop_ids=[STOP]))
        responses = [Response(Prompt("x", "x"), prompt, g, "", Verdict(False)) for g in gens]
        group = [Rollout(r, {}, scale * (i + 1)) for i, r in enumerate(responses)]
        rollouts += group
        model.zero_grad()
        accumulate(model, group, config.rl)
        gradients += [flat([p.grad for p in trained(model).values()])] if scale else []
        assert scale or all(p.grad is None for p in trained(model).values())
    for start in (None, copy_trained(model)):
        model.zero_grad()
        accumulate(model, rollouts, config.rl, start)
        whole = flat([p.grad for p in trained(model).values()])
        assert torch.allclose(whole, sum(gradients), atol=1e-4) and whole.norm() > 1


def test_exits_are_kept_from_moving_later():
    """Catches: a reference that moves; heads not reached; KL reversed; a cost of exiting more."""
    model, config, rollouts = small_model(None), Config(), []
    config.rl.prompts, config.rl.rollouts, config.rl.exit_kl_weight = 2, K, 0.5
    start = copy_trained(model)
    for prompt in ([0, 1], [1, 0, 0]):
        gens = generate(model, [prompt] * K, "head", LONGEST, 1.0, 3, Sampling(stop_ids=[STOP]))
        responses = [Response(Prompt("x", "x"), prompt, g, "", Verdict(False)) for g in gens]
        rollouts += [Rollout(r, {}, 0.0) for r in responses]
    assert accumulate(model, rollouts, config.rl, start) == pytest.approx(0, abs=1e-5)
    scramble(((n, p) for n, p in model.named_parameters() if "lora_B" in n or "exits" in n), 2)
    model.zero_grad()
    found = accumulate(model, rollouts, config.rl, start)
    expected, seen = torch.zeros(()), []
    for r in rollouts:
        g, n = r.response.generation, len(r.response.prompt_ids)
        ids = torch.tensor([r.response.prompt_ids + g.tokens[:-1]])
        depths = torch.tensor([[3] * (n - 1) + g.depths])
        now, then = (score(m, ids, depths, [n]).head_logits[0, n - 1 :] for m in (model, start))
        reached = depths[0, n - 1 :, None] >= torch.tensor([1, 2])
        chances = Bernoulli(logits=now), Bernoulli(logits=then.detach())
        expected = expected + kl_divergence(*chances)[reached & (now < then)].sum() / (2 * K)
        seen += (now < then)[reached].tolist()
    assert found == pytest.approx(expected.item(), rel=1e-4) and found > 0.1
    assert {*seen} == {True, False}
    weights = list(trained(model).values())
    exact = torch.autograd.grad(0.5 * expected, weights, allow_unused=True)
    pairs = [[0 * p if g is None else g for g in (p.grad, g)] for p, g in zip(weights, exact)]
    assert all(torch.allclose(*pair) for pair in pairs)


@pytest.mark.parametrize("penalty, cost", [("max", 1.0), ("mean", 14 / 24), ("sum", 14 / 8)])
def test_rewards_are_the_weighted_parts(penalty, cost):
    """Catches: a first readout that is not charged; depth in other units than L."""
    g = Generation(tokens=[5, 6, 7], depths=[8, 2, 4])
    rl = replace(Config().rl, kl_weight=0.5, depth_weight=2.0, length_weight=0.01)
    rl = replace(rl, depth_penalty=penalty)
    for correct in (True, False):
        response = Response(Prompt("x", "x"), [1, 2], g, "", Verdict(correct))
        expected = {"verify": float(correct), "kl": -0.2, "depth": -2 * cost, "length": -0.03}
        assert reward_parts(response, 0.4, rl, 8) == pytest.approx(expected)
