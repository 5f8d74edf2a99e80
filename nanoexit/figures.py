"""Depth as colour, in a terminal and on a page, and figures as SVG.

`paint` and `legend` colour a response for a terminal: 24-bit colour, 256 colours or plain text, as
COLORTERM and TERM say. NO_COLOR (no-color.org) and a pipe mean plain text.

`line_figure` and `bar_figure` draw a `Figure`, whose `.svg()` is a file of its own, made for 400
pixels, light or dark as its reader is. Names are escaped. What is not drawn is named below.

Both scales of depth keep a contrast of 3 to 1 on white and on black, because a program cannot know
the background of a terminal. `safe` also darkens with depth: it can be read with any of the colour
blindnesses, and in a grey print.
"""

import itertools
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TextIO

from nanoexit.config import printable

SCALES = {
    "heat": ("#e03131", "#d9650b", "#a98600", "#13948c", "#2f6fe0"),
    "safe": ("#e27200", "#b17f52", "#83838a", "#4c7bb0", "#1a5fb4"),
}
CSS = Path(__file__).with_name("figures.css").read_text(encoding="utf-8")
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 360, 42, 346, 12, 180  # of a drawing and of its axes
MOST_LINES, MOST_POINTS, MOST_MARKS = 8, 120, 30
SERIES = [f"var(--s{index})" for index in range(MOST_LINES)]


# --- depth as colour, and the terminal ----------------------------------------------------------


def depth_colors(full_depth: int, scale: str = "heat") -> list[str]:
    """The "#rrggbb" of the depths 1..`full_depth`: the first is red, the last is blue."""
    stops = [bytes.fromhex(stop[1:]) for stop in SCALES[scale]]
    colors = []
    for spared in range(full_depth - 1, -1, -1):
        place = (1 - spared / max(1, full_depth - 1)) * (len(stops) - 1)
        left = min(int(place), len(stops) - 2)
        mixed = (a + (b - a) * (place - left) for a, b in zip(stops[left], stops[left + 1]))
        colors.append("#" + "".join(f"{round(part):02x}" for part in mixed))
    return colors


def terminal_colors(stream: TextIO, variables: Mapping[str, str] = os.environ) -> int:
    """How many colours `stream` shows: 2**24, 256, or 0 for a pipe, a dumb terminal, NO_COLOR."""
    term = variables.get("TERM", "")
    if not stream.isatty() or variables.get("NO_COLOR") or term in ("", "dumb"):
        return 0
    if variables.get("COLORTERM", "").lower() in ("truecolor", "24bit") or term.endswith("-direct"):
        return 2**24
    return 256 if "256" in term else 0


def paint(pieces: Sequence[str], depths: Sequence[int], full_depth: int, stream: TextIO) -> str:
    """The pieces of a response as one text for `stream`, each in the colour of its depth.

    Control characters are escaped. What `stream` cannot encode becomes a question mark.
    """
    painted = ""
    for depth, run in itertools.groupby(zip(pieces, depths, strict=True), key=lambda pair: pair[1]):
        painted += _colored("".join(piece for piece, _ in run), depth, full_depth, stream)
    return painted


def legend(exit_layers: Sequence[int], full_depth: int, stream: TextIO) -> str:
    """One line that names the colour of each depth; "" for a stream without colours."""
    if not terminal_colors(stream):
        return ""
    depths = sorted({*exit_layers, full_depth})
    return "depth  " + "  ".join(_colored(f"■ {d}", d, full_depth, stream) for d in depths)


def _colored(text: str, depth: int, full_depth: int, stream: TextIO) -> str:
    """Harmless text in the exact colour, or in the nearest of the 6 x 6 x 6 cube of 256 colours."""
    encoding = stream.encoding or "utf-8"
    text = printable(text).encode(encoding, "replace").decode(encoding)
    colors = terminal_colors(stream)
    if not colors:
        return text
    rgb = bytes.fromhex(depth_colors(full_depth)[depth - 1][1:])
    code = "2;{};{};{}".format(*rgb)
    if colors == 256:
        levels = (0, 95, 135, 175, 215, 255)
        red, green, blue = (min(range(6), key=lambda i: abs(levels[i] - c)) for c in rgb)
        code = f"5;{16 + 36 * red + 6 * green + blue}"
    return f"\x1b[38;{code}m{text}\x1b[0m"


# --- figures ------------------------------------------------------------------------------------


@dataclass
class Line:
    """A series of points: (x, y), or (x, y, low, high) with an interval around y."""

    name: str
    points: Sequence[tuple[float, ...]]


@dataclass
class Figure:
    """A drawing with its title, legend and remarks."""

    title: str
    height: float
    body: str

    def svg(self, alone: bool = True) -> str:
        """The text of a file; if not `alone`, a part of a page that holds figures.css."""
        edge, style = (10, f"<style>{CSS}</style>") if alone else (0, "")
        width, height = WIDTH + 2 * edge, round(self.height) + 2 * edge
        size = f'width="{width}" height="{height}"'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="-{edge} -{edge} {width} '
            f'{height}" role="img" aria-label="{escape(self.title)}">{style}'
            f'<rect class="paper" x="-{edge}" y="-{edge}" {size}/>{self.body}</svg>\n'
        )


