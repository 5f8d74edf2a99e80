"""Depth as colour, for the page and the terminal alike: red left early, blue ran every block.

Two scales: `heat` (red, orange, gold, teal, blue) and `safe`, orange to blue and ever darker, which people with any of the
colour blindnesses, and a grey print, can tell apart. Every colour keeps a contrast of 3 to 1 both on white and on black,
because a program cannot know the background of a terminal.

A terminal gets 24-bit colour, the 256-colour cube or plain text, as COLORTERM and TERM say; NO_COLOR (no-color.org) and a
pipe mean plain. What a model wrote may hold escape sequences: on a terminal they are shown, not obeyed.
"""

import os
import re
from collections.abc import Sequence
from itertools import groupby
from typing import TextIO

from nanoexit.errors import UserError, nearest

SCALES = {
    "heat": ("#e03131", "#d9650b", "#a98600", "#13948c", "#2f6fe0"),
    "safe": ("#e27200", "#b17f52", "#83838a", "#4c7bb0", "#1a5fb4"),
}
RESET = "\x1b[0m"


def depth_color(depth: int, full_depth: int, scale: str = "heat") -> str:
    """The colour "#rrggbb" of a token that ran `depth` of `full_depth` blocks: 1 is the red end, full depth the blue."""
    if scale not in SCALES:
        raise UserError(f"colour scale {scale!r} is not one of {', '.join(SCALES)}{nearest(scale, SCALES)}")
    if not 1 <= depth <= full_depth:
        raise ValueError(f"depth {depth} is outside 1..{full_depth}")
    stops = [_rgb(stop) for stop in SCALES[scale]]
    place = (depth - 1) / (full_depth - 1) * (len(stops) - 1) if full_depth > 1 else len(stops) - 1
    left = min(int(place), len(stops) - 2)
    mixed = (a + (b - a) * (place - left) for a, b in zip(stops[left], stops[left + 1]))
    return "#" + "".join(f"{round(part):02x}" for part in mixed)


def terminal_colors(stream: TextIO) -> int:
    """How many colours `stream` shows: 2**24, 256, or 0 for a pipe, a dumb terminal or a user who set NO_COLOR."""
    term = os.environ.get("TERM", "")
    if not stream.isatty() or os.environ.get("NO_COLOR") or term in ("", "dumb"):
        return 0
    if os.environ.get("COLORTERM", "").lower() in ("truecolor", "24bit") or term.endswith("-direct"):
        return 2**24
    return 256 if "256" in term else 0


def paint(pieces: Sequence[str], depths: Sequence[int], full_depth: int, stream: TextIO, scale: str = "heat") -> str:
    """The pieces of a response as one string for `stream`, each in the colour of its depth where the stream has colours."""
    if len(pieces) != len(depths):
        raise ValueError(f"{len(pieces)} pieces of text but {len(depths)} depths")
    if stream.isatty():
        pieces = [_harmless(piece) for piece in pieces]
    colors = terminal_colors(stream)
    if not colors:
        return "".join(pieces)
    runs = groupby(zip(pieces, depths), key=lambda pair: pair[1])
    return "".join(
        _escape(depth_color(depth, full_depth, scale), colors) + "".join(piece for piece, _ in run) + RESET
        for depth, run in runs
    )


def legend(exit_layers: Sequence[int], full_depth: int, stream: TextIO, scale: str = "heat") -> str:
    """One line that says which colour is which depth, or "" where the stream has no colours to explain."""
    colors = terminal_colors(stream)
    if not colors:
        return ""
    depths = sorted({*exit_layers, full_depth})
    marks = [f"{_escape(depth_color(d, full_depth, scale), colors)}■ {d}{RESET}" for d in depths]
    return "depth  " + "  ".join(marks) + " (all blocks)"


def _rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def _escape(color: str, colors: int) -> str:
    """The escape sequence that starts text in `color`: exact, or the nearest of a 256-colour terminal's 6 x 6 x 6 cube."""
    red, green, blue = _rgb(color)
    if colors > 256:
        return f"\x1b[38;2;{red};{green};{blue}m"
    levels = (0, 95, 135, 175, 215, 255)
    r, g, b = (min(range(6), key=lambda i: abs(levels[i] - part)) for part in (red, green, blue))
    return f"\x1b[38;5;{16 + 36 * r + 6 * g + b}m"


def _harmless(text: str) -> str:
    """Control characters other than newline and tab as visible ones: ESC as its picture, the C1 set as a replacement mark."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda match: chr(0x2400 + ord(match[0])), text)
    return re.sub(r"[\x7f-\x9f]", "\ufffd", text)
