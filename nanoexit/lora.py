"""LoRA by hand (Hu et al. 2021): attach, switch off, merge.

y = W x + (alpha / r) B A x, with A [r, in] drawn as in the paper's code and B [out, r]
zero at first, so that a new adapter changes no bit of the output. Adapters are float32 and are cast
for the product, so small updates are not lost in bfloat16. The base weights are never modified."""

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoexit.config import LoRAConfig
from nanoexit.model import Linear, Transformer


class LoRA(nn.Module):
    """The update of one linear map, skipped while `enabled` is False."""

    def __init__(self, base: Linear, config: LoRAConfig, generator: torch.Generator):
        super().__init__()
        device = base.weight.device
        bound = 1 / math.sqrt(base.in_features)  # kaiming_uniform, a = sqrt(5), as in the reference
        a = torch.empty(config.r, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.r, device=device))
        self.scale = config.alpha / config.r
        self.enabled = True
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], to be added to the base's output."""
        x = F.linear(x, self.lora_A.to(x.dtype)) * self.scale  # [..., r]
        return F.linear(x, self.lora_B.to(x.dtype))


def attach_lora(model: Transformer, config: LoRAConfig, seed: int = 0) -> None:
    """Give every linear map named in config.targets a fresh adapter."""
    generator = torch.Generator().manual_seed(seed)
    for name, linear in linear_maps(model):
        if name.rsplit(".", 1)[-1] in config.targets:
            linear.adapter = LoRA(linear, config, generator)


def linear_maps(model: Transformer) -> Iterator[tuple[str, Linear]]:
    """(name, map) of every linear map that can hold an adapter, in order."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Linear))


def adapters(model: Transformer) -> dict[str, LoRA]:
    """The attached adapters, by the name of their linear map."""
    return {name: m.adapter for name, m in linear_maps(model) if isinstance(m.adapter, LoRA)}


@contextlib.contextmanager
def adapters_off(model: Transformer) -> Iterator[None]:
    """Inside the `with`, every adapter is off."""
    on = [adapter for adapter in adapters(model).values() if adapter.enabled]
    for adapter in on:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in on:
            adapter.enabled = True


def merged_weight(linear: Linear) -> Tensor:
    """The weight with its adapter added, in the weight's own dtype."""
    weight, lora = linear.weight.detach(), linear.adapter
    if not isinstance(lora, LoRA):
        return weight
    update = lora.lora_B.detach() @ lora.lora_A.detach() * lora.scale  # [out, in] float32
    return (weight.float() + update).to(weight.dtype)
