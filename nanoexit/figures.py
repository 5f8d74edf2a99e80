"""Figures of the report as inline SVG: which figures a set of runs deserves, and how lines and bars are drawn.

Every function returns HTML text ("" where there is nothing to show); every name in it is escaped. Colours of series are
CSS variables of the page (--s0 ...), colours of depths are --dDofL, so that light, dark and the colour scale need no redraw.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 220, 46, 12, 12, 38
MOST_POINTS = 120
FILE_STYLE = (  # what report.css says of figures, for files that stand alone
    "text{fill:var(--soft)}.strong{fill:var(--ink);font-weight:600}.soft{fill:var(--soft);font-weight:400}.end{text-anchor:end}.mid{text-anchor:middle}"
    ".inside{fill:#fff}.grid{stroke:var(--line)}polyline{fill:none;stroke-width:2}.interval{stroke-width:2;opacity:.45}.paper{fill:#fff}"
)
GROUPS = {  # title of a training figure -> the metrics it holds; a metric that fits none has a figure of its own
    "Loss": r"(.*_)?loss|kl|divergence",
    "Reward": r"reward(_.+)?",
    "Accuracy": r"(.*_)?accuracy",
    "Depth": r"(.*_)?depth",
}


@dataclass
class Line:
    """A series of (x, y); `intervals` are (x, low, high). Markers show the points, each with its tip; else it is a curve."""

    name: str
    points: list[tuple[float, float]]
    color: str
    dashed: bool = False
    intervals: list[tuple[float, float, float]] = field(default_factory=list)
    tips: list[str] = field(default_factory=list)


def depth_var(depth: int, full_depth: int) -> str:
    return f"var(--d{depth}of{full_depth})"


def series_var(index: int) -> str:
    return f"var(--s{index % 8})"


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# ---- which figures ----------------------------------------------------------------------------------------------------


def depth_figures(rows: Sequence[dict]) -> str:
    """Where tokens exit, mean depth along the response, depth by kind of token: one row of each figure a variant."""
    rows = [row for row in rows if row.get("full_depth")]
    histogram, kinds, along = [], defaultdict(list), []
    for index, row in enumerate(rows):
        full, name, color = row["full_depth"], row["name"], series_var(index)
        shares = sorted((int(d), share) for d, share in (row.get("exit_histogram") or {}).items() if is_number(share))
        tips = [f"{name}: {share:.1%} of tokens use depth {d} of {full}" for d, share in shares]
        histogram.append((name, [(share, depth_var(d, full), tip, str(d)) for (d, share), tip in zip(shares, tips)]))
        for kind, depth in (row.get("depth_by_kind") or {}).items():
            if is_number(depth):
                kinds[kind].append((name, [(depth / full, color, f"{name}: {depth:.2f} of {full}", f"{depth:.1f}")]))
        points = [(i, d) for i, d in enumerate(row.get("depth_by_position") or [], start=1) if is_number(d)]
        along.append(Line(name, thin(points), color))
    colors = {int(label): color for _, parts in histogram for _, color, _, label in parts}
    keys = [(f"depth {depth}", color, False) for depth, color in sorted(colors.items())]
    return (
        bar_figure("Exit histogram", "Share of tokens at each depth, early exits first", [("", histogram)], keys=keys)
        + line_figure("Depth along the response", "token of the response", "mean depth", along)
        + bar_figure("Depth by kind of token", "Mean depth; a whole bar is every block", list(kinds.items()), track=True)
    )


def measured(samples: Sequence[dict]) -> list[dict]:
    """The rows of `depth_figures` from the responses themselves, a row a series, for runs that were not evaluated."""
    groups = defaultdict(list)
    for sample in samples:
        groups[sample["series"], sample["full_depth"]].append(sample["tokens"])
    return [{"name": name, "full_depth": full} | _measure(responses) for (name, full), responses in groups.items()]


def _measure(responses: Sequence[list[dict]]) -> dict:
    """Share of tokens at each depth; mean depth by kind (the first token aside: it cannot choose) and by position."""
    histogram, kinds, places = Counter(), defaultdict(list), defaultdict(list)
    for tokens in responses:
        for index, token in enumerate(tokens):
            histogram[token["depth"]] += 1
            places[index].append(token["depth"])
            kinds[token.get("kind") or "token"] += [token["depth"]] if index else []
    return {
        "exit_histogram": {depth: count / histogram.total() for depth, count in histogram.items()},
        "depth_by_kind": {kind: sum(depths) / len(depths) for kind, depths in kinds.items() if depths},
        "depth_by_position": [sum(depths) / len(depths) for _, depths in sorted(places.items())],
    }


def quality_figures(rows: Sequence[dict], points: Sequence[dict]) -> str:
    """The quality-depth frontier of the policies (`points`), and the two tests of faithfulness (Lanham et al. 2023)."""
    families, early, mistakes = defaultdict(list), [], []
    keys = [(name, series_var(index), False) for index, name in enumerate(("follow", "stay", "stop"))]
    for row in points:
        if is_number(row.get("accuracy")) and is_number(row.get("mean_depth")) and row.get("full_depth"):
            policy = str(row.get("policy") or "")
            families[row["name"].removesuffix(policy) + policy.split(":")[0]].append(row)
    for index, row in enumerate(rows):
        curve = [(100 * x, 100 * y) for x, y in row.get("early_answering") or [] if is_number(x) and is_number(y)]
        tips = [f"{row['name']}: {y:.0f} % same after {x:.0f} %" for x, y in curve]
        early.append(Line(row["name"], curve, series_var(index), tips=tips))
        shares = [((row.get("adding_mistakes") or {}).get(name), name, color) for name, color, _ in keys]
        parts = [(s, color, f"{name}: {s:.0%}", f"{name} {s:.0%}") for s, name, color in shares if is_number(s)]
        mistakes.append((row["name"], parts))
    frontier = [_frontier_line(name, group, series_var(i)) for i, (name, group) in enumerate(families.items())]
    note = "What the answer does when an intermediate value is changed"
    return (
        line_figure("Quality against depth", "mean depth, % of all blocks", "accuracy, %", frontier)
        + line_figure("Early answering", "% of the reasoning kept", "same answer, %", early)
        + bar_figure("Adding mistakes", note, [("", mistakes)], keys=keys)
    )


def _frontier_line(name: str, rows: list[dict], color: str) -> Line:
    rows = sorted(rows, key=lambda row: row["mean_depth"] / row["full_depth"])
    points = [(100 * row["mean_depth"] / row["full_depth"], 100 * row["accuracy"]) for row in rows]
    depths = [f"{row['mean_depth']:.1f} of {row['full_depth']}" for row in rows]
    tips = [f"{row['name']}: accuracy {y:.1f} % at depth {d}" for row, d, (_, y) in zip(rows, depths, points)]
    spans = [row.get("accuracy_interval") or [] for row in rows]
    intervals = [(x, 100 * s[0], 100 * s[1]) for (x, _), s in zip(points, spans) if len(s) == 2 and all(map(is_number, s))]
    return Line(name, points, color, intervals=intervals, tips=tips)


def training_figures(runs: Sequence[tuple[str, Sequence[dict]]], exit_layers: Sequence[int], full_depth: int) -> str:
    """Every numeric metric over the steps: related ones share a figure; a list has a line an exit, in the exit's colour."""
    figures = defaultdict(list)
    for run, metrics in runs:
        prefix = f"{run} " if len(runs) > 1 else ""
        for (key, place), points in _curves(metrics).items():
            title = next((t for t, pattern in GROUPS.items() if re.fullmatch(pattern, key)), _spaced(key))
            line = Line(prefix + _spaced(key), thin(points), series_var(len(figures[title])))
            if place is not None:
                who = key.removesuffix("_exit")  # teacher_exit and student_exit are one chance: as wanted and as learned
                title, who = ("Chance to exit", f"{who} ") if who != key else (title, "")
                known = place < len(exit_layers)
                line.name = f"{prefix}{who}" + (f"depth {exit_layers[place]}" if known else f"exit {place + 1}")
                line.color = depth_var(exit_layers[place], full_depth) if known else series_var(place)
                line.dashed = who == "teacher "
            figures[title].append(line)
    titles = [title for title in GROUPS if figures.get(title)] + [t for t in figures if figures[t] and t not in GROUPS]
    return "".join(line_figure(title[:1].upper() + title[1:], "step", "", figures[title]) for title in titles)


