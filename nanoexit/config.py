"""Every knob with its meaning and range; YAML in, precise errors out; reading and writing files.

Files named in a config are looked up in the working directory, then in the root of the repository,
so scripts run from anywhere. A user's mistake raises a `UserError`: one line that says what was
wrong, where, and what was expected. The scripts print it and exit with code 2. Any other exception
is a bug of ours and keeps its traceback."""

import contextlib
import copy
import difflib
import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import yaml
from safetensors import SafetensorError

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = ["auto", "float32", "bfloat16", "float16"]


def knob(default: Any, doc: str, low: float = 0, high: float = math.inf, choices: Any = ()) -> Any:
    """A documented field; low <= number <= high. For a list, the limits apply to each item."""
    doc += f" ({', '.join(choices)})" if choices else ""
    meta = {"doc": doc, "bounds": (low, high, choices)}
    return field(default_factory=lambda: copy.copy(default), metadata=meta)


@dataclass
class ModelConfig:
    name: str = knob("data/tiny", "a folder, or the id of a model on the hub")
    revision: str | None = knob(None, "branch, tag or commit on the hub; saved in nanoexit.json")
    device: str = knob("auto", "auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps")
    dtype: str = knob("auto", "auto is bfloat16 on cuda, float32 elsewhere", choices=DTYPES)
    logits_chunk: int = knob(1024, "tokens whose logits a loss holds in memory at once", 1)


@dataclass
class ExitsConfig:
    layers: list[int] = knob([1], "depths that get an exit head; [] for none", 1)
    head: str = knob("linear", "scalar product, or MLP D -> 2D -> 1", choices=["linear", "mlp"])
    shortcuts: bool = knob(False, "affine maps stand in for the blocks that an exit skips")
    cap: int | None = knob(None, "largest depth of any token, the prompt's included", 1)


@dataclass
class LoRAConfig:
    r: int = knob(8, "rank", 1, 65536)
    alpha: float = knob(16.0, "the update B A x is scaled by alpha / r")
    targets: list[str] = knob(TARGETS[:4], "linear maps that get an adapter", choices=TARGETS)


@dataclass
class DataConfig:
    prompts: str = knob("clock", "a task that makes prompts, or a JSONL or CSV file")
    traces: str | None = knob(None, "folder of the teacher's traces; null is run.dir/traces")
    count: int | None = knob(None, "training prompts to use; null is all, or 8192 if made", 1)
    held_out: float = knob(0.1, "share of prompts kept for evaluation, by a hash", high=0.9)
    checker: str = knob("auto", "task that verifies answers; auto picks it from the prompts")
    system: str | None = knob(None, "system message for prompts without one")
    template: dict = knob({}, "chat template variables, such as {enable_thinking: false}")


@dataclass
class TeacherConfig:
    kl_strength: float = knob(1.0, "s of the target chance 2 (1 - sigmoid(s KL)) to exit", 0.01)
    traces: int = knob(1, "traces that the base model writes for each prompt", 1)
    chunk: int = knob(512, "traces per write to disk, the most that a kill can lose", 1)
    keep_mb: float = knob(1000.0, "keep its residuals in memory if they fit in this many MB")


@dataclass
class GenerationConfig:
    max_new_tokens: int = knob(400, "most tokens in a response, including the end token", 1)
    temperature: float = knob(1.0, "0 takes the most likely token")
    top_p: float = knob(1.0, "sample from the smallest set with this probability", 0.01, 1)
    top_k: int = knob(0, "sample from the k most likely tokens; 0 is off")
    batch_size: int = knob(16, "rows that decode together while the teacher writes", 1)


@dataclass
class SFTConfig:
    steps: int = knob(200, "optimizer steps", 1)
    batch_size: int = knob(8, "traces per step, over all processes", 1)
    micro_batch: int = knob(64, "traces in one forward; smaller needs less memory", 1)
    lr: float = knob(1e-4, "peak learning rate of AdamW: warm-up, then a half cosine", 0, 10)
    targets: str = knob("student", "whose early readouts set targets", choices=["student", "base"])
    broad: float = knob(0.1, "share of rows that draw their exits uniformly", high=1)
    price: bool = knob(False, "heads learn what an exit costs, in KL for each block that it saves")
    early: float = knob(0.0, "weight of training early readouts that are nearly good enough")
    save_every: int = knob(50, "steps between checkpoints", 1)


@dataclass
class RLConfig:
    steps: int = knob(60, "optimizer steps, each on a fresh batch of rollouts", 1)
    prompts: int = knob(16, "prompts per step, over all processes", 1)
    rollouts: int = knob(16, "rollouts per prompt", 2)
    lr: float = knob(1e-3, "peak learning rate of AdamW, as in SFT", high=10)
    micro_batch: int = knob(256, "rollouts in one forward; smaller needs less memory", 1)
    kl_weight: float = knob(0.0, "beta: cost of KL to the teacher, in mean nats per token")
    exit_kl_weight: float = knob(0.0, "cost of exits that moved later: KL(now || start) in nats")
    depth_weight: float = knob(1.0, "lambda: cost of depth, in units of L")
    depth_penalty: str = knob("max", "which depth is charged", choices=["max", "mean", "sum"])
    length_weight: float = knob(0.005, "eta: cost of each token written")
    save_every: int = knob(20, "steps between checkpoints", 1)


