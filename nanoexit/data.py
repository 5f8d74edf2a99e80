"""Prompts and traces on disk.

Prompts come from a task made on the spot (`clock`, or `clock:2-6` for chains of two to six operations), from JSONL (`prompt`,
optional `answer`, `system`, `id`; GSM8K's `question`, `answer` load too), from CSV with named columns (`story`, `question`), or
from a file of a dataset on the hub (`hub:ID/FILE`). A hash of the prompt's text decides whether it is held out, so the split
needs no file and never moves.

Traces are responses that the base model wrote, with KL(P || Q_d) at every exit depth. A chunk of traces is one JSONL file (id,
prompt, completion, token ids, finish reason) with a safetensors file of the numbers beside it. Chunks are only ever added, the
JSONL last, so a chunk is either there or not: a kill loses at most the one under way.
"""

import csv
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanoexit.config import DataConfig, find_file
from nanoexit.errors import UserError
from nanoexit.tasks import LONGEST_CHAIN, Prompt, clock_prompts

TRAINING_CHAINS = 8192  # when data.count says nothing


# --- prompts ---------------------------------------------------------------------------------------------------------


def load_prompts(config: DataConfig, split: str, count: int | None = None, seed: int = 0) -> list[Prompt]:
    """The `train` or `held_out` prompts, the first `count` of them. Raises UserError where there are none."""
    clock = re.fullmatch(r"clock(?::(\d+)-(\d+))?", config.prompts)
    if clock:
        low, high = (int(clock[1]), int(clock[2])) if clock[1] else (1, LONGEST_CHAIN)
        if not 1 <= low <= high <= LONGEST_CHAIN:
            raise UserError(f"data.prompts: {config.prompts!r}: expected clock:A-B with 1 <= A <= B <= {LONGEST_CHAIN}")
        source: Iterable[Prompt] = clock_prompts([seed, split == "held_out"], low, high)
        count = count or TRAINING_CHAINS
    else:
        source = read_prompts(config)
    held_out = split == "held_out"
    wanted = (p for p in source if is_held_out(p.prompt, config.held_out) == held_out)
    prompts = list(itertools.islice(wanted, count))
    if not prompts:
        raise UserError(f"data.prompts: {config.prompts} has no {split.replace('_', '-')} prompts (data.held_out = {config.held_out})")
    return prompts


def is_held_out(prompt: str, share: float = 0.1) -> bool:
    """Whether a prompt is kept for evaluation: a hash of its text, the same everywhere and always."""
    return zlib.crc32(prompt.encode("utf-8")) % 10000 < share * 10000


def read_prompts(config: DataConfig) -> list[Prompt]:
    """Every prompt of a JSONL or CSV file, or of a hub dataset's file. Errors name the file and the line."""
    if config.prompts.startswith("hub:"):
        from nanoexit.hub import find_dataset_file
        path = find_dataset_file(config.prompts)
    else:
        path = find_file(config.prompts, "data.prompts:")
    rows = _read_csv(path) if path.suffix == ".csv" else read_jsonl(path)
    return [_prompt(row, f"{path}:{line}", f"{path.stem}-{line}", config) for line, row in rows]


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of every line that is not blank."""
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{line} is not JSON: {error.msg} at column {error.colno}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{line}: expected an object, found {type(row).__name__}")
            yield line, row


def _read_csv(path: Path) -> Iterator[tuple[int, dict]]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from enumerate(csv.DictReader(file), start=2)


def _prompt(row: dict, where: str, default_id: str, config: DataConfig) -> Prompt:
    text, answer = row.get("prompt"), row.get("answer")
    if text is None and row.get("question") is not None:
        text = row["question"] if not row.get("story") else f"{row['story']}\n\n{row['question']}"
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: expected a prompt (or question, or story and question), found the keys {', '.join(map(str, row)) or 'none'}")
    checker = config.checker if config.checker != "auto" else row.get("checker") or guess_checker(answer)
    return Prompt(str(row.get("id") or default_id), text, None if answer in (None, "") else str(answer),
                  row.get("system") or config.system, checker, str(row.get("group") or ""))


def guess_checker(answer: object) -> str:
    """gsm8k where the answer ends in #### and a number, exact where there is any other answer, else none."""
    if answer in (None, ""):
        return "none"
    return "gsm8k" if re.search(r"####\s*-?[\d,.]+\s*$", str(answer)) else "exact"


# --- traces ----------------------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """One response of the base model, with what exiting early would have cost at each of its positions."""

    id: str
    prompt: str
    completion: str
    prompt_ids: list[int]
    tokens: list[int]
    finish: str
    kl: Tensor | None = None  # [N, E] float32 nats, of the last N input positions; N = len(tokens), or all where prompts exit too


def write_chunk(folder: Path, number: int, traces: Sequence[Trace]) -> None:
    """Add one chunk. Its JSONL comes last: only then does the chunk exist."""
    numbers = {str(i): trace.kl.contiguous() for i, trace in enumerate(traces)}
    replace(folder / f"{number:05d}.safetensors", lambda path: save_file(numbers, path))
    write_json_lines(folder / f"{number:05d}.jsonl", [{k: v for k, v in vars(t).items() if k != "kl"} for t in traces])


def has_chunk(folder: Path, number: int) -> bool:
    return (folder / f"{number:05d}.jsonl").is_file()


def read_traces(folder: Path) -> list[Trace]:
    """All chunks, in order."""
    traces = []
    for path in sorted(folder.glob("[0-9]*.jsonl")):
        numbers = load_file(path.with_suffix(".safetensors"))
        traces += [Trace(**row, kl=numbers[str(i)]) for i, (_, row) in enumerate(read_jsonl(path))]
    return traces


# --- writing ---------------------------------------------------------------------------------------------------------


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside, then rename: a reader sees the old file or the new one, never half of either."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write(beside)
    os.replace(beside, path)


def write_text(path: Path, text: str) -> None:
    replace(path, lambda p: p.write_text(text + "\n", encoding="utf-8"))


def write_json_lines(path: Path, rows: Sequence[dict]) -> None:
    replace(path, lambda p: p.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"))


def rounded(value: Any) -> Any:
    """Floats at six significant digits, tensors and arrays as lists, non-finite as None: what JSON can hold."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
