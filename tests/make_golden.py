"""Makes tests/golden/*.json: logits of `transformers` on small random models, so that parity is pinned where it is absent.

    python tests/make_golden.py        (needs transformers; kept for the record, not part of the suite)

Weights come from numpy's PCG64 by name and seed, the same on every machine, so only the logits are stored.
"""

import json
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
SMALL = {"vocab_size": 32, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS = {
    "llama": {"model_type": "llama", "rope_theta": 10000.0, "tie_word_embeddings": False},
    "llama3-rope": {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": LLAMA3, "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "rope_theta": 10000.0, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "qwen2-tied": {"model_type": "qwen2", "rope_theta": 1000000.0, "tie_word_embeddings": True, "use_sliding_window": False},
    "qwen2-untied": {"model_type": "qwen2", "rope_theta": 10000.0, "tie_word_embeddings": False, "sliding_window": 16, "use_sliding_window": False},
    "qwen3": {"model_type": "qwen3", "rope_theta": 1000000.0, "head_dim": 10, "tie_word_embeddings": False},
}
TOKENS = 64


def weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """A random value for every tensor, by sorted name; norms around 1."""
    rng = np.random.default_rng(seed)
    return {name: ((1 if "norm" in name else 0) + rng.standard_normal(shapes[name]) * 0.2).astype(np.float32) for name in sorted(shapes)}


def token_ids() -> np.ndarray:
    return np.random.default_rng(7).integers(0, SMALL["vocab_size"], size=TOKENS)


def transformers_logits(config: dict, seed: int) -> np.ndarray:
    """[TOKENS, V] float32 from AutoModelForCausalLM with the weights above."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**SMALL, **config}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).float().eval()
    state = {n: p for n, p in model.named_parameters()}
    values = weights({n: tuple(p.shape) for n, p in state.items()}, seed)
    with torch.no_grad():
        for name, p in state.items():
            p.copy_(torch.from_numpy(values[name]))
        return model(torch.from_numpy(token_ids())[None]).logits[0].numpy()


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for seed, (name, config) in enumerate(CONFIGS.items()):
        logits = transformers_logits(config, seed)
        assert np.isfinite(logits).all() and logits.std() > 0.1
        rows = [[round(float(x), 6) for x in row] for row in logits]
        (GOLDEN / f"{name}.json").write_text(json.dumps({"config": {**SMALL, **config}, "seed": seed, "logits": rows}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
