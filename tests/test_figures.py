"""Depth as colour, what a terminal gets, and figures as SVG."""

import io
import re
from xml.etree import ElementTree

import pytest

from nanoexit import figures
from nanoexit.figures import Axis, Line, bar_figure, depth_colors, legend, line_figure, paint

EVIL = '</text><script>"'


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def luminance(color: str) -> float:
    parts = [part / 255 for part in bytes.fromhex(color[1:])]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_red_is_early_and_blue_is_late():
    """Catches: a reversed scale, an off-by-one at its ends, a wrong mixture between its stops."""
    heat = figures.SCALES["heat"]
    assert (depth_colors(28)[0], depth_colors(28)[-1]) == (heat[0], heat[-1])
    assert depth_colors(1) == [heat[-1]], "a model of one block only has full depth"
    assert depth_colors(9)[1] == "#dc4b1e", "half way between the first two stops"


@pytest.mark.parametrize("scale", figures.SCALES)
def test_scales_can_be_read(scale):
    """Catches: a yellow that vanishes on white, a navy on black, a `safe` scale of hue alone."""
    lights = [luminance(color) for color in depth_colors(32, scale)]
    assert all(1.05 / (light + 0.05) >= 3 and (light + 0.05) / 0.05 >= 3 for light in lights)
    if scale == "safe":
        assert lights == sorted(set(lights), reverse=True) and lights[0] > 2 * lights[-1]


def test_colours_as_the_terminal_has():
    """Catches: codes that the terminal does not know, an ignored NO_COLOR, codes in a pipe."""
    exact = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    assert figures.terminal_colors(Terminal(), exact) == 2**24
    assert figures.terminal_colors(Terminal(), {"TERM": "screen-256color", "NO_COLOR": ""}) == 256
    for variables in ({"TERM": "vt100"}, exact | {"TERM": "dumb"}, exact | {"NO_COLOR": "1"}):
        assert figures.terminal_colors(Terminal(), variables) == 0
    assert figures.terminal_colors(io.StringIO(), exact) == 0


def test_paint(monkeypatch):
    """Catches: colour that leaks past the response, a code for each token of a run, wrong codes."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    painted = paint(["a", "b", "c"], [1, 1, 2], 2, Terminal())
    assert painted == "\x1b[38;2;224;49;49mab\x1b[0m\x1b[38;2;47;111;224mc\x1b[0m"
    monkeypatch.delenv("COLORTERM")
    assert paint(["a"], [1], 2, Terminal()) == "\x1b[38;5;167ma\x1b[0m"
    assert "■ 1" in legend([1], 2, Terminal()) and "■ 2" in legend([1], 2, Terminal())
    assert legend([1], 2, io.StringIO()) == ""
    with pytest.raises(ValueError):
        paint(["a"], [1, 2], 2, Terminal())


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_a_response_cannot_drive_the_terminal(stream, monkeypatch):
    """Catches: a response that clears the screen or sets the title, on a terminal or in a pipe."""
    monkeypatch.setenv("NO_COLOR", "1")
    painted = paint(["\x1b]0;owned\x07\x9b2J\tx\r\n"], [1], 2, stream)
    assert painted == "\\x1b]0;owned\\x07\\x9b2J\tx\\x0d\n"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_console_without_the_character(encoding):
    """Catches: a UnicodeEncodeError on a console that cannot show a token, or half a surrogate."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    stream.write(paint(["日本 😀", "\ud83d", " a"], [1, 1, 2], 2, stream))
    stream.flush()
    expected = "日本 😀? a" if encoding == "utf-8" else "?? ?? a"
    assert stream.buffer.getvalue().decode(encoding) == expected


# --- figures ------------------------------------------------------------------------------------


