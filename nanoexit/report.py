"""One self-contained HTML page: responses coloured by depth, and the figures of their runs.

`write_page(path, [read_run(folder), ...])` fills report.html. The page uses no network: its
Content-Security-Policy allows its own script, by hash, and nothing else. Text of models and files
reaches it as the escaped names of figures, or as data: JSON, deflated, in base64, which report.js
inflates and shows by textContent.

A page stays under 3 MB: beyond `BUDGET` the last responses lose their likeliest tokens, then their
exit chances, then themselves, and the page says so. A wrong type in a file is a UserError with file
and key, or a dash. Cells and figures are evaluate's. A base that runs share is shown once.
"""

import base64
import hashlib
import json
import math
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from nanoexit import figures
from nanoexit.config import UserError, read_json, read_json_lines, rounded, show, write_text
from nanoexit.evaluate import table_cells
from nanoexit.figures import Figure, Line, bar_figure, is_number, line_figure

BUDGET = 2_050_000  # bytes of compressed responses
FILES = ("samples.jsonl", "metrics.jsonl", "summary.json", "evaluation.json")
DEEPEST = 1000  # of any model
BASE = ("policy", "prompts", "accuracy", "max_depth", "tokens")  # one base where these are equal
PARTS = {
    "text": ["prompt", "words", "depths", "kinds"],
    "exit chances": ["heads"],
    "likeliest tokens": ["top", "chances"],
}
SHARES = "accuracy, written, target exit, student exit, reasoning kept, share of answers, exits"
DEPTHS = "cap, depth, mean depth, max depth, opaque serial depth"  # axes of these end at full depth
SECONDS = ("evaluation_seconds", "training_seconds")
CURVES = (  # title, key of a row of evaluation.json, horizontal axis, vertical axis
    ("Accuracy under a cap", "capped_accuracy", "cap", "accuracy"),
    ("Accuracy by group", "accuracy_by_group", "", "accuracy"),
    ("Same answer, depth free", "same_answer", "reasoning kept", "share of answers"),
    ("Same answer, capped", "same_answer_capped", "reasoning kept", "share of answers"),
    ("A written value is changed", "changed_value", "", "share of answers"),
    ("A written value is changed, capped", "changed_value_capped", "", "share of answers"),
    ("Share of tokens that exit at a depth", "exit_histogram", "depth", "exits"),
    ("Depth along the response", "depth_by_position", "token", "mean depth"),
    ("Opaque serial depth by group", "max_depth_by_group", "", "opaque serial depth"),
    ("Depth by kind of token", "depth_by_kind", "", "mean depth"),
)


@dataclass
class Run:
    """What a run directory holds for the page, any part of it empty. `where` begins its errors."""

    name: str
    samples: Sequence[dict] = ()
    metrics: Sequence[dict] = ()
    summary: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    where: str = ""


def read_run(folder: str | Path) -> Run:
    """The run in `folder`. UserError for no folder, nothing to show, or a broken file."""
    paths = [Path(folder, name) for name in FILES]
    if not any(path.is_file() for path in paths):
        raise UserError(f"{folder}: no run to report; expected a folder with {' or '.join(FILES)}")
    lines = ([row for _, row in read_json_lines(p)] if p.is_file() else [] for p in paths[:2])
    (samples, metrics), (summary, evaluation) = lines, map(read_json, paths[2:])
    return Run(Path(folder).resolve().name, samples, metrics, summary, evaluation, f"{folder}/")


def write_page(path: str | Path, runs: Sequence[Run], title: str = "", note: str = "") -> None:
    """Write the page of `runs`. `note` is plain text under the title."""
    files = (Path(__file__).with_name(f"report.{kind}") for kind in ("html", "css", "js"))
    html, css, js = (file.read_text(encoding="utf-8") for file in files)
    rows, points = _rows(runs, "rows"), _rows(runs, "frontier")
    responses, left_out = _fit(_responses(runs))
    depths = {row["full_depth"] for row in [*rows, *points, *responses]}
    data: dict[str, Any] = {"responses": responses, "left_out": left_out, "colors": {}}
    data |= {key: [r.pop(key) for r in responses] for keys in PARTS.values() for key in keys}
    data["table"] = _table(rows, ", ".join(f"{run.where}evaluation.json" for run in runs))
    data["seconds"] = [rounded([run.name, *map(run.summary.get, SECONDS)]) for run in runs]
    for scale in figures.SCALES:
        data["colors"][scale] = {full: figures.depth_colors(full, scale) for full in depths}
    fills = {
        "title": escape(title or ", ".join(run.name for run in runs)),
        "note": escape(note),
        "hash": base64.b64encode(hashlib.sha256(js.encode()).digest()).decode(),
        "css": figures.CSS + css,
        "js": js,
        "figures": _figures(runs, rows, points or rows, max(depths, default=1)),
        "data": base64.b64encode(zlib.compress(json.dumps(data).encode())).decode(),
    }
    write_text(Path(path), Template(html).substitute(fills))


