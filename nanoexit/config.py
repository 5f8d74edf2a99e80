"""Every knob, with its meaning, unit, default and range, in one dataclass a section; YAML in, precise errors out.

`load_config("configs/tiny.yaml", ["sft.lr=1e-3"])` reads the file with yaml's safe loader, applies the overrides, and checks
every key, type and range. An error names the file, the key, what was given and what is allowed. Files that a config names
are looked for from the working directory, then from the root of the repository, so scripts run from anywhere.
"""

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from nanoexit.errors import UserError, nearest

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
C = TypeVar("C")


def knob(default: Any, doc: str, low: float | None = None, high: float | None = None, choices: Sequence | None = None) -> Any:
    """A documented field: `low` and `high` are inclusive bounds; for a list they and `choices` hold for each item."""
    meta = {"doc": doc, "low": low, "high": high, "choices": choices}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


@dataclass
class ModelConfig:
    name: str = knob("data/tiny", "a folder, or the id of a model on the hub")
    revision: str | None = knob(None, "branch, tag or commit on the hub; the one that was used is pinned in nanoexit.json")
    device: str = knob("auto", "auto (cuda, else mps, else cpu), or any torch device: cpu, cuda, cuda:1, mps")
    dtype: str = knob("auto", "auto is bfloat16 on cuda and float32 elsewhere", choices=["auto", "float32", "bfloat16", "float16"])


@dataclass
class ExitsConfig:
    layers: list[int] = knob([1], "depths with an exit head: a token that exits at d has run blocks 0..d-1; [] is a model without exits", low=1)
    head: str = knob("linear", "shape of a head: one scalar product, or an MLP D -> 2D -> 1", choices=["linear", "mlp"])
    prompt: str = knob("full", "depth of prompt tokens: full, limit:D (frozen after depth D) or head (they sample exits too)")


@dataclass
class LoRAConfig:
    r: int = knob(8, "rank", low=1)
    alpha: float = knob(16.0, "the update B A x is scaled by alpha / r", low=0)
    dropout: float = knob(0.0, "dropout on the input of A while training", low=0, high=0.99)
    targets: list[str] = knob(["q_proj", "k_proj", "v_proj", "o_proj"], "linear maps that get an adapter", choices=TARGETS)


@dataclass
class DataConfig:
    prompts: str = knob("clock", "clock (chains made on the spot), or a JSONL or CSV file, or hub:ID/FILE of a dataset")
    traces: str | None = knob(None, "folder of the teacher's traces, shared by runs; nothing means traces/ in the run's own")
    count: int | None = knob(None, "use the first so many training prompts; nothing means all (for clock: 8192)", low=1)
    held_out: float = knob(0.1, "share of the prompts kept for evaluation, chosen by a hash of the prompt", low=0, high=0.9)
    checker: str = knob("auto", "how answers are verified; auto picks by the prompts", choices=["auto", "clock", "gsm8k", "exact", "none"])
    system: str | None = knob(None, "system message for prompts that bring none")


@dataclass
class TeacherConfig:
    kl_strength: float = knob(1.0, "s in the target chance 2 (1 - sigmoid(s KL)) to exit where reached", low=0)
    traces: int = knob(1, "traces the base model writes for each prompt", low=1)
    chunk: int = knob(512, "traces between two writes to disk (what a kill can lose)", low=1)


@dataclass
class GenerationConfig:
    max_new_tokens: int = knob(400, "tokens a response may have, the end-of-text token included", low=1)
    temperature: float = knob(1.0, "0 takes the most likely token", low=0)
    top_p: float = knob(1.0, "sample from the smallest set of tokens with this much probability", low=0.01, high=1)
    top_k: int = knob(0, "sample from the k most likely tokens; 0 is off", low=0)
    batch_size: int = knob(16, "rows that decode together; a finished row leaves and the next prompt takes its place", low=1)
    pack: str = knob("auto", "decode from a second copy of the weights, laid out for it; auto: on a CPU for models up to 2 GiB, elsewhere always",
                     choices=["auto", "always", "never"])
    cuda_graphs: bool = knob(True, "on CUDA, replay the blocks between two exits as one launch")


