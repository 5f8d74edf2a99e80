"""One self-contained HTML page: responses coloured by depth, and the figures of their runs.

`write_page(path, [read_run(folder), ...])` fills report.html. The page uses no network: its
Content-Security-Policy allows its own script, by hash, and nothing else. Text from models and files
enters only as escaped names in figures, or as data: deflated JSON in base64, which report.js
inflates and shows through textContent. 200 responses of 400 tokens make a page of less than 3 MB.
"""

import base64
import contextlib
import hashlib
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from nanoexit.config import UserError, read_json, read_json_lines, rounded, write_text
from nanoexit.evaluate import table_cells
from nanoexit.figures import CSS, is_number, line_figure

FILES = ("samples.jsonl", "metrics.jsonl", "evaluation.json")
BASE = ("policy", "accuracy", "perplexity", "prompt", "text")  # rows equal in all are the same base
SHARES = ("accuracy", "written", "target exit", "student exit", "same answer", "exits")
CURVES = (  # title, key in a row of evaluation.json, horizontal axis, vertical axis
    ("Accuracy under a cap", "capped_accuracy", "cap", "accuracy"),
    ("Reasoning cut, depth free", "same_answer", "kept", "same answer"),
    ("Reasoning cut, capped", "same_answer_capped", "kept", "same answer"),
    ("Share of tokens that exit at a depth", "exit_histogram", "depth", "exits"),
    ("Opaque serial depth by group", "max_depth_by_group", "group", "opaque serial depth"),
)


@dataclass
class Run:
    """The parts of a run directory that the page shows; any may be empty."""

    name: str
    samples: Sequence[dict] = ()
    metrics: Sequence[dict] = ()
    rows: Sequence[dict] = ()  # of evaluation.json, as is the frontier
    frontier: Sequence[dict] = ()


def read_run(folder: str | Path) -> Run:
    """The run in `folder`. UserError if it is missing, has nothing to show or a broken file."""
    paths = [Path(folder, name) for name in FILES]
    if not any(path.is_file() for path in paths):
        raise UserError(f"{folder}: no run to report; expected a folder with {' or '.join(FILES)}")
    try:
        lines = [[row for _, row in read_json_lines(p)] if p.is_file() else [] for p in paths[:2]]
        samples, metrics, found = *lines, read_json(paths[2])
    except UserError as error:
        raise UserError(f"{error}; delete the file to leave it out") from None
    name = Path(folder).resolve().name
    return Run(name, samples, metrics, found.get("rows", []), found.get("frontier", []))


def write_page(path: str | Path, runs: Sequence[Run], title: str = "", note: str = "") -> None:
    """Write the page of `runs`. `note` is plain text under the title."""
    files = (Path(__file__).with_name(f"report.{kind}") for kind in ("html", "css", "js"))
    html, css, js = (file.read_text(encoding="utf-8") for file in files)
    with _name_in_errors(runs, "evaluation.json"):
        rows, points = _merged(runs, "rows"), _merged(runs, "frontier")
        table = table_cells(rows) if rows else None
        evaluation = _evaluation(rows, points)
    with _name_in_errors(runs, "samples.jsonl"):
        samples = _responses(runs)
    data = {"samples": samples, "table": table, "single": len(runs) == 1}
    page = Template(html).substitute(
        title=escape(title or ", ".join(run.name for run in runs)),
        note=escape(note),
        hash=base64.b64encode(hashlib.sha256(js.encode()).digest()).decode(),
        css=CSS + css,
        js=js,
        evaluation=evaluation,
        training=_training(runs),
        data=base64.b64encode(zlib.compress(json.dumps(rounded(data)).encode())).decode(),
    )
    write_text(Path(path), page)


@contextlib.contextmanager
def _name_in_errors(runs: Sequence[Run], file: str) -> Iterator[None]:
    """Turn an error inside, caused by a wrong value in `file`, into a UserError that names it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        where = ", ".join(f"{run.name}/{file}" for run in runs)
        raise UserError(f"{where}: malformed: {error!r}") from None


def _merged(runs: Sequence[Run], key: str) -> list[dict]:
    """Rows, frontiers or samples of all runs, named by run and variant; a shared base only once."""
    merged: dict[Any, dict] = {}
    for run in runs:
        for item in getattr(run, key):
            variant = str(item["variant"])
            base = variant.startswith("base")
            same = str([item.get(name) for name in BASE]) if base else len(merged)
            if len(runs) > 1 and not (base and run is runs[0]):
                variant = f"{run.name} · {variant}"
            merged.setdefault(same, {**item, "variant": variant})
    return list(merged.values())


def _responses(runs: Sequence[Run]) -> list[dict]:
    """All responses: those from the evaluation, then training rollouts."""
    samples = _merged(runs, "samples")
    for place, sample in enumerate(samples, start=1):
        deepest = max((token["depth"] for token in sample["tokens"]), default=1)
        if not 1 <= deepest <= sample["full_depth"]:
            raise ValueError(f"response {place} has depth {deepest} of {sample['full_depth']}")
    return sorted(samples, key=lambda sample: "step" in sample)


def _evaluation(rows: Sequence[dict], points: Sequence[dict]) -> str:
    """Accuracy against depth, one line per kind of policy; then the CURVES of the rows."""
    policies: dict[str, list] = defaultdict(list)
    for row in [*rows, *points]:
        name = f"{row['variant']} ({row['policy'].partition(':')[0]})"
        policies[name].append((row["mean_depth"], row["accuracy"]))
    html = _figure("Accuracy against depth", "mean depth", "accuracy", policies)
    for title, key, x, y in CURVES:
        lines = {f"{row['variant']} ({row['policy']})": _points(row.get(key)) for row in rows}
        html += _figure(title, x, y, lines)
    return html


def _points(value: Any) -> list[tuple]:
    """(x, y) points from [[x, y], ...], or from {"2 steps": y}, whose names begin with x."""
    if isinstance(value, list):
        return [(x, y) for x, y in value]
    found = [(re.match(r"\d+", name), y) for name, y in (value or {}).items()]
    return [(int(x[0]), y) for x, y in found if x]


def _training(runs: Sequence[Run]) -> str:
    """One figure per metric, with a line for each run, or for each exit if values are lists."""
    metrics: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for row in run.metrics:
            for key, value in row.items():
                values = value if isinstance(value, list) else [value]
                for place, y in enumerate(values, start=1):
                    name = f"{run.name} exit {place}" if values is value else run.name
                    metrics[key.replace("_", " ")][name].append((row.get("step"), y))
    return "".join(_figure(key, "step", key, metrics[key]) for key in metrics if key != "step")


def _figure(title: str, x: str, y: str, lines: dict[str, list]) -> str:
    """A figure as HTML; "" if no point can be drawn. The vertical axis of a share reaches 1."""
    if not any(all(map(is_number, point)) for points in lines.values() for point in points):
        return ""
    svg = line_figure(title, x, y, lines, float(y in SHARES)).svg(alone=False)
    return f'<figure class="figure">{svg}</figure>\n'
