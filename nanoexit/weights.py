"""Weights on disk: check a model's folder and load it.

Contract. If config.json asks for something not implemented here, loading stops before any weight is
read and names it. Every tensor is checked by name, shape and value. Nothing is executed: only
safetensors and JSON are read. The model is created without memory and receives its tensors one by
one, so loading N bytes takes little more than N bytes."""

import contextlib
import dataclasses
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from nanoexit.config import Rule, UserError, check_file, check_values, read_json, show
from nanoexit.model import Llama3Rope, Shape, Transformer
from nanoexit.tokenizer import Tokenizer, content_hash, find_model, model_stop_ids

QWEN: dict = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
QWEN |= {"max_position_embeddings": 32768, "num_key_value_heads": 32}
QWEN |= {"sliding_window": 4096, "max_window_layers": 28}
FAMILIES = {  # with transformers' defaults for keys that config.json leaves out
    "llama": QWEN | {"max_position_embeddings": 2048, "num_key_value_heads": None},
    "qwen2": QWEN,
    "qwen3": QWEN | {"head_dim": 128},
}
REQUIRED = ["model_type", "vocab_size", "hidden_size", "intermediate_size"]
REQUIRED += ["num_hidden_layers", "num_attention_heads"]
SIZES = [*REQUIRED, "max_position_embeddings", "original_max_position_embeddings"]
OPTIONAL = ["num_key_value_heads", "head_dim", "sliding_window"]
SWITCHES = ["attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window"]
KEYS = {  # of config.json; values outside these rules are not implemented
    **dict.fromkeys(SIZES, Rule(int, 1, 2**24)),
    **dict.fromkeys(OPTIONAL, Rule(int | None, 1, 2**24)),
    "model_type": Rule(str, choices=[*FAMILIES]),
    "num_hidden_layers": Rule(int, 1, 2**12),
    "max_window_layers": Rule(int, 0, 2**24),
    "rms_norm_eps": Rule(float, 0, 1),
    "rope_theta": Rule(float | None, 1, 1e15),
    **dict.fromkeys(["factor", "low_freq_factor", "high_freq_factor"], Rule(float, 1e-6, 1e6)),
    "partial_rotary_factor": Rule(float, 1, 1),
    **dict.fromkeys(SWITCHES, Rule(bool)),
    "hidden_act": Rule(str, choices=["silu", "swish"]),
    **dict.fromkeys(["rope_type", "type"], Rule(str, choices=["default", "llama3"])),
    **dict.fromkeys(["rope_scaling", "rope_parameters"], Rule(dict | None)),
    "quantization_config": Rule(NoneType),
    "layer_types": Rule(list | None),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Stored = dict[str, tuple[Path, str]]  # parameter name -> file, and tensor name in it


def read_shape(folder: Path) -> Shape:
    """config.json, in transformers' old or new format -> Shape. UserError for anything else."""
    where = folder / "config.json"
    check_file(where)
    given = read_json(where)
    check_values(given, KEYS, where, REQUIRED)
    family = given["model_type"]
    c = FAMILIES[family] | given
    bias, heads = c.get("attention_bias", False), c["num_attention_heads"]
    theta, scaling = _rope(c, where)
    shape = Shape(
        family=family,
        vocab=c["vocab_size"],
        width=c["hidden_size"],
        ffn=c["intermediate_size"],
        blocks=c["num_hidden_layers"],
        heads=heads,
        kv_heads=c["num_key_value_heads"] or heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(c["rms_norm_eps"]),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias and family != "qwen2",
        mlp_bias=c.get("mlp_bias", False) and family == "llama",
        qk_norm=family == "qwen3",
        tied=c.get("tie_word_embeddings", False),
        max_positions=c["max_position_embeddings"],
    )
    _refuse(c, shape, where)
    return shape


def _refuse(c: dict, s: Shape, where: Path) -> None:
    """Refuse what would load without an error but compute something else."""
    used = s.family != "llama" and c.get("use_sliding_window")
    window, kinds = c["sliding_window"] if used else None, c.get("layer_types") or []
    if not kinds and window and c["max_window_layers"] < s.blocks:
        kinds = ["sliding_attention"]
    odd = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
    short = "sliding_attention" in kinds and (window or 0) < s.max_positions
    for bad, problem in (
        (odd, f"layer_types: {show(odd)}"),
        (short, f"sliding_window {window}, below the {s.max_positions} positions,"),
        (s.heads % s.kv_heads, f"num_key_value_heads {s.kv_heads} for {s.heads} heads"),
        (s.width % s.heads and not c.get("head_dim"), f"hidden_size {s.width} for {s.heads} heads"),
        (s.head_dim % 2, f"head_dim {s.head_dim}, an odd number,"),
    ):
        if bad:
            raise UserError(f"{where}: {problem} is not implemented")


def _rope(c: dict, where: Path) -> tuple[float, Llama3Rope | None]:
    """-> theta and Llama 3's scaling, from rope_theta and rope_scaling, or from rope_parameters."""
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    fields = Llama3Rope._fields if kind == "llama3" else ()
    check_values(rope, KEYS, f"{where}: RoPE {show(kind)}", fields)
    for key in rope.keys() - KEYS.keys():
        raise UserError(f"{where}: RoPE: {show(key)} is not implemented")
    theta = float(rope.get("rope_theta") or c["rope_theta"] or QWEN["rope_theta"])
    if kind == "default":
        return theta, None
    scaling = Llama3Rope(*(rope[key] for key in fields))
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise UserError(f"{where}: RoPE: high_freq_factor is not above low_freq_factor")
    return theta, scaling


def load_model(
    name: str, device: str = "auto", dtype: str = "auto", revision: str | None = None
) -> Transformer:
    """A model from a folder or the hub, frozen and ready to run; arguments as in ModelConfig.
    UserError names the file or tensor that is missing, unexpected, misshapen or not finite."""
    folder, commit = find_model(str(name), revision)
    shape, stored, place = read_shape(folder), _locate(folder), pick_device(device)
    if dtype == "auto":
        dtype = "bfloat16" if place.type == "cuda" else "float32"
    if dtype not in DTYPES:
        raise UserError(f"dtype: expected one of auto, {', '.join(DTYPES)}, found {show(dtype)}")
    content = content_hash({folder / "config.json", *(path for path, _ in stored.values())})
    with torch.device("meta"):
        model = Transformer(_tie(shape, stored))
    shapes = {key: parameter.shape for key, parameter in model.named_parameters()}
    for key in stored.keys() - shapes.keys():
        if key.endswith(".bias") and not read_tensor(*stored[key]).any():
            del stored[key]  # some tools store zero biases that the model does not have
    compare_names(stored, shapes, folder)
    for key in tqdm(sorted(stored), "load", leave=False, delay=1, disable=None):
        weight = read_tensor(*stored[key], shapes[key], device=place, dtype=DTYPES[dtype])
        owner, _, leaf = key.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(weight, requires_grad=False))
    model.name, model.revision, model.content = str(name), commit or "", content
    reads_text = (folder / "tokenizer.json").exists()
    model.stop_ids = Tokenizer(folder).stop_ids if reads_text else model_stop_ids(folder)
    return model.eval()


