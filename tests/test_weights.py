"""Model folders as strangers write them: what loads, and what is refused by name before it can compute something else."""

import json
import struct
from pathlib import Path

import pytest
import torch
from conftest import SHAPES, random_model, with_exits
from safetensors.torch import load_file, save_file

from nanoexit.adapters import load_adapter, merged_tensors, save_adapter, save_merged
from nanoexit.config import ROOT
from nanoexit.errors import UserError
from nanoexit.weights import load_model, read_shape

HUB = ROOT.parent / "shared" / "hub"
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def old_config(family: str) -> dict:
    """config.json as transformers 4 writes it."""
    s = SHAPES[family]
    c = {"model_type": family, "vocab_size": s.vocab, "hidden_size": s.width, "intermediate_size": s.ffn, "num_hidden_layers": s.blocks,
         "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads, "rms_norm_eps": s.norm_eps, "rope_theta": s.rope_theta,
         "hidden_act": "silu", "tie_word_embeddings": s.tied, "torch_dtype": "float32", "max_position_embeddings": 2048, "eos_token_id": [7, 9]}
    if family == "qwen3":
        c["head_dim"] = s.head_dim
    if family == "llama":
        c |= {"attention_bias": True, "mlp_bias": True, "rope_scaling": {"rope_type": "llama3", **s.rope_scaling._asdict()}}
    return c


def new_config(family: str) -> dict:
    """The same as transformers 5 writes it."""
    c = old_config(family)
    rope = {"rope_theta": c.pop("rope_theta"), **c.pop("rope_scaling", {"rope_type": "default"})}
    return c | {"rope_parameters": rope, "dtype": c.pop("torch_dtype")}


def write(folder: Path, config: dict, tensors: dict, shards: int = 1) -> Path:
    """A model folder: one file, or shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {n: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(sorted(tensors))}
    for shard in set(weight_map.values()):
        save_file({n: tensors[n] for n in tensors if weight_map[n] == shard}, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def tensors_of(model) -> dict:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def load(folder: Path, dtype: str = "float32"):
    return load_model(str(folder), "cpu", dtype)


def refused(folder: Path, *words: str) -> None:
    """Loading ends in one UserError that has every one of these words in it."""
    with pytest.raises(UserError) as caught:
        load(folder)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


# --- what loads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("config", [old_config, new_config])
def test_loads_as_old_and_new_tools_write_it(tmp_path, family, config, shards):
    """Bug: a config key read from one place only (rope_theta, rope_scaling, dtype), or a shard left out."""
    model = random_model(family)
    loaded = load(write(tmp_path / "m", config(family), tensors_of(model), shards))
    assert loaded.shape == SHAPES[family]
    assert torch.equal(loaded(IDS), model(IDS))
    assert loaded.stop_ids == {7, 9}
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("stored", [("model.embed_tokens.weight",), ("lm_head.weight",), ("model.embed_tokens.weight", "lm_head.weight")])
def test_tied_under_either_name(tmp_path, stored):
    """Bug: a tied model that stores only lm_head.weight (TinyStories-656K does) is called incomplete."""
    model = random_model("qwen2")
    tensors = tensors_of(model)
    shared = tensors.pop("model.embed_tokens.weight")
    tensors |= {name: shared.clone() for name in stored}
    assert torch.equal(load(write(tmp_path, old_config("qwen2"), tensors))(IDS), model(IDS))


def test_untied_keeps_its_own_head(tmp_path):
    """Bug: an untied model without lm_head.weight is read out through its embedding."""
    tensors = tensors_of(random_model("qwen3"))
    del tensors["lm_head.weight"]
    refused(write(tmp_path, old_config("qwen3"), tensors), "lm_head.weight", "missing")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
def test_every_dtype_to_every_dtype(tmp_path, stored, asked):
    """Bug: the stored dtype survives where another was asked for, or values change on the way."""
    tensors = {n: t.to(stored) for n, t in tensors_of(random_model("qwen2")).items()}
    loaded = load(write(tmp_path, old_config("qwen2"), tensors), asked)
    for name, p in loaded.named_parameters():
        assert p.dtype == getattr(torch, asked)
        assert torch.equal(p, tensors[name].to(p.dtype))


def test_old_llama_buffers_are_passed_over(tmp_path):
    """Bug: rotary_emb.inv_freq, which old Llama checkpoints store, is called unexpected."""
    tensors = tensors_of(random_model("llama"))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    load(write(tmp_path, old_config("llama"), tensors))


def test_sliding_window_that_is_not_used(tmp_path):
    """Bug: a Qwen2 config that names a window but does not use it is refused."""
    config = old_config("qwen2") | {"sliding_window": 512, "use_sliding_window": False}
    load(write(tmp_path, config, tensors_of(random_model("qwen2"))))


REAL = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": ("qwen2", 28, 128, 10000.0, False, True),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", 30, 64, 100000.0, True, False),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama", 16, 64, 500000.0, True, False),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", 24, 64, 1000000.0, True, True),
    "Qwen/Qwen3-0.6B": ("qwen3", 28, 128, 1000000.0, True, False),
}


@pytest.mark.skipif(not HUB.is_dir(), reason="the public config files are not here")
@pytest.mark.parametrize("name", REAL)
def test_real_configs(name):
    """Bug: a public model's config is refused or misread."""
    s = read_shape(HUB / name)
    assert (s.family, s.blocks, s.head_dim, s.rope_theta, s.tied, s.qkv_bias) == REAL[name]
    assert (s.rope_scaling is not None) == name.startswith("meta-llama")
    assert s.qk_norm == (s.family == "qwen3")


