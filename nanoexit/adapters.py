"""Save and load what training produced: adapters in PEFT's format, exit heads, merged models.

Contract. An adapter folder holds adapter_model.safetensors and adapter_config.json as peft writes
and reads them, exit_heads.safetensors (the parameters of exits.ExitHeads), and
nanoexit.json, which records the base model. An adapter fits any model whose files have the recorded
content, wherever they are stored. PEFT options that are not implemented are refused by name."""

import json
import re
import shutil
from pathlib import Path
from types import NoneType

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanoexit.config import Rule, UserError, check_values, read_json, replace, show, write_text
from nanoexit.exits import ExitHeads, attach, detach
from nanoexit.lora import LoRA, LoRAConfig, adapters, linear_maps, merged_weight
from nanoexit.model import Transformer
from nanoexit.tokenizer import find_model
from nanoexit.weights import compare_names, read_tensor, tensor_names

FILES = ["adapter_config.json", "adapter_model.safetensors"]
FILES += ["nanoexit.json", "exit_heads.safetensors"]
FACTS = {  # keys of nanoexit.json
    **dict.fromkeys(["base_model", "content"], Rule(str)),
    "head": Rule(str, choices=["linear", "mlp"]),
    "revision": Rule(str | None),
    "cap": Rule(int | None),
    "shortcuts": Rule(bool),
    "exit_layers": Rule(list[int]),
}
PEFT = {  # keys of adapter_config.json; values outside these rules are not implemented
    "peft_type": Rule(str, choices=["LORA"]),
    "r": Rule(int, 1, 2**16),
    "lora_alpha": Rule(float, 0, 1e6),
    "target_modules": Rule(str | list),
    "lora_dropout": Rule(float, 0, 0.99),  # not applied: only training would differ
    "use_rslora": Rule(bool),
    **dict.fromkeys(["rank_pattern", "alpha_pattern"], Rule(dict | None)),
    **dict.fromkeys(["base_model_name_or_path", "revision"], Rule(str | None)),
    "bias": Rule(str, choices=["none"]),
    "modules_to_save": Rule(NoneType),
    "init_lora_weights": Rule(bool | str, choices=[True, False, "gaussian", "orthogonal"]),
}
REQUIRED = ["peft_type", "r", "lora_alpha", "target_modules"]
IDLE = ["task_type", "peft_version", "inference_mode", "auto_mapping", "megatron_core"]
IDLE += ["qalora_group_size"]  # no effect after training


def save_adapter(model: Transformer, folder: str | Path) -> None:
    """Write the adapters in PEFT's format, the exit heads, and nanoexit.json."""
    folder = Path(folder)
    for file, tensors in _trained(model).items():
        save_tensors(folder / file, tensors, {"format": "pt"})
    facts: dict = {"base_model": model.name, "revision": model.revision or None}
    facts |= {"content": model.content, "cap": model.cap}
    if isinstance(exits := model.exits, ExitHeads):
        facts |= {
            "exit_layers": list(exits.layers),
            "head": exits.kind,
            "shortcuts": bool(exits.lenses),
        }
    _write_json(folder / "nanoexit.json", facts)
    if adapters(model):
        _write_json(folder / "adapter_config.json", _peft_config(model))


def _trained(model: Transformer) -> dict[str, dict[str, Tensor]]:
    """The parameters of adapters and heads, by file and name."""
    files: dict = {}
    lora = files["adapter_model.safetensors"] = {}
    for name, adapter in adapters(model).items():
        lora[f"base_model.model.{name}.lora_A.weight"] = adapter.lora_A
        lora[f"base_model.model.{name}.lora_B.weight"] = adapter.lora_B
    if isinstance(model.exits, ExitHeads):
        files["exit_heads.safetensors"] = dict(model.exits.named_parameters())
    return {file: tensors for file, tensors in files.items() if tensors}


def _peft_config(model: Transformer) -> dict:
    """The content of adapter_config.json. PEFT allows a different rank and alpha for each map."""
    attached = adapters(model)
    ranks = {name: adapter.lora_A.shape[0] for name, adapter in attached.items()}
    alphas = {name: adapter.scale * ranks[name] for name, adapter in attached.items()}
    first = next(iter(attached))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True}
    config |= {"base_model_name_or_path": model.name, "revision": model.revision or None}
    config |= {"r": ranks[first], "lora_alpha": alphas[first]}
    config["rank_pattern"] = {name: r for name, r in ranks.items() if r != ranks[first]}
    config["alpha_pattern"] = {name: a for name, a in alphas.items() if a != alphas[first]}
    config |= {"lora_dropout": 0.0, "target_modules": list(attached)}
    return config


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Replace a safetensors file, whose metadata is `about`."""
    given = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace(path, lambda beside: save_file(given, beside, about))


def _write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def adapter_folder(name: str | Path) -> Path:
    """A run, its adapter folder, or an adapter's hub id -> the folder that holds its files."""
    root = find_model(str(name), files=FILES)[0]
    for path in (root / "adapter", root):
        if any((path / file).exists() for file in ("nanoexit.json", "adapter_config.json")):
            return path
    raise UserError(f"{name}: no adapter found there or in {root / 'adapter'}")


def adapter_base(folder: str | Path) -> tuple[str, str | None]:
    """The base model of an adapter, and its revision on the hub (None for a folder)."""
    path = adapter_folder(folder)
    facts, config = _read(path)
    name = facts.get("base_model") or config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{path}: the adapter does not name its base model; pass --model")
    return name, (facts or config).get("revision")


