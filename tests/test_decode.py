"""Ways that decoding takes for speed alone: attention for each run of neighbours, and the padding of CUDA graphs (run, not captured)."""

import pytest
import torch
from conftest import random_model, with_exits

from nanoexit import decode
from nanoexit.generate import generate

PROMPTS = [[3, 7, 11], [5, 1, 30, 22, 9, 4, 17], [8, 8], [2, 39, 14, 6, 25], [1, 2, 3]]


@pytest.mark.parametrize("policy", ["full", "head", "fixed:2", "kl:1"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_padded_stretches_write_what_is_written_without(family, policy, batch_size, monkeypatch):
    """Catches: padding rows that write elsewhere, padding of tokens that owe that pays for others, positions that are masked wrongly."""
    model = with_exits(random_model(family))
    kw = {"seed": 5, "stop_ids": [0, 1, 2], "batch_size": batch_size, "prompt_exits": "limit:1"}
    plain = generate(model, PROMPTS, policy, 12, **kw)
    monkeypatch.setattr(decode.Graphs, "WARM", 10**9)
    make = decode.DecodeStep.__init__

    def padded(steps, *arguments):
        make(steps, *arguments)
        steps.graphs = decode.Graphs(steps)

    monkeypatch.setattr(decode.DecodeStep, "__init__", padded)
    for a, b in zip(generate(model, PROMPTS, policy, 12, **kw), plain):
        assert (a.tokens, a.depths) == (b.tokens, b.depths)
        assert torch.allclose(torch.tensor(a.token_logprobs), torch.tensor(b.token_logprobs), atol=1e-4)


@pytest.mark.parametrize("policy", ["head", "kl:1"])
def test_attention_for_those_who_run_on_alone_equals_attention_for_all(family, policy, monkeypatch):
    """Catches: queries, keys or masks of one run taken for another's, rows put together in another order."""
    model = with_exits(random_model(family))
    kw = {"seed": 5, "stop_ids": [0, 1, 2], "batch_size": 5}
    find, found, written = decode.Step._runs, [], []
    monkeypatch.setattr(decode.Step, "_runs", lambda step, going: found.append(find(step, going)) or found[-1])
    for cost in (10**9, 0):
        monkeypatch.setattr(decode, "ATTENTION_CALL", cost)
        found.clear()
        written.append(generate(model, PROMPTS, policy, 12, **kw))
        assert any(runs and len(runs) > 1 for runs in found) == (cost == 0), "several runs, or attention for all"
    for a, b in zip(*written):
        assert (a.tokens, a.depths) == (b.tokens, b.depths)
        assert torch.allclose(torch.tensor(a.token_logprobs), torch.tensor(b.token_logprobs), atol=1e-4)