# --- what the files hold ------------------------------------------------------------------------


def _objects(value: Any, where: str) -> list[dict]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f"{where}: expected a list of objects, found {show(value)}")
    return value


def _depth(value: Any, deepest: int, where: str) -> int:
    if type(value) is not int or not 1 <= value <= deepest:
        raise UserError(f"{where}: expected a depth from 1 to {deepest}, found {show(value)}")
    return value


def _rows(runs: Sequence[Run], key: str) -> list[dict]:
    """Rows of all evaluations, their variants by run, with a `name`: variant (policy)."""
    rows: list[dict] = []
    bases: list[list] = []
    for run in runs:
        where = f"{run.where}evaluation.json: {key}"
        found = _objects(run.evaluation.get(key, []), where)
        for index, row in enumerate(found):
            _depth(row.get("full_depth"), DEEPEST, f"{where}[{index}].full_depth")
            base = [run.evaluation.get("model"), *map(row.get, BASE)]
            if row.get("variant") != "base" or base not in bases:
                bases.append(base)
                variant = _named(runs, run, row)
                name = f"{variant} ({row.get('policy')})"
                rows.append({"cap": None, "policy": None, **row, "variant": variant, "name": name})
    return rows


def _table(rows: Sequence[dict], where: str) -> tuple[list[list[str]], list[str]]:
    """The table of evaluate.py, and its reasons for dashes."""
    try:
        return table_cells(rows) if rows else ([[""]], [])
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not as evaluate.py writes it: {error!r}") from None


def _named(runs: Sequence[Run], run: Run, row: dict) -> str:
    """The variant, behind the name of its run unless there is one run, or one base."""
    variant = str(row.get("variant") or "response")
    alone = len(runs) == 1 or (variant.startswith("base") and run is runs[0])
    return variant if alone else f"{run.name} · {variant}"


def _responses(runs: Sequence[Run]) -> list[dict]:
    """The samples of all runs as the page's script reads them, in order of their prompts."""
    responses: dict[Any, dict] = {}
    prompts: dict[str, int] = {}
    for run in runs:
        for index, sample in enumerate(run.samples, start=1):
            response = _response(sample, f"{run.where}samples.jsonl: response {index}")
            step = f" · step {sample['step']}" if "step" in sample else ""
            response["label"] = _named(runs, run, sample) + step
            base = str(sample.get("variant")).startswith("base")
            text = (response["prompt"], *response["words"])
            responses.setdefault(text if base else len(responses), response)
            prompts.setdefault(response["prompt"], len(prompts))
    return sorted(responses.values(), key=lambda response: prompts[response["prompt"]])


def _response(sample: dict, where: str) -> dict:
    """One sample, a list for each part of its tokens. What is wrong and not needed is null."""
    full = _depth(sample.get("full_depth"), DEEPEST, f"{where}.full_depth")
    tokens = _objects(sample.get("tokens"), f"{where}.tokens")
    for index, token in enumerate(tokens):
        _depth(token.get("depth"), full, f"{where}.tokens[{index}].depth")
    tops = [_pairs(token.get("top")) for token in tokens]
    kept = ("id", "answer", "correct", "finish", "full_depth", "exit_layers", "cap", "rewards")
    return {key: rounded(sample.get(key)) for key in kept} | {
        "prompt": str(sample.get("prompt", "")),
        "words": [str(token.get("text", "–")) for token in tokens],
        "depths": [token["depth"] for token in tokens],
        "kinds": [str(token.get("kind", "")) for token in tokens],
        "heads": [[_chance(p) for p in _list(token.get("exit_probs"))] for token in tokens],
        "top": [[text for text, _ in pairs] for pairs in tops],
        "chances": [[_chance(p) for _, p in pairs] for pairs in tops],
    }


