"""On a GPU: captured and replayed graphs compute what the plain forward computes."""

import gc

import numpy as np
import pytest
import torch
from conftest import random_model, with_exits

from nanoexit.fast import capture_cuda
from nanoexit.generate import Sampling, generate
from nanoexit.score import align, readout_logprobs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
PROMPTS = [[3, 7, 11], [5, 1, 30, 22, 9, 4, 17], [8, 8], [2, 39, 14, 6, 25], [1, 2, 3]]


@pytest.mark.parametrize("policy", ["full", "head", "fixed:2", "kl:1"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_graphs_write_what_is_written_without(family, policy, batch_size):
    """Catches: a captured shape used for another; padding or debts written to another cache."""
    model, ways = with_exits(random_model(family)).cuda(), []
    for fast in (True, False):
        settings = Sampling(stop_ids=[0, 1, 2], batch_size=batch_size, fast=fast)
        ways.append(generate(model, PROMPTS, policy, 12, 1.0, 5, settings))
    for a, b in zip(*ways):
        assert (a.tokens, a.depths) == (b.tokens, b.depths)
        assert np.allclose(a.token_logprobs, b.token_logprobs, atol=1e-3)


def test_an_old_graph_does_not_spoil_a_new_one():
    """Catches: the garbage collector freeing a graph while another is captured."""
    x, before = torch.zeros(4, device="cuda"), gc.get_threshold()
    for _ in range(10):
        loop: list = [capture_cuda(lambda: x + 1)]
        loop.append(loop)
    gc.set_threshold(1)
    try:
        capture_cuda(lambda: torch.stack([x + i for i in range(100)]))
    finally:
        gc.set_threshold(*before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_writes_what_the_cpu_writes(family, dtype):
    """Catches: a code path used only on the GPU that computes something else."""
    here = with_exits(random_model(family))
    there = with_exits(random_model(family).to(dtype)).cuda()  # heads and adapters stay float32
    gens = generate(there, PROMPTS, "full", 8, seed=1, settings=Sampling(stop_ids=[]))
    a = align(here, PROMPTS, [g.tokens for g in gens])
    logp = readout_logprobs(here, here.run(a.ids).hidden.flatten(0, 1)[a.at], a.tokens)
    found = np.concatenate([g.token_logprobs for g in gens])
    assert np.allclose(found, logp.detach(), atol=1e-3 if dtype == torch.float32 else 0.5)
