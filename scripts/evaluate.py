"""Evaluate runs: the base beside their students under each policy of evaluate.policies, on held-out prompts.

    python scripts/evaluate.py configs/tiny.yaml --adapter runs/tiny-sft
    python scripts/evaluate.py configs/tiny_rl.yaml --adapter runs/tiny-sft runs/tiny-rl

Accuracy, depth and divergence; the rubric's scores (judge.kind); what the answer does when the reasoning is cut or a value in it is
changed; and accuracy against depth for each policy of evaluate.frontier.

Writes evaluation.json and evaluation.md into the run's directory. Same seed, same figures.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanoexit.config import load_config, parser
from nanoexit.errors import run_script
from nanoexit.evaluate import evaluate_run, merge, table
from nanoexit.training import load_student


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--adapter", metavar="RUN_DIR", nargs="+", help="the run to evaluate, or several (default: run.dir)")
    args = command.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    tables = []
    for folder in map(Path, args.adapter or [config.run.dir]):
        config.run.init = str(folder)
        model, tokenizer = load_student(config)
        tables.append((folder.name, evaluate_run(model, tokenizer, config, folder, thorough=True)))
    print(table(merge(tables)))
    print("\nwritten to evaluation.md and evaluation.json in " + ", ".join(str(f) for f in args.adapter or [folder]))


if __name__ == "__main__":
    run_script(main)
