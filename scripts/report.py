"""Write the page that people look at: responses coloured by depth, and the figures of one or more runs.

    python scripts/report.py runs/tiny
    python scripts/report.py runs/sft runs/rl --out both.html
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanoexit.errors import run_script
from nanoexit.report import read_run, write_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="a run directory; several share one page, side by side")
    parser.add_argument("--out", metavar="FILE", help="where to write the page (default: report.html in the first RUN_DIR)")
    args = parser.parse_args()
    runs = [read_run(folder) for folder in args.runs]
    out = Path(args.out) if args.out else Path(args.runs[0]) / "report.html"
    write_runs(out, runs)
    print(f"wrote {out}: {sum(len(run.samples) for run in runs)} responses, {sum(len(run.metrics) for run in runs)} steps, "
          f"{out.stat().st_size / 1e6:.2f} MB")  # fmt: skip


if __name__ == "__main__":
    run_script(main)
