"""What training made, on disk: adapters in PEFT's format, exit heads beside them, merged models.

Contract. An adapter folder holds adapter_model.safetensors and adapter_config.json as peft writes
and reads them, exit_heads.safetensors, whose metadata says how to use it, and nanoexit.json, which
says what they belong to. A model is the base of an adapter if its files have the same content,
wherever they are. Options of peft that are not implemented are refused by name.
"""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanoexit.config import LoRAConfig, UserError, printable, replace, show, write_text
from nanoexit.exits import ExitHeads, attach, detach
from nanoexit.lora import LoRA, adapters, linear_maps, merged_weight
from nanoexit.model import Transformer
from nanoexit.tokenizer import check_values, find_model, read_object
from nanoexit.weights import check_finite, compare_names, open_weights, read_tensor

FILES = ["adapter_config.json", "adapter_model.safetensors"]
FILES += ["nanoexit.json", "exit_heads.safetensors"]
HEADS_USE = (
    "Tensors D.weight [1, width] and D.bias [1] are the head of depth D (mlp: D.0.* widens, SiLU, "
    "D.2.* reads out). With h the residual after D blocks and x = h / rms(h) in float32, a token "
    "that did not exit earlier exits at D with chance sigmoid(weight . x + bias)."
)
NULL = type(None)
FACTS = {  # of nanoexit.json: kinds, and range of a number
    **dict.fromkeys(["base_model", "content", "head"], ((str,), 0, 0)),
    "revision": ((str, NULL), 0, 0),
    "full_depth": ((int,), 1, 2**12),
    "cap": ((int, NULL), 1, 2**12),
    "exit_layers": ((list,), 0, 0),
}
PEFT = {  # of adapter_config.json
    "r": ((int,), 1, 2**16),
    "lora_alpha": ((int, float), 0, 1e6),
    "lora_dropout": ((int, float), 0, 0.99),
    "use_rslora": ((bool,), 0, 0),
    "target_modules": ((str, list), 0, 0),
    "exclude_modules": ((str, list, NULL), 0, 0),
    "layers_to_transform": ((int, list, NULL), 0, 2**12),
    **dict.fromkeys(["rank_pattern", "alpha_pattern"], ((dict, NULL), 0, 0)),
    **dict.fromkeys(["base_model_name_or_path", "revision"], ((str, NULL), 0, 0)),
}
IDLE = (  # options that change nothing after training
    "task_type peft_version inference_mode auto_mapping megatron_core loftq_config eva_config "
    "corda_config lora_ga_config qalora_group_size runtime_config ensure_weight_tying"
)
ALLOWED: dict[str, tuple] = {  # values of the other options, by default those that switch one off
    "peft_type": ("LORA",),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "layers_pattern": (None, [], "", "layers", ["layers"]),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the base
}


# --- saving -----------------------------------------------------------------------------------


def save_adapter(model: Transformer, folder: str | Path) -> None:
    """Write the adapters in PEFT's format, the exit heads, and nanoexit.json."""
    folder = Path(folder)
    if adapters(model):
        _save(folder / "adapter_model.safetensors", _peft_tensors(model), {})
        _write_json(folder / "adapter_config.json", _peft_config(model))
    facts: dict[str, Any] = {"base_model": model.name, "revision": model.revision or None}
    facts |= {"content": model.content, "full_depth": model.full_depth, "cap": model.cap}
    if isinstance(model.exits, ExitHeads):
        use = {"kind": model.exits.kind, "layers": json.dumps(model.exits.layers), "use": HEADS_USE}
        _save(folder / "exit_heads.safetensors", dict(model.exits.heads.named_parameters()), use)
        facts |= {"exit_layers": list(model.exits.layers), "head": model.exits.kind}
    _write_json(folder / "nanoexit.json", facts)


