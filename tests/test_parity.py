"""Parity with `transformers`: by golden files everywhere, directly where it is installed."""

import json

import make_golden
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from nanoexit.model import Transformer
from nanoexit.weights import load_model, read_shape


def built(tmp_path, config: dict, seed: int) -> Transformer:
    """The model as a folder on disk, loaded like any other."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {n: tuple(p.shape) for n, p in Transformer(read_shape(tmp_path)).named_parameters()}
    save_file(make_golden.weights(shapes, seed), tmp_path / "model.safetensors")
    return load_model(str(tmp_path), device="cpu", dtype="float32")


@pytest.mark.parametrize("name", list(make_golden.CONFIGS))
def test_logits_equal_the_golden_ones(tmp_path, name):
    """Catches: a wrong rotation, scaling, bias, norm, head size or tie in any family."""
    golden = json.loads((make_golden.GOLDEN / f"{name}.json").read_text())
    model = built(tmp_path, golden["config"], golden["seed"])
    logits = model(torch.from_numpy(make_golden.token_ids())[None])[0].numpy()
    assert np.abs(logits - np.array(golden["logits"])).max() < 1e-4


@pytest.mark.parametrize("name", list(make_golden.CONFIGS))
def test_logits_equal_transformers(tmp_path, name):
    """Catches: outdated golden files, and a new transformers that computes something else."""
    pytest.importorskip("transformers")
    config, seed = make_golden.CONFIGS[name], list(make_golden.CONFIGS).index(name)
    model = built(tmp_path, {**make_golden.SMALL, **config}, seed)
    logits = model(torch.from_numpy(make_golden.token_ids())[None])[0].numpy()
    assert np.abs(logits - make_golden.transformers_logits(config, seed)).max() < 1e-4


def test_golden_files_are_small():
    """Catches: golden files that bloat the repository."""
    assert sum(path.stat().st_size for path in make_golden.GOLDEN.iterdir()) < 300_000
