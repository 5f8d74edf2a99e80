"""fast.py held equal to the plain path: random steps side by side, layouts, kept copies."""

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_model, with_exits

from nanoexit.cache import Cache
from nanoexit.exits import Ask, Prescribed
from nanoexit.fast import FastModel, choose_layout, has_onednn, lay_out
from nanoexit.generate import Sampling, generate


def stand_in(run, replays: list):
    """A `capture` for any device: its graphs rerun what was captured, on the same tensors."""
    out = run()

    def replay():
        replays.append(out)
        out.copy_(run())

    return replay, out


class Keeps(Ask):
    """Exits at given depths, and keeps the residuals that it was asked about."""

    def __init__(self, model, depths):
        super().__init__(model, Prescribed(depths), len(depths))
        self.kept = {}

    def __call__(self, depth, h, index):
        self.kept[depth] = h
        return super().__call__(depth, h, index)


@torch.inference_mode()
def step_by_step(model, engine, prompts: list[int], seed: int, steps: int = 30) -> None:
    """`engine` equals `model` at every step; `prompts`: each row's length before the first."""
    s, rng, T = model.shape, np.random.default_rng(seed), max(prompts)
    positions = torch.tensor(prompts)[:, None]
    size = (s.blocks, len(prompts), 2, s.kv_heads, T + steps + 1, s.head_dim)
    caches = [Cache(torch.zeros(size)) for _ in range(2)]
    for cache in caches:
        cache.span = T
        model.run(torch.arange(len(prompts) * T).view(-1, T) % s.vocab, cache=cache)
    last = kept = torch.zeros(0)
    for step in range(steps):
        if step in (steps // 3, 2 * steps // 3):  # rows change places; all but two leave
            keep = torch.arange(len(positions)).flip(0)[: 5 if step == steps // 3 else 2]
            positions = positions[keep]
            for cache in caches:
                cache.select(keep)
        B = len(positions)
        ids = torch.from_numpy(rng.integers(s.vocab, size=(B, 1)))
        depths = torch.from_numpy(rng.choice([1, 2, 3, 5], size=B, p=[0.4, 0.2, 0.2, 0.2]))
        alive = torch.from_numpy(rng.random((B, 1)) < 0.7) if step % 3 == 2 else ids >= 0
        alive[0] = True
        runs, stops = [], [Keeps(model, depths), Keeps(model, depths)]
        for way, cache, stop in zip((model, engine), caches, stops):
            cache.span, cache.aligned = int(positions.max()) + 1, len(positions.unique()) == 1
            runs.append(way.run(ids, positions, cache, stop, None if alive.all() else alive))
        plain, fused = runs
        assert torch.equal(last, kept), "a result that the caller kept was written over"
        last, kept = fused.hidden, fused.hidden.clone()
        for depth, h in stops[0].kept.items():
            assert torch.allclose(h, stops[1].kept[depth], atol=1e-4), step
        assert torch.equal(plain.depths, fused.depths), step
        assert torch.allclose(plain.hidden[alive], fused.hidden[alive], atol=1e-4), step
        logits = model.readout(plain.hidden[alive]), engine.readout(fused.hidden[alive])
        assert torch.allclose(*logits, atol=1e-3), step
        positions = positions + alive.long()
    for way, cache in zip((model, engine), caches):  # at full depth: all debts are paid
        cache.span, cache.aligned = int(positions.max()) + 1, False
        way.run(ids, positions, cache, None, None)
    assert not engine.debts and torch.allclose(caches[0].kv, caches[1].kv, atol=1e-4)


@pytest.mark.parametrize("lengths", [[4], [3, 3], [2, 6, 1, 4, 4]])
@pytest.mark.parametrize("call", [0, 10**9])
def test_fused_steps_equal_plain_steps(family, lengths, call):
    """Catches: maps or adapters in another order; keys of an exited row lost; rows mixed up."""
    model = with_exits(random_model(family))
    engine = FastModel(model, len(lengths))
    engine.attention_call = call
    step_by_step(model, engine, lengths, seed=len(lengths))


@pytest.mark.parametrize("lengths", [[250], [2, 6, 1, 4, 4], [247, 250, 238, 247, 251]])
def test_replayed_stretches_equal_plain_steps(family, lengths):
    """Catches: a shape replayed for another; stale inputs; graphs of a cache that moved."""
    model, replays = with_exits(random_model(family)), []
    engine = FastModel(model, len(lengths), capture=lambda run: stand_in(run, replays))
    step_by_step(model, engine, lengths, seed=1)
    times = [sum(out is other for other in replays) for out in replays]
    assert max(times) > 3, "some graph must be replayed, or this shows nothing"


@torch.inference_mode()
def test_graphs_go_when_their_model_goes():
    """Catches: graphs that wait for the garbage collector, which may spoil another's capture."""
    model = with_exits(random_model("llama"))
    engine = FastModel(model, 1, capture=lambda run: (int, run()))
    cache = Cache(torch.zeros(5, 1, 2, 2, 4, 6))
    for i in range(4):
        cache.span = i + 1
        engine.run(torch.tensor([[i]]), torch.tensor([[i]]), cache, None, None)
    assert engine.graphs.captured
    gone = weakref.ref(engine)
    gc.disable()
    del engine
    left = gone()
    gc.enable()
    assert left is None


# --- weights laid out -------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["apart", "joined", "transposed", "onednn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[(24, 16)], [(8, 16)], [(16, 16), (4, 16), (4, 16)]])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 5])
def test_every_layout_is_the_same_product(layout, dtype, sizes, bias, rows):
    """Catches: maps in another order, a bias lost, a matrix turned the wrong way."""
    if layout == "onednn" and not has_onednn(dtype):
        pytest.skip("no oneDNN for this dtype here")
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, generator=g).to(dtype) for size in sizes]
    biases = [torch.randn(len(w), generator=g).to(dtype) if bias else None for w in weights]
    x = torch.randn(rows, 16, generator=g).to(dtype)
    with torch.inference_mode():
        y = lay_out(layout, weights, biases)(x)
    pairs = [(w.double(), None if b is None else b.double()) for w, b in zip(weights, biases)]
    expected = torch.cat([F.linear(x.double(), w, b) for w, b in pairs], -1)
    close = (1e-5, 1e-5) if dtype == torch.float32 else (0.02, 0.1)
    assert y.dtype == dtype and torch.allclose(y.double(), expected, *close)


