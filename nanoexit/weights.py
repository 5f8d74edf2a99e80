"""Weights on disk: check a model's folder and load it.

Contract. A config that this transformer does not implement is refused by name before any weight is read, and every tensor is
checked by name, shape and value before it is used. Nothing is guessed and nothing is executed: safetensors and JSON only.

The model is made without memory and given its tensors one by one, so loading N bytes takes little more than N bytes.
"""

from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from nanoexit.errors import UserError, nearest
from nanoexit.hub import find_model
from nanoexit.model import Llama3Rope, Shape, Transformer
from nanoexit.tokenizer import read_json, stop_ids

FAMILIES = ("llama", "qwen2", "qwen3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGE = 2**27  # bytes: from here on, loading shows progress


# --- the architecture ------------------------------------------------------------------------------------------------


def read_shape(folder: Path) -> Shape:
    """config.json, as old and new tool chains write it -> Shape. Raises UserError for what is not implemented."""
    where = folder / "config.json"
    if not where.is_file():
        raise UserError(f"{folder}: no config.json: expected the folder of a model")
    c = read_json(where)
    family = c.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{where}: model_type {family!r} is not implemented: expected {', '.join(FAMILIES)}{nearest(family, FAMILIES)}")
    _refuse(c, where)
    width, heads = _whole(c, "hidden_size", where), _whole(c, "num_attention_heads", where)
    theta, scaling = _rope(c, where)
    attention_bias, mlp_bias = bool(c.get("attention_bias", False)), bool(c.get("mlp_bias", False))
    return Shape(
        family, _whole(c, "vocab_size", where), width, _whole(c, "intermediate_size", where), _whole(c, "num_hidden_layers", where),
        heads, _whole(c, "num_key_value_heads", where, heads), _whole(c, "head_dim", where, width // heads), theta, scaling,
        float(c.get("rms_norm_eps", 1e-6)), qkv_bias=family == "qwen2" or attention_bias, o_bias=family != "qwen2" and attention_bias,
        mlp_bias=family == "llama" and mlp_bias, qk_norm=family == "qwen3", tied=bool(c.get("tie_word_embeddings", False)),
        max_positions=_whole(c, "max_position_embeddings", where, 2048),
    )


def _whole(c: dict, key: str, where: Path, default: int | None = None) -> int:
    value = c.get(key) if c.get(key) is not None else default
    if type(value) is not int or value < 1:
        raise UserError(f"{where}: {key}: expected a whole number, found {value!r}")
    return value


def _refuse(c: dict, where: Path) -> None:
    """What would silently compute something else."""
    if c.get("quantization_config"):
        method = c["quantization_config"].get("quant_method", "of some kind")
        raise UserError(f"{where}: quantization_config: {method} quantized weights are not implemented; take the unquantized model")
    if c.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"{where}: hidden_act {c['hidden_act']!r} is not implemented: expected silu")
    sliding = c.get("sliding_window") and (c.get("use_sliding_window") or "sliding_attention" in (c.get("layer_types") or []))
    if sliding and c["sliding_window"] < c.get("max_position_embeddings", 0):
        raise UserError(f"{where}: sliding_window {c['sliding_window']} is active and shorter than max_position_embeddings "
                        f"{c['max_position_embeddings']}: sliding windows are not implemented")


def _rope(c: dict, where: Path) -> tuple[float, Llama3Rope | None]:
    """-> theta and Llama 3's scaling, from rope_theta and rope_scaling, or from the newer rope_parameters."""
    newer, older = c.get("rope_parameters") or {}, c.get("rope_scaling") or {}
    rope = {**older, **newer}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = float(rope.get("rope_theta") or c.get("rope_theta") or 10000.0)
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"{where}: rope type {kind!r} is not implemented: expected default or llama3")
    missing = [key for key in Llama3Rope._fields if key not in rope]
    if missing:
        raise UserError(f"{where}: rope type llama3 lacks {', '.join(missing)}")
    return theta, Llama3Rope(*(rope[key] for key in Llama3Rope._fields))


# --- loading ---------------------------------------------------------------------------------------------------------


