"""The main job: the base model writes traces, a student with exits and adapters learns them while spending less depth.

    python scripts/train_sft.py configs/tiny.yaml                                    (minutes, on a laptop)
    torchrun --nproc-per-node 2 scripts/train_sft.py configs/tiny.yaml run.dir=runs/two    (the same, by two processes)

Traces that are missing are written first. --resume goes on with an interrupted run, to the same weights.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanoexit import sft
from nanoexit.config import load_config, parser
from nanoexit.errors import run_script
from nanoexit.evaluate import evaluate_run, table
from nanoexit.training import is_main, processes


def main() -> None:
    args = parser(__doc__, resume=True).parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    with processes(config):
        model, tokenizer, folder = sft.run(config, args.resume)
        if not is_main():
            return
        rows = evaluate_run(model, tokenizer, config, folder)
    print(f"\n{table(rows)}\n\nThe run is in {folder}. Next:")
    print(f"  python scripts/sample.py --adapter {folder}    shows the student, each token with the depth it used")
    print(f"  python scripts/report.py {folder}    draws training and responses on one page")


if __name__ == "__main__":
    run_script(main)
