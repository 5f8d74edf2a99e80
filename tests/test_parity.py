"""Parity with `transformers`: by golden files everywhere, directly where it is installed."""

import json

import make_golden
import numpy as np
import pytest
from make_golden import CONFIGS
from safetensors.numpy import save_file

from nanoexit.model import Transformer
from nanoexit.weights import load_model, read_shape


def built(tmp_path, config: dict, seed: int) -> Transformer:
    """The model as a folder on disk, loaded like any other."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {n: tuple(p.shape) for n, p in Transformer(read_shape(tmp_path)).named_parameters()}
    save_file(make_golden.weights(shapes, seed), tmp_path / "model.safetensors")
    return load_model(str(tmp_path), device="cpu", dtype="float32")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("peer", ["golden", "transformers"])
def test_logits_equal_those_of_transformers(tmp_path, name, peer):
    """Catches: a wrong rotation, scaling, bias, norm, head size or tie; outdated golden files."""
    golden = json.loads((make_golden.GOLDEN / f"{name}.json").read_text())
    config, seed, expected = golden["config"], golden["seed"], golden["logits"]
    if peer == "transformers":
        pytest.importorskip("transformers")
        config, seed = {**make_golden.SMALL, **CONFIGS[name]}, list(CONFIGS).index(name)
        expected = make_golden.logits_of(make_golden.transformers_model(CONFIGS[name], seed))
    logits = built(tmp_path, config, seed)(make_golden.ROWS)[0].numpy()
    assert np.abs(logits - np.array(expected)).max() < 1e-4


def test_golden_files_are_small():
    """Catches: golden files that bloat the repository."""
    assert sum(path.stat().st_size for path in make_golden.GOLDEN.iterdir()) < 300_000