def line_figure(
    title: str, x: str, y: str, lines: Sequence[Line], x_range: Any = None, y_range: Any = None
) -> Figure:
    """Lines over axes labelled `x` and `y`. A range is (low, high); (0, 1) is labelled in per cent.

    Without a range an axis spans the points, the vertical one from zero. The ninth line and the
    following, and the points that are not finite, are named under the figure.
    """
    drawn, remarks = [], []
    for line in lines[:MOST_LINES]:
        points = [point for point in line.points if all(map(is_number, point))]
        if missing := len(line.points) - len(points):
            remarks.append(f"{line.name}: {missing} of {len(line.points)} points are not finite.")
        drawn.append(Line(line.name, points[:: len(points) // MOST_POINTS + 1]))
    if rest := [line.name for line in lines[MOST_LINES:]]:
        remarks.append(f"Not drawn, beyond {MOST_LINES} lines: {', '.join(rest)}.")
    xs = [point[0] for line in drawn for point in line.points]
    ys = [value for line in drawn for point in line.points for value in point[1:]]
    across, up = Axis(xs or [0, 1], x_range, LEFT, RIGHT), Axis([0, *ys], y_range, BOTTOM, TOP)
    out = f'<text class="mid" x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 36}">{escape(x)}</text>'
    for at, mark in up.marks():
        out += f'<path class="grid" d="M{LEFT} {at}H{RIGHT}"/>'
        out += f'<text class="end" x="{LEFT - 7}" y="{at + 4}">{mark}</text>'
    for at, mark in across.marks():
        out += f'<text class="mid" x="{at}" y="{BOTTOM + 18}">{mark}</text>'
    out += "".join(
        _curve(line, SERIES[i], across, up) for i, line in enumerate(drawn) if line.points
    )
    out = f'<g data-x="{across}" data-y="{up}">{out}</g>'
    keys = {line.name: SERIES[i] for i, line in enumerate(drawn) if line.name and line.points}
    return _figure(title, y if y != title else "", out, BOTTOM + 40, keys, remarks)


class Axis:
    """Values low..high, drawn from `start` to `end`; its text is what the page's script reads."""

    def __init__(self, values: Sequence[float], span: Any, start: float, end: float) -> None:
        self.share, self.start, self.end = span == (0, 1), start, end
        low, high = min(*values, *(span or values)), max(*values, *(span or values))
        size = (high - low) or abs(high) or 1.0
        power = 10.0 ** math.floor(math.log10(size / 5))
        step = power * next(m for m in (1, 2, 5, 10, 20) if size <= 5 * power * m)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        self.ticks = [i * step for i in range(first, max(last, first + 1) + 1)]
        if span:  # the ends of the range instead of round numbers
            inner = [tick for tick in self.ticks if low < tick < high - step / 2]
            self.ticks = [low, *inner, high]

    def at(self, value: float) -> float:
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return round(self.start + share * (self.end - self.start), 1)

    def marks(self) -> list[tuple[float, str]]:
        return [(self.at(t), f"{t:.0%}" if self.share else f"{t:.6g}") for t in self.ticks]

    def __str__(self) -> str:
        return f"{self.ticks[0]} {self.ticks[-1]} {self.start} {self.end} {int(self.share)}"


def _curve(line: Line, color: str, x: Axis, y: Axis) -> str:
    """A line and, where its points are few, its intervals and markers with tips."""
    points = " ".join(f"{x.at(p[0])},{y.at(p[1])}" for p in line.points)
    name, stroke = escape(line.name), f'style="stroke:{color}"'
    out = f'<polyline data-name="{name}" {stroke} points="{points}"/>'
    for at, value, *interval in line.points if len(line.points) <= MOST_MARKS else []:
        if interval:
            low, high = map(y.at, interval)
            out += f'<path class="interval" {stroke} d="M{x.at(at)} {low}V{high}"/>'
        out += f'<circle cx="{x.at(at)}" cy="{y.at(value)}" r="3.5" style="fill:{color}">'
        out += f"<title>{name}: {value:.4g} at {at:.4g}</title></circle>"
    return out


def bar_figure(title: str, note: str, bars: Mapping[str, float], whole: float = 1) -> Figure:
    """Horizontal bars, {name: value}: `whole` fills the width, and 1 means labels in per cent.

    Values that are not finite are named under the figure.
    """
    out, y, remarks = "", 0, []
    for name, value in bars.items():
        if not is_number(value):
            remarks.append(f"{name} is not finite.")
            continue
        width = max(0.0, min(value / whole, 1.0)) * WIDTH
        label, box = f"{value:.1%}" if whole == 1 else f"{value:.2f}", f'y="{y + 18}" height="12"'
        out += f'<text y="{y + 12}">{escape(name)}</text>'
        out += f'<text class="end" x="{WIDTH}" y="{y + 12}">{label}</text>'
        out += f'<rect class="track" width="{WIDTH}" rx="3" {box}/>'
        out += f'<rect width="{width:.1f}" rx="3" {box} style="fill:{SERIES[0]}"/>'
        y += 38
    return _figure(title, note, out, y, {}, remarks)


def _figure(
    title: str, note: str, drawing: str, height: float, keys: dict[str, str], remarks: list[str]
) -> Figure:
    """The drawing between its title and its legend of names and colours."""
    body, y = "", -6.0
    for line in textwrap.wrap(title, 44):
        y += 18
        body += f'<text class="title" y="{y}">{escape(line)}</text>'
    body += f'<text y="{y + 18}">{escape(note)}</text>'
    body += f'<g transform="translate(0 {y + 30})">{drawing}</g>'
    x, y = 0.0, y + height + 50
    for name, color in keys.items():
        width = 34 + 6.4 * len(name)
        if x and x + width > WIDTH:
            x, y = 0.0, y + 20
        body += f'<path class="key" d="M{x} {y}h14" style="stroke:{color}"/>'
        body += f'<text x="{x + 20}" y="{y + 4}">{escape(name)}</text>'
        x += width
    for text in textwrap.wrap(" ".join(remarks), 58):
        y += 20
        body += f'<text y="{y + 4}">{escape(text)}</text>'
    return Figure(title, y + 10, body)


def is_number(value: Any) -> bool:
    """A finite number of a size that can be drawn. True and False are no numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100
