"""Weights on disk: check a model's folder, load it, save it; adapters in PEFT's format; merged export.

Contract. A config that this transformer does not implement is refused by name before any weight is read, and every tensor is
checked by name, shape and value before it is used. Nothing is guessed and nothing is executed: safetensors and JSON only.

The model is made without memory and given its tensors one by one, so loading N bytes takes little more than N bytes.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from nanoexit.config import TARGETS, LoRAConfig
from nanoexit.data import replace
from nanoexit.errors import UserError, nearest
from nanoexit.exits import attach
from nanoexit.hub import find_model
from nanoexit.lora import adapters, attach_lora, linear_maps, merged_weight
from nanoexit.model import Llama3Rope, Shape, Transformer
from nanoexit.tokenizer import read_json, stop_ids

FAMILIES = ("llama", "qwen2", "qwen3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PEFT_PREFIX = "base_model.model."
PEFT_READ = {  # options of adapter_config.json that are read, or that change nothing once an adapter is trained; any other has to be off
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "auto_mapping", "peft_version", "loftq_config", "eva_config", "corda_config", "megatron_core", "qalora_group_size",
    "runtime_config", "ensure_weight_tying", "layers_pattern",
}
PEFT_PLAIN = ("bias", "none"), ("init_lora_weights", True), ("init_lora_weights", "gaussian")  # pissa and others change the base as well
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
    _compare(set(where), set(names.values()), model.shape.tied, folder)
    big = sum(path.stat().st_size for path in set(where.values())) > LARGE
    order = sorted(expected, key=lambda n: (str(where[names[n]]), n))
    with ExitStack() as stack:
        files, mapped = {}, 0
        for name in tqdm(order, desc=f"load {folder.name}", unit="tensor", disable=not big, leave=False):
            path = where[names[name]]
            if path not in files or mapped > LARGE:
                tensor = None
                stack.close()  # one shard open at a time, and anew now and then: pages copied from can go
                files, mapped = {path: stack.enter_context(_open(path))}, 0
            tensor = _read(files[path], names[name], path)
            _check(tensor, names[name], expected[name], path)
            mapped += tensor.nbytes if tensor.dtype != dtype else 0  # in its own dtype on the CPU, the map is the weight
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(tensor.to(device, dtype), requires_grad=False))


def _locate(folder: Path) -> dict[str, Path]:
    """Every stored tensor's name -> the file it is in: model.safetensors, or the shards of its index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        with _open(single) as file:
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


def _open(path: Path):
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None


def _read(file, name: str, path: Path) -> Tensor:
    try:
        return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: tensor {name} cannot be read: {error}") from None


def _compare(found: set[str], wanted: set[str], tied: bool, folder: Path) -> None:
    missing = sorted(wanted - found)
    extra = sorted(found - wanted - ({"lm_head.weight", "model.embed_tokens.weight"} if tied else set()))
    if missing:
        raise UserError(f"{folder}: tensor {missing[0]} is missing{f', and {len(missing) - 1} more' if missing[1:] else ''}{nearest(missing[0], extra)}")
    if extra:
        raise UserError(f"{folder}: tensor {extra[0]} is unexpected{f', and {len(extra) - 1} more' if extra[1:] else ''}: config.json describes no such part")


