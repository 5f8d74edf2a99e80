"""The tools of bench.py: timing in turn, peak memory, models and reports.

Ratios are what counts: variants take turns in one process, each round gives a ratio, and the median
and the interquartile range are reported. Times hold only for this machine at this moment.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from nanoexit.config import UserError, read_json_lines, write_text
from nanoexit.exits import Policy
from nanoexit.generate import Generation, Sampling, generate
from nanoexit.model import Transformer
from nanoexit.weights import load_model, read_shape

PEERS = {  # module and packages
    "hf": ("bench_hf", "transformers peft"),
    "llama.cpp": ("bench_llama", "llama-cpp-python gguf"),
}
LENGTHS = {  # tokens per row, as reported
    "decode": "{prompt} + {new}",
    "exits": "{prompt} + {new}",
    "rollout": "{prompt} + {new}",
    "train": "{length}",
    "update": "prompt {prompt}, {new} written",
    "memory": "1600",
    "load": "1",
    "growth": "up to {longest}",
}
PAGE = 4096  # bytes: memory is counted in pages
SHAPES = {  # of public checkpoints; tiny shows the overhead around the arithmetic
    "tiny": ("llama", 256, 192, 512, 12, 6, 2, 8192, True),
    "smollm2-135m": ("llama", 49152, 576, 1536, 30, 9, 3, 8192, True),
    "qwen2.5-0.5b": ("qwen2", 151936, 896, 4864, 24, 14, 2, 32768, True),
    "deepseek-1.5b": ("qwen2", 151936, 1536, 8960, 28, 12, 2, 131072, False),
}
KEYS = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
KEYS += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
KEYS += ("tie_word_embeddings",)  # of config.json


# --- times ------------------------------------------------------------------------------------


@dataclass
class Times:
    """Seconds of each round, by variant; all variants of a round were measured together."""

    rounds: dict[str, list[float]]

    def __getitem__(self, name: str) -> float:
        return statistics.median(self.rounds[name])

    def ratio(self, slow: str, fast: str) -> tuple[float, list[float]]:
        """How many times faster `fast` is: the median over rounds, and the interquartile range."""
        return middle([a / b for a, b in zip(self.rounds[slow], self.rounds[fast])])


def middle(values: Sequence[float]) -> tuple[float, list[float]]:
    """-> the median and the interquartile range."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, [low, high]


