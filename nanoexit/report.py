"""One self-contained HTML page: responses coloured by depth, and the figures of their runs.

`write_page(path, [read_run(folder), ...])` fills report.html. The page uses no network: its
Content-Security-Policy allows its own script, by hash, and nothing else. Text from models and files
enters only as escaped names in figures, or as data: deflated JSON in base64, which report.js
inflates and shows through textContent. 200 responses of 400 tokens make a page below 3 MB."""

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
KEPT, SAME = "share of the reasoning kept", "share with the same answer"
CURVES = (  # title, key in a row of evaluation.json, horizontal axis, vertical axis
    ("Accuracy under a cap", "capped_accuracy", "cap, in blocks", "accuracy"),
    ("Reasoning cut, depth free", "same_answer", KEPT, SAME),
    ("Reasoning cut, capped", "same_answer_capped", KEPT, SAME),
    ("Tokens that exit at a depth", "exit_histogram", "depth, in blocks", "share of tokens"),
    ("Opaque serial depth by steps", "max_depth_by_group", "steps that the task needs", "blocks"),
)
# Titles of the figures of metrics; others have the metric's own name.
TITLES = {"kl": "KL to the teacher, nats", "lr": "Learning rate", "grad_norm": "Gradient norm"}
TITLES |= {"mean_depth": "Mean depth, in blocks", "max_depth": "Opaque serial depth, in blocks"}
TITLES |= {"target_exit": "Targets at the heads", "student_exit": "Chance to exit at the heads"}
TITLES |= {"written": "Steps written", "flat_groups": "Prompts whose rewards are all equal"}
TITLES |= {"reward_verify": "Reward: right answer", "reward_kl": "Reward: KL to the teacher"}
TITLES |= {"exit_kl": "KL of the heads that now exit less, nats per response"}
TITLES |= {"reward_depth": "Reward: depth", "reward_length": "Reward: tokens written"}
SHARES = re.compile("(?i)accuracy|share|at the heads|steps written")  # their axis reaches 1


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
    colors: dict[str, str] = {}  # of the lines of all figures
    with _name_in_errors(runs, "evaluation.json"):
        rows, points = _merged(runs, "rows"), _merged(runs, "frontier")
        table = table_cells(rows) if rows else None
        evaluation = _evaluation(rows, points, colors)
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
        training=_training(runs, colors),
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
    merged: dict = {}
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


def _evaluation(rows: Sequence[dict], points: Sequence[dict], colors: dict) -> str:
    """Accuracy against depth, one line per kind of policy; then the CURVES of the rows."""
    policies: dict = defaultdict(list)
    for row in [*rows, *points]:
        name = f"{row['variant']} ({row['policy'].partition(':')[0]})"
        policies[name].append((row["mean_depth"], row["accuracy"]))
    html = _figure("Accuracy against depth", "mean depth, in blocks", "accuracy", policies, colors)
    for title, key, x, y in CURVES:
        lines = {f"{row['variant']} ({row['policy']})": _points(row.get(key)) for row in rows}
        html += _figure(title, x, y, lines, colors)
    return html


def _points(value: Any) -> list[tuple]:
    """(x, y) points from [[x, y], ...], or from {"2 steps": y}, whose names begin with x."""
    if isinstance(value, list):
        return [(x, y) for x, y in value]
    found = [(re.match(r"\d+", name), y) for name, y in (value or {}).items()]
    return [(int(x[0]), y) for x, y in found if x]


def _training(runs: Sequence[Run], colors: dict) -> str:
    """One figure per metric: a line for each run, in the colour of its student in the evaluation;
    if values are lists, a line for each exit head, from red for the first to blue."""
    metrics: dict = defaultdict(lambda: defaultdict(list))
    for run in runs:
        student = f"{run.name} · student" if len(runs) > 1 else "student"
        own = [color for name, color in colors.items() if name.startswith(student)]
        if own:
            colors[run.name] = own[0]
        for row in run.metrics:
            for key, value in row.items():
                values = value if isinstance(value, list) else [value]
                for place, y in enumerate(values):
                    name = run.name
                    if values is value:
                        name += f", exit head {place + 1}"
                        blue = f"var(--h4) {100 * place // len(values)}%"
                        colors[name] = f"color-mix(in oklch longer hue, {blue}, var(--h0))"
                    metrics[key][name].append((row.get("step"), y))
    metrics.pop("step", None)
    titles = {key: TITLES.get(key, key.replace("_", " ").capitalize()) for key in metrics}
    return "".join(_figure(titles[key], "step", "", metrics[key], colors) for key in metrics)


def _figure(title: str, x: str, y: str, lines: dict[str, list], colors: dict) -> str:
    """A figure as HTML; "" if no point can be drawn. The vertical axis of a share reaches 1."""
    if not any(all(map(is_number, point)) for points in lines.values() for point in points):
        return ""
    top = bool(SHARES.search(y or title))
    svg = line_figure(title, x, y, lines, top, colors).svg(alone=False)
    return f'<figure class="figure">{svg}</figure>\n'