def _check(tensor: Tensor, name: str, shape: tuple[int, ...], path: Path) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(f"{path}: tensor {name} has the shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype not in DTYPES.values():
        raise UserError(f"{path}: tensor {name} is {str(tensor.dtype).removeprefix('torch.')}, expected {', '.join(DTYPES)}")
    if not all(map(torch.isfinite, torch.aminmax(tensor))):  # without a temporary as large as the tensor; NaN passes through
        raise UserError(f"{path}: tensor {name} has values that are not finite: the file is damaged")


# --- adapters and heads ----------------------------------------------------------------------------------------------


def save_adapter(model: Transformer, folder: str | Path) -> None:
    """Adapters in PEFT's own format and names, exit heads beside them, and nanoexit.json, which says what they belong to."""
    folder, attached = Path(folder), adapters(model)
    if attached:
        tensors = {f"{PEFT_PREFIX}{name}.lora_{m}.weight": getattr(a, f"lora_{m}").detach().cpu().contiguous()
                   for name, a in attached.items() for m in "AB"}
        replace(folder / "adapter_model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))
        _write_json(folder / "adapter_config.json", _peft_config(model))
    facts: dict[str, Any] = {"base_model": model.name, "revision": model.revision, "full_depth": model.full_depth}
    if model.exits is not None:
        heads = {n: p.detach().cpu().contiguous() for n, p in model.exits.heads.named_parameters()}
        metadata = {"format": "pt", "kind": model.exits.kind, "layers": json.dumps(model.exits.layers), "use": HEADS_USE}
        replace(folder / "exit_heads.safetensors", lambda path: save_file(heads, path, metadata))
        facts |= {"exit_layers": list(model.exits.layers), "head": model.exits.kind}
    _write_json(folder / "nanoexit.json", facts)


HEADS_USE = (
    "Tensors D.weight [1, width] and D.bias [1] are the head of depth D (mlp: D.0.* widens, SiLU, D.2.* reads out). With h the residual "
    "after D blocks and x = h / rms(h) in float32, the token exits at D with chance sigmoid(weight . x + bias), given that no earlier head let it out."
)


def _peft_config(model: Transformer) -> dict:
    attached = adapters(model)
    first = next(iter(attached.values()))
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model.name, "revision": None, "r": first.lora_A.shape[0],
            "lora_alpha": first.scale * first.lora_A.shape[0], "lora_dropout": first.dropout, "bias": "none", "fan_in_fan_out": False,
            "inference_mode": True, "target_modules": sorted({name.rpartition(".")[2] for name in attached})}


def adapter_folder(folder: str | Path) -> Path:
    """A run directory or the adapter folder in it -> the folder with the files. Raises UserError where there are none."""
    for path in (Path(folder) / "adapter", Path(folder)):
        if (path / "nanoexit.json").is_file() or (path / "adapter_config.json").is_file():
            return path
    raise UserError(f"{folder}: no adapter there (no nanoexit.json or adapter_config.json, also not in {Path(folder) / 'adapter'})")


def adapter_base(folder: str | Path) -> str:
    """The model that an adapter belongs to."""
    path = adapter_folder(folder)
    name = read_json(path / "nanoexit.json").get("base_model") or read_json(path / "adapter_config.json").get("base_model_name_or_path")
    if not name:
        raise UserError(f"{path}: does not say which model it belongs to; give it with --model")
    return name


def load_adapter(model: Transformer, folder: str | Path) -> None:
    """Attach what save_adapter wrote, or a LoRA adapter of peft's (which brings no exit heads).

    Raises UserError where it belongs to another model, or uses what is not implemented.
    """
    path = adapter_folder(folder)
    facts, config = read_json(path / "nanoexit.json"), read_json(path / "adapter_config.json")
    if facts.get("revision") and model.revision and facts["revision"] != model.revision:
        raise UserError(f"{path}: was trained on {facts['base_model']} at {facts['revision'][:20]}, this model is {model.name} at {model.revision[:20]}")
    lora = _lora_config(config, path) if config else None
    if facts.get("exit_layers"):
        attach(model, facts["exit_layers"], facts["head"], lora)
        _copy_in(path / "exit_heads.safetensors", dict(model.exits.heads.named_parameters()))
    elif lora is not None:
        attach_lora(model, lora)
    if lora is not None:
        wanted = {f"{PEFT_PREFIX}{name}.lora_{m}.weight": getattr(a, f"lora_{m}") for name, a in adapters(model).items() for m in "AB"}
        _copy_in(path / "adapter_model.safetensors", wanted)


def _lora_config(config: dict, path: Path) -> LoRAConfig:
    where = path / "adapter_config.json"
    if config.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type {config.get('peft_type')!r} is not implemented: expected LORA")
    for key, value in config.items():
        off = value in (None, False, [], {}) or (key, value) in PEFT_PLAIN
        if key not in PEFT_READ and not off:
            raise UserError(f"{where}: {key} = {value!r} is not implemented")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or any(t not in TARGETS for t in targets):
        raise UserError(f"{where}: target_modules {targets!r}: expected a list of {', '.join(TARGETS)}")
    numbers = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    for key, value in zip(("r", "lora_alpha", "lora_dropout"), numbers):
        if type(value) not in (int, float) or value < 0 or (key == "r" and (value < 1 or value != int(value))):
            raise UserError(f"{where}: {key}: expected a number, found {value!r}")
    return LoRAConfig(int(numbers[0]), float(numbers[1]), float(numbers[2]), targets)


def _copy_in(path: Path, wanted: dict[str, Tensor]) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with _open(path) as file:
        _compare(set(file.keys()), set(wanted), False, path)
        for name, p in wanted.items():
            tensor = _read(file, name, path)
            _check(tensor, name, tuple(p.shape), path)
            p.data.copy_(tensor)


# --- export ----------------------------------------------------------------------------------------------------------


def merged_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the whole model under the checkpoint's names, adapters merged into the weights."""
    maps = dict(linear_maps(model))
    for name, p in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner.startswith("exits") or ".adapter" in owner:
            continue
        yield name, merged_weight(maps[owner]) if leaf == "weight" and owner in maps else p.detach()


def save_merged(model: Transformer, source: Path, out: Path) -> None:
    """A folder like the base's, with the adapters merged into its weights; config and tokenizer files are copied from `source`."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in merged_tensors(model)}
    for path in sorted([*source.glob("*.json"), *source.glob("*.jinja")]):
        if not path.name.endswith(".index.json"):
            replace(out / path.name, lambda p, text=path.read_bytes(): p.write_bytes(text))
    replace(out / "model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))


def _write_json(path: Path, content: dict) -> None:
    replace(path, lambda p: p.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))