def pick_device(name: str) -> torch.device:
    """auto is cuda, else mps, else cpu. UserError for a device that cannot be used."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.device: {name!r} cannot be used here: {reason}") from None


def _locate(folder: Path) -> Stored:
    """Every tensor of model.safetensors, or of the shards that its index names."""
    shards, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if index.exists() and not (folder / shards[0]).exists():
        given = read_json(index)
        check_values(given, {"weight_map": Rule(dict)}, index, ["weight_map"])
        shards = sorted({*map(str, given["weight_map"].values())})
    for shard in shards:  # an untrusted index must not reach outside its folder
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", shard):
            raise UserError(f"{index}: shard {show(shard)} is not a plain file name")
    found: Stored = {}
    for path in (folder / shard for shard in shards):
        for source in tensor_names(path):
            parts = [part for part in source.split(".") if part not in ("_orig_mod", "module")]
            name = ".".join(parts if parts[0] in ("model", "lm_head") else ["model", *parts])
            if name in found:
                raise UserError(f"{folder}: {found[name][1]} and {source} are the same tensor")
            if not name.endswith("rotary_emb.inv_freq"):  # of old Llama checkpoints
                found[name] = path, source
    return found


def _tie(shape: Shape, stored: Stored) -> Shape:
    """Tied embeddings may be stored under either name or both; if two differ, they are not tied."""
    if not shape.tied or HEAD not in stored:
        return shape
    a, b = read_tensor(*stored.setdefault(EMBEDDING, stored[HEAD])), read_tensor(*stored[HEAD])
    if a.dtype != b.dtype or not torch.equal(a, b):
        return dataclasses.replace(shape, tied=False)
    del stored[HEAD]
    return shape


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open safetensors file; whatever the package raises becomes a UserError."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except Exception as error:
        raise UserError(f"{path} is not a complete safetensors file: {error}") from None


def tensor_names(path: Path) -> list[str]:
    """The names in a safetensors file. Raises UserError for a file that is not complete."""
    check_file(path)
    with _opened(path) as file:
        return list(file.keys())


def read_tensor(path: Path, name: str, shape: Any = None, **options: Any) -> Tensor:
    """A copy of a tensor; options: device and dtype, as for Tensor.to, by default as stored.
    UserError for another shape, for a stored dtype not in DTYPES, and for values that are not
    finite in `dtype`. The file is reopened for each tensor, so that its memory can be freed."""
    where = f"{path}: tensor {name}"
    with _opened(path) as file:
        stored = file.get_tensor(name)
    if shape is not None and stored.shape != shape:
        raise UserError(f"{where} has the shape {[*stored.shape]}, expected {[*shape]}")
    if stored.dtype not in DTYPES.values():
        raise UserError(f"{where} is {stored.dtype}, expected {', '.join(DTYPES)}")
    tensor = stored.to(**options, copy=True)
    if tensor.numel() and not all(map(torch.isfinite, tensor.aminmax())):  # both are NaN if any is
        problem = f"is not finite in {tensor.dtype}: it is damaged, or needs a wider dtype"
        raise UserError(f"{where} {problem}")
    return tensor


def compare_names(found: Collection[str], wanted: Collection[str], where: Path | str) -> None:
    """Raise UserError for the first name that is missing or unexpected."""
    missing, extra = {*wanted} - {*found}, {*found} - {*wanted}
    for names, problem in ((missing, "missing"), (extra, "unexpected")):
        if names:
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{where}: {min(names)} is {problem}{more}")
