"""The peer of bench.py --peer hf: transformers and peft, called as a user would call them."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

transformers.logging.set_verbosity_error()


def load(folder: str, dtype: torch.dtype, device: torch.device) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(device).eval()


@torch.inference_mode()
def decode(model: Any, ids: torch.Tensor, new: int, cache: str) -> None:
    """Greedy; cache is dynamic or static."""
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        cache_implementation=cache,
    )


def with_lora(model: Any, targets: Sequence[str]) -> Any:
    """Rank 8, alpha 16, no dropout."""
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=[*targets])).train()
