"""The peer of bench.py --peer llama.cpp: its C++ engine, through llama-cpp-python."""

import json
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from safetensors.torch import load_file

WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def convert(folder: Path, dtype: str) -> Path:
    """Convert a llama or qwen2 snapshot to a GGUF file beside it, without a tokenizer.

    Matrices get this dtype; everything else is float32.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    out = gguf.GGUFWriter(folder / "model.gguf", config["model_type"])
    out.add_vocab_size(config["vocab_size"])
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_rope_dimension_count(config["hidden_size"] // heads)
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_tokenizer_model("none")
    kinds = gguf.GGMLQuantizationType
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.float().numpy()
        if config["model_type"] == "llama" and ("q_proj" in name or "k_proj" in name):
            values = _neighbours(values, heads if "q_proj" in name else kv_heads)
        kind = kinds.BF16 if dtype == "bfloat16" and values.ndim > 1 else kinds.F32
        out.add_tensor(_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return folder / "model.gguf"


def _neighbours(values: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows: llama.cpp's RoPE pairs neighbouring rows of a head, checkpoints its halves."""
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _name(name: str) -> str:
    if name in WHOLE:
        return WHOLE[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{IN_BLOCK[module]}.{kind}"


class Llama:
    """One model and a context for `rows` texts of at most `length` tokens."""

    def __init__(self, folder: str, dtype: str, rows: int, length: int, threads: int):
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, None)
        self.model = llama_cpp.llama_model_load_from_file(
            str(convert(Path(folder), dtype)).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = rows * (length + 256)  # each row's share is rounded
        params.n_seq_max = rows
        params.n_threads = params.n_threads_batch = threads
        if dtype == "float32":
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(rows * length, 0, 1)

    def decode(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """Greedy: `new` tokens after each prompt, all rows at once."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        places = []
        for row, prompt in enumerate(prompts):
            places += [(row, i, token, i == len(prompt) - 1) for i, token in enumerate(prompt)]
        written: list[list[int]] = [[] for _ in prompts]
        for step in range(new):
            for row, values in enumerate(self._run(places)):
                written[row].append(int(values.argmax()))
            places = [
                (row, len(prompt) + step, written[row][-1], True)
                for row, prompt in enumerate(prompts)
            ]
        return written

    def _run(self, places: list[tuple[int, int, int, bool]]) -> list[np.ndarray]:
        """(row, position, token, whether its logits are wanted) -> those logits [V], in order."""
        self.batch.n_tokens = len(places)
        for i, (row, position, token, wanted) in enumerate(places):
            self.batch.token[i] = token
            self.batch.pos[i] = position
            self.batch.logits[i] = wanted
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, row
        if llama_cpp.llama_decode(self.context, self.batch):
            raise RuntimeError("llama.cpp could not decode")
        wanted_places = [i for i, place in enumerate(places) if place[3]]
        logits = [llama_cpp.llama_get_logits_ith(self.context, i) for i in wanted_places]
        return [np.ctypeslib.as_array(values, (self.vocab,)) for values in logits]
