"""Small random models of the three families, with heads and adapters that are not zero."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tqdm.std import TRLock, tqdm

from nanoexit.config import ROOT, TARGETS, LoRAConfig
from nanoexit.exits import attach
from nanoexit.model import Llama3Rope, Shape, Transformer

torch.set_num_threads(1)
tqdm.set_lock(TRLock())  # forks share the default; one killed inside it would block all others

if find_spec("hypothesis"):  # else tests/test_fuzz.py is skipped
    from hypothesis import HealthCheck, settings

    options = {"deadline": None, "suppress_health_check": list(HealthCheck)}
    settings.register_profile("suite", max_examples=100, derandomize=True, **options)
    settings.register_profile("long", max_examples=3000, database=None, **options)
    settings.load_profile("suite")

TINY = ROOT / "configs" / "tiny.yaml"
SCALING = Llama3Rope(4.0, 1.0, 4.0, 16)
BIASES = {"o_bias": True, "mlp_bias": True, "qkv_bias": True}
SHAPES = {
    "llama": Shape("llama", 40, 24, 40, 5, 4, 2, 6, rope_scaling=SCALING, **BIASES),
    "qwen2": Shape("qwen2", 40, 24, 40, 5, 4, 1, 6, qkv_bias=True, tied=True),
    "qwen3": Shape("qwen3", 40, 24, 40, 5, 4, 2, 10, qk_norm=True),
}


def random_model(family: str, seed: int = 0) -> Transformer:
    """Every tensor is random, even biases and norms: no 0 or 1 can hide a forgotten term."""
    model = Transformer(SHAPES[family])
    scramble(model.named_parameters(), seed)
    return model.requires_grad_(False)


def with_exits(model, layers=(1, 2, 4), head="linear", cap=None, seed=1) -> Transformer:
    """Attach exit heads and lenses, and adapters on every map, none of them zero."""
    attach(model, layers, head, True, LoRAConfig(r=3, alpha=6, targets=TARGETS), cap, seed)
    named = model.named_parameters()
    scramble(((n, p) for n, p in named if "lora_B" in n or n.startswith("exits")), seed)
    return model


def scramble(parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, p in parameters:
        noise = torch.randn(p.shape, generator=generator)
        p.data = 1 + 0.2 * noise if "norm" in name else noise * (0.3 if p.dim() > 1 else 0.2)


def script(name: str, *arguments, **options) -> subprocess.CompletedProcess:
    """Run scripts/NAME.py in a process of its own."""
    command = [sys.executable, ROOT / "scripts" / f"{name}.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(params=list(SHAPES))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The reasoner shipped with the repository."""
    return ROOT / "data" / "tiny"