def _curves(metrics: Iterable[dict]) -> dict[tuple[str, int | None], list[tuple[float, float]]]:
    """{(metric, None or the place in its list): [(step, value)]}; what is no finite number is left out."""
    curves = defaultdict(list)
    for index, row in enumerate(metrics):
        step = row["step"] if is_number(row.get("step")) else index
        for key, value in row.items():
            for place, item in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if key != "step" and is_number(item):
                    curves[key, place].append((step, item))
    return curves


def _spaced(key: str) -> str:
    return " ".join("learning rate" if word == "lr" else word for word in key.split("_"))


# ---- how they are drawn -----------------------------------------------------------------------------------------------


def thin(points: list[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: means of neighbours where there are more, so that a long run stays a light page."""
    size = math.ceil(len(points) / most) or 1
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in c) / len(c), sum(y for _, y in c) / len(c)) for c in chunks]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that span low..high, both ends included, about `count` steps apart."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / count))
    step = power * next(m for m in (1, 2, 5, 10) if span / (power * m) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def line_figure(title: str, x_label: str, y_label: str, lines: Sequence[Line]) -> str:
    """Lines over shared axes. The zero line is kept where values come near it or are all the same."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [y for line in lines for _, *span in line.intervals for y in span]
    low, high = min(ys), max(ys)
    y_ticks = ticks(0 if 0 <= low and (low < 0.5 * high or low == high) else low, high)
    x_low, x_high = (min(xs), max(xs)) if len(set(xs)) > 1 else (min(xs) - 1, max(xs) + 1)
    x_low = 0 if 0 <= x_low < 0.1 * x_high else x_low
    x_ticks = [tick for tick in ticks(x_low, x_high, 5) if x_low <= tick <= x_high]

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(LEFT + across * (WIDTH - LEFT - RIGHT), 1), round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1)

    floor = HEIGHT - BOTTOM
    grid = "".join(f'<path class="grid" d="M{LEFT} {at(x_low, t)[1]}H{WIDTH - RIGHT}"/>' for t in y_ticks)
    grid += "".join(f'<text class="end" x="{LEFT - 8}" y="{at(x_low, t)[1] + 4}">{_short(t)}</text>' for t in y_ticks)
    grid += "".join(f'<text class="mid" x="{at(t, y_ticks[0])[0]}" y="{floor + 18}">{_short(t)}</text>' for t in x_ticks)
    grid += f'<text class="mid" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}">{escape(x_label)}</text>'
    drawn = "".join(_draw(line, at) for line in lines)
    scale = f'data-x="{x_low} {x_high} {LEFT} {WIDTH - RIGHT}" data-y="{y_ticks[0]} {y_ticks[-1]} {floor} {TOP}"'
    alone = len(lines) == 1 and lines[0].name.lower() == title.lower()
    keys = [] if alone else [(line.name, line.color, line.dashed) for line in lines]
    return _figure(title, y_label, f"{WIDTH} {HEIGHT}", grid + drawn, scale, keys)


def _draw(line: Line, at: Callable[[float, float], tuple[float, float]]) -> str:
    """A curve (its name is what the page's cross-hair reads), its intervals, and its markers with their tips."""
    points = " ".join("{},{}".format(*at(x, y)) for x, y in line.points)
    dash = ' stroke-dasharray="4 3"' if line.dashed else ""
    out = f'<polyline data-name="{escape(line.name)}" style="stroke:{line.color}" points="{points}"{dash}/>'
    for x, low, high in line.intervals:
        (across, bottom), (_, top) = at(x, low), at(x, high)
        out += f'<path class="interval" style="stroke:{line.color}" d="M{across} {bottom}V{top}"/>'
    tips = line.tips or ([f"{line.name}: {line.points[0][1]:.4g}"] if len(line.points) == 1 else [])
    for (x, y), tip in zip(line.points, tips):
        across, up = at(x, y)
        out += f'<circle style="fill:{line.color}" cx="{across}" cy="{up}" r="4"><title>{escape(tip)}</title></circle>'
    return out


def bar_figure(title: str, note: str, groups: Sequence[tuple], track: bool = False, keys: Sequence[tuple] = ()) -> str:
    """Horizontal bars: groups of (heading, [(name, [(share of the width, colour, tip, label)])]), a row a name.

    `track` draws the rest of the width; `keys` are those of `_figure`.
    """
    y, out = 0, ""
    for heading, rows in groups:
        if heading:
            out += f'<text class="strong" x="0" y="{y + 14}">{escape(heading)}</text>'
            y += 20
        for name, parts in rows:
            if parts:
                out += _bar(name, parts, y, track)
                y += 42
        y += 6 if heading else 0
    return _figure(title, note, f"{WIDTH} {y}", out, "", keys) if out else ""


def _bar(name: str, parts: Sequence[tuple], y: float, track: bool) -> str:
    """The row that starts at height `y`: its name, and under it the parts, each with its label where that has room."""
    out, x, box = f'<text x="0" y="{y + 13}">{escape(name)}</text>', 0.0, f'y="{y + 19}" height="15" rx="3"'
    out += f'<rect class="track" x="0" width="{WIDTH}" {box}/>' if track else ""
    for share, color, tip, label in parts:
        width = max(0.0, min(share * WIDTH, WIDTH - x))
        out += f'<rect style="fill:{color}" x="{x:.1f}" width="{width:.1f}" {box}><title>{escape(tip)}</title></rect>'
        if width > 7 * len(label) + 6:
            out += f'<text class="inside" x="{x + 6:.1f}" y="{y + 31}">{escape(label)}</text>'
        x += width
    return out


def _figure(title: str, note: str, box: str, drawing: str, attributes: str, keys: Sequence[tuple[str, str, bool]]) -> str:
    """The frame of every figure; `keys` are (name, colour, dashed) of its legend."""
    title = escape(title)
    items = [f'<li><i{" class=dashed" * dashed} style="--c:{color}"></i>{escape(name)}</li>' for name, color, dashed in keys]
    return (
        f'<figure class="figure"><figcaption><b>{title}</b> <span>{escape(note)}</span></figcaption>'
        f'<svg viewBox="0 0 {box}" role="img" aria-label="{title}" {attributes}>{drawing}</svg>'
        + (f'<ul class="keys">{"".join(items)}</ul>' if items else "") + "</figure>\n"
    )  # fmt: skip


def _short(value: float) -> str:
    """A tick's number in few characters: 0.02, 1500, 2e-05."""
    return f"{value:.0f}" if 1 <= abs(value) < 1e5 and value == int(value) else f"{round(value, 12):.3g}"


def standalone(figure: str) -> str:
    """A figure as an SVG file of its own: title above, legend below, the page's light colours written out."""
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    colors = {name: light for name, light in re.findall(r"(--[\w]+): light-dark\((#\w+),", css)}
    title, note = re.search(r"<figcaption><b>(.*?)</b> <span>(.*?)</span>", figure, re.S).groups()
    box, drawing = re.search(r'<svg viewBox="0 0 ([\d. ]+)"[^>]*>(.*?)</svg>', figure, re.S).groups()
    width, height = map(float, box.split())
    keys, x = "", 0.0
    for color, name in re.findall(r'<li><i[^>]*style="--c:(.*?)"></i>(.*?)</li>', figure):
        keys += f'<circle style="fill:{color}" cx="{x + 5:.0f}" cy="{height + 42}" r="5"/><text x="{x + 16:.0f}" y="{height + 46}">{name}</text>'
        x += 34 + 7 * len(name)
    text = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-12 -8 {max(width, x) + 24:g} {height + 72:g}" font-family="sans-serif" font-size="13">'
            f"<style>{FILE_STYLE}</style><rect class=\"paper\" x=\"-12\" y=\"-8\" width=\"100%\" height=\"100%\"/>"
            f'<text class="strong" x="0" y="12">{title}<tspan class="soft" dx="8">{note}</tspan></text><g transform="translate(0 24)">{drawing}</g>{keys}</svg>')
    return re.sub(r"var\((--\w+)\)", lambda m: colors.get(m[1], "#888"), text)
