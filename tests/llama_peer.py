"""What scripts/bench.py measures beside us with --peer llama.cpp: its C++ engine, through llama-cpp-python. Nothing else imports it there."""

import json
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from safetensors.torch import load_file

NAMES = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down"}


def convert(folder: str, dtype: str) -> Path:
    """Write a snapshot of a llama or qwen2 as one GGUF file beside it: matrices in this dtype, the rest in float32, no tokenizer."""
    config = json.loads((Path(folder) / "config.json").read_text())
    heads, kv_heads, architecture = config["num_attention_heads"], config["num_key_value_heads"], config["model_type"]
    out = gguf.GGUFWriter(Path(folder) / "model.gguf", architecture)
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
    for name, tensor in load_file(Path(folder) / "model.safetensors").items():
        values = tensor.float().numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):  # it rotates neighbours, the checkpoints halves
            n = heads if "q_proj" in name else kv_heads
            values = values.reshape(n, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        kind = gguf.GGMLQuantizationType.BF16 if dtype == "bfloat16" and values.ndim > 1 else gguf.GGMLQuantizationType.F32
        out.add_tensor(_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    for write in (out.write_header_to_file, out.write_kv_data_to_file, out.write_tensors_to_file, out.close):
        write()
    return Path(folder) / "model.gguf"


def _name(name: str) -> str:
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{NAMES[module]}.{kind}"


class Peer:
    """One model and a context for `rows` texts of at most `length` tokens."""

    def __init__(self, folder: str, dtype: str, rows: int, length: int, threads: int):
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, None)
        self.model = llama_cpp.llama_model_load_from_file(str(convert(folder, dtype)).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_threads, params.n_threads_batch = rows * (length + 256), rows, threads, threads  # a row's share is rounded
        if dtype == "float32":
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(rows * length, 0, 1)

    def decode(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """Greedy: `new` tokens after each prompt, all rows at once."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        places = [(row, i, token, i == len(prompt) - 1) for row, prompt in enumerate(prompts) for i, token in enumerate(prompt)]
        written = [[] for _ in prompts]
        for step in range(new):
            logits = self._run(places)
            for row, values in enumerate(logits):
                written[row].append(int(values.argmax()))
            places = [(row, len(prompt) + step, written[row][-1], True) for row, prompt in enumerate(prompts)]
        return written

    def _run(self, places: list[tuple[int, int, int, bool]]) -> list[np.ndarray]:
        """(row, position, token, whether its logits are wanted) -> the logits [V] that are wanted, in order."""
        self.batch.n_tokens = len(places)
        for i, (row, position, token, wanted) in enumerate(places):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, wanted
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, row
        if llama_cpp.llama_decode(self.context, self.batch):
            raise RuntimeError("llama.cpp could not decode")
        return [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, i), (self.vocab,)) for i, place in enumerate(places) if place[3]]