def load_model(name: str, device: str = "auto", dtype: str = "auto", revision: str | None = None) -> Transformer:
    """A model from a folder or the hub, frozen and ready to run.

    device: auto is cuda, else mps, else cpu. dtype: auto is bfloat16 on cuda and float32 elsewhere.
    Raises UserError naming the file or tensor that is missing, unexpected, misshapen or not finite.
    """
    folder, pinned = find_model(name, revision)
    shape = read_shape(folder)
    device = pick_device(device)
    wanted = DTYPES[("bfloat16" if device.type == "cuda" else "float32") if dtype == "auto" else dtype]
    with torch.device("meta"):
        model = Transformer(shape)
    _fill(model, folder, device, wanted)
    model.name, model.revision, model.stop_ids = name, pinned, stop_ids(folder)
    return model.requires_grad_(False).eval()


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"model.device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from None


def _fill(model: Transformer, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Give a model without memory its tensors, one after the other."""
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
    where = _locate(folder)
    names = {name: name for name in expected}
    embedding = "model.embed_tokens.weight"
    if model.shape.tied and embedding not in where and "lm_head.weight" in where:
        names[embedding] = "lm_head.weight"  # tied, and stored under the other name
    compare_names(set(where), set(names.values()), model.shape.tied, folder)
    big = sum(path.stat().st_size for path in set(where.values())) > LARGE
    order = sorted(expected, key=lambda n: (str(where[names[n]]), n))
    with ExitStack() as stack:
        files, mapped = {}, 0
        for name in tqdm(order, desc=f"load {folder.name}", unit="tensor", disable=not big, leave=False):
            path = where[names[name]]
            if path not in files or mapped > LARGE:
                tensor = None
                stack.close()  # one shard open at a time, and anew now and then: pages copied from can go
                files, mapped = {path: stack.enter_context(open_file(path))}, 0
            tensor = read_tensor(files[path], names[name], path)
            check_tensor(tensor, names[name], expected[name], path)
            mapped += tensor.nbytes if tensor.dtype != dtype else 0  # in its own dtype on the CPU, the map is the weight
            weight = tensor.to(device, dtype)
            check_finite(weight, names[name], path)
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(weight, requires_grad=False))


def _locate(folder: Path) -> dict[str, Path]:
    """Every stored tensor's name -> the file it is in: model.safetensors, or the shards of its index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        with open_file(single) as file:
            where = dict.fromkeys(file.keys(), single)
    elif index.is_file():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise UserError(f"{index}: expected weight_map, an object of tensors and their shards, found {named!r}")
        where = {name: folder / _plain(shard, index) for name, shard in named.items()}
        for shard in sorted(set(where.values())):
            if not shard.is_file():
                raise UserError(f"{shard}: no such file, but {index.name} names it")
    else:
        raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json (other formats are not read)")
    return {name: path for name, path in where.items() if not name.endswith("rotary_emb.inv_freq")}


def _plain(shard: object, index: Path) -> str:
    """A shard's name must be a plain file name: an index from a stranger shall not reach outside its folder."""
    if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
        raise UserError(f"{index}: shard {shard!r} is not a plain file name")
    return shard


def open_file(path: Path):
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None


def read_tensor(file, name: str, path: Path) -> Tensor:
    try:
        return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: tensor {name} cannot be read: {error}") from None


def compare_names(found: set[str], wanted: set[str], tied: bool, folder: Path) -> None:
    missing = sorted(wanted - found)
    extra = sorted(found - wanted - ({"lm_head.weight", "model.embed_tokens.weight"} if tied else set()))
    if missing:
        raise UserError(f"{folder}: tensor {missing[0]} is missing{f', and {len(missing) - 1} more' if missing[1:] else ''}{nearest(missing[0], extra)}")
    if extra:
        raise UserError(f"{folder}: tensor {extra[0]} is unexpected{f', and {len(extra) - 1} more' if extra[1:] else ''}: config.json describes no such part")


def check_tensor(tensor: Tensor, name: str, shape: tuple[int, ...], path: Path) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(f"{path}: tensor {name} has the shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype not in DTYPES.values():
        raise UserError(f"{path}: tensor {name} is {str(tensor.dtype).removeprefix('torch.')}, expected {', '.join(DTYPES)}")


def check_finite(tensor: Tensor, name: str, path: Path) -> None:
    """On the tensor's own device, in the dtype that it is used in."""
    if not all(map(torch.isfinite, torch.aminmax(tensor))):  # without a temporary as large as the tensor; NaN passes through
        raise UserError(f"{path}: tensor {name} has values that are not finite in {str(tensor.dtype).removeprefix('torch.')}: the file is damaged, or needs a wider dtype")
