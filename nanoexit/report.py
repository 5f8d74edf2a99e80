"""One self-contained HTML page: responses with every token in the colour of its depth, and the figures of their runs.

`write_runs(path, [read_run(folder)])` is scripts/report.py; `write_page(path, title, samples)` is `sample.py --html`. The
page is report.html, filled with report.css, report.js and the data. It needs no network, and its Content-Security-Policy
forbids any, as well as every script but its own, known by its hash.

What models and prompts wrote reaches the page in two ways only: as JSON in a script element of type application/json, every
"<" written \\u003c, shown by textContent; and as the escaped names of figures. Numbers of tokens are packed as columns of
fixed-width base-36 text (a fifth of the JSON they would be); a page that still grows over `BUDGET` leaves out, from its last
responses on, the top-5 tokens, then the chances of the heads, then whole responses, and says so.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from nanoexit import figures
from nanoexit.colors import SCALES, depth_color
from nanoexit.data import replace
from nanoexit.errors import UserError

FILES = ("samples.jsonl", "metrics.jsonl", "summary.json", "evaluation.json")
BUDGET = 2_600_000  # characters of response data: with figures, styles and script the page stays under 3 MB
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
COLUMNS = {
    "accuracy": "Accuracy", "mean_depth": "Mean depth", "layers_run": "Layers run", "exit_rate": "Exit rate",
    "kl": "KL to the teacher", "perplexity": "Perplexity", "tokens": "Tokens", "written": "Steps written",
    "repetition": "Repetition", "judge": "Rubric, of 40", "seconds": "Seconds",
}  # fmt: skip
TILES = ("accuracy", "mean_depth", "layers_run", "kl", "tokens", "seconds")


@dataclass
class Run:
    """What a run directory holds for the page; any of it may be missing."""

    name: str
    samples: list[dict] = field(default_factory=list)
    metrics: list[dict] = field(default_factory=list)
    summary: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)


# ---- reading ----------------------------------------------------------------------------------------------------------


def read_run(folder: str | Path) -> Run:
    """The run in `folder`. Raises UserError where it is no folder, holds nothing to show, or holds a broken file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a run directory such as runs/tiny")
    if not any((folder / name).is_file() for name in FILES):
        raise UserError(f"{folder}: nothing to report; expected one of {', '.join(FILES)} in it")
    samples = _read_lines(folder / "samples.jsonl")
    for index, sample in enumerate(samples, start=1):
        _check_sample(sample, f"{folder / 'samples.jsonl'}: response {index}")
    summary, evaluation = (_read_object(folder / name) for name in ("summary.json", "evaluation.json"))
    return Run(folder.resolve().name, samples, _read_lines(folder / "metrics.jsonl"), summary, evaluation)


