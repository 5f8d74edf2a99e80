"""The mathematics, on numbers worked by hand."""

import math

import pytest
import torch

from nanoexit.evaluate import repetition, share
from nanoexit.responses import token_kinds
from nanoexit.exits import path_logprob, sample_depths, stick_breaking, teacher_chance
from nanoexit.reinforce import depth_cost, leave_one_out, surrogate
from nanoexit.score import divergence, through_readout, token_logprob
from nanoexit.training import batch_at, cosine_share

HALF, THIRD = 0.0, math.log(0.5)  # log-odds of 1/2 and of 1/3


def test_stick_breaking_takes_what_is_left():
    """Catches: heads that act independently, or a last option that does not take the rest. 1/2, 1/2 * 1/3, 1/2 * 2/3."""
    z = torch.tensor([HALF, THIRD])
    assert torch.allclose(stick_breaking(z).exp(), torch.tensor([1 / 2, 1 / 6, 1 / 3]))
    extreme = stick_breaking(torch.tensor([-200.0, 200.0, 0.0]))
    assert torch.isfinite(extreme).all() and abs(extreme.logsumexp(0)) < 1e-6


def test_a_path_costs_what_its_heads_said():
    """Catches: reading a head beyond the exit; giving a depth that has no head a finite likelihood."""
    z = torch.tensor([[HALF, THIRD]] * 4)
    z[0, 1] = torch.nan  # beyond the exit at 2: must not be read
    logp = path_logprob(z, torch.tensor([2, 5, 8, 4]), [2, 5], 8)
    assert torch.allclose(logp[:3].exp(), torch.tensor([1 / 2, 1 / 6, 1 / 3]))
    assert logp[3] == -math.inf


def test_teacher_chance_is_1_at_no_divergence():
    """Catches: a wrong sign or a missing factor 2. kl = ln 3 at strength 1: 2 (1 - 3/4) = 1/2; at strength 2: 2 (1 - 9/10)."""
    kl = torch.tensor([0.0, math.log(3), 50.0])
    assert torch.allclose(teacher_chance(kl, 1.0), torch.tensor([1.0, 0.5, 0.0]), atol=1e-6)
    assert teacher_chance(kl, 2.0)[1].item() == pytest.approx(0.2)


def test_depths_are_drawn_head_by_head():
    """Catches: taking the last head that fires, or a head whose chance only equals its noise."""
    chance = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.0, 1.0]])
    u = torch.tensor([[0.4, 0.1], [0.6, 0.4], [0.5, 0.9], [0.0, 0.99]])
    assert sample_depths(chance, u, [2, 5], 8).tolist() == [2, 5, 8, 5]


def test_divergence_has_a_direction_and_no_epsilon():
    """Catches: swapped arguments; probabilities clamped. P = (3/4, 1/4), Q = (1/2, 1/2)."""
    p, q = torch.tensor([3.0, 1.0]).log(), torch.tensor([1.0, 1.0]).log()
    assert divergence(p, q).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)
    assert divergence(q, p).item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-6)
    assert divergence(torch.tensor([100.0, 0.0]), torch.tensor([0.0, 100.0])).item() == pytest.approx(100, abs=1e-3)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_a_chunked_readout_has_the_gradient_of_a_whole_one(chunk):
    """Catches: a chunk that is dropped, counted twice, or weighted with another row's gradient."""
    torch.manual_seed(0)
    w, h = torch.randn(11, 5), torch.randn(7, 5, requires_grad=True)
    tokens, weights = torch.arange(7), torch.randn(7)
    whole = token_logprob(h @ w.T, tokens)
    expected = torch.autograd.grad((whole * weights).sum(), h)[0]
    pieces = through_readout(h, lambda piece, rows: token_logprob(piece @ w.T, tokens[rows]), chunk)
    assert torch.allclose(pieces, whole, atol=1e-6)
    assert torch.allclose(torch.autograd.grad((pieces * weights).sum(), h)[0], expected, atol=1e-6)


def test_an_advantage_leaves_its_own_reward_out():
    """Catches: the plain group mean, whose gradient is too small by (K - 1) / K. 6 less (0 + 3) / 2, and so on."""
    assert leave_one_out(torch.tensor([[6.0, 0.0, 3.0], [1.0, 1.0, 1.0]])).tolist() == [[4.5, -4.5, 0.0], [0.0, 0.0, 0.0]]
    assert torch.isfinite(leave_one_out(torch.tensor([[1.0, 1.0]]), normalize_std=True)).all()


def test_depth_is_charged_in_units_of_full_depth():
    """Catches: a penalty that depends on the model's size, or `max` that is a mean."""
    assert [depth_cost([2, 4, 6], penalty, 8) for penalty in ("mean", "max", "sum")] == [0.5, 0.75, 1.5]


def test_clipping_bounds_what_a_rollout_can_teach():
    """Catches: clipping that also stops a correction back. ratio 2 and advantage 1: 1.2; advantage -1: -2."""
    two = torch.tensor([math.log(2.0)])
    assert surrogate(two, torch.zeros(1), torch.tensor([1.0]), 0.2).item() == pytest.approx(1.2)
    assert surrogate(two, torch.zeros(1), torch.tensor([-1.0]), 0.2).item() == pytest.approx(-2.0)
    assert surrogate(two, torch.zeros(1), torch.tensor([3.0]), 0.0).item() == pytest.approx(3 * math.log(2))


def test_every_item_is_seen_once_an_epoch():
    """Catches: batches that depend on where a run was resumed, or that skip the end of an epoch."""
    seen = [i for step in range(5) for i in batch_at(step, 10, 4, seed=3)]
    assert sorted(seen[:10]) == list(range(10)) == sorted(seen[10:])
    assert batch_at(3, 10, 4, 3) == seen[12:16] and seen[:10] != seen[10:]


def test_the_rate_rises_then_falls():
    """Catches: a first step at rate zero, a schedule that never ends low."""
    rates = [cosine_share(step, 100, 9) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[-1] < 0.03 and max(rates) == 1.0


def test_intervals_kinds_and_repetition():
    """Catches: an interval of zero width at 100 %, tags counted as reasoning, repetition that counts the first time."""
    p, (low, high) = share([True] * 100)
    assert p == 1.0 and low == pytest.approx(0.963, abs=1e-3) and high == pytest.approx(1.0)
    assert token_kinds(["5", " 2", " </think>", " 6", " <eos>"]) == ["reasoning", "reasoning", "punctuation", "answer", "punctuation"]
    assert repetition([1, 2, 3, 4]) == 0 and repetition([1] * 7) == pytest.approx(0.75)
