"""One self-contained HTML page: responses coloured by depth, and the figures of their runs.

`write_page(path, [read_run(folder), ...])` fills report.html. The page uses no network: its
Content-Security-Policy allows its own script, by hash, and nothing else. Text of models and files
reaches it as the escaped names of figures, or as data: JSON, deflated, in base64, which report.js
inflates and shows by textContent.

A page stays under 3 MB: beyond `BUDGET` the last responses lose their likeliest tokens, then their
exit chances, then themselves, and the page says so. A wrong depth in a file is a UserError; most
other wrong values are not shown. Cells and figures are evaluate's. Runs share one base.
"""

import base64
import hashlib
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from nanoexit.config import UserError, read_json, read_json_lines, show, write_text
from nanoexit.evaluate import table_cells
from nanoexit.figures import CSS, Line, is_number, line_figure

BUDGET = 2_050_000  # bytes of compressed responses
FILES = ("samples.jsonl", "metrics.jsonl", "evaluation.json")
PARTS = ("text", "exit_probs", "top")  # of a response; the last are left out first
BASE = ("policy", "accuracy", "perplexity", "prompt", "text")  # where equal, the base is the same
SHARES = ("accuracy", "written", "target exit", "student exit", "same answer", "exits")
CURVES = (  # title, key of a row of evaluation.json, horizontal axis, vertical axis
    ("Accuracy under a cap", "capped_accuracy", "cap", "accuracy"),
    ("Reasoning cut, depth free", "same_answer", "kept", "same answer"),
    ("Reasoning cut, capped", "same_answer_capped", "kept", "same answer"),
    ("Share of tokens that exit at a depth", "exit_histogram", "depth", "exits"),
    ("Depth along the response", "depth_by_position", "token", "mean depth"),
    ("Opaque serial depth by group", "max_depth_by_group", "group", "opaque serial depth"),
)
Chart = tuple[str, str, str, dict]  # title, axes, {name of a line: points}


@dataclass
class Run:
    """What a run directory holds for the page, any part of it empty. `where` begins its errors."""

    name: str
    samples: Sequence[dict] = ()
    metrics: Sequence[dict] = ()
    evaluation: dict = field(default_factory=dict)
    where: str = ""


def read_run(folder: str | Path) -> Run:
    """The run in `folder`. UserError for no folder, nothing to show, or a broken file."""
    paths = [Path(folder, name) for name in FILES]
    if not any(path.is_file() for path in paths):
        raise UserError(f"{folder}: no run to report; expected a folder with {' or '.join(FILES)}")
    lines = [[row for _, row in read_json_lines(p)] if p.is_file() else [] for p in paths[:2]]
    evaluation, name = read_json(paths[2]), Path(folder).resolve().name
    return Run(name, lines[0], lines[1], evaluation, f"{folder}/")


def write_page(path: str | Path, runs: Sequence[Run], title: str = "", note: str = "") -> None:
    """Write the page of `runs`. `note` is plain text under the title."""
    files = (Path(__file__).with_name(f"report.{kind}") for kind in ("html", "css", "js"))
    html, css, js = (file.read_text(encoding="utf-8") for file in files)
    for run in runs:
        _check(run)
    rows, points = _named(runs, "rows"), _named(runs, "frontier")
    data = _responses(runs) | {"table": _table(runs, rows), "single": len(runs) == 1}
    fills = {
        "title": escape(title or ", ".join(run.name for run in runs)),
        "note": escape(note),
        "hash": base64.b64encode(hashlib.sha256(js.encode()).digest()).decode(),
        "css": CSS + css,
        "js": js,
        "evaluation": _figures(_evaluation(rows, points or rows)),
        "training": _figures(_training(runs)),
        "data": base64.b64encode(zlib.compress(json.dumps(data).encode())).decode(),
    }
    write_text(Path(path), Template(html).substitute(fills))


def _check(run: Run) -> None:
    """UserError for anything but objects with a depth where the page needs one."""
    for key in ("rows", "frontier"):
        where = f"{run.where}evaluation.json: {key}"
        _depths(run.evaluation.get(key, []), "full_depth", where)
    where = f"{run.where}samples.jsonl: responses"
    _depths(run.samples, "full_depth", where)
    for index, sample in enumerate(run.samples):
        _depths(sample.get("tokens"), "depth", f"{where}[{index}].tokens", sample["full_depth"])


def _depths(items: Any, key: str, where: str, deepest: int = 1000) -> None:
    if not isinstance(items, list):
        raise UserError(f"{where}: expected a list of objects, found {show(items)}")
    for index, item in enumerate(items):
        depth = item.get(key) if isinstance(item, dict) else None
        if type(depth) is not int or not 1 <= depth <= deepest:
            found = f"expected a depth from 1 to {deepest}, found {show(depth)}"
            raise UserError(f"{where}[{index}].{key}: {found}")


