"""Depth as colour: what a terminal gets, what a pipe gets, and whether people can read and tell it apart."""

import io

import pytest

from nanoexit.colors import SCALES, depth_color, legend, paint, terminal_colors
from nanoexit.errors import UserError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Makes a terminal with just these variables set."""

    def make(**variables: str) -> Terminal:
        for name in ("NO_COLOR", "COLORTERM", "TERM"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return Terminal()

    return make


def channels(color: str) -> list[float]:
    """sRGB text to linear light."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]


def luminance(color: str) -> float:
    red, green, blue = channels(color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_red_is_early_and_blue_is_late():
    """Catches a reversed scale and an off-by-one at the ends: depth 1, not 0, is the first colour, and L the last."""
    assert depth_color(1, 28) == SCALES["heat"][0] and depth_color(28, 28) == SCALES["heat"][-1]
    assert depth_color(1, 2) == SCALES["heat"][0] and depth_color(2, 2) == SCALES["heat"][-1]
    assert depth_color(1, 1) == SCALES["heat"][-1], "a model of one block only has full depth"
    assert depth_color(2, 9) == "#dc4b1e", "half way between the first two stops"
    assert len({depth_color(d, 28) for d in range(1, 29)}) == 28


@pytest.mark.parametrize("scale", SCALES)
def test_readable_on_white_and_on_black(scale):
    """Catches a pretty yellow that nobody can read on a light terminal, or a navy on a dark one (contrast 3 to 1 wanted)."""
    for depth in range(1, 65):
        light = luminance(depth_color(depth, 64, scale))
        assert 1.05 / (light + 0.05) >= 3 and (light + 0.05) / 0.05 >= 3, depth


def test_safe_scale_gets_darker_with_depth():
    """Catches a 'safe' scale that rests on hue alone: lightness must fall all the way, as for someone who sees no hue."""
    lights = [luminance(depth_color(d, 32, "safe")) for d in range(1, 33)]
    assert all(a > b for a, b in zip(lights, lights[1:])) and lights[0] > 2 * lights[-1]


def test_wrong_names_and_depths_are_refused():
    """Catches silent clamping: a depth of 0 or L + 1 is a bug of the caller, and a wrong scale names the right ones."""
    with pytest.raises(UserError, match="heat, safe.*did you mean 'safe'"):
        depth_color(1, 2, "save")
    for depth in (0, 3):
        with pytest.raises(ValueError):
            depth_color(depth, 2)


def test_colours_as_the_terminal_has(terminal):
    """Catches 24-bit codes sent to a terminal that has 256, any code to one that has none, and a NO_COLOR not obeyed."""
    assert terminal_colors(terminal(TERM="xterm-256color", COLORTERM="truecolor")) == 2**24
    assert terminal_colors(terminal(TERM="screen-256color")) == 256
    assert terminal_colors(terminal(TERM="dumb", COLORTERM="truecolor")) == 0
    assert terminal_colors(terminal(TERM="vt100")) == 0
    assert terminal_colors(terminal(TERM="xterm-256color", COLORTERM="truecolor", NO_COLOR="1")) == 0
    assert terminal_colors(terminal(TERM="xterm-256color", NO_COLOR="")) == 256, "an empty NO_COLOR is not set"


def test_paint(terminal):
    """Catches colour that leaks past the response (no reset), a code a token where a run shares one, and wrong colours."""
    painted = paint(["a", "b", "c"], [1, 1, 2], 2, terminal(TERM="xterm", COLORTERM="24bit"))
    assert painted == "\x1b[38;2;224;49;49mab\x1b[0m\x1b[38;2;47;111;224mc\x1b[0m"
    assert paint(["a"], [1], 2, terminal(TERM="xterm-256color")) == "\x1b[38;5;167ma\x1b[0m"
    assert "■ 1" in legend([1], 2, terminal(TERM="xterm-256color")) and "2" in legend([1], 2, terminal(TERM="xterm-256color"))


def test_piped_text_is_untouched(terminal):
    """Catches escape codes in a file: piped output is what the model wrote, byte for byte, whatever TERM says."""
    terminal(TERM="xterm-256color", COLORTERM="truecolor")
    assert paint(["a\x1b[2J", "\r\n"], [1, 2], 2, io.StringIO()) == "a\x1b[2J\r\n"
    assert legend([1], 2, io.StringIO()) == ""


@pytest.mark.parametrize("variables", [{"TERM": "xterm-256color"}, {"TERM": "xterm", "NO_COLOR": "1"}])
def test_a_response_cannot_drive_the_terminal(terminal, variables):
    """Catches a response that clears the screen or sets the title: ESC, BEL and the C1 CSI are shown, tab and newline kept."""
    painted = paint(["\x1b]0;owned\x07\x9b2J\tx\n"], [1], 2, terminal(**variables))
    assert "␛]0;owned␇\ufffd2J\tx\n" in painted
