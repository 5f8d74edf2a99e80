"""How nanoexit speaks of a user's mistake: one line that says what was wrong, where, and what would be right.

The library raises `UserError`; a script hands its `main` to `run_script`, which prints that line and exits with code 2.
Anything else that reaches the top is a bug of ours and keeps its traceback.
"""

import difflib
import os
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """A mistake in what the user gave: a file, a key, a tensor, a flag. The message is one complete line."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """'; did you mean X?' where one of `allowed` is close to `word`, else an empty string."""
    close = difflib.get_close_matches(str(word), [str(a) for a in allowed], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main: a UserError ends in one line and exit code 2, Ctrl-C in exit code 130."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted: what was written so far is kept; --resume goes on where there is a checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `... | head` closed our output: not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
