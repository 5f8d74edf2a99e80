"""Write an HTML page: responses coloured by depth, and the figures of their runs.

python scripts/report.py runs/tiny
python scripts/report.py runs/sft runs/rl --out both.html
"""

import argparse
from pathlib import Path

import _script

from nanoexit.report import read_run, write_page


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="runs to show on one page")
    parser.add_argument("--out", metavar="FILE", help="default: report.html in the first RUN_DIR")
    parser.add_argument("--title", default="", help="default: the names of the runs")
    parser.add_argument("--note", default="", help="text under the title")
    args = parser.parse_args()
    runs = [read_run(folder) for folder in args.runs]
    out = Path(args.out) if args.out else Path(args.runs[0]) / "report.html"
    write_page(out, runs, args.title, args.note)
    responses, steps = sum(len(r.samples) for r in runs), sum(len(r.metrics) for r in runs)
    size = out.stat().st_size / 1e6
    print(f"wrote {out}: {responses} responses, {steps} steps, {size:.2f} MB")


if __name__ == "__main__":
    _script.run_main(main)
