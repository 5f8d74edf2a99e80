"""Model folders as other tools write them: what loads, and what is refused by name."""

import json
import struct
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import SHAPES, random_model, with_exits
from safetensors.torch import load_file, save_file

from nanoexit.adapters import save_merged
from nanoexit.config import UserError
from nanoexit.tokenizer import content_hash
from nanoexit.weights import KEYS, REQUIRED, load_model, read_shape

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM, UP = "model.norm.weight", "model.layers.2.mlp.up_proj.weight"
SILENT = {
    "llama": {"kv_heads": 4, "head_dim": 6, "max_positions": 2048, "rope_theta": 10000.0},
    "qwen2": {"max_positions": 32768, "head_dim": 6, "tied": False},
    "qwen3": {"head_dim": 128, "norm_eps": 1e-6, "max_positions": 32768, "qkv_bias": False},
}
WINDOW = {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 2}
FULL, SLIDING = {"layer_types": ["full_attention"]}, {"layer_types": ["sliding_attention"]}
NEVER = [{"use_sliding_window": False}, {"max_window_layers": 5}, {"sliding_window": 2048}]
NEVER += [{"sliding_window": None}, FULL]
ACTIVE = [{}, {"max_position_embeddings": 1024}, SLIDING, SLIDING | {"use_sliding_window": False}]
ACTIVE += [{"layer_types": ["chunked_attention"]}, {"max_position_embeddings": "absent"}]
NONSENSE = {int: [-1, 10**30, float("nan"), 2.5, 1e400, "5", "text", True, [1], {"a": 1}]}
NONSENSE[float] = [-1, 10**30, float("nan"), 1e400, "1e-5", True, [1], {"a": 1}]
NONSENSE[bool] = ["false", "text", 0, 1, float("nan"), 10**30, [1]]
NONSENSE |= {str: [0, True, ["silu"]], dict: ["text", 0, [1]], list: ["text", 0, {"a": 1}]}
NONSENSE[type(None)] = ["gptq", 0, {"quant_method": "gptq"}]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def old_config(family: str) -> dict:
    """config.json as transformers 4 writes it."""
    s = SHAPES[family]
    c = {"model_type": family, "vocab_size": s.vocab, "hidden_size": s.width, "hidden_act": "silu"}
    c |= {"intermediate_size": s.ffn, "num_hidden_layers": s.blocks, "num_attention_heads": s.heads}
    c |= {"num_key_value_heads": s.kv_heads, "head_dim": s.head_dim, "rms_norm_eps": s.norm_eps}
    c |= {"rope_theta": s.rope_theta, "tie_word_embeddings": s.tied, "eos_token_id": [7, 9]}
    c |= {"max_position_embeddings": 2048, "torch_dtype": "float32"}
    c["rope_scaling"] = s.rope_scaling and {"rope_type": "llama3", **s.rope_scaling._asdict()}
    return c | {"attention_bias": True, "mlp_bias": True} if s.rope_scaling else c


def new_config(family: str) -> dict:
    """The same as transformers 5 writes it."""
    c = old_config(family)
    rope = {"rope_theta": c.pop("rope_theta"), "rope_type": "default"}
    return c | {"rope_parameters": rope | (c.pop("rope_scaling") or {})}