@dataclass
class SFTConfig:
    steps: int = knob(200, "optimizer steps", low=1)
    batch_size: int = knob(8, "traces a step, over all processes", low=1)
    samples_per_trace: int = knob(1, "exit patterns drawn for each trace of a step", low=1)
    micro_batch: int = knob(64, "rows (trace x pattern) in one forward; smaller needs less memory, same result", low=1)
    lr: float = knob(1e-4, "peak learning rate of AdamW for the adapters", low=0)
    head_lr: float | None = knob(None, "learning rate of the exit heads; nothing means lr", low=0)
    warmup: int = knob(10, "steps of linear warm-up; then a half cosine down to 0.02 of the peak", low=0)
    weight_decay: float = knob(0.0, "AdamW's decoupled weight decay on matrices", low=0)
    grad_clip: float = knob(1.0, "largest norm of the whole gradient; 0 is off", low=0)
    divergence: str = knob("student_teacher", "KL(student || teacher), the original's, or KL(teacher || student)", choices=["student_teacher", "teacher_student"])
    kl_weight: float = knob(1.0, "weight of the divergence", low=0)
    exit_loss: str = knob("soft", "heads learn the teacher's chance (soft) or the sampled decision (sampled)", choices=["soft", "sampled"])
    exit_weight: float = knob(1.0, "weight of the exit loss", low=0)
    chunk: int = knob(1024, "tokens whose logits are in memory at once", low=1)
    save_every: int = knob(50, "steps between checkpoints", low=1)


@dataclass
class RLConfig:
    steps: int = knob(60, "optimizer steps, each on one fresh batch of rollouts", low=1)
    prompts: int = knob(16, "prompts a step", low=1)
    rollouts: int = knob(16, "rollouts a prompt", low=2)
    lr: float = knob(1e-3, "learning rate of AdamW (constant)", low=0)
    grad_clip: float = knob(1.0, "largest norm of the whole gradient; 0 is off", low=0)
    micro_batch: int = knob(256, "rollouts in one forward; smaller needs less memory, same result", low=1)
    verify_weight: float = knob(1.0, "reward of a verified answer", low=0)
    lenient_weight: float = knob(0.0, "reward where only the lenient reading of the answer is right (a number without ####)", low=0)
    kl_weight: float = knob(0.0, "beta: cost of each nat of KL to the teacher, mean over tokens", low=0)
    depth_weight: float = knob(1.0, "lambda: cost of depth, in units of L", low=0)
    depth_penalty: str = knob("mean", "depth of a rollout: mean, max or sum over its tokens", choices=["mean", "max", "sum"])
    length_weight: float = knob(0.005, "eta: cost of each token written", low=0)
    normalize_std: bool = knob(False, "divide advantages by the standard deviation of their group")
    clip: float = knob(0.0, "PPO-style clipping range of the likelihood ratio; 0 is off", low=0, high=1)
    epochs: int = knob(1, "optimizer steps on one batch of rollouts; more than 1 needs clip > 0", low=1)
    keep_samples: int = knob(2, "rollouts of each step that samples.jsonl keeps, with their rewards", low=0)
    save_every: int = knob(20, "steps between checkpoints", low=1)


@dataclass
class JudgeConfig:
    kind: str = knob("offline", "offline (the rubric computed by a task's checker) or api (a language model)", choices=["offline", "api", "none"])
    base_url: str | None = knob(None, "an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1")
    model: str | None = knob(None, "the judge's model name at that endpoint")
    api_key_env: str = knob("JUDGE_API_KEY", "name of the environment variable that holds the key; the key itself is written nowhere")
    concurrency: int = knob(8, "requests under way at once", low=1)
    retries: int = knob(5, "attempts after the first, on 429, 5xx, timeouts and unreadable replies", low=0)
    timeout: float = knob(60.0, "seconds to wait for one reply", low=0.01)
    max_requests: int = knob(10000, "requests one run may send in all", low=1)
    max_tokens: int = knob(512, "tokens one reply may have", low=1)
    token_budget: int = knob(5000000, "tokens one run may use in all, as the endpoint counts them", low=1)


@dataclass
class EvaluateConfig:
    count: int = knob(1024, "held-out prompts", low=1)
    policies: list[str] = knob(["head"], "full, head, fixed:D, kl:S or confidence:T, evaluated in turn")
    frontier: list[str] = knob([], "more policies, for which scripts/evaluate.py measures accuracy and depth alone")
    batch_size: int = knob(256, "rows that decode together", low=1)
    samples: int = knob(16, "responses kept in samples.jsonl", low=0)


@dataclass
class RunConfig:
    dir: str = knob("runs/run", "where the run is written")
    seed: int = knob(0, "every random draw of the run is a function of this", low=0)
    init: str | None = knob(None, "start from the adapters and heads of this run (REINFORCE starts from an SFT run)")
    threads: int | None = knob(None, "CPU threads; nothing means torch's own choice", low=1)
    wandb: bool = knob(False, "mirror metrics to Weights & Biases, where its package is installed")