def test_axes_do_not_dramatize():
    """Catches: shares on an axis from 0.9, an axis that cuts a value off or divides by zero."""
    assert Axis([0.93, 0.94], (0, 1), 0, 100).marks()[0] == (0, "0%")
    assert Axis([0.93, 0.94], (0, 1), 0, 100).marks()[-1] == (100, "100%")
    assert [mark for _, mark in Axis([3, 5], (0, 28), 0, 100).marks()] == ["0", "10", "20", "28"]
    for values in ([0, 0], [-3.2, 9.1], [1e-9, 2e-9], [0, 12345], [7], [-1e99, 1e99]):
        ticks = Axis(values, None, 0, 1).ticks
        assert ticks[0] <= min(values) and ticks[-1] >= max(values) and 2 <= len(ticks) <= 7
        assert ticks == sorted(set(ticks))
    assert Axis([2.0], (0, 1), 0, 1).at(2.0) == 1, "a wrong share stays inside the figure"


def test_a_line_stands_where_it_should():
    """Catches: an upside-down axis, an interval away from its point, an axis without zero."""
    points = [(1, 0.5, 0.4, 0.6), (2, 0.9, 0.8, 1.0)]
    svg = line_figure("t", "x", "y", [Line("a", points)], y_range=(0, 1)).svg()
    (x0, y0), (x1, y1) = (p.split(",") for p in re.search(r'points="(\S+) (\S+)"', svg).groups())
    assert float(x0) < float(x1) and float(y0) > float(y1)
    bottom, top = map(float, re.search(rf'd="M{x0} (\S+)V(\S+)"', svg).groups())
    assert bottom > float(y0) > top
    flat = line_figure("t", "x", "y", [Line("a", [(0, 8.0), (1, 8.2)])]).svg()
    assert re.search(r'data-y="(\S+) ', flat)[1] == "0.0", "without a range the axis has its zero"


def test_what_is_not_drawn_is_named():
    """Catches: a ninth line in the colour of the first, a NaN drawn, a point for each step."""
    lines = [Line(f"arm {i}", [(n, 1) for n in range(10_000)]) for i in range(10)]
    lines[0] = Line("arm 0", [(0, 1), (1, float("nan"))])
    svg = line_figure("t", "x", "y", lines).svg()
    assert svg.count("<polyline") == 8 and "nan" not in svg and svg.count(",") < 1000
    text = " ".join(ElementTree.fromstring(svg).itertext())
    assert "arm 0: 1 of 2 points are not finite." in text
    assert "Not drawn, beyond 8 lines: arm 8, arm 9." in text
    bars = bar_figure("t", "n", {"a": float("nan"), "b": 0.5}).svg()
    assert "a is not finite." in bars and "nan" not in bars
    assert "0 of" not in line_figure("t", "x", "y", [Line("empty", [])]).svg()


def test_bars_stay_inside():
    """Catches: a bar that runs out of the figure, or is drawn against a wrong whole."""
    svg = bar_figure("t", "n", {"a": 0.25, "b": 9, "c": -1}).svg()
    widths = re.findall(r'<rect width="(\S+)" rx="3" y="\d+" height="12" style', svg)
    assert widths == ["90.0", "360.0", "0.0"]
    depths = bar_figure("t", "n", {"a": 7.0}, whole=28).svg()
    assert '<rect width="90.0"' in depths and ">7.00<" in depths and "25.0%" in svg


@pytest.mark.parametrize("alone", [True, False])
def test_names_are_text(alone):
    """Catches: a name that becomes markup, a file that is no XML or is drawn in black."""
    lines = [Line(EVIL + str(i), [(0, 1), (1, i)]) for i in range(9)]
    for figure in line_figure(EVIL, EVIL, EVIL, lines), bar_figure(EVIL, EVIL, {EVIL: 1}):
        tree = ElementTree.fromstring(figure.svg(alone))
        assert not [node for node in tree.iter() if node.tag.endswith("script")]
        assert EVIL in "".join(tree.itertext())
        for name in re.findall(r"var\((--\w+)\)", figure.svg(alone)) if alone else ():
            assert f"{name}: light-dark(" in figure.svg(), "an SVG in a README brings its colours"