def _named(runs: Sequence[Run], key: str) -> list[dict]:
    """Rows, frontiers or samples of all runs, named by run and variant; a shared base once."""
    found: dict[Any, dict] = {}
    for run in runs:
        for item in run.samples if key == "samples" else run.evaluation.get(key, []):
            variant = str(item.get("variant"))
            base = variant.startswith("base")
            same = str([item.get(name) for name in BASE]) if base else len(found)
            if len(runs) > 1 and not (base and run is runs[0]):
                variant = f"{run.name} · {variant}"
            found.setdefault(same, {**item, "variant": variant})
    return list(found.values())


def _table(runs: Sequence[Run], rows: Sequence[dict]) -> Any:
    """The table of evaluate.py, and its reasons for dashes."""
    try:
        return table_cells(rows) if rows else [[[""]], []]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        where = ", ".join(run.where + FILES[2] for run in runs)
        raise UserError(f"{where}: not as evaluate.py writes it: {error!r}") from None


def _responses(runs: Sequence[Run]) -> dict[str, Any]:
    """The parts of all responses: those of the evaluation, then rollouts of the training."""
    data: dict[str, list] = {part: [] for part in PARTS}
    for sample in sorted(_named(runs, "samples"), key=lambda sample: "step" in sample):
        tokens = sample.pop("tokens")
        for key in ("text", "depth", "kind"):
            sample[key] = [token.get(key) for token in tokens]
        data["text"].append(sample)
        for part in ("exit_probs", "top"):
            data[part].append([token.get(part) for token in tokens])
    text = json.dumps(data)  # and back: three decimals, and null for what is not finite
    data = json.loads(text, parse_float=lambda x: round(float(x), 3), parse_constant=lambda _: None)
    fit(data)
    return data


def fit(data: dict[str, list], budget: int = BUDGET) -> None:
    """Null the parts of responses beyond about `budget` compressed bytes."""
    size, packer = 0, zlib.compressobj()
    for part in PARTS:
        for index, value in enumerate(data[part]):
            packed = packer.compress(json.dumps(value).encode())
            size += len(packed + packer.flush(zlib.Z_SYNC_FLUSH))
            if size > budget and index > 0:
                data[part][index] = None


def _evaluation(rows: Sequence[dict], points: Sequence[dict]) -> list[Chart]:
    """Accuracy against depth, a line a kind of policy; then the curves of the rows."""
    policies: dict[str, list] = defaultdict(list)
    for row in points:
        name = f"{row['variant']} ({str(row.get('policy')).partition(':')[0]})"
        policies[name].append((row.get("mean_depth"), row.get("accuracy")))
    charts: list[Chart] = [("Accuracy against depth", "mean depth", "accuracy", policies)]
    for title, key, x, y in CURVES:
        lines = {f"{row['variant']} ({row.get('policy')})": _points(row.get(key)) for row in rows}
        charts.append((title, x, y, lines))
    return charts


def _points(value: Any) -> list[tuple]:
    """{"2 steps": y}, [[x, y], ...] or [y at 1, y at 2, ...] as (x, y)."""
    if isinstance(value, list):
        pairs = enumerate(value, start=1)
        return [tuple(y) if isinstance(y, list) and len(y) == 2 else (x, y) for x, y in pairs]
    items = value.items() if isinstance(value, dict) else ()
    found = [(re.match(r"\d{1,9}", name), y) for name, y in items]
    return [(int(x[0]), y) for x, y in found if x]


def _training(runs: Sequence[Run]) -> list[Chart]:
    """A chart a metric: a line a run, or a line an exit where values are lists."""
    metrics: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for index, row in enumerate(run.metrics):
            for key, value in row.items():
                for place, y in enumerate(value, 1) if isinstance(value, list) else [("", value)]:
                    name = f"{run.name} exit {place}" if place else run.name
                    metrics[key.replace("_", " ")][name].append((row.get("step", index), y))
    return [(key, "step", key, lines) for key, lines in metrics.items() if key != "step"]


def _figures(charts: Sequence[Chart]) -> str:
    """The charts that have a point, as HTML. Axes start at zero; those of shares end at 1."""
    html = ""
    for title, x, y, found in charts:
        if any(all(map(is_number, point)) for points in found.values() for point in points):
            lines = [Line(name, points) for name, points in found.items()]
            svg = line_figure(title, x, y, lines, float(y in SHARES)).svg(alone=False)
            html += f'<figure class="figure">{svg}</figure>\n'
    return html