def _read_lines(path: Path) -> list[dict]:
    """The objects of a JSONL file, [] where there is none. A broken last line without newline is still being written."""
    if not path.is_file():
        return []
    *lines, unfinished = path.read_text(encoding="utf-8").split("\n")
    rows = [_parse(line, f"{path}: line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    try:
        return rows + ([_parse(unfinished, "")] if unfinished.strip() else [])
    except UserError:
        return rows


def _read_object(path: Path) -> dict:
    return _parse(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else {}


def _parse(text: str, where: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {str(value)[:40]}")
    return value


def _check_sample(sample: dict, where: str) -> None:
    """Refuse a response whose depths the page could not colour."""
    full, tokens = sample.get("full_depth"), sample.get("tokens")
    if not isinstance(full, int) or full < 1:
        raise UserError(f"{where}: full_depth: expected the number of blocks of the model, found {full!r}")
    if not isinstance(tokens, list) or not all(isinstance(t, dict) and isinstance(t.get("text"), str) for t in tokens):
        raise UserError(f'{where}: tokens: expected a list of objects such as {{"text": "a", "depth": 1}}')
    for index, token in enumerate(tokens):
        if not isinstance(token.get("depth"), int) or not 1 <= token["depth"] <= full:
            raise UserError(f"{where}: tokens[{index}].depth: expected 1 to {full}, found {token.get('depth')!r}")


# ---- the page ---------------------------------------------------------------------------------------------------------


def write_page(path: str | Path, title: str, samples: Sequence[dict], metrics: Sequence[dict] = (),
               summary: dict | None = None, evaluation: dict | None = None) -> None:  # fmt: skip
    """Write the page of one run, or of one response. The samples are those of samples.jsonl."""
    for index, sample in enumerate(samples, start=1):
        _check_sample(sample, f"response {index}")
    write_runs(path, [Run("", list(samples), list(metrics), summary or {}, evaluation or {})], title)


def write_runs(path: str | Path, runs: Sequence[Run], title: str | None = None) -> None:
    """Write one page for `runs`, side by side. A reader of `path` never sees half a page."""
    text = page(title or ", ".join(run.name for run in runs), runs)
    replace(Path(path), lambda beside: beside.write_bytes(text.encode("utf-8", "replace")))  # half a surrogate pair is "?"


def page(title: str, runs: Sequence[Run]) -> str:
    """The whole page as text."""
    part = {kind: Path(__file__).with_name(f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")}
    samples, rows = _labelled(runs), _evaluation_rows(runs)
    depth_rows = rows if any(row.get("exit_histogram") for row in rows) else figures.measured(samples)
    headed = next((sample for sample in samples if sample["exit_layers"]), {"exit_layers": [], "full_depth": 0})
    curves = [(run.name, run.metrics) for run in runs if run.metrics]
    full_depths = {row["full_depth"] for row in [*samples, *rows] if row.get("full_depth")}
    fills = {
        "title": escape(title or "Responses"),
        "hash": base64.b64encode(hashlib.sha256(part["js"].encode()).digest()).decode(),
        "css": part["css"] + _color_rules(full_depths),
        "js": part["js"],
        "summary": "".join(_tiles(run, len(runs) > 1) for run in runs),
        "table": _table(rows),
        "quality": _section("Quality", figures.quality_figures(rows, _evaluation_rows(runs, "frontier") or rows)),
        "depth": _section("Depth", figures.depth_figures(depth_rows)),
        "training": _section("Training", figures.training_figures(curves, headed["exit_layers"], headed["full_depth"])),
        "data": _json(pack(samples)).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fills[match[1]], part["html"])  # one pass: what was filled in is final


def _section(title: str, content: str) -> str:
    body = f'<h2>{title}</h2><div class="figures">\n{content}</div>'
    return f'<section aria-label="{title}">{body}</section>' if content else ""


def _color_rules(full_depths: Iterable[int]) -> str:
    """The colour of every depth as CSS variables --dDofL, once a scale: choosing a scale is setting an attribute."""
    rules = ""
    for scale in SCALES:
        colors = [f"--d{d}of{full}:{depth_color(d, full, scale)}" for full in sorted(full_depths) for d in range(1, full + 1)]
        rules += f":root[data-scale={scale}]{{{';'.join(colors)}}}\n"
    return rules


def _number(key: str, value: object, full_depth: object = None) -> str:
    """A figure as people read it: shares in per cent, depths with their whole, of a judge's summary the overall mean."""
    if key == "judge" and isinstance(value, dict):
        value = (value.get("means") or value).get("overall")
    if not figures.is_number(value):
        return "–"
    if key in ("accuracy", "layers_run", "exit_rate", "written", "repetition"):
        return f"{value:.1%}"
    if key == "mean_depth":
        return f"{value:.1f}" + (f" of {full_depth}" if figures.is_number(full_depth) else "")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _tiles(run: Run, named: bool) -> str:
    """The final figures of a run, large, with those of its teacher beneath."""
    teacher = run.summary.get("teacher") if isinstance(run.summary.get("teacher"), dict) else {}
    tiles = ""
    for key in TILES:
        if figures.is_number(run.summary.get(key)):
            value, base = (_number(key, of.get(key), of.get("full_depth")) for of in (run.summary, teacher))
            tiles += f"<div><dt>{COLUMNS[key]}</dt><dd>{value}</dd>"
            tiles += (f"<dd class=faint>base {base}</dd>" if base != "–" else "") + "</div>"
    heading = f"<h3>{escape(run.name)}</h3>" if named else ""
    return f'{heading}<dl class="tiles">{tiles}</dl>' if tiles else ""


def _table(rows: Sequence[dict]) -> str:
    """Evaluation as a table: a row a variant and policy, the columns that any row has."""
    keys = [key for key in COLUMNS if any(_number(key, row.get(key)) != "–" for row in rows)]
    if not keys:
        return ""
    body = ""
    for row in rows:
        body += f"<tr><th scope=row>{escape(row['name'])}</th>"
        cells = (_number(key, row.get(key), row.get("full_depth")) + _remark(key, row.get(key), row) for key in keys)
        body += "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"
    head = "".join(f"<th scope=col>{COLUMNS[key]}</th>" for key in keys)
    table = f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<section aria-label="Evaluation"><h2>Evaluation</h2><div class="scroll" tabindex="0">{table}</div></section>'


def _remark(key: str, value: object, row: dict) -> str:
    """What stands small behind a number: the interval of an accuracy; who judged, and how often that failed."""
    remark, span = "", row.get("accuracy_interval") or []
    if key == "accuracy" and len(span) == 2 and all(map(figures.is_number, span)):
        remark = f"{100 * span[0]:.1f}–{100 * span[1]:.1f}"
    if key == "judge" and isinstance(value, dict):
        failed = f"{value['failed']} failed" if value.get("failed") else ""
        remark = ", ".join(filter(None, [str(value.get("kind") or ""), str(value.get("model") or ""), failed]))
    return f" <small>{escape(remark)}</small>" if remark else ""


# ---- the data ---------------------------------------------------------------------------------------------------------


def _evaluation_rows(runs: Sequence[Run], key: str = "rows") -> list[dict]:
    """The rows of all evaluations (or the points of their frontiers), each with a `name`: run (where there are several), variant, policy."""
    rows = []
    for run in runs:
        for row in run.evaluation.get(key) or []:
            words = [run.name if len(runs) > 1 else "", row.get("variant"), row.get("policy")]
            rows.append({**row, "name": " · ".join(dict.fromkeys(str(word) for word in words if word)) or "model"})
    return rows


def _labelled(runs: Sequence[Run]) -> list[dict]:
    """The samples of all runs, each with its `series` (run, variant) and `label` (series, step), and defaults."""
    blank = {"prompt": "", "answer": None, "correct": None, "finish": "", "exit_layers": [], "rewards": {}, "step": None}
    samples = []
    for run in runs:
        for sample in run.samples:
            step = f"step {sample['step']}" if sample.get("step") is not None else ""
            words = [run.name if len(runs) > 1 else "", sample.get("variant")]
            series = " · ".join(str(word) for word in words if word) or "response"
            names = {"series": series, "label": f"{series} · {step}" if step else series}
            samples.append(blank | {k: v for k, v in sample.items() if v is not None} | names)
    return samples


def pack(samples: Sequence[dict], budget: int = BUDGET) -> dict:
    """The responses as the page's script reads them, grouped by prompt, at most about `budget` characters long."""
    words: dict[str, int] = {}
    for sample in samples:  # what was written first: it has the small numbers, and stays when the top-5 have to go
        for token in sample["tokens"]:
            words.setdefault(token["text"], len(words))
    for text in (str(text) for s in samples for t in s["tokens"] for text, _ in t.get("top") or []):
        words.setdefault(text, len(words))
    width = max(1, len(_base36(len(words) + 1)))
    prompts: dict[str, dict] = {}
    for sample in samples:
        about = {key: sample.get(key) for key in ("id", "prompt", "answer")}
        entry = prompts.setdefault(sample["prompt"], {**about, "samples": []})
        entry["samples"].append(_packed(sample, words, width))
    return _within({"words": list(words), "width": width, "prompts": list(prompts.values()), "left_out": {}}, budget)


def _packed(sample: dict, words: dict[str, int], width: int) -> dict:
    """A response as columns: an entry a token, of fixed width; chances in thousandths, "zz" where there is none."""
    tokens, heads = sample["tokens"], len(sample["exit_layers"])
    chances = (p for t in tokens for p in [*(t.get("exit_probs") or []), *[None] * heads][:heads])
    tops = (pair for t in tokens for pair in [*(t.get("top") or []), *[["", None]] * 5][:5])
    return {
        **{key: sample[key] for key in ("label", "correct", "finish", "full_depth", "exit_layers")},
        "rewards": {part: value for part, value in sample["rewards"].items() if figures.is_number(value)},
        "tokens": _column((words[t["text"]] for t in tokens), width),
        "depths": _column((t["depth"] for t in tokens), 2),
        "kinds": "".join((t.get("kind") or " ")[0] for t in tokens),
        "heads": _column(map(_thousandths, chances), 2),
        "top": "".join(_column([words.get(str(text), 0)], width) + _column([_thousandths(p)], 2) for text, p in tops),
    }


def _within(data: dict, budget: int) -> dict:
    """`data` without what would make the page too long: details of its last responses first."""
    size = len(_json(data))
    responses = [sample for prompt in data["prompts"] for sample in prompt["samples"]]
    for key in ("top", "heads"):
        for sample in reversed(responses):
            if size > budget and sample[key]:
                size -= len(sample[key])
                sample[key] = ""
                data["left_out"][key] = data["left_out"].get(key, 0) + 1
    while size > budget and len(data["prompts"]) > 1:
        dropped = data["prompts"].pop()
        size -= len(_json(dropped))
        data["left_out"]["responses"] = data["left_out"].get("responses", 0) + len(dropped["samples"])
    return data


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _column(numbers: Iterable[int | None], width: int) -> str:
    return "".join("z" * width if number is None else _base36(number).rjust(width, "0") for number in numbers)


def _thousandths(chance: object) -> int | None:
    return round(1000 * min(1.0, max(0.0, chance))) if figures.is_number(chance) else None


def _base36(number: int) -> str:
    text = ""
    while number:
        number, digit = divmod(number, 36)
        text = DIGITS[digit] + text
    return text
