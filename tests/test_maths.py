"""The mathematics, on numbers worked by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model, with_exits

from nanoexit.exits import Asked, Policy, path_logprob, target_chance
from nanoexit.model import attend
from nanoexit.score import align, divergence, pad, readout_kl, readout_logprobs
from nanoexit.training import batch_at, cosine_share, stream

HALF, THIRD, CPU = 0.0, math.log(0.5), torch.device("cpu")  # log-odds of 1/2 and of 1/3


def test_a_path_costs_what_its_heads_said():
    """Catches: independent heads; one read beyond the exit. 1/2, 1/2 * 1/3; 1/2 * 2/3 is left."""
    z = torch.tensor([[HALF, THIRD]] * 4)
    z[0, 1] = torch.nan  # beyond the exit at 2
    logp = path_logprob(z, torch.tensor([2, 5, 8, 4]), [2, 5], 8)
    assert torch.allclose(logp[:3].exp(), torch.tensor([1 / 2, 1 / 6, 1 / 3]))
    assert logp[3] == -math.inf == path_logprob(z, torch.tensor(8), [2], 5)[0]
    assert path_logprob(z[:, :1], torch.tensor(5), [2], 5).exp().tolist() == [0.5] * 4
    z = torch.tensor([[-200.0, 200.0]] * 3)
    extreme = path_logprob(z, torch.tensor([2, 5, 8]), [2, 5], 8)
    assert extreme.tolist() == pytest.approx([-200, 0, -200])


def test_the_target_is_1_without_divergence():
    """Catches: a wrong sign; no factor 2. ln 3: 2 (1 - 3/4); at strength 2: 2 (1 - 9/10)."""
    kl = torch.tensor([0.0, math.log(3), 50.0])
    assert torch.allclose(target_chance(kl, 1.0), torch.tensor([1.0, 0.5, 0.0]), atol=1e-6)
    assert target_chance(kl, 2.0)[1].item() == pytest.approx(0.2)


def test_the_oracle_exits_below_its_chance_only():
    """Catches: an exit where the chance only equals the noise; the chance of another token."""
    asked = Asked(None, 2, torch.tensor([1, 2, 3]), None, None, torch.tensor([0.4, 0.5, 0.6]))
    policy = Policy("kl", 1, lambda asked: torch.tensor([0.9, 0.5, 0.5, 0.5])[asked.at])
    assert policy.exits(asked).tolist() == [True, False, False]


def test_divergence_has_a_direction_and_no_epsilon():
    """Catches: KL(student || teacher); probabilities clamped; chunks that do not match."""
    p, q = torch.tensor([3.0, 1.0]).log(), torch.tensor([1.0, 1.0]).log()  # 3/4, 1/4; 1/2, 1/2
    assert divergence(p, q).item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2))
    assert divergence(q, p).item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)
    far = divergence(torch.tensor([100.0, 0.0]), torch.tensor([0.0, 100.0]))
    assert far.item() == pytest.approx(100, abs=1e-3)
    model = random_model("qwen2")
    teacher, student = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    expected = divergence(model.readout(teacher), model.readout(student))
    model.logits_chunk = 2
    assert torch.allclose(readout_kl(model, teacher, student), expected, atol=1e-5)


def test_confidence_is_that_of_the_early_readout():
    """Catches: a rule that looks at logits other than those an exit would sample from."""
    model = with_exits(random_model("qwen2"))
    h = torch.randn(9, 24, generator=torch.Generator().manual_seed(0))
    sure = model.readout(model.lensed(h, 1)).softmax(-1).amax(-1)
    asked = Asked(model, 1, torch.arange(9), h, None, torch.zeros(9))
    assert torch.equal(Policy("confidence", sure.median()).exits(asked), sure >= sure.median())


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_a_chunked_readout_has_the_gradient_of_a_whole_one(chunk):
    """Catches: a chunk that is dropped, counted twice, or weighted with another row's gradient."""
    model, g = random_model("qwen2"), torch.Generator().manual_seed(0)
    h, weights = torch.randn(7, 24, generator=g, requires_grad=True), torch.randn(7, generator=g)
    tokens, model.logits_chunk = torch.arange(7), chunk
    whole = model.readout(h).log_softmax(-1)[range(7), tokens]
    expected = torch.autograd.grad((whole * weights).sum(), h)[0]
    pieces = readout_logprobs(model, h, tokens)
    assert torch.allclose(pieces, whole, atol=1e-6)
    assert torch.allclose(torch.autograd.grad((pieces * weights).sum(), h)[0], expected, atol=1e-6)
    assert len(readout_logprobs(model, h[:0], tokens[:0])) == 0


def test_gradients_of_attention_are_made_in_float32():
    """Catches: bfloat16 attention where a CPU needs gradients, which takes 10 x longer."""
    qkv = [torch.randn(2, 40, 40, 64, requires_grad=True).bfloat16() for _ in "qkv"]
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(*qkv, None)
    assert torch.equal(found, attend(*(x.float() for x in qkv), None).bfloat16())


def test_a_response_is_aligned_with_the_readouts_that_wrote_it():
    """Catches: an alignment off by one; a first readout at full depth; padding with a depth."""
    model = SimpleNamespace(full_depth=8, device=CPU)
    a = align(model, [[1, 2, 3], [4]], [[5, 6], [7, 8, 9]], [[2, 8], [1, 2, 3]])
    assert a.ids.tolist() == [[1, 2, 3, 5], [4, 7, 8, 0]]
    assert a.depths.tolist() == [[8, 8, 2, 8], [1, 2, 3, 0]]
    assert a.at.tolist() == [2, 3, 4, 5, 6] and a.tokens.tolist() == [5, 6, 7, 8, 9]
    assert a.rows.tolist() == [0, 0, 1, 1, 1] and (a.prompt_lens, a.counts) == ([3, 1], [2, 3])
    full = align(model, [[1, 2, 3], [4]], [[5, 6], [7, 8, 9]])
    assert full.depths.tolist() == [[8] * 4, [8, 8, 8, 0]]
    assert pad([[1], [], [2, 3]], CPU).tolist() == [[1, 0], [0, 0], [2, 3]]


def test_items_rates_and_noise_of_steps():
    """Catches: batches that depend on where a run was resumed, or that skip the end of an epoch; a
    first step at rate zero, a schedule that never ends low; one stream of noise for two things."""
    assert stream("a", 0, 5) != stream("b", 0, 5) and stream("a", 0)[0] != stream("b", 0)[0]
    seen = [i for step in range(5) for i in batch_at(step, 10, 4, seed=3)]
    assert sorted(seen[:10]) == list(range(10)) == sorted(seen[10:])
    assert batch_at(3, 10, 4, 3) == seen[12:16] and seen[:10] != seen[10:]
    rates = [cosine_share(step, 100, 9) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 == max(rates) and rates[-1] < 0.03
