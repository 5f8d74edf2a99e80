"""Write the page in data/demo: the answers of an experiment's arms, side by side.

    python scripts/experiment.py && python scripts/demo.py

Reads the run directories of one seed; --out writes to another page.
"""

import argparse
from pathlib import Path

import _path  # noqa: F401
from experiment import CHARGED, SFT, UNCHARGED

from nanoexit.config import ROOT, read_json, run_script
from nanoexit.report import read_run, write_page

TITLE = "Charge a model for depth, and it writes its reasoning down"
NOTE = """A small base model answers chains of operations, of which only the last digit is kept.
Three students of it answer the same prompts. SFT taught the first to write the same at less
depth. REINFORCE then rewarded two copies of it for right answers; it charged one of them, lambda
3, for the deepest token of each response. What to notice: without the charge nothing is written,
and the answer is one deep token. With it nearly every step is written, and no token runs deep,
however long the chain. Under a cap of three or four blocks (Accuracy under a cap) only the
charged model is still right. With the text cut (Reasoning cut), its answer is lost and theirs
stay."""


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--runs", default="runs/experiment", help="experiment's runs (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(ROOT / "data" / "demo" / "index.html"))
    args = parser.parse_args()
    runs = []
    for arm in (SFT, UNCHARGED, CHARGED):
        run = read_run(arm.folder(Path(args.runs), args.seed))
        run.name = arm.name
        run.samples = [sample for sample in run.samples if "step" not in sample]  # no rollouts
        runs.append(run)
    look = read_json(Path(args.runs) / "bases" / "shipped.json")
    runs[0].samples = [*look.get("samples", []), *runs[0].samples]
    out = Path(args.out)
    write_page(out, runs, TITLE, " ".join(NOTE.split()))
    print(f"wrote {out}, {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run_script(main)