def _peft_tensors(model: Transformer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, adapter in adapters(model).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = adapter.lora_A
        tensors[f"base_model.model.{name}.lora_B.weight"] = adapter.lora_B
    return tensors


def _peft_config(model: Transformer) -> dict[str, Any]:
    attached = adapters(model)
    ranks = {name: adapter.lora_A.shape[0] for name, adapter in attached.items()}
    alphas = {name: adapter.scale * ranks[name] for name, adapter in attached.items()}
    first = next(iter(attached))
    leaves = {name.rpartition(".")[2] for name in attached}
    maps = [name for name, _ in linear_maps(model) if name.rpartition(".")[2] in leaves]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True}
    config |= {"base_model_name_or_path": model.name, "revision": model.revision or None}
    config |= {"r": ranks[first], "lora_alpha": alphas[first]}
    config["rank_pattern"] = {name: r for name, r in ranks.items() if r != ranks[first]}
    config["alpha_pattern"] = {name: a for name, a in alphas.items() if a != alphas[first]}
    config |= {"lora_dropout": attached[first].dropout, "fan_in_fan_out": False}
    config["target_modules"] = sorted(leaves) if len(maps) == len(attached) else list(attached)
    return config


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    given = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace(path, lambda beside: save_file(given, beside, {"format": "pt", **metadata}))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


# --- loading ----------------------------------------------------------------------------------


def adapter_folder(name: str | Path) -> Path:
    """A run, the adapter folder in it, or an adapter's id on the hub -> the folder of its files."""
    for path in (Path(name) / "adapter", Path(name)):
        if any((path / file).exists() for file in ("nanoexit.json", "adapter_config.json")):
            return path
    if Path(name).exists():
        raise UserError(f"{name}: no adapter there, nor in {Path(name) / 'adapter'}")
    return find_model(str(name), files=FILES)[0]


def read_facts(folder: str | Path) -> dict[str, Any]:
    """nanoexit.json of an adapter, checked: base_model, revision (None: a folder), content,
    full_depth, cap, and with heads exit_layers and head. {} for an adapter of peft.
    """
    path = adapter_folder(folder) / "nanoexit.json"
    facts = read_object(path)
    check_values(facts, FACTS, path)
    for depth in facts.get("exit_layers", []):
        check_values({"exit_layers": depth}, {"exit_layers": FACTS["full_depth"]}, path)
    return facts


def adapter_base(folder: str | Path) -> tuple[str, str | None]:
    """The model that an adapter belongs to, and its revision on the hub (None: a folder)."""
    facts, path = read_facts(folder), adapter_folder(folder) / "adapter_config.json"
    config = read_object(path)
    check_values(config, PEFT, path)
    if facts.get("base_model"):
        return facts["base_model"], facts.get("revision")
    if config.get("base_model_name_or_path"):
        return config["base_model_name_or_path"], config.get("revision")
    raise UserError(f"{path}: does not say which model it belongs to; give it with --model")


def load_adapter(model: Transformer, folder: str | Path) -> None:
    """Attach what save_adapter wrote, or a LoRA adapter of peft (which brings no exit heads).

    Raises UserError where it belongs to other weights, or uses what is not implemented.
    """
    path, facts = adapter_folder(folder), read_facts(folder)
    config = read_object(path / "adapter_config.json")
    for key, own in (("content", model.content), ("full_depth", model.full_depth)):
        if own and facts.get(key, own) != own:
            base = f"{facts.get('base_model')} ({key} {str(facts[key])[:19]})"
            this = f"this model is {model.name} ({key} {str(own)[:19]})"
            raise UserError(printable(f"{path}: was trained on {base}, {this}"))
    maps = dict(linear_maps(model))
    plan = _plan(config, list(maps), path / "adapter_config.json") if config else {}
    try:
        layers, head = facts.get("exit_layers", []), facts.get("head", "linear")
        attach(model, layers, head, None, facts.get("cap"))
        for name, lora in plan.items():
            maps[name].adapter = LoRA(maps[name], lora, torch.Generator())
        if plan:
            _copy_in(path / "adapter_model.safetensors", _peft_tensors(model))
        if isinstance(model.exits, ExitHeads):
            _copy_in(path / "exit_heads.safetensors", dict(model.exits.heads.named_parameters()))
    except UserError:
        detach(model)
        raise
    model.eval()


def _copy_in(path: Path, wanted: dict[str, Tensor]) -> None:
    """Fill parameters from a file; its names may carry an adapter's name, as in lora_A.default."""
    pickle = path.with_suffix(".bin")
    if pickle.exists() and not path.exists():
        raise UserError(f"{pickle}: a pickle is not read: save it with safe_serialization=True")
    with open_weights(path) as file:
        plain = re.compile(r"(lora_[AB])\.[^.]+\.weight$")
        stored = {plain.sub(r"\1.weight", name): name for name in file.keys()}  # noqa: SIM118
        compare_names(stored, wanted, path)
        for name, parameter in wanted.items():
            tensor = read_tensor(file, stored[name], path, tuple(parameter.shape))
            check_finite(tensor, name, path)
            parameter.data.copy_(tensor)