@dataclass
class Config:
    """One run. The sections' own docstrings are their fields."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    exits: ExitsConfig = dataclasses.field(default_factory=ExitsConfig)
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    generation: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)
    sft: SFTConfig = dataclasses.field(default_factory=SFTConfig)
    rl: RLConfig = dataclasses.field(default_factory=RLConfig)
    judge: JudgeConfig = dataclasses.field(default_factory=JudgeConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)


def load_config(path: str | Path, overrides: Sequence[str] = (), schema: type[C] = Config) -> C:
    """Read a YAML file into `schema` (a dataclass of dataclasses), then apply overrides such as "sft.lr=1e-3".

    Raises UserError for a missing file, broken YAML, an unknown section or key, a wrong type, a value out of range.
    """
    path = find_file(path, "config")
    config = schema()
    _fill(config, _parse(path.read_text(encoding="utf-8"), str(path)) or {}, str(path), "")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r}: expected KEY=VALUE, such as sft.lr=1e-3")
        tree: Any = _parse(text, f"override {override!r}")
        for part in reversed(key.split(".")):
            tree = {part: tree}
        _fill(config, tree, f"override {override!r}", "")
    return config


def parser(doc: str, resume: bool = False) -> argparse.ArgumentParser:
    """What the scripts that take a config have in common: CONFIG [a.b=c ...] [--resume], and every key in --help."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="keys, with their defaults:\n" + describe())
    made.add_argument("config", help="a YAML file, such as configs/tiny.yaml")
    made.add_argument("overrides", nargs="*", metavar="a.b=c", help="change a key of the config, such as sft.lr=1e-3")
    if resume:
        made.add_argument("--resume", action="store_true", help="go on with the run in run.dir")
    return made


def find_file(path: str | Path, what: str = "file") -> Path:
    """`path` from the working directory, else from the root of the repository. Raises UserError where neither has it."""
    path = Path(path).expanduser()
    for candidate in (path, ROOT / path):
        if candidate.is_file():
            return candidate
    raise UserError(f"{what} {path}: no such file" + ("" if path.is_absolute() else f" in {Path.cwd()} or {ROOT}"))


def to_yaml(config: Any) -> str:
    """The resolved config as YAML text; `load_config` reads it back unchanged."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def describe(schema: type = Config) -> str:
    """Every key with its default and meaning, a line each: what `--help` prints."""
    lines = []
    for section in dataclasses.fields(schema):
        for f in dataclasses.fields(section.default_factory):
            default = f.default_factory() if f.default is dataclasses.MISSING else f.default
            default = "nothing" if default is None else default
            choices = f.metadata["choices"]
            doc = f.metadata["doc"] + (f" ({', '.join(choices)})" if choices else "")
            lines.append(f"  {section.name}.{f.name} = {default}\n      {doc}")
    return "\n".join(lines)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{where}:{at} is not YAML: {getattr(error, 'problem', None) or error}") from None


def _fill(config: Any, tree: Any, where: str, prefix: str) -> None:
    """Set the fields of a dataclass from a mapping, sections first; `prefix` is the dotted key so far."""
    if not isinstance(tree, dict):
        raise UserError(f"{where}: {prefix.rstrip('.') or 'the file'}: expected a mapping of keys, found {tree!r}")
    hints = typing.get_type_hints(type(config))
    fields = {f.name: f for f in dataclasses.fields(config)}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in fields:
            raise UserError(f"{where}: unknown key {key!r}{nearest(name, fields)} Allowed here: {', '.join(fields)}")
        if dataclasses.is_dataclass(hints[name]):
            _fill(getattr(config, name), {} if value is None else value, where, f"{key}.")
        else:
            setattr(config, name, _checked(value, hints[name], fields[name].metadata, f"{where}: {key}"))


def _checked(value: Any, hint: Any, meta: Any, where: str) -> Any:
    """`value` as the type of `hint`, within the knob's bounds. YAML 1.1 reads 1e-5 as text: it is a number here."""
    if isinstance(hint, types.UnionType):  # T | None
        if value is None:
            return None
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            raise UserError(f"{where}: expected a list such as [1, 2], found {value!r}")
        return [_checked(item, typing.get_args(hint)[0], meta, where) for item in value]
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)
        except ValueError:
            pass
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise UserError(f"{where}: expected {names[hint]}, found {value!r}")
    if meta["choices"] and value not in meta["choices"]:
        raise UserError(f"{where}: {value!r} is not one of {', '.join(meta['choices'])}{nearest(value, meta['choices'])}")
    low, high = meta["low"], meta["high"]
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}" if low is not None else f"at most {high}"
        raise UserError(f"{where}: {value!r} is out of range, expected {bounds}")
    return value
