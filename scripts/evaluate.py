"""Evaluate a run: the base beside its student under each policy of evaluate.policies, on held-out prompts.

    python scripts/evaluate.py configs/tiny.yaml --adapter runs/tiny-sft
    python scripts/evaluate.py configs/tiny.yaml 'evaluate.policies=[head, "fixed:2", "kl:8", "confidence:0.9"]'

Writes evaluation.json and evaluation.md into the run's directory. Same seed, same figures.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanoexit.config import load_config, parser
from nanoexit.errors import run_script
from nanoexit.evaluate import evaluate_run, table
from nanoexit.training import load_student


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--adapter", metavar="RUN_DIR", help="the run to evaluate (default: run.dir)")
    args = command.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    config.run.init = args.adapter or config.run.dir
    model, tokenizer = load_student(config)
    folder = Path(config.run.init)
    print(table(evaluate_run(model, tokenizer, config, folder, thorough=True)))
    print(f"\nwritten to {folder / 'evaluation.md'} and {folder / 'evaluation.json'}")


if __name__ == "__main__":
    run_script(main)