def in_turn(variants: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> Times:
    """Run each variant once unmeasured, then all in turn; each round starts with another one."""
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for run in variants.values():
        run()
    for i in tqdm(range(rounds), desc=f"{len(names)} in turn", unit="round", leave=False):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            _wait(device)
            start = time.perf_counter()
            variants[name]()
            _wait(device)
            times[name].append(time.perf_counter() - start)
    return Times(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- memory -----------------------------------------------------------------------------------


def peak(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """One call -> its peak memory in bytes, above what was held before, and its seconds."""
    start = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before, time.perf_counter() - start
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run()
    return max(PAGE, resident("VmHWM") - before), time.perf_counter() - start


def resident(key: str) -> int:
    """VmRSS or VmHWM (the peak) of this process, in bytes. Linux only."""
    line = next((line for line in _lines("/proc/self/status") if line.startswith(key)), None)
    if line is None:
        raise UserError("memory is read from /proc, which this system does not have")
    return int(line.split()[1]) * 1024


def _lines(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="utf-8").splitlines()
    return []


# --- models -----------------------------------------------------------------------------------


def snapshot(folder: Path, shape: str, dtype: torch.dtype, **more: object) -> None:
    """Write a checkpoint with random weights. more: further keys of its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"rms_norm_eps": 1e-6, **dict(zip(KEYS, SHAPES[shape])), **more}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.device("meta"):
        parameters = Transformer(read_shape(folder)).named_parameters()
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, p in parameters:
        drawn = torch.empty(p.shape).normal_(0, 0.02, generator=generator)
        tensors[name] = (torch.ones(p.shape) if "norm" in name else drawn).to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def prompts(rows: int, length: int, vocab: int) -> list[list[int]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocab, (rows, length), generator=generator).tolist()


def load(args: argparse.Namespace) -> Transformer:
    model = load_model(args.model, str(args.device), args.dtype)
    model.logits_chunk = args.chunk
    return model


def peer(name: str) -> ModuleType:
    """The module of a peer. Raises UserError if its packages are missing."""
    module, packages = PEERS[name]
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"--peer {name}: not installed; pip install {packages}") from None


def write(
    model: Transformer,
    ids: list[list[int]],
    policy: str | Policy,
    new: int,
    temperature: float = 0.0,
    fast: bool = True,
) -> list[Generation]:
    """Generate `new` tokens per row."""
    return generate(model, ids, policy, new, temperature, settings=Sampling(stop_ids=(), fast=fast))


# --- what is reported -------------------------------------------------------------------------


def hardware(device: torch.device) -> str:
    """The GPU, or the CPU and how many of its threads are in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = (line for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    cpu = next(names, f":{platform.processor() or platform.machine()}").split(":", 1)[1].strip()
    return f"{cpu}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def report(
    args: argparse.Namespace,
    work: str,
    against: str,
    ratio: float,
    spread: Sequence[float],
    unit: str = "x faster",
    **more: float,
) -> None:
    """Print a measurement, for people and as JSON; `more` are further figures to report."""
    about = {"shape": args.name, "dtype": args.dtype, "batch": args.batch}
    about["lengths"] = LENGTHS[args.work].format(**vars(args))
    where = {"rounds": args.rounds, "hardware": hardware(args.device), "torch": torch.__version__}
    more = {name: float(f"{value:.4g}") for name, value in more.items()}
    extra = "".join(f", {name.replace('_', ' ')} {value}" for name, value in more.items())
    print(f"{', '.join(map(str, about.values()))} tokens a row; {where['hardware']}")
    half = f"{spread[0]:.2f} to {spread[1]:.2f}"
    print(f"{work} against {against}: {ratio:.2f} {unit} ({half}){extra}")
    line = {"work": work, **about, "ratio": round(ratio, 3), "unit": unit}
    line |= {"spread": [round(s, 3) for s in spread], "against": against, **more, **where}
    print(json.dumps(line), flush=True)
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        with open(args.save, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def write_table(folder: Path) -> Path:
    """The lines of every *.jsonl in `folder` as Markdown tables, in its README.md."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise UserError(f"{folder}: no *.jsonl; expected files written by --save")
    out = "# Speed and memory\n\nWritten by `python scripts/bench.py table`.\n"
    for file in files:
        out += f"\n## {file.stem}\n\n{table([row for _, row in read_json_lines(file)])}"
    if drawings := sorted(folder.glob("*.svg")):
        out += "\n" + "".join(f"![{path.stem}]({path.name})\n" for path in drawings)
    write_text(folder / "README.md", out)
    return folder / "README.md"


def table(rows: Sequence[dict]) -> str:
    """One row per line; a row names its hardware if it differs from that of the first row."""
    columns = "work | shape, dtype, batch | tokens a row | against | | middle half | speed"
    lines = [f"| {columns} |", "|" + "---|" * 7]
    for r in rows:
        here, first = (row["hardware"].split(", ") for row in (r, rows[0]))
        other = "".join(f", {part}" for part in here if part not in first)
        speeds = ((r.get("tokens_per_s"), "tokens/s"), (r.get("gigabytes_read_per_s"), "GB/s"))
        cells = [
            r["work"] + other,
            f"{r['shape']}, {r['dtype']}, {r['batch']}",
            r.get("lengths", ""),
            r["against"],
            f"{r['ratio']:.2f} {r['unit']}",
            f"{r['spread'][0]:.2f} to {r['spread'][1]:.2f}",
            ", ".join(f"{value:,.0f} {unit}" for value, unit in speeds if value),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    places = dict.fromkeys(f"{r['hardware']}, torch {r['torch']}" for r in rows)
    return "\n".join(lines) + f"\n\nOn {'; '.join(places)}.\n"
