"""REINFORCE: charge a student for depth, and it moves its reasoning into its text.

    python scripts/train_rl.py configs/tiny_rl.yaml
    python scripts/train_rl.py configs/tiny_rl.yaml rl.depth_weight=0    the same without the charge

Starts from the SFT run in run.init, which is made first if it is missing. --resume continues an
interrupted run.
"""

from dataclasses import replace
from pathlib import Path

import _script

from nanoexit.config import Config, UserError, load_config
from nanoexit.evaluate import evaluate_run, table
from nanoexit.reinforce import run_reinforce
from nanoexit.sft import run_sft
from nanoexit.training import check, is_main, load_student, processes, run_directory


def main() -> None:
    args = _script.command_line(__doc__, resume=True).parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    if not config.run.init:
        raise UserError(
            f"{args.config}: run.init: name the SFT run to start from, such as runs/tiny-sft"
        )
    if Path(config.run.init).resolve() == Path(config.run.dir).resolve():
        raise UserError(f"run.init: {config.run.init} is also run.dir; choose another run.dir")
    check(config, args.resume, reinforce=True)
    with processes(config):
        if not (Path(config.run.init) / "adapter" / "nanoexit.json").is_file():
            make_start(replace(config, run=replace(config.run, dir=config.run.init, init=None)))
        model, tokenizer = load_student(config)
        with run_directory(config, args.resume) as folder:
            run_reinforce(model, tokenizer, config, folder)
            if not is_main():
                return
            rows = evaluate_run(model, tokenizer, config, folder)
    print(f"\n{table(rows)}\n\nThe run is in {folder}. Next:")
    print(f"  python scripts/sample.py --adapter {folder}")
    print("      what it writes now")
    print(f"  python scripts/report.py {config.run.init} {folder}")
    print("      before and after, side by side")


def make_start(config: Config) -> None:
    """Make the SFT run that REINFORCE starts from, or continue an interrupted one."""
    resume = (Path(config.run.dir) / "checkpoint").is_dir()
    check(config, resume)
    model, tokenizer = load_student(config)
    with run_directory(config, resume) as folder:
        run_sft(model, tokenizer, config, folder)


if __name__ == "__main__":
    _script.run_main(main)
