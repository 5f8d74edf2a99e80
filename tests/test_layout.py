"""Weights laid out for decoding: the same product in every layout, and never of weights that have changed."""

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model

from nanoexit import layout
from nanoexit.generate import generate


@pytest.mark.parametrize("name", ["apart", "joined", "transposed", "onednn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[(24, 16)], [(8, 16)], [(16, 16), (4, 16), (4, 16)]])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 5])
def test_every_layout_is_the_same_product(name, dtype, sizes, bias, rows):
    """Catches: maps in another order, a bias lost, a matrix turned the wrong way."""
    if name == "onednn" and not layout._has_onednn(dtype):
        pytest.skip("no oneDNN for this type here")
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    biases = [torch.randn(len(w), generator=generator).to(dtype) if bias else None for w in weights]
    x = torch.randn(rows, 16, generator=generator).to(dtype)
    with torch.inference_mode():
        y = layout.lay_out(name, weights, biases)(x)
    expected = torch.cat([F.linear(x.double(), w.double(), None if b is None else b.double()) for w, b in zip(weights, biases)], -1)
    assert y.dtype == dtype and torch.allclose(y.double(), expected, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=1e-5 if dtype == torch.float32 else 0.02)


def test_the_layout_follows_rows_type_and_size(monkeypatch):
    """Catches: a second copy of a model that is too large for two, or a copy where none was wanted."""
    model = random_model("llama")
    there = layout._has_onednn(torch.float32)
    assert [layout.choose(model, rows, "auto") for rows in (1, 2, 16)] == ["transposed"] + (["onednn"] * 2 if there else ["joined"] * 2)
    assert layout.choose(model, 1, "never") == "apart"
    monkeypatch.setattr(layout, "AUTO_LIMIT", 1000)
    assert layout.choose(model, 1, "auto") == "apart" and layout.choose(model, 1, "always") == "transposed"


@pytest.mark.parametrize("change", ["in place", "replaced", "loaded"])
def test_weights_that_changed_are_laid_out_anew(change):
    """Catches: text written by weights that training has since changed. Each change is one after which the text must differ."""
    model, other = random_model("llama"), random_model("llama", seed=7)
    write = lambda m: generate(m, [[3, 7, 11]], "full", 12, temperature=0, stop_ids=[])[0].tokens
    before, expected = write(model), write(other)
    assert before == write(model) and before != expected
    with torch.no_grad():
        if change == "in place":
            for p, q in zip(model.parameters(), other.parameters()):
                p.copy_(q)
        elif change == "replaced":
            for p, q in zip(model.parameters(), other.parameters()):
                p.data = q.data.clone()
        else:
            model.load_state_dict(other.state_dict())
    assert write(model) == expected


def test_weights_made_under_inference_mode_are_laid_out_each_time():
    """Catches: weights that count no changes refused, or their copy taken for fresh."""
    other = random_model("llama", seed=7)
    with torch.inference_mode():
        model = random_model("llama")
    write = lambda m: generate(m, [[3, 7, 11]], "full", 12, temperature=0, stop_ids=[])[0].tokens
    before = write(model)
    with torch.inference_mode():
        for p, q in zip(model.parameters(), other.parameters()):
            p.copy_(q)
    assert before != write(model) == write(other)


def test_a_model_that_is_gone_leaves_no_copy():
    """Catches: a cache that keeps every model alive."""
    kept = len(layout._kept)
    model = random_model("llama")
    generate(model, [[3, 7, 11]], "full", 2, stop_ids=[])
    assert len(layout._kept) == kept + 1
    del model
    assert len(layout._kept) == kept
