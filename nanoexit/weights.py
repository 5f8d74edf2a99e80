"""Weights on disk: check a model's folder and load it.

Contract. A config.json that this transformer does not implement is refused by name before a weight
is read. Every tensor is checked by name, shape and value before it is used. Nothing is executed:
safetensors and JSON only. What config.json leaves out has the default of transformers.

The model is made without memory and receives its tensors one by one, so that loading N bytes takes
little more than N bytes.
"""

import dataclasses
import functools
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from nanoexit.config import UserError, nearest, printable, show
from nanoexit.model import Llama3Rope, Shape, Transformer
from nanoexit.tokenizer import (
    HUB_ID,
    Tokenizer,
    check_file,
    check_values,
    content_hash,
    fetch,
    find_model,
    model_stop_ids,
    read_object,
)

REQUIRED = ["vocab_size", "hidden_size", "intermediate_size"]
REQUIRED += ["num_hidden_layers", "num_attention_heads"]
NULL = type(None)
KEYS = {  # of config.json: kinds, and range of a number
    **dict.fromkeys(REQUIRED, ((int,), 1, 2**24)),
    "num_hidden_layers": ((int,), 1, 2**12),
    **dict.fromkeys(["num_key_value_heads", "head_dim"], ((int, NULL), 1, 2**24)),
    "max_position_embeddings": ((int,), 1, 2**31),
    "original_max_position_embeddings": ((int,), 1, 2**31),
    "sliding_window": ((int, NULL), 1, 2**31),
    "max_window_layers": ((int,), 0, 2**31),
    "rms_norm_eps": ((int, float), 0, 1),
    "rope_theta": ((int, float, NULL), 1, 1e15),
    **dict.fromkeys(["factor", "low_freq_factor", "high_freq_factor"], ((int, float), 1e-6, 1e6)),
    "partial_rotary_factor": ((int, float), 1, 1),  # another is not implemented
    **dict.fromkeys(["attention_bias", "mlp_bias"], ((bool,), 0, 0)),
    **dict.fromkeys(["tie_word_embeddings", "use_sliding_window"], ((bool,), 0, 0)),
    **dict.fromkeys(["hidden_act", "rope_type", "type"], ((str,), 0, 0)),
    **dict.fromkeys(["rope_scaling", "rope_parameters"], ((dict, NULL), 0, 0)),
    "quantization_config": ((dict, NULL), 0, 0),
    "layer_types": ((list, NULL), 0, 0),
}
DEFAULTS: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
DEFAULTS |= {"sliding_window": 4096, "max_window_layers": 28}
DEFAULTS |= {"max_position_embeddings": 32768, "num_key_value_heads": 32}
FAMILIES = {  # and the defaults of transformers, for what config.json leaves out
    "llama": DEFAULTS | {"max_position_embeddings": 2048, "num_key_value_heads": None},
    "qwen2": DEFAULTS,
    "qwen3": DEFAULTS | {"head_dim": 128},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LARGE = 2**27  # bytes: from here on, loading shows progress


# --- the architecture -------------------------------------------------------------------------


def read_shape(folder: Path) -> Shape:
    """config.json, as old and new tool chains write it -> Shape.

    Raises UserError with key and value for nonsense and for what is not implemented.
    """
    where = folder / "config.json"
    check_file(where)
    given = read_object(where)
    family = given.get("model_type")
    if family not in [*FAMILIES]:
        expected = f"expected {', '.join(FAMILIES)}{nearest(family, FAMILIES)}"
        raise UserError(f"{where}: model_type {show(family)} is not implemented: {expected}")
    check_values(given, KEYS, where)
    for key in REQUIRED:
        if key not in given:
            raise UserError(f"{where}: {key} is missing")
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


def _refuse(c: dict[str, Any], s: Shape, where: Path) -> None:
    """What would silently compute something else."""
    kinds, quantized = c.get("layer_types") or [], c.get("quantization_config") or {}
    used = c.get("use_sliding_window", False) and s.family != "llama"
    window = c["sliding_window"] if used else None
    slides = window is not None and c["max_window_layers"] < s.blocks
    slides = "sliding_attention" in kinds if kinds else slides
    short = slides and (window is None or window < s.max_positions)
    odd = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
    for bad, problem in (
        (quantized, f"quantization_config: {show(quantized.get('quant_method'))}"),
        (c["hidden_act"] not in ("silu", "swish"), f"hidden_act {show(c['hidden_act'])}"),
        (odd, f"layer_types: {show(odd)}"),
        (short, f"sliding_window {window} with layers that slide, {s.max_positions} positions,"),
        (s.heads % s.kv_heads, f"num_key_value_heads {s.kv_heads} for {s.heads} heads"),
        (s.width % s.heads and not c.get("head_dim"), f"hidden_size {s.width} for {s.heads} heads"),
        (s.head_dim % 2, f"head_dim {s.head_dim}, odd,"),
    ):
        if bad:
            raise UserError(f"{where}: {problem} is not implemented")


def _rope(c: dict[str, Any], where: Path) -> tuple[float, Llama3Rope | None]:
    """-> theta and Llama 3's scaling, from rope_theta and rope_scaling, or from rope_parameters."""
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    check_values(rope, KEYS, f"{where}: RoPE")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    odd = [key for key in rope if key not in KEYS] or [kind]
    if odd[0] not in ("default", "llama3"):
        raise UserError(f"{where}: RoPE {show(odd[0])} is not implemented: only default, llama3")
    theta = float(rope.get("rope_theta") or c["rope_theta"] or DEFAULTS["rope_theta"])
    if kind == "default":
        return theta, None
    missing = [key for key in Llama3Rope._fields if key not in rope]
    if missing:
        raise UserError(f"{where}: RoPE: llama3 lacks {', '.join(missing)}")
    scaling = Llama3Rope(*(rope[key] for key in Llama3Rope._fields))
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise UserError(f"{where}: RoPE: high_freq_factor is not above low_freq_factor")
    return theta, scaling


# --- loading ----------------------------------------------------------------------------------


class Stored(NamedTuple):
    path: Path
    name: str


Tensors = dict[str, Stored]  # by the names of the model's parameters


def load_model(
    name: str, device: str = "auto", dtype: str = "auto", revision: str | None = None
) -> Transformer:
    """A model from a folder or the hub, frozen and ready to run.

    device: auto is cuda, else mps, else cpu. dtype: auto is bfloat16 on cuda and float32 elsewhere.
    Raises UserError naming the file or tensor that is missing, unexpected, misshapen or not finite.
    """
    folder, commit = find_model(str(name), revision)
    shape, stored, place = read_shape(folder), _locate(folder), pick_device(device)
    dtype = ("bfloat16" if place.type == "cuda" else "float32") if dtype == "auto" else dtype
    if dtype not in DTYPES:
        raise UserError(f"model.dtype: {show(dtype)} is not one of auto, {', '.join(DTYPES)}")
    content = content_hash({folder / "config.json", *(tensor.path for tensor in stored.values())})
    with torch.device("meta"):
        model = Transformer(_tie(shape, stored))
    expected = {name for name, _ in model.named_parameters()}
    _drop_zero_biases(stored, expected)
    compare_names(stored, expected, folder)
    _fill(model, stored, place, DTYPES[dtype])
    model.name, model.revision, model.content = str(name), commit or "", content
    model.stop_ids = model_stop_ids(folder)
    if (folder / "tokenizer.json").exists():
        model.stop_ids = Tokenizer(folder).stop_ids
    return model.requires_grad_(False).eval()


def pick_device(name: str) -> torch.device:
    """auto is cuda, else mps, else cpu. Raises UserError where the device cannot be used."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.device: {name!r} cannot be used here: {reason}") from None


def find_dataset_file(name: str) -> Path:
    """`hub:OWNER/NAME/path/in/the/dataset.jsonl` -> the file on this machine."""
    parts = name.removeprefix("hub:").split("/", 2)
    repository, file = "/".join(parts[:2]), "".join(parts[2:])
    if not (HUB_ID.fullmatch(repository) and file):
        raise UserError(f"{show(name)}: expected hub:OWNER/NAME/FILE")
    get = functools.partial(hf_hub_download, repository, file, repo_type="dataset")
    return fetch(f"{printable(name)}:", get)


def _locate(folder: Path) -> Tensors:
    """Every tensor of model.safetensors, or of the shards of its index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.exists() and not single.exists():
        named = read_object(index).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise UserError(f"{index}: weight_map: expected tensors and files, found {show(named)}")
        for shard in named.values():  # a foreign index must not reach outside its folder
            if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
                raise UserError(f"{index}: shard {show(shard)} is not a plain file name")
        stored = [Stored(folder / shard, name) for name, shard in named.items()]
        for path in sorted({tensor.path for tensor in stored}):
            check_file(path)
    else:
        with open_weights(single) as file:
            stored = [Stored(single, name) for name in file.keys()]  # noqa: SIM118
    found: Tensors = {}
    for tensor in stored:
        parts = [part for part in tensor.name.split(".") if part not in ("_orig_mod", "module")]
        name = ".".join(parts if parts[:1] in (["model"], ["lm_head"]) else ["model", *parts])
        if name in found:
            both = f"{printable(found[name].name)} and {printable(tensor.name)}"
            raise UserError(f"{folder}: {both} are the same tensor")
        if not name.endswith("rotary_emb.inv_freq"):  # of old Llama checkpoints
            found[name] = tensor
    return found


def _tie(shape: Shape, stored: Tensors) -> Shape:
    """Tied embeddings are stored under either name, or both; two that differ are not tied."""
    if not shape.tied or HEAD not in stored:
        return shape
    embedding = stored.setdefault(EMBEDDING, stored[HEAD])
    a, b = _read(embedding), _read(stored[HEAD])
    if a.dtype != b.dtype or not torch.equal(a, b):
        return dataclasses.replace(shape, tied=False)
    del stored[HEAD]
    return shape


def _drop_zero_biases(stored: Tensors, expected: Collection[str]) -> None:
    """Some tools store biases of zeros where the model has none."""
    for name in [name for name in stored if name not in expected]:
        known = name.removesuffix(".bias") + ".weight" in expected
        if known and not _read(stored[name]).any():
            del stored[name]


def _fill(model: Transformer, stored: Tensors, device: torch.device, dtype: torch.dtype) -> None:
    """Give a model without memory its tensors, one after the other."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    large = sum(path.stat().st_size for path in {t.path for t in stored.values()}) > LARGE
    opened, mapped = None, 0
    with ExitStack() as stack:
        order = sorted(stored, key=lambda name: stored[name])
        for name in tqdm(order, desc="load", unit="tensor", disable=not large, leave=False):
            path, source = stored[name]
            if path != opened or mapped > LARGE:
                tensor: Tensor | None = None
                stack.close()  # one file at a time, opened anew now and then: read pages can go
                file = stack.enter_context(open_weights(path))
                opened, mapped = path, 0
            tensor = read_tensor(file, source, path, shapes[name])
            mapped += tensor.nbytes if tensor.dtype != dtype else 0  # else the map is the weight
            weight = tensor.to(device, dtype)
            check_finite(weight, source, path)
            owner, _, leaf = name.rpartition(".")
            parameter = torch.nn.Parameter(weight, requires_grad=False)
            setattr(model.get_submodule(owner), leaf, parameter)


def _read(tensor: Stored) -> Tensor:
    with open_weights(tensor.path) as file:
        return read_tensor(file, tensor.name, tensor.path)


def open_weights(path: Path) -> Any:
    """A safetensors file, to be read with `read_tensor`."""
    check_file(path)
    try:
        return safe_open(path, "pt")
    except Exception as error:  # whatever the package raises
        problem = printable(str(error))
        raise UserError(f"{path} is not a whole safetensors file: {problem}") from None


def read_tensor(file: Any, name: str, path: Path, shape: tuple[int, ...] | None = None) -> Tensor:
    """A tensor in its stored dtype; UserError for another shape, or a dtype not in DTYPES."""
    where = f"{path}: tensor {printable(name)}"
    try:
        tensor = file.get_tensor(name)
    except Exception as error:
        raise UserError(f"{where} cannot be read: {printable(str(error))}") from None
    if shape is not None and tuple(tensor.shape) != shape:
        raise UserError(f"{where} has the shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype not in DTYPES.values():
        raise UserError(f"{where} is {tensor.dtype}, expected {', '.join(DTYPES)}")
    return tensor


def compare_names(found: Collection[str], wanted: Collection[str], where: Path) -> None:
    """Raise UserError for the first tensor that is missing or unexpected."""
    missing, extra = sorted({*wanted} - {*found}), sorted({*found} - {*wanted})
    for names, problem in ((missing, "missing"), (extra, "unexpected")):
        if names:
            more = f", and {len(names) - 1} more" if names[1:] else ""
            close = nearest(names[0], extra if names is missing else missing)
            raise UserError(printable(f"{where}: tensor {names[0]} is {problem}{more}{close}"))


def check_finite(tensor: Tensor, name: str, path: Path) -> None:
    """On the tensor's device, in the dtype that it is used in, without a large temporary."""
    if not all(map(torch.isfinite, torch.aminmax(tensor))):  # NaN passes through
        problem = f"is not finite in {tensor.dtype}: it is damaged, or needs a wider dtype"
        raise UserError(f"{path}: tensor {printable(name)} {problem}")