@pytest.mark.skipif(not HUB.is_dir(), reason="the public config files are not here")
def test_every_config_of_the_hub_folder_reads():
    """Bug: any one of them, the newest tool chain's among them, fails."""
    for path in HUB.glob("*/*/config.json"):
        read_shape(path.parent)


# --- what is refused -------------------------------------------------------------------------------------------------

NOT_IMPLEMENTED = {
    "family": ({"model_type": "gemma2"}, ("model_type", "gemma2", "qwen3")),
    "no family": ({"model_type": None}, ("model_type",)),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ("yarn", "llama3")),
    "linear": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ("linear",)),
    "dynamic, new": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, ("dynamic",)),
    "longrope": ({"rope_scaling": {"type": "longrope"}}, ("longrope",)),
    "half a llama3": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ("llama3", "low_freq_factor")),
    "window": ({"sliding_window": 512, "use_sliding_window": True}, ("sliding_window", "512")),
    "window by layer": ({"sliding_window": 512, "layer_types": ["full_attention", "sliding_attention"]}, ("sliding_window",)),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, ("quantization_config", "gptq")),
    "activation": ({"hidden_act": "gelu"}, ("hidden_act", "gelu")),
    "no width": ({"hidden_size": None}, ("hidden_size",)),
    "width in words": ({"hidden_size": "wide"}, ("hidden_size", "wide")),
}


@pytest.mark.parametrize("case", NOT_IMPLEMENTED)
def test_refused_by_name_before_a_weight_is_read(tmp_path, case):
    """Bug: the model is computed as something it is not. The weights here are no safetensors: opening them would say so."""
    change, words = NOT_IMPLEMENTED[case]
    (tmp_path / "config.json").write_text(json.dumps(old_config("qwen2") | change))
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    refused(tmp_path, *words)


def missing(tensors):
    del tensors["model.layers.2.mlp.up_proj.weight"]


def unexpected(tensors):
    tensors["model.layers.0.mlp.experts.weight"] = torch.zeros(2)


def misshapen(tensors):
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(5, 24)


def poisoned(tensors):
    tensors["model.norm.weight"][3] = float("nan")


def whole_numbers(tensors):
    tensors["model.norm.weight"] = torch.ones(24, dtype=torch.int32)


@pytest.mark.parametrize("damage, words", [
    (missing, ("model.layers.2.mlp.up_proj.weight", "missing")),
    (unexpected, ("model.layers.0.mlp.experts.weight", "unexpected")),
    (misshapen, ("model.layers.1.self_attn.k_proj.weight", "[5, 24]", "[6, 24]")),
    (poisoned, ("model.norm.weight", "not finite")),
    (whole_numbers, ("model.norm.weight", "int32", "bfloat16")),
])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_wrong_tensor_is_named(tmp_path, damage, words, shards):
    """Bug: a damaged checkpoint loads, or the message does not say which tensor and what was expected."""
    tensors = tensors_of(random_model("qwen2"))
    damage(tensors)
    refused(write(tmp_path, old_config("qwen2"), tensors, shards), *words)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 5])
def test_a_shard_outside_the_folder(tmp_path, shard):
    """Bug: an index from a stranger makes us open a file outside its folder."""
    tensors = tensors_of(random_model("qwen2"))
    write(tmp_path, old_config("qwen2"), tensors)  # a whole model lies where ../ would lead
    folder = write(tmp_path / "m", old_config("qwen2"), tensors, 2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
    refused(folder, "plain file name")


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": None}])
def test_an_index_that_is_none(tmp_path, index):
    """Bug: an index without its map ends in a traceback."""
    folder = write(tmp_path / "m", old_config("qwen2"), tensors_of(random_model("qwen2")), 2)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "m")


def test_a_tensor_that_the_index_misplaces(tmp_path):
    """Bug: an index naming the wrong shard ends in safetensors' own traceback."""
    folder = write(tmp_path, old_config("qwen2"), tensors_of(random_model("qwen2")), 2)
    index = folder / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    name = "model.norm.weight"
    found["weight_map"][name] = next(s for s in found["weight_map"].values() if s != found["weight_map"][name])
    index.write_text(json.dumps(found))
    refused(folder, name)