# --- the options of peft ----------------------------------------------------------------------


def _plan(config: dict[str, Any], names: list[str], where: Path) -> dict[str, LoRAConfig]:
    """adapter_config.json and the names of the linear maps -> the adapter of each map with one."""
    for key in ("peft_type", "r", "lora_alpha", "target_modules"):
        if key not in config:
            raise UserError(f"{where}: {key} is missing")
    for key in config.keys() - PEFT.keys() - {*IDLE.split()}:
        value, options = config[key], ALLOWED.get(key, (None, False, [], {}))
        if not any(type(value) is type(o) and value == o for o in options):  # 0 is not False
            raise UserError(f"{where}: {printable(key)} = {show(value)} is not implemented")
    check_values(config, PEFT, where)
    try:
        targets = [n for n in [*names, "lm_head", "model.embed_tokens"] if _is_target(config, n)]
        plan = {name: _settings(config, name, where) for name in targets}
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        keys = "target_modules, exclude_modules, rank_pattern or alpha_pattern"
        raise UserError(f"{where}: a pattern of {keys}: {printable(str(error))}") from None
    if not targets or targets[-1] not in names:
        found = f"{targets[-1]} is not implemented" if targets else "no map has such a name"
        raise UserError(f"{where}: target_modules {show(config['target_modules'])}: {found}")
    return plan


def _is_target(config: dict[str, Any], name: str) -> bool:
    """Whether peft gives the map `name` an adapter."""
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    if isinstance(targets, str) and layers:
        raise TypeError("layers_to_transform needs a list of target_modules")
    if _matches(config.get("exclude_modules") or [], name):
        return False
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return name.startswith("model.layers.")
    if not layers or name in targets or not _matches(targets, name):
        return _matches(targets, name)
    return name.startswith("model.layers.") and int(name.split(".")[2]) in layers


def _matches(names: str | list, name: str) -> bool:
    """Names as peft reads them: a regular expression, or a list of full names and endings."""
    if isinstance(names, str):
        return re.fullmatch(_bounded(names), name) is not None
    return name in names or name.endswith(tuple(f".{n}" for n in names))


def _bounded(pattern: str) -> str:
    """A foreign regular expression, refused where matching it could take very long."""
    if re.search(r"\)[*+{]", pattern) or sum(map(pattern.count, "*+{")) > 5:
        raise re.error(f"{show(pattern)} repeats a group, or too often")
    return pattern


def _settings(config: dict[str, Any], name: str, where: Path) -> LoRAConfig:
    """Rank, alpha and dropout of one map."""
    chosen = {key: config.get(key, 0.0) for key in ("r", "lora_alpha", "lora_dropout")}
    for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        for pattern, value in reversed((config.get(patterns) or {}).items()):
            if re.match(rf"(.*\.)?({_bounded(pattern)})$", name):
                chosen[key] = value
    check_values(chosen, PEFT, where)
    r, alpha, dropout = chosen.values()
    return LoRAConfig(r, alpha * (r**0.5 if config.get("use_rslora") else 1.0), dropout)


# --- export -----------------------------------------------------------------------------------


def save_merged(model: Transformer, source: Path, out: Path) -> None:
    """Write a model folder like `source`, with the adapters merged into the weights."""
    for path in sorted([*source.glob("*.json"), *source.glob("*.jinja")]):
        if path.name not in FILES and not path.name.endswith(".index.json"):
            data = path.read_bytes()
            replace(out / path.name, functools.partial(Path.write_bytes, data=data))
    config = read_object(source / "config.json")
    if config.get("tie_word_embeddings", False) != model.shape.tied:
        _write_json(out / "config.json", {**config, "tie_word_embeddings": model.shape.tied})
    _save(out / "model.safetensors", dict(merged_tensors(model)), {})


def merged_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the whole model under the checkpoint's names, adapters merged in."""
    maps = dict(linear_maps(model))
    for name, p in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if not owner.startswith("exits") and ".adapter" not in owner:
            yield name, merged_weight(maps[owner]) if leaf == "weight" and owner in maps else p