def test_the_layout_follows_rows_and_size():
    """Catches: a copy of a model too large to hold twice; the layout for another number of rows."""
    model = random_model("llama")
    many = "onednn" if has_onednn(torch.float32) else "joined"
    assert [choose_layout(model, rows) for rows in (1, 2, 16)] == ["transposed", many, many]
    assert choose_layout(model, 1, copy_limit=1000) == "apart"


def greedy(model) -> list[int]:
    settings = Sampling(stop_ids=[])
    return generate(model, [[3, 7, 11]], "full", 12, temperature=0, settings=settings)[0].tokens


@pytest.mark.parametrize("change", ["in place", "replaced", "loaded", "in inference mode"])
def test_weights_that_changed_are_laid_out_anew(change):
    """Catches: text from weights that have since changed, with a version counter or without."""
    with torch.inference_mode(change == "in inference mode"):
        model = random_model("llama")
    other = random_model("llama", seed=7)
    before, expected = greedy(model), greedy(other)
    assert before == greedy(model) and before != expected
    pairs = list(zip(model.parameters(), other.parameters()))
    if change == "replaced":
        for p, q in pairs:
            p.data = q.data.clone()
    elif change == "loaded":
        model.load_state_dict(other.state_dict())
    else:
        with torch.inference_mode(change == "in inference mode"), torch.no_grad():
            for p, q in pairs:
                p.copy_(q)
    assert greedy(model) == expected


def test_a_step_of_training_keeps_the_copy_of_the_base():
    """Catches: all weights copied again for every rollout, or adapters that are read only once."""
    model = with_exits(random_model("llama"))
    before, copies = greedy(model), dict(model.fast_products)
    assert copies
    with torch.no_grad():
        for p in (p for name, p in model.named_parameters() if "lora_B" in name):
            p.mul_(3)
    assert greedy(model) != before and model.fast_products == copies
