"""The main job: the base writes traces, and a student with exits and adapters learns from them.

    python scripts/train_sft.py configs/tiny.yaml                     minutes, on a laptop
    torchrun --nproc-per-node 2 scripts/train_sft.py configs/tiny.yaml run.dir=runs/two

Missing traces are written first. --resume continues an interrupted run, to the same weights.
"""

import _script

from nanoexit.config import load_config
from nanoexit.evaluate import evaluate_run, table
from nanoexit.sft import run_sft
from nanoexit.training import check, is_main, load_student, processes, run_directory


def main() -> None:
    args = _script.command_line(__doc__, resume=True).parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    check(config, args.resume)
    with processes(config):
        model, tokenizer = load_student(config)
        with run_directory(config, args.resume) as folder:
            run_sft(model, tokenizer, config, folder)
            if not is_main():
                return
            rows = evaluate_run(model, tokenizer, config, folder)
    print(f"\n{table(rows)}\n\nThe run is in {folder}. Next:")
    print(f"  python scripts/sample.py --adapter {folder}")
    print("      every token with the depth it used")
    print(f"  python scripts/report.py {folder}")
    print("      training and responses on one page")


if __name__ == "__main__":
    _script.run_main(main)
