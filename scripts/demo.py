"""Write the pages in data/demo: the answers of an experiment's arms, side by side.

    python scripts/experiment.py && python scripts/demo.py
    python scripts/experiment.py --real && python scripts/demo.py --real

Reads the run directories of one seed; --out writes to another page.
"""

import argparse
from pathlib import Path

import _script
from experiment import Arm

from nanoexit.config import ROOT, read_json
from nanoexit.report import read_run, write_page

TITLE = "Charge a model for depth, and it writes its reasoning down"
NOTE = """{base} Three students of it answer the same prompts, the first {count} of seed {seed}. SFT
taught one to write what the base writes at less depth. REINFORCE then rewarded two copies of it for
right answers; it charged one of them, lambda {charge:g}, for the deepest token of each response.
Base and SFT choose at random whether to write. What to notice: without the charge nothing is
written, and the answer is one deep token. With it nearly every step is written, and no token runs
deep, however long the chain. Under a low cap (Accuracy under a cap) only the charged model is still
right. With the reasoning cut (Reasoning cut), its answer changes and the others' stay."""
TINY = "A base of 8 blocks answers chains of operations, of which only the last digit is kept."
REAL = "SmolLM2 135M, 30 blocks, was taught to answer chains in English, written out or at once."


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--real", action="store_true", help="of the experiment with --real")
    parser.add_argument("--runs", help="run directories (runs/experiment, or runs/real)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="the page (index.html in data/demo, or real.html)")
    args = parser.parse_args()
    base, about = ("words", REAL) if args.real else ("shipped", TINY)
    folder = Path(args.runs or ("runs/real" if args.real else "runs/experiment"))
    runs = []
    charge = Arm(base=base).study.charge
    for weight in (None, 0.0, charge):
        arm = Arm(weight, base=base)
        run = read_run(arm.folder(folder, args.seed))
        run.name = arm.name
        run.samples = [sample for sample in run.samples if "step" not in sample]  # no rollouts
        runs.append(run)
    prompts = {sample["id"] for sample in runs[0].samples}
    note = NOTE.format(base=about, count=len(prompts), seed=args.seed, charge=charge)
    look = read_json(folder / "bases" / f"{base}.json")
    runs[0].samples = [*look.get("samples", []), *runs[0].samples]
    out = Path(args.out or ROOT / "data" / "demo" / ("real.html" if args.real else "index.html"))
    write_page(out, runs, TITLE, " ".join(note.split()))
    print(f"wrote {out}, {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    _script.run_main(main)
