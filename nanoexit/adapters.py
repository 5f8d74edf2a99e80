"""What training made, on disk: adapters in PEFT's own format, the exit heads beside them, and merged models.

Contract. An adapter folder holds adapter_model.safetensors and adapter_config.json as `peft` writes and reads them,
exit_heads.safetensors, whose metadata says how to use it, and nanoexit.json, which says what they belong to. An adapter that
asks for what is not implemented is refused by name.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from nanoexit.config import TARGETS, LoRAConfig
from nanoexit.data import replace
from nanoexit.errors import UserError
from nanoexit.exits import attach
from nanoexit.lora import adapters, attach_lora, linear_maps, merged_weight
from nanoexit.model import Transformer
from nanoexit.tokenizer import read_json
from nanoexit.weights import check_finite, check_tensor, compare_names, open_file, read_tensor

PEFT_PREFIX = "base_model.model."
PEFT_READ = {  # options of adapter_config.json that are read, or that change nothing once an adapter is trained; any other has to be off
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "auto_mapping", "peft_version", "loftq_config", "eva_config", "corda_config", "megatron_core", "qalora_group_size",
    "runtime_config", "ensure_weight_tying", "layers_pattern",
}
PEFT_PLAIN = ("bias", "none"), ("init_lora_weights", True), ("init_lora_weights", "gaussian")  # pissa and others change the base as well


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
    with open_file(path) as file:
        compare_names(set(file.keys()), set(wanted), False, path)
        for name, p in wanted.items():
            tensor = read_tensor(file, name, path)
            check_tensor(tensor, name, tuple(p.shape), path)
            check_finite(tensor, name, path)
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