def test_a_missing_shard(tmp_path):
    """Bug: a shard that did not come down is found out as a traceback, or after the others were read."""
    folder = write(tmp_path, old_config("qwen2"), tensors_of(random_model("qwen2")), 2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "model-00002-of-00002.safetensors", "no such file")


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", struct.pack("<Q", 10**12) + b"{}", None])
def test_a_file_that_is_not_whole(tmp_path, content):
    """Bug: a truncated download loads, or ends in a traceback."""
    folder = write(tmp_path, old_config("qwen2"), tensors_of(random_model("qwen2")))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    refused(folder, "model.safetensors", "safetensors file")


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_a_pickle_is_never_opened(tmp_path):
    """Bug: pytorch_model.bin is taken where safetensors are missing, or beside them."""
    folder, mark = tmp_path / "m", tmp_path / "mark"
    write(folder, old_config("qwen2"), tensors_of(random_model("qwen2")))
    torch.save(Bomb(mark), folder / "pytorch_model.bin")
    load(folder)
    (folder / "model.safetensors").unlink()
    refused(folder, "no model.safetensors")
    assert not mark.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_config_that_is_not_json(tmp_path, text):
    """Bug: a broken config.json ends in a traceback."""
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path, "config.json")


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path) -> Path:
    return write(tmp_path / "base", old_config("qwen3"), tensors_of(random_model("qwen3")))


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("opened", [".", "adapter"])
def test_adapter_round_trip(tmp_path, base, head, opened):
    """Bug: an adapter, a scale or a head is lost or renamed between save and load; a run directory is not recognized."""
    model = with_exits(load(base), head=head)
    save_adapter(model, tmp_path / "run" / "adapter")
    again = load(base)
    load_adapter(again, tmp_path / "run" / opened)
    assert torch.equal(again(IDS), model(IDS))
    assert not torch.equal(again(IDS), load(base)(IDS))
    assert again.exits.layers == model.exits.layers and again.exits.kind == head
    want, got = (dict(m.exits.named_parameters()) for m in (model, again))
    assert want.keys() == got.keys() and all(torch.equal(want[n], got[n]) for n in want)


def test_the_wrong_base_is_refused(tmp_path, base):
    """Bug: an adapter is put on weights that it was not trained on."""
    save_adapter(with_exits(load(base)), tmp_path / "run")
    other = write(tmp_path / "other", old_config("qwen3"), tensors_of(random_model("qwen3", seed=5)))
    with pytest.raises(UserError, match="was trained on"):
        load_adapter(load(other), tmp_path / "run")


@pytest.mark.parametrize("key, value", [
    ("peft_type", "IA3"), ("bias", "all"), ("use_rslora", True), ("use_dora", True), ("rank_pattern", {"q_proj": 4}), ("alpha_pattern", {"q_proj": 4}),
    ("modules_to_save", ["lm_head"]), ("layers_to_transform", [0]), ("target_modules", "all-linear"), ("target_modules", ["lm_head"]),
    ("fan_in_fan_out", True), ("lora_bias", True), ("exclude_modules", ["q_proj"]), ("layer_replication", [[0, 2]]),
    ("trainable_token_indices", [1]), ("r", None), ("lora_alpha", "much"), ("a_future_option", True), ("init_lora_weights", "pissa"),
])
def test_peft_options_not_implemented(tmp_path, base, key, value):
    """Bug: an option that changes what an adapter computes is passed over."""
    save_adapter(with_exits(load(base)), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=key):
        load_adapter(load(base), tmp_path)


def test_a_damaged_adapter(tmp_path, base):
    """Bug: an adapter with another rank, or without one of its tensors, loads in part."""
    save_adapter(with_exits(load(base)), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file(tensors | {name: torch.zeros(2, 2)}, path)
    with pytest.raises(UserError, match="expected"):
        load_adapter(load(base), tmp_path)
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(UserError, match="missing"):
        load_adapter(load(base), tmp_path)
    with pytest.raises(UserError, match="no adapter there"):
        load_adapter(load(base), tmp_path / "nowhere")


def test_heads_say_how_to_use_them(tmp_path, base):
    """Bug: the metadata's rule is not what the heads compute. Read with safetensors alone, as its reader would."""
    from safetensors import safe_open
    model = with_exits(load(base))
    save_adapter(model, tmp_path)
    with safe_open(tmp_path / "exit_heads.safetensors", "pt") as file:
        assert json.loads(file.metadata()["layers"]) == list(model.exits.layers)
        assert "sigmoid" in file.metadata()["use"]
        assert sorted(file.keys()) == sorted(f"{d}.{leaf}" for d in model.exits.layers for leaf in ("weight", "bias"))


def test_merged_export_is_the_adapted_model(tmp_path, base):
    """Bug: the merged weights are not base + scale * B A, or the folder is not complete."""
    (base / "tokenizer_config.json").write_text("{}")
    model = with_exits(load(base))
    save_merged(model, base, tmp_path / "out")
    assert {n for n, _ in merged_tensors(model)} == set(tensors_of(load(base)))
    assert (load(tmp_path / "out")(IDS) - model(IDS)).abs().max() < 1e-4
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
