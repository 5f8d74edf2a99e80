"""What the scripts share: the path to the package, a config's command line, exit codes.

The repository goes on sys.path, so that the scripts run without installing the package. Until
`run_main` takes over, Ctrl-C and SIGTERM end a script at once, as imports take seconds.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def report_once(line: str) -> None:
    """Print to stderr; of torchrun's processes, only the first that reports does."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    with contextlib.suppress(FileExistsError):
        if file:
            (Path(file).parents[1] / "reported").touch(exist_ok=False)
        print(line, file=sys.stderr)


def end_at_once(number: int, _: Any) -> None:
    report_once("stopped before any work was done")
    os._exit(128 + number)


if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # not in tests
    signal.signal(signal.SIGINT, end_at_once)
    signal.signal(signal.SIGTERM, end_at_once)

from nanoexit.config import Config, UserError  # noqa: E402


def command_line(doc: Any, resume: bool = False, schema: Any = Config) -> argparse.ArgumentParser:
    """What scripts with a config share: CONFIG [a.b=c ...] [--resume], with every key in --help."""
    epilog = "keys, with their defaults:\n"
    for section, knobs in vars(schema()).items():
        for f in fields(knobs):
            default = json.dumps(getattr(knobs, f.name))
            epilog += f"  {section}.{f.name} = {default}\n      {f.metadata['doc']}\n"
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw, epilog=epilog)
    parser.add_argument("config", help="a YAML file, such as configs/tiny.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="key and value")
    if resume:
        parser.add_argument("--resume", action="store_true", help="continue the run in run.dir")
    return parser


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main. Exit codes, with one line each: 2 UserError, 130 Ctrl-C, 143 SIGTERM."""

    def stop(number: int, _: Any) -> None:
        raise KeyboardInterrupt(number)

    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        signal.signal(number, stop)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115  None: it is closed
        stream.reconfigure(errors="replace")
        setattr(sys, name, stream)
    try:
        main()
        sys.stdout.flush()
    except (UserError, OSError) as error:  # OSError: disk full, no permission
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        if not isinstance(error, BrokenPipeError):  # `... | head` closed our output: not an error
            report_once(f"error: {UserError(str(error))}")
            raise SystemExit(2) from None
    except KeyboardInterrupt as stopped:
        for number in signals:  # a second one adds no traceback
            signal.signal(number, signal.SIG_IGN)
        report_once("stopped: what was written is kept; --resume continues from a checkpoint")
        raise SystemExit(128 + stopped.args[0]) from None