def _chance(value: Any) -> float | None:
    return round(value, 3) if is_number(value) else None


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []


def _fit(responses: list[dict], budget: int = BUDGET) -> tuple[list[dict], list[str]]:
    """The responses within about `budget` compressed bytes, and what was left out, in words."""
    left_out, size, packer = [], 0, zlib.compressobj()
    for what, keys in PARTS.items():
        dropped = 0
        for response in responses:
            text = json.dumps([response[key] for key in keys]).encode()
            size += len(packer.compress(text) + packer.flush(zlib.Z_SYNC_FLUSH))
            if size > budget and response is not responses[0]:
                response.update(dict.fromkeys(keys))
                dropped += 1
        left_out += [f"{what} of the last {dropped}"] if dropped else []
    return [response for response in responses if response["words"] is not None], left_out


# --- figures ------------------------------------------------------------------------------------


def _figures(runs: Sequence[Run], rows: Sequence[dict], points: Sequence[dict], full: int) -> str:
    """The figures of the page as HTML, under two headings."""
    ranges = dict.fromkeys(SHARES.split(", "), (0, 1))
    ranges |= dict.fromkeys(DEPTHS.split(", "), (0, full))
    policies: dict[str, list] = defaultdict(list)
    for row in points:
        kind = f"{row['variant']} ({str(row['policy']).partition(':')[0]})"
        name = kind if len(runs) == 1 else row["variant"]
        policies[name].append([row.get("mean_depth"), row.get("accuracy")])
    evaluation = [_chart("Accuracy against depth", policies, "mean depth", "accuracy", ranges)]
    for title, key, x, y in CURVES:
        found = {row["name"]: row.get(key) for row in rows}
        evaluation.append(_chart(title, found, x, y, ranges))
    training = [_chart(key, lines, "step", key, ranges) for key, lines in _metrics(runs).items()]
    html = ""
    for heading, drawn in ("Evaluation", evaluation), ("Training", training):
        body = "".join(f'<figure class="figure">{f.svg(alone=False)}</figure>' for f in drawn if f)
        head = f'<section aria-label="{heading} figures"><h2>{heading} figures</h2>'
        html += f'{head}<div class="figures">{body}</div></section>\n' if body else ""
    return html


def _metrics(runs: Sequence[Run]) -> dict[str, dict[str, list]]:
    """{metric: {name of a line: [[step, value], ...]}}; a line an exit where values are lists."""
    metrics: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        owner = run.name if len(runs) > 1 else ""
        for index, row in enumerate(run.metrics):
            for key, value in row.items():
                for place, y in enumerate(value, 1) if isinstance(value, list) else [(0, value)]:
                    name = f"{owner} exit {place}".strip() if place else owner
                    metrics[key.replace("_", " ")][name].append([row.get("step", index), y])
    metrics.pop("step", None)
    return metrics


def _chart(title: str, found: dict, x: str, y: str, ranges: dict) -> Figure | None:
    """A line for each name where values are keyed by numbers ("6 steps" is 6), else bars."""
    lines, bars, unit = [], {}, ""
    for name, value in found.items():
        points = []
        for text, number in _pairs(value):
            at, _, unit = text.partition(" ")
            points.append((_float(at), number))
            bars[f"{text}, {name}"] = number
        lines.append(Line(name, sorted(points)))
    if any(is_number(at) for line in lines for at, _ in line.points):
        return line_figure(title, x or unit, y, lines, ranges.get(x), ranges.get(y))
    bars = {name: bars[name] for name in sorted(bars)}
    return bar_figure(title, y, bars, ranges.get(y, (0, 1))[1]) if bars else None


def _pairs(value: Any) -> list[tuple[str, float]]:
    """{x: y}, [[x, y], ...] or [y at 1, ...] of a file; what is no number becomes NaN."""
    listed = enumerate(_list(value), start=1)
    pairs = [y if isinstance(y, list) and len(y) == 2 else (x, y) for x, y in listed]
    pairs += value.items() if isinstance(value, dict) else []
    return [(str(x), _float(y)) for x, y in pairs]


def _float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