def write(folder: Path, config: dict, tensors: dict, shards: int = 1) -> Path:
    """A model folder: one file, or shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    where = {n: f"model-{i % shards + 1:05}.safetensors" for i, n in enumerate(sorted(tensors))}
    for shard in set(where.values()):
        save_file({n: t for n, t in tensors.items() if where[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def tensors_of(model) -> dict:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def load(folder: Path, dtype: str = "float32"):
    return load_model(str(folder), "cpu", dtype)


def refused(folder: Path, *words: str) -> None:
    """Loading ends in one UserError with each of these words."""
    with pytest.raises(UserError) as caught:
        load(folder)
    assert all(word in str(caught.value) for word in words), (words, str(caught.value))
    assert str(caught.value).isprintable()


def changed(folder: Path, change=dict, family: str = "qwen2", shards: int = 1) -> Path:
    """A folder whose tensors went through `change`, a function of the dict."""
    return write(folder, old_config(family), change(tensors_of(random_model(family))), shards)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("config", [old_config, new_config])
def test_loads_as_old_and_new_tools_write_it(tmp_path, family, config, shards):
    """Catches: a config key read from one place only, or a shard left out."""
    model = random_model(family)
    loaded = load(write(tmp_path, config(family), tensors_of(model), shards))
    assert loaded.shape == SHAPES[family] and loaded.stop_ids == {7, 9}
    assert torch.equal(loaded(IDS), model(IDS))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_two_tensors_are_not_tied(tmp_path):
    """Catches: a tied config that drops a different lm_head.weight, in logits or in the merge."""
    head = torch.randn(40, 24, generator=torch.Generator().manual_seed(3))
    model = load(changed(tmp_path / "a", lambda tensors: tensors | {HEAD: head}))
    own = random_model("qwen2")
    assert torch.allclose(model(IDS), own.model.norm(own.run(IDS).hidden) @ head.T, atol=1e-5)
    save_merged(model, tmp_path / "a", tmp_path / "b")
    assert torch.equal(load(tmp_path / "b")(IDS), model(IDS))
    assert json.loads((tmp_path / "b" / "config.json").read_text())["tie_word_embeddings"] is False


def oddities(tensors: dict) -> dict:
    """Names of a compiled model without `model.`, biases of zeros, an old buffer."""
    found = {"layers.1.mlp.up_proj.bias": torch.zeros(40)}
    found["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    bare = {name.replace("model.", ""): tensor for name, tensor in tensors.items()}
    return found | {n.replace("layers.", "_orig_mod.layers."): t for n, t in bare.items()}


@pytest.mark.parametrize("family, change", [
    ("llama", lambda tensors: {f"module.{name}": t for name, t in tensors.items()}),
    ("qwen3", oddities),
    ("qwen2", lambda tied: tied | {HEAD: tied[EMBEDDING].clone()}),
    ("qwen2", lambda tied: {HEAD if n == EMBEDDING else n: t for n, t in tied.items()}),
])  # fmt: skip
def test_harmless_oddities_are_accepted(tmp_path, family, change):
    """Catches: a complete model refused for names, zeros or a tie that a tool wrote its own way."""
    assert torch.equal(load(changed(tmp_path, change, family))(IDS), random_model(family)(IDS))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
def test_every_dtype_to_every_dtype(tmp_path, stored, asked):
    """Catches: the stored dtype kept where another was asked for, or values that change."""
    folder = changed(tmp_path, lambda tensors: {n: t.to(stored) for n, t in tensors.items()})
    tensors = load_file(folder / "model.safetensors")
    for name, p in load(folder, asked).named_parameters():
        assert p.dtype == getattr(torch, asked) and torch.equal(p, tensors[name].to(p.dtype))


def test_defaults_are_those_of_the_family(tmp_path, family):
    """Catches: one default for all; transformers has 128 for the head_dim of Qwen3."""
    keys = [*REQUIRED, *(["num_key_value_heads"] if family != "llama" else [])]
    (tmp_path / "config.json").write_text(json.dumps({k: old_config(family)[k] for k in keys}))
    assert SILENT[family].items() <= read_shape(tmp_path).__dict__.items()


@pytest.mark.parametrize("change", [*NEVER, *ACTIVE], ids=str)
def test_sliding_windows(tmp_path, change):
    """Catches: layers that never slide refused, or an active window ignored."""
    config = {k: v for k, v in (old_config("qwen2") | WINDOW | change).items() if v != "absent"}
    folder = write(tmp_path, config, tensors_of(random_model("qwen2")))
    _ = load(folder) if change in NEVER else refused(folder, "is not implemented")


@pytest.mark.parametrize("size", [2**10, 2**27])
def test_content(tmp_path, size):
    """Catches: a copy taken for another model, or changed weights for the same one."""
    path, hashes = tmp_path / "a.safetensors", []
    for content in (b"x", b"x", b"y"):
        with path.open("wb") as file:
            file.truncate(size)
            file.seek(size // 2)
            file.write(content * (1 + size // 4096))
        hashes.append(content_hash([path]))
    assert hashes[0] == hashes[1] != hashes[2]


def test_merged_export_is_the_adapted_model(tmp_path):
    """Catches: merged weights that are not base + scale B A; an adapter that is added again."""
    base = changed(tmp_path / "base", family="qwen3")
    for name in ("tokenizer_config.json", "adapter_config.json"):
        (base / name).write_text("{}")
    model = with_exits(load(base))
    save_merged(model, base, tmp_path / "out")
    assert (load(tmp_path / "out")(IDS) - model(IDS)).abs().max() < 1e-4
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"config.json", "model.safetensors", "tokenizer_config.json"}


@pytest.mark.parametrize("key", KEYS)
def test_nonsense_is_refused_with_key_and_value(tmp_path, key):
    """Catches: a key of config.json that breaks its rule and is accepted or misreported."""
    hint, low, *_ = KEYS[key]
    kinds = get_args(hint) or (hint,)
    null = [] if type(None) in kinds else [None]
    for value in [*NONSENSE[kinds[0]], *([0] if low else []), *null]:
        (tmp_path / "config.json").write_text(json.dumps(old_config("qwen2") | {key: value}))
        with pytest.raises(UserError, match=rf"config\.json: {key}: expected .*, found "):
            read_shape(tmp_path)


@pytest.mark.parametrize("case", [
    ({"model_type": "gemma2"}, "model_type", "gemma2", "qwen3"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn", "llama3"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "dynamic"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3", "is missing"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config", "gptq"),
    ({"hidden_act": "gelu\x1b[2J"}, "hidden_act", "gelu"),
    ({"hidden_size": None}, "hidden_size"),
    ({"num_attention_heads": 5, "head_dim": None}, "hidden_size 24 for 5 heads"),
    ({"head_dim": 7}, "head_dim"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
])  # fmt: skip
def test_refused_by_name_before_a_weight_is_read(tmp_path, case):
    """Catches: a model computed as something else. The weights here are not safetensors."""
    change, *words = case
    (tmp_path / "config.json").write_text(json.dumps(old_config("qwen2") | change))
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    refused(tmp_path, *words)


@pytest.mark.parametrize("case", [
    (lambda t: {n: v for n, v in t.items() if n != UP}, UP, "missing"),
    (lambda t: t | {"model.experts\x1b.weight": torch.zeros(2)}, "experts\\x1b", "unexpected"),
    (lambda t: t | {UP: torch.zeros(5, 24)}, UP, "[5, 24]", "[40, 24]"),
    (lambda t: t | {NORM: t[NORM] * float("nan")}, NORM, "not finite"),
    (lambda t: t | {NORM: torch.ones(24, dtype=torch.int32)}, NORM, "int32", "bfloat16"),
    (lambda t: t | {UP.replace("weight", "bias"): torch.ones(40)}, "bias", "unexpected"),
    (lambda t: t | {"norm.weight": t[NORM].clone()}, NORM, "norm.weight", "same tensor"),
])  # fmt: skip
def test_a_wrong_tensor_is_named(tmp_path, case):
    """Catches: a damaged checkpoint that loads, or a message without tensor and expectation."""
    change, *words = case
    refused(changed(tmp_path, change), *words)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b", "..", "", 5])
def test_a_shard_outside_the_folder(tmp_path, shard):
    """Catches: a foreign index that makes us open a file outside its folder."""
    folder = changed(changed(tmp_path) / "m", shards=2)  # ../ would lead to a whole model
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {UP: shard}}))
    refused(folder, "plain file name")
    index.write_text('{"weight_map": []}')
    refused(folder, "weight_map")


@pytest.mark.parametrize("name, shards", [("model-00002.safetensors", 2), ("model.safetensors", 1)])
def test_files_that_were_not_downloaded(tmp_path, name, shards):
    """Catches: missing weights that end in a traceback, or in opening a pickle (law 7)."""
    snapshot = changed(tmp_path / "snapshots" / "abc", shards=shards)
    (snapshot / name).unlink()
    (snapshot / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refused(snapshot, name, "no such file", "incomplete snapshot")


@pytest.mark.parametrize("content", [b"", b"\x80\x04", struct.pack("<Q", 10**12), None, POINTER])
def test_a_file_that_is_not_complete(tmp_path, content):
    """Catches: a truncated download or a git-lfs pointer that loads, or ends in a traceback."""
    path = changed(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    refused(tmp_path, "model.safetensors", "git-lfs" if content == POINTER else "safetensors file")
