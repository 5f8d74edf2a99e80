"""The experiment: charge a small reasoner for depth, and see whether it begins to think out loud.

    python scripts/experiment.py                        SFT, lambda = 0 and lambda = 1, one seed: minutes on a laptop
    python scripts/experiment.py --full --jobs 2        every arm, three seeds, two arms side by side

Stopped at any moment it goes on where it was. Writes results.json, table.md, SVG figures and index.html into --out.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from nanoexit import experiment
from nanoexit.config import ROOT
from nanoexit.errors import run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="change a key of configs/tiny_rl.yaml, for all arms")
    parser.add_argument("--full", action="store_true", help="all arms, seeds 0 to 2")
    parser.add_argument("--seeds", type=int, nargs="+", help="other seeds")
    parser.add_argument("--out", default="runs/experiment", help="where everything is written (default: runs/experiment)")
    parser.add_argument("--jobs", type=int, default=1, help="arms that run side by side, a core each")
    args = parser.parse_intermixed_args()
    arms, seeds, folder = experiment.FULL if args.full else experiment.DEFAULT, args.seeds or ([0, 1, 2] if args.full else [0]), Path(args.out)
    starts = [arm for arm in arms if arm.depth_weight is None]
    rest = [arm for arm in arms if arm not in starts]
    _all(args.jobs, experiment.make_base, [(arm.base, folder) for arm in starts], "bases")
    results = _all(args.jobs, experiment.run_arm, [(arm, seed, folder, args.overrides) for seed in seeds for arm in starts], "SFT")
    for result in results[: len(starts)]:
        if result["prompt_exits"] == "full":
            print(f"\n{experiment.preflight_lines(result)}")
    results += _all(args.jobs, experiment.run_arm, [(arm, seed, folder, args.overrides) for seed in seeds for arm in rest], "REINFORCE")
    order = [arm.name for arm in arms]
    results.sort(key=lambda r: (order.index(r["arm"]), r["seed"]))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    command = "python scripts/experiment.py" + " --full" * args.full + "".join(f" {o}" for o in args.overrides) + f" (commit {commit or 'unknown'})"
    experiment.write(results, folder, command)
    print(f"\n{experiment.table(results)}\n\n{folder / 'index.html'} shows it; the figures and results.json lie beside.")


def _all(jobs: int, function, calls: list[tuple], name: str) -> list:
    """function(*call) for every call, in order: one after the other, or `jobs` side by side."""
    if jobs == 1:
        return [function(*call) for call in calls]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_quiet) as pool:
        futures = [pool.submit(function, *call) for call in calls]
        for done in tqdm(as_completed(futures), name, len(calls), unit="arm", dynamic_ncols=True):
            done.result()  # an error is told at once
        return [future.result() for future in futures]


def _quiet() -> None:
    """The bars of processes side by side would write over each other."""
    sys.stderr = open(os.devnull, "w")


if __name__ == "__main__":
    run_script(main)
