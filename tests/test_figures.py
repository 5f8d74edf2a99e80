"""Depth as colour, what a terminal gets, and figures as SVG."""

import io
import os
import re
from xml.etree import ElementTree

import pytest
from sample import TERMINAL, has_colors, legend, paint

from nanoexit.config import ROOT
from nanoexit.figures import Axis, line_figure

EVIL = '</text><script>"'
COLOURS = {"TERM": "xterm-256color"}


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def luminance(rgb: bytes) -> float:
    parts = [part / 255 for part in rgb]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_can_be_read():
    """Catches: a yellow that vanishes on white, a navy on black, a `safe` scale by hue only."""
    css = (ROOT / "nanoexit" / "report.css").read_text()
    page = [luminance(bytes.fromhex(stop)) for stop in re.findall(r"--h\d: #(\w+);", css)]
    cube = (0, 95, 135, 175, 215, 255)
    digits = [[(code - 16) // n % 6 for n in (36, 6, 1)] for code in TERMINAL]
    terminal = [luminance(bytes(cube[digit] for digit in code)) for code in digits]
    for light in page + terminal:
        assert 1.05 / (light + 0.05) >= 3 and (light + 0.05) / 0.05 >= 3
    safe = page[5:]
    assert len(safe) == 5 and safe == sorted(safe, reverse=True) and safe[0] > 2 * safe[-1]


def test_colours_as_the_terminal_has(monkeypatch):
    """Catches: codes that the terminal does not know, an ignored NO_COLOR, codes in a pipe."""
    for variables in (COLOURS, {"TERM": "alacritty", "COLORTERM": "truecolor", "NO_COLOR": ""}):
        monkeypatch.setattr(os, "environ", variables)
        assert has_colors(Terminal()) and not has_colors(io.StringIO())
        for plain in (variables | {"TERM": "dumb"}, variables | {"NO_COLOR": "1"}, {}):
            monkeypatch.setattr(os, "environ", plain)
            assert not has_colors(Terminal())


def test_paint(monkeypatch):
    """Catches: a reversed scale, colour that leaks past the response, a code for each token."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", COLOURS["TERM"])
    painted = paint(["a", "b", "c"], [1, 1, 2], 2, Terminal())
    assert painted == "\x1b[38;5;160mab\x1b[0m\x1b[38;5;26mc\x1b[0m", "red is early, blue is late"
    only = paint(["a"], [1], 1, Terminal())
    assert only == "\x1b[38;5;26ma\x1b[0m", "the only block is full depth"
    assert len({paint(["a"], [depth], 8, Terminal()) for depth in range(1, 9)}) == 8
    assert legend([1], 2, Terminal()) == "depth\x1b[38;5;160m  ■ 1\x1b[0m\x1b[38;5;26m  ■ 2\x1b[0m"
    assert legend([1], 2, io.StringIO()) == ""
    with pytest.raises(ValueError):
        paint(["a"], [1, 2], 2, Terminal())


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_response_cannot_drive_or_stop_the_terminal(encoding):
    """Catches: a response that clears the screen, or that a console cannot encode."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    pieces = ["日本 😀", "\ud83d", " a", "\x1b]0;owned\x07\x9b2J\tx\r"]
    stream.write(paint(pieces, [1, 1, 2, 2], 2, stream))
    stream.flush()
    expected = "日本 😀? a" if encoding == "utf-8" else "?? ?? a"
    expected += "\\x1b]0;owned\\x07\\x9b2J\tx\\x0d"
    assert stream.buffer.getvalue().decode(encoding) == expected


def test_axes_do_not_dramatize():
    """Catches: shares on an axis from 0.9, an axis that cuts a value off or divides by zero."""
    assert str(Axis([0.93, 0.94, 1], 0, 100)) == "0.0 1.0 0 100"
    assert Axis([3, 5, 28], 0, 100).ticks == [0, 10, 20, 30]
    for values in ([], [0, 0], [-3.2, 9.1], [1e-9, 2e-9], [0, 12345], [7], [-1e99, 1e99]):
        ticks = Axis(values, 0, 1).ticks
        assert ticks[0] <= min([0, *values]) and ticks[-1] >= max([0, *values])
        assert ticks == sorted(set(ticks)) and 2 <= len(ticks) <= 7


def test_a_line_stands_where_it_should():
    """Catches: an upside-down axis, an interval away from its point, a line that runs back."""
    points = [(2, 0.9, 0.8, 1.0), (1, 0.5, 0.4, 0.6)]
    svg = line_figure("t", "x", "y", {"a": points}, 1).svg()
    (x0, y0), (x1, y1) = (p.split(",") for p in re.search(r'points="(\S+) (\S+)"', svg).groups())
    bottom, top = map(float, re.search(rf'd="M{x0} (\S+)V(\S+)"', svg).groups())
    assert float(x0) < float(x1) and bottom > float(y0) > max(top, float(y1))


def test_lines_that_would_hide_or_say_too_much():
    """Catches: a line hidden by an equal one; two that look alike; a trend through two points."""
    three, two = [(0, 1), (1, 2), (2, 1)], [(0, 3), (1, 3)]
    colors, lines = {"c": "red", "d": "red"}, {"a": three, "b": three, "c": two, "d": [(0, 0)]}
    svg = line_figure("t", "x", "y", lines, 0, colors).svg()
    dashed = [";stroke-dasharray" in s for s in re.findall('<g style="(.*?)">', svg)]
    assert dashed == [False, True, False, True]
    assert re.findall('class="(curve|apart)"', svg) == ["curve", "curve", "apart", "apart"]
    later = line_figure("t", "x", "y", {"b": three}, 0, colors).svg()
    assert f'<g style="color:{colors["b"]}">' in later and colors["b"] != colors["a"]


def test_what_is_not_drawn_is_named():
    """Catches: a ninth line in the colour of the first, a NaN drawn, a point for each step."""
    lines = {f"arm {i}": [(n, 1) for n in range(10_000)] for i in range(10)}
    lines["arm 0"] = [(0, 1), (1, float("nan")), ("x", True)]
    svg = line_figure("t", "x", "y", lines | {"empty": []}).svg()
    assert svg.count("<polyline") == 8 and "nan" not in svg and svg.count(",") < 1000
    text = " ".join(ElementTree.fromstring(svg).itertext())
    assert "arm 0 (without 2 points that are not numbers)" in text and "empty" not in text
    assert "arm 8 (not drawn, beyond 8 lines) arm 9 (not drawn, beyond 8 lines)" in text


@pytest.mark.parametrize("alone", [True, False])
def test_names_are_text(alone):
    """Catches: a name that becomes markup, a file that is not XML or is drawn in black."""
    lines = {EVIL + str(i): [(0, 1), (1, i)] for i in range(9)}
    svg = line_figure(EVIL, EVIL, EVIL, lines).svg(alone)
    tree = ElementTree.fromstring(svg)
    assert not [node for node in tree.iter() if node.tag.endswith("script")]
    assert EVIL in "".join(tree.itertext())
    for name in re.findall(r"var\((--\w+)\)", svg) if alone else ():
        assert f"{name}: light-dark(" in svg, "an SVG in a README brings its colours"
