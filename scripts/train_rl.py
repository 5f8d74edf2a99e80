"""REINFORCE: charge a student for depth, and it moves its reasoning into what it writes.

    python scripts/train_rl.py configs/tiny_rl.yaml                     (a minute or two, on a laptop)
    python scripts/train_rl.py configs/tiny_rl.yaml rl.depth_weight=0   the same without the charge

Starts from the run in run.init; where there is none yet, that SFT run is made first. --resume goes on with an interrupted run.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanoexit import reinforce, sft
from nanoexit.adapters import save_adapter
from nanoexit.config import load_config, parser
from nanoexit.errors import UserError, run_script
from nanoexit.evaluate import evaluate_run, table
from nanoexit.training import is_main, load_student, processes, start_run


def main() -> None:
    args = parser(__doc__, resume=True).parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    if not config.run.init:
        raise UserError(f"{args.config}: run.init: REINFORCE starts from an SFT run: name one, such as runs/tiny-sft")
    with processes(config):
        if not (Path(config.run.init) / "adapter" / "nanoexit.json").is_file():
            first = replace(config, run=replace(config.run, dir=config.run.init, init=None))
            sft.run(first, resume=(Path(first.run.dir) / "checkpoint").is_dir())
        model, tokenizer = load_student(config)
        folder = start_run(config, args.resume)
        reinforce.train(model, tokenizer, config, folder)
        if not is_main():
            return
        save_adapter(model, folder / "adapter")
        rows = evaluate_run(model, tokenizer, config, folder)
    print(f"\n{table(rows)}\n\nThe run is in {folder}. Next:")
    print(f"  python scripts/sample.py --adapter {folder}    shows what it writes now")
    print(f"  python scripts/report.py {config.run.init} {folder}    shows before and after side by side")


if __name__ == "__main__":
    run_script(main)
