"""Figures as SVG files of their own, which follow the reader's light or dark setting."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

CSS = Path(__file__).with_name("figures.css").read_text(encoding="utf-8")
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 380, 42, 346, 12, 180  # of the drawing and its axes
MOST_LINES, MOST_POINTS, MOST_MARKS = 8, 120, 30


@dataclass
class Figure:
    """A drawing that grows downwards."""

    title: str
    height: int = 0
    body: str = ""

    def write(self, text: str, style: str = "", kind: str = "") -> None:
        """Add `text`, wrapped; a `style` puts a stroke of that style before it, as a key."""
        if style and text:
            self.body += f'<path class="key" d="M0 {self.height + 14}h14" style="{style}"/>'
        x = 20 if style else 0
        for line in textwrap.wrap(text, 44 if kind else 54):
            self.height += 18
            self.body += f'<text class="{kind}" x="{x}" y="{self.height}">{escape(line)}</text>'

    def svg(self, alone: bool = True) -> str:
        """The SVG as a file of its own; if not `alone`, for a page that includes figures.css."""
        height = self.height + 20
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="'
            f'-10 -10 {WIDTH} {height}" role="img" aria-label="{escape(self.title)}">'
            f"{f'<style>{CSS}</style>' if alone else ''}"
            f'<rect class="paper" x="-10" y="-10" width="100%" height="100%"/>{self.body}</svg>\n'
        )


def line_figure(
    title: str, x: str, y: str, lines: Mapping, top: float = 0, colors: dict | None = None
) -> Figure:
    """Lines over axes that include zero and all points; the vertical one reaches at least `top`.
    lines: name -> points, (x, y) or (x, y, low, high) with an interval around y. colors: by name;
    new names are added. A line with the points or the colour of an earlier one is dashed."""
    names = [name for name, points in lines.items() if points]
    drawn = [sorted(p for p in lines[n] if all(map(is_number, p))) for n in names[:MOST_LINES]]
    across = Axis([point[0] for points in drawn for point in points], LEFT, RIGHT)
    up = Axis([top, *(v for points in drawn for point in points for v in point[1:])], BOTTOM, TOP)
    figure = Figure(title)
    figure.write(title, kind="title")
    figure.write(y)
    figure.body += f'<g transform="translate(0 {figure.height + 12})" data-x="{across}" '
    figure.body += f'data-y="{up}">{_axes(across, up, x)}'
    styles = []
    colors = {} if colors is None else colors
    for index, (name, points) in enumerate(zip(names, drawn)):
        style = f"color:{colors.setdefault(name, f'var(--s{len(colors) % MOST_LINES})')}"
        hides = style in styles or points in drawn[:index]
        styles.append(style + ";stroke-dasharray:4 4" * hides)
        figure.body += f'<g style="{styles[-1]}">{_curve(name, points, across, up)}</g>'
    figure.body += "</g>"
    figure.height += BOTTOM + 54
    for name, points, style in zip(names, drawn, styles):
        missing = len(lines[name]) - len(points)
        remark = f" (without {missing} points that are not numbers)" if missing else ""
        figure.write(name + remark, style)
    for name in names[MOST_LINES:]:
        figure.write(f"{name} (not drawn, beyond {MOST_LINES} lines)")
    return figure


class Axis:
    """Values from zero, drawn from `start` to `end`; report.js reads the axis from its str()."""

    def __init__(self, values: Sequence[float], start: float, end: float):
        self.start, self.end = start, end
        low, high = min([0, *values]), max([0, *values])
        size = (high - low) or 1.0
        power = 10.0 ** math.floor(math.log10(size / 5))
        step = power * next(m for m in (1, 2, 5, 10, 20) if size <= 5 * power * m)
        first, last = math.floor(low / step + 1e-9), math.ceil((low + size) / step - 1e-9)
        self.ticks = [i * step for i in range(first, last + 1)]

    def at(self, value: float) -> float:
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return round(self.start + share * (self.end - self.start), 1)

    def __str__(self) -> str:
        return f"{self.ticks[0]} {self.ticks[-1]} {self.start} {self.end}"


def _axes(x: Axis, y: Axis, label: str) -> str:
    out = f'<text class="mid" x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 36}">{escape(label)}</text>'
    for tick in y.ticks:
        out += f'<path class="grid" d="M{LEFT} {y.at(tick)}H{RIGHT}"/>'
        out += f'<text class="end" x="{LEFT - 7}" y="{y.at(tick) + 4}">{tick:.6g}</text>'
    for tick in x.ticks:
        out += f'<text class="mid" x="{x.at(tick)}" y="{BOTTOM + 18}">{tick:.6g}</text>'
    return out


def _curve(name: str, points: Sequence[tuple[float, ...]], x: Axis, y: Axis) -> str:
    """Few points have markers and intervals; fewer than three are not joined by a line."""
    path = " ".join(f"{x.at(p[0])},{y.at(p[1])}" for p in points[:: len(points) // MOST_POINTS + 1])
    kind = "curve" if len(points) > 2 else "apart"
    out = f'<polyline class="{kind}" data-name="{escape(name)}" points="{path}"/>'
    for at, value, *interval in points if len(points) <= MOST_MARKS else []:
        out += f'<circle cx="{x.at(at)}" cy="{y.at(value)}" r="3.5"/>'
        if interval:
            ends = "V".join(str(y.at(end)) for end in interval)
            out += f'<path class="interval" d="M{x.at(at)} {ends}"/>'
    return out


def is_number(value: Any) -> bool:
    """Whether this is a finite number small enough to draw. True and False are not numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100