def _read(folder: Path) -> tuple[dict, dict]:
    """The checked nanoexit.json ({} for peft's own) and adapter_config.json ({} for heads only)."""
    ours, theirs = folder / "nanoexit.json", folder / "adapter_config.json"
    try:
        facts, config = read_json(ours), read_json(theirs)
        check_values(facts, FACTS, ours)
        check_values(config, PEFT, theirs, REQUIRED if config else ())
    except UserError as error:
        own = (folder.parent / "checkpoint").is_dir()
        cure = f"; delete {folder}, and --resume of its run writes it again" if own else ""
        raise UserError(f"{error}{cure}") from None
    return facts, config


def load_adapter(model: Transformer, folder: str | Path) -> None:
    """Attach what save_adapter wrote, or a LoRA adapter from peft (which has no exit heads).
    UserError if it was trained on other weights or uses an option not implemented here."""
    path = adapter_folder(folder)
    facts, config = _read(path)
    content, own = facts.get("content"), model.content
    if content and own and content != own:
        base = f"{show(facts.get('base_model'))} ({content[:19]})"
        raise UserError(f"{path}: was trained on {base}, this model is {model.name} ({own[:19]})")
    maps = dict(linear_maps(model))
    plan = _plan(config, [*maps], path / "adapter_config.json") if config else {}
    kind = facts.get("head", "linear"), facts.get("shortcuts", False)
    attach(model, facts.get("exit_layers", []), *kind, cap=facts.get("cap"))
    try:
        for name, lora in plan.items():
            maps[name].adapter = LoRA(maps[name], lora, torch.Generator())
        wanted = _trained(model)
        for file in FILES:
            if file.endswith(".safetensors") and file not in wanted and (path / file).exists():
                raise UserError(f"{path}: damaged: no JSON file describes {file}; export it again")
        for file, parameters in wanted.items():
            copy_in(path / file, parameters)
    except UserError:
        detach(model)
        raise


def copy_in(path: Path, wanted: dict[str, Tensor]) -> None:
    """Fill parameters from a file, whose names may include an adapter's, as in lora_A.default."""
    pickle = path.with_suffix(".bin")
    if pickle.exists() and not path.exists():
        raise UserError(f"{pickle}: pickles are not read; save it with safe_serialization=True")
    stored = {re.sub(r"(?<=lora_[AB])\.[^.]+(?=\.weight$)", "", n): n for n in tensor_names(path)}
    compare_names(stored, wanted, path)
    for name, parameter in wanted.items():
        parameter.data.copy_(read_tensor(path, stored[name], parameter.shape))


def save_merged(model: Transformer, source: Path, out: Path) -> None:
    """Write a model folder like `source`, with the adapters merged into the weights."""
    out.mkdir(parents=True, exist_ok=True)
    for path in [*source.glob("*.json"), *source.glob("*.jinja")]:
        if path.name not in FILES and not path.name.endswith(".index.json"):
            shutil.copy(path, out)
    config = read_json(source / "config.json") | {"tie_word_embeddings": model.shape.tied}
    _write_json(out / "config.json", config)
    named = model.state_dict()
    base = {n: p for n, p in named.items() if not (n.startswith("exits.") or ".adapter." in n)}
    merged = {f"{name}.weight": merged_weight(linear) for name, linear in linear_maps(model)}
    save_tensors(out / "model.safetensors", base | merged, {"format": "pt"})


def _plan(config: dict, names: list[str], where: Path) -> dict[str, LoRAConfig]:
    """adapter_config.json and the linear maps' names -> the settings of each map it adapts."""
    for key in sorted(config.keys() - PEFT.keys() - {*IDLE}):
        if config[key] is not False and config[key] not in (None, [], {}):
            raise UserError(f"{where}: {key} = {show(config[key])} is not implemented")
    every, targets = [*names, "lm_head", "model.embed_tokens"], config["target_modules"]
    if targets == "all-linear":
        targets = r"model\.layers\..*"
    try:
        found = {n: _settings(config, n, where) for n in every if _matches(targets, n)}
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{where}: target_modules, rank_pattern, alpha_pattern: {error}") from None
    if not found or found.keys() - names:
        problem = "lm_head and embed_tokens are not implemented" if found else "no match"
        raise UserError(f"{where}: target_modules {show(targets)}: {problem}")
    return found


def _matches(names: str | list, name: str) -> bool:
    """Whether `names`, a regular expression or a list of names and suffixes, selects `name`."""
    if isinstance(names, list):
        return name in names or name.endswith(tuple(f".{n}" for n in names))
    choices = 3 * len(re.findall(r"(?<!\()[*+?{]", names)) + names.count("|")
    if re.search(r"\)[*+{]", names) or choices > 20:
        raise re.error(f"{show(names)} repeats a group, or too much: it could take too long")
    return re.fullmatch(names, name) is not None


def _settings(config: dict, name: str, where: Path) -> LoRAConfig:
    """Rank and alpha of one map."""
    chosen = {key: config[key] for key in ("r", "lora_alpha")}
    for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        for pattern, value in reversed((config.get(patterns) or {}).items()):
            if _matches(rf"(.*\.)?({pattern})", name):
                chosen[key] = value
    check_values(chosen, PEFT, where)
    r, alpha = chosen.values()
    return LoRAConfig(r, alpha * (r**0.5 if config.get("use_rslora") else 1.0))
