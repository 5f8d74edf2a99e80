"""REINFORCE: the estimator against the exact gradient, on a model small enough to enumerate everything it can do."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import scramble

from nanoexit.config import Config, LoRAConfig
from nanoexit.errors import UserError
from nanoexit.responses import Response
from nanoexit.exits import Fixed, Head, attach
from nanoexit.generate import generate
from nanoexit.model import Shape, Transformer
from nanoexit.reinforce import Rollout, accumulate, leave_one_out, refuse_off_policy, reward_parts
from nanoexit.score import score
from nanoexit.tasks import Prompt, Verdict
from nanoexit.training import trained

STOP, LONGEST, K = 2, 3, 4
PROMPT = [0, 1]


def small_model() -> Transformer:
    """3 words, 3 blocks, exits at 1 and 2: some hundreds of rollouts are all there are."""
    model = Transformer(Shape("qwen2", 3, 8, 8, 3, 2, 1, 4, qkv_bias=True, tied=True))
    scramble(model.named_parameters(), 0)
    model.requires_grad_(False)
    attach(model, [1, 2], "linear", LoRAConfig(r=1, alpha=1, targets=["q_proj", "down_proj"]))
    scramble(((n, p) for n, p in model.named_parameters() if "lora_B" in n or n.startswith("exits")), 1)
    return model


def reward(tokens, depths) -> float:
    """Anything that depends on all that was sampled."""
    return sum((i + 1) * t for i, t in enumerate(tokens)) - 0.7 * sum(depths[1:]) + 2.0 * (tokens[-1] == STOP)


def every_rollout():
    """(tokens, depths): texts up to LONGEST tokens that end at STOP, with every pattern of exits."""
    for n in range(1, LONGEST + 1):
        for tokens in itertools.product(range(3), repeat=n):
            if STOP in tokens[:-1] or (n < LONGEST and tokens[-1] != STOP):
                continue
            for depths in itertools.product([1, 2, 3], repeat=n - 1):
                yield list(tokens), [3, *depths]


def exact_gradient(model: Transformer, prompt_exits: bool) -> torch.Tensor:
    """The gradient of the sum over all rollouts of p(rollout) times its reward."""
    expected, mass = 0.0, 0.0
    prompts = itertools.product([1, 2, 3], repeat=len(PROMPT)) if prompt_exits else [(3, 3)]
    for prompt_depths, (tokens, depths) in itertools.product(list(prompts), list(every_rollout())):
        ids = torch.tensor([PROMPT + tokens[:-1]])
        out = score(model, ids, torch.tensor([[*prompt_depths, *depths[1:]]]), [2], prompt_exits=prompt_exits)
        logp = out.logits[0, 1:].log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)].sum() + out.exit_logprobs.sum()
        expected, mass = expected + logp.exp() * reward(tokens, depths), mass + logp.exp().item()
    assert mass == pytest.approx(1, abs=1e-4), "every rollout, once"
    return torch.cat([g.flatten() for g in torch.autograd.grad(expected, list(trained(model).values()))])


def estimate(model: Transformer, config: Config, groups: int, seed: int, baseline: bool) -> torch.Tensor:
    """One estimate from groups x K rollouts, by the code that trains."""
    prompt = Prompt("x", "x")
    gens = generate(model, [PROMPT] * (groups * K), "head", LONGEST, seed=seed, stop_ids=[STOP], prompt_exits=config.exits.prompt)
    rewards = torch.tensor([reward(g.tokens, g.depths) for g in gens])
    advantages = leave_one_out(rewards.view(-1, K)).flatten() if baseline else rewards
    rollouts = [Rollout(Response(prompt, PROMPT, g, "", Verdict(False, False)), {}, a) for g, a in zip(gens, advantages.tolist())]
    model.zero_grad()
    accumulate(model, rollouts, config, len(rollouts))
    return -torch.cat([p.grad.flatten() for p in trained(model).values()])


@pytest.mark.parametrize("prompt_exits", ["full", "head"])
def test_the_estimator_is_unbiased_and_the_baseline_helps(prompt_exits):
    """Catches: a factor in the advantage, a token or an exit left out of the likelihood or counted twice, the last token of a text
    dropped, exits of the prompt forgotten. Any of these moves the mean by many standard errors."""
    model, config = small_model(), Config()
    config.exits.prompt = prompt_exits
    exact = exact_gradient(model, prompt_exits == "head")
    directions = torch.randn(6, len(exact), generator=torch.Generator().manual_seed(0))
    directions[0] = exact / exact.norm()
    spread = {}
    for baseline in (True, False):
        runs = torch.stack([estimate(model, config, 64, seed, baseline) for seed in range(80)]) @ directions.T
        error = (runs.mean(0) - directions @ exact).abs() / (runs.std(0) / len(runs) ** 0.5)
        assert (error < 3).all(), error
        spread[baseline] = runs.var(0).sum()
        assert not baseline or exact.norm() > 10 * runs[:, 0].std() / len(runs) ** 0.5, "the gradient must stand out of the noise"
    assert spread[True] < 0.8 * spread[False]


def test_rewards_are_the_weighted_parts():
    """Catches: depth charged on the prompt, or not in units of L; the lenient reward on top of the strict one."""
    from nanoexit.generate import Generation
    g = Generation(tokens=[5, 6, 7], depths=[8, 2, 4], prompt_depths=[8, 8])
    rl = replace(Config().rl, kl_weight=0.5, depth_weight=2.0, length_weight=0.01, lenient_weight=0.25)
    right = Response(Prompt("x", "x"), [1, 2], g, "", Verdict(True, True))
    lenient = Response(Prompt("x", "x"), [1, 2], g, "", Verdict(False, True))
    assert reward_parts(right, 0.4, rl, 8, False) == pytest.approx({"verify": 1.0, "kl": -0.2, "depth": -0.75, "length": -0.03})
    assert reward_parts(lenient, 0.0, rl, 8, True) == pytest.approx({"verify": 0.25, "kl": 0.0, "depth": -2 * (22 / 4) / 8, "length": -0.03})


@pytest.mark.parametrize("key, value", [("temperature", 0.6), ("top_p", 0.9), ("top_k", 5)])
def test_sampling_that_the_likelihood_does_not_have_is_refused(key, value):
    """Catches: law 5 broken by a setting; the gradient would be that of another distribution."""
    config = Config()
    setattr(config.generation, key, value)
    with pytest.raises(UserError, match=key):
        refuse_off_policy(config, Head((1,)))


@pytest.mark.parametrize("policy", [Head((1,), floor=0.1), Head((1,), threshold=0.5), Fixed((1,))])
def test_policies_that_do_not_sample_the_heads_are_refused(policy):
    """Catches: the original's 0.1 floor in rollouts."""
    with pytest.raises(UserError, match="without threshold or floor"):
        refuse_off_policy(Config(), policy)
