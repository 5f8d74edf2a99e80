"""Ways that decoding takes for speed alone: attention for each run of neighbours, and CUDA graphs, as far as they go without a GPU."""

import contextlib
import copy

import pytest
import torch
from conftest import random_model, with_exits

from nanoexit import decode
from nanoexit.generate import generate

PROMPTS = [[3, 7, 11], [5, 1, 30, 22, 9, 4, 17], [8, 8], [2, 39, 14, 6, 25], [1, 2, 3]]


@pytest.fixture
def replays(monkeypatch):
    """Decoding as on a GPU, but with a graph that runs what it captured again, on the same tensors and into the same. A list of its replays."""
    run, make, capturing, replayed = decode.Graphs._run, decode.DecodeStep.__init__, [], []

    class Graph:
        def replay(self):
            replayed.append(self)
            self.out.copy_(run(*self.given))

    @contextlib.contextmanager
    def capture(graph):
        capturing.append(graph)
        yield
        capturing.clear()

    def noted(graphs, cache, *given):
        out = run(graphs, cache, *given)
        for graph in capturing:
            graph.given, graph.out = (graphs, copy.copy(cache), *given), out  # its memory, wherever the cache moves
        return out

    def graphed(steps, *arguments):
        make(steps, *arguments)
        steps.graphs = decode.Graphs(steps)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(decode.Graphs, "_run", noted)
    monkeypatch.setattr(decode.Graphs, "SPAN", 4)
    monkeypatch.setattr(decode.DecodeStep, "__init__", graphed)
    return replayed


@pytest.mark.parametrize("policy", ["full", "head", "fixed:2", "kl:1"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_replayed_stretches_write_what_is_written_without(family, policy, batch_size, request):
    """Catches: a shape replayed for another, inputs that are not copied anew, padding that writes elsewhere or pays for others, positions masked wrongly."""
    model = with_exits(random_model(family))
    kw = {"seed": 5, "stop_ids": [0, 1, 2], "batch_size": batch_size, "prompt_exits": "limit:1"}
    plain = generate(model, PROMPTS, policy, 12, **kw)
    replays = request.getfixturevalue("replays")
    graphed = generate(model, PROMPTS, policy, 12, **kw)
    assert len(set(replays)) < len(replays), "something was replayed twice, or this shows nothing"
    for a, b in zip(graphed, plain):
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
