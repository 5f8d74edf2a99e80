"""Puts the repository on sys.path, so that the scripts run without installing the package.

Until run_script takes over, Ctrl-C and SIGTERM end a script at once, as imports take seconds.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def stop(number: int, _: Any) -> None:
    os.write(2, b"stopped before any work was done\n")
    os._exit(128 + number)


if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # not in tests
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