@dataclass
class JudgeConfig:
    kind: str = knob("none", "api asks a model to score responses", choices=["api", "none"])
    base_url: str | None = knob(None, "OpenAI-compatible endpoint, like http://127.0.0.1:8000/v1")
    model: str | None = knob(None, "the judge's model name at that endpoint")
    api_key_env: str = knob("JUDGE_API_KEY", "environment variable that holds the key")
    concurrency: int = knob(8, "requests in flight", 1, 256)
    retries: int = knob(5, "attempts after the first", high=100)
    timeout: float = knob(60.0, "seconds that a complete reply may take", 0.01, 3600)
    max_tokens: int = knob(512, "most tokens in one reply", 1)


@dataclass
class EvaluateConfig:
    count: int = knob(1024, "held-out prompts", 1)
    policies: list[str] = knob(["head"], "full, head, head:T, fixed:D, kl:S, confidence:T")
    frontier: list[str] = knob([], "more policies, for accuracy against depth only")
    caps: list[int] = knob([], "caps under which accuracy is measured", 1)
    batch_size: int = knob(256, "rows that decode together", 1)
    samples: int = knob(16, "responses kept in samples.jsonl")


@dataclass
class RunConfig:
    dir: str = knob("runs/run", "the run directory")
    seed: int = knob(0, "every random draw of the run is a function of this", high=2**63 - 1)
    init: str | None = knob(None, "start from the adapters and heads of this run")
    threads: int | None = knob(None, "CPU threads; null is torch's own choice", 1, 4096)
    patience: int = knob(1800, "seconds without an answer from a process that end the run", 1)


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    exits: ExitsConfig = field(default_factory=ExitsConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    run: RunConfig = field(default_factory=RunConfig)


# --- YAML and the command line ----------------------------------------------------------------
def load_config(path: str | Path, overrides: Sequence[str] = (), schema: Any = Config) -> Any:
    """`schema` from a YAML file, then overrides like "sft.lr=1e-3". UserError for any mistake."""
    path = find_file(path, "config")
    config = schema()
    _fill(config, parse_yaml(read_text(path), str(path)), str(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        where = f"override {show(override)}"
        if not equals:
            raise UserError(f"{where}: expected KEY=VALUE, such as sft.lr=1e-3")
        tree = parse_yaml(text, where)
        for part in reversed(key.split(".")):
            tree = {part: tree}
        _fill(config, tree, where)
    return config


def to_yaml(config: Any) -> str:
    """The resolved config as YAML; `load_config` reads it back unchanged."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, except that a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, times in keys.items():
            if times > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {show(key)} is given twice")
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """YAML text -> its value. UserError for broken, too deep or too long input."""
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # the package raises IndexError for `!!int ""`, and others
        raise UserError(f"{where} is not YAML: {error}") from None


def _fill(config: Any, tree: Any, where: str, prefix: str = "") -> None:
    """Set the fields of a dataclass from a mapping; `prefix` is the dotted key so far."""
    check_value(tree, Rule(dict | None), f"{where}: {prefix.rstrip('.') or 'the file'}")
    hints = get_type_hints(type(config))
    knobs = {f.name: f.metadata for f in fields(config)}
    for name, value in (tree or {}).items():
        key = f"{prefix}{name}"
        if name not in knobs:
            allowed = f"{nearest(name, knobs)}; allowed here: {', '.join(knobs)}"
            raise UserError(f"{where}: unknown key {show(key)}{allowed}")
        if is_dataclass(hints[name]):
            _fill(getattr(config, name), value, where, f"{key}.")
        else:
            setattr(config, name, _checked(value, hints[name], knobs[name], f"{where}: {key}"))


def _checked(value: Any, hint: Any, meta: Any, where: str) -> Any:
    """`value` as the type of `hint`, within the knob's bounds."""
    if float in (hint, *get_args(hint)) and type(value) in (int, str):
        with contextlib.suppress(ValueError):
            value = float(str(value))  # YAML 1.1 reads 1e-5 as text: it is a number here
    check_value(value, Rule(hint, *meta["bounds"]), where)
    for name, item in value.items() if isinstance(value, dict) else ():
        check_value(name, Rule(str), f"{where}: a name")
        check_value(item, Rule(bool | int | float | str | None, -math.inf), f"{where}.{name}")
    return value


# --- errors -----------------------------------------------------------------------------------
class UserError(ValueError):
    """A mistake in the input: a file, a key, a tensor, a flag. The message becomes one line."""

    def __init__(self, message: str):
        super().__init__(printable(" ".join(message.split())))


class Rule(NamedTuple):
    """What a key may hold: a value of this type, a number in the range, one of the choices."""

    hint: Any  # such as int, str | None or list[int]; the rest is then about its items
    low: float = 0
    high: float = math.inf
    choices: Sequence = ()


KINDS = {int: "a whole number", float: "a number", bool: "true or false"}
KINDS |= {str: "text without NUL or surrogate"}
KINDS |= {list: "a list such as [1, 2]", dict: "a mapping such as {key: value}", NoneType: "null"}


def check_value(value: Any, rule: Rule, where: str) -> None:
    """Raise UserError for a value that breaks its rule, and for NaN, infinity, NUL, surrogates."""
    hint, low, high, choices = rule
    if get_origin(hint) is list and isinstance(value, list):
        for item in value:
            check_value(item, rule._replace(hint=get_args(hint)[0]), where)
        return
    kinds = (list,) if get_origin(hint) is list else get_args(hint) or (hint,)
    kind = float if type(value) is int and float in kinds else type(value)
    fits = kind in kinds and (not choices or value in choices)
    if kind in (int, float):
        fits = fits and low <= value <= high and abs(value) != math.inf
    if kind is str:
        fits = fits and not re.search("[\0\ud800-\udfff]", value)
    if fits:
        return
    expected = " or ".join(KINDS[kind] for kind in kinds)
    if choices:
        expected = f"one of {', '.join(map(str, choices))}"
    elif int in kinds or float in kinds:
        expected += f" from {low} to {high}" if math.isfinite(high) else f", at least {low}"
    close = nearest(value, choices)
    raise UserError(f"{where}: expected {expected}, found {show(value)}{close}")


def check_values(given: dict, rules: dict[str, Rule], where: Any, required: Any = ()) -> None:
    """Raise UserError for the first value that breaks its rule, or is required and missing."""
    for key, rule in rules.items():
        if key in given:
            check_value(given[key], rule, f"{where}: {key}")
        elif key in required:
            raise UserError(f"{where}: {key} is missing")


def nearest(word: Any, allowed: Iterable) -> str:
    """'; did you mean X?' if one of `allowed` is close to `word`, else an empty string."""
    close = difflib.get_close_matches(str(word), map(str, allowed), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def show(value: Any) -> str:
    """A value for a message: its repr, shortened and safe in a terminal."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    return printable(short.repr(value))


def printable(text: str) -> str:
    """`text` with control characters (C0 except newline and tab, DEL, C1) as \\x1b."""
    return re.sub(r"[\0-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)


# --- files ------------------------------------------------------------------------------------
def find_file(path: str | Path, what: str = "file") -> Path:
    """`path` in the working directory, else in the root of the repository, else UserError."""
    path = Path(os.path.expanduser(path))
    for candidate in (path, ROOT / path):
        if os.path.isfile(candidate):
            return candidate
    raise UserError(f"{what} {path}: no such file in {Path.cwd()} or {ROOT}")


def check_file(path: Path) -> None:
    """Raise UserError for a file that is missing, or that is a git-lfs pointer."""
    if not path.is_file():
        snapshot = path.absolute().parent.parent.name == "snapshots"
        hint = ": an incomplete snapshot of the hub; run once while online" if snapshot else ""
        raise UserError(f"{path}: no such file{hint}")
    with path.open("rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise UserError(f"{path}: a git-lfs pointer, not the file: run `git lfs pull` there")


def read_text(path: Path) -> str:
    """UTF-8 with or without a BOM, or UTF-16 with one; else a UserError that names the line."""
    check_file(path)
    data = path.read_bytes()
    kind = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    try:
        return data.decode(kind).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        where = f"{path}:{data.count(10, 0, error.start) + 1}"
        found = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise UserError(f"{where}: not {kind.upper()}: {found}; save the file as UTF-8") from None


def parse_json(text: str, where: str, kind: type = object) -> Any:
    """JSON text -> its value. UserError for broken, too deep or too long input, or another kind."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # also for a number of 5,000 digits
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json(path: Path) -> dict:
    """The object in a JSON file, or {} if there is no file. UserError for anything else."""
    return parse_json(read_text(path), str(path), dict) if os.path.lexists(path) else {}


def read_json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of every line that is not blank."""
    for line, text in enumerate(read_text(path).split("\n"), start=1):
        if text.strip():
            yield line, parse_json(text, f"{path}:{line}", dict)


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, flush it, rename it: `path` is never half written.
    Follows a symlink. UserError if the write fails, or for a folder or a device."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: expected a file to write to, found a folder or a device")
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        _flush_to_disk(beside)
        os.replace(beside, path)
        _flush_to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None
    finally:
        if beside.is_file():
            beside.unlink()


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a text file; half a surrogate pair becomes a question mark."""
    replace(path, lambda beside: beside.write_bytes(text.encode("utf-8", "replace")))


def write_json_lines(path: Path, rows: Iterable[dict]) -> None:
    """Replace a JSONL file, with one object per line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def rounded(value: Any) -> Any:
    """`value` as JSON can hold it: floats to six digits, tensors as lists, non-finite as null."""
    text = json.dumps(value, default=lambda tensor: tensor.tolist())
    six = lambda digits: float(f"{float(digits):.6g}")  # noqa: E731
    return json.loads(text, parse_float=six, parse_constant=lambda _: None)
