"""Evaluate runs: the base and the students, under each policy of evaluate.policies.

    python scripts/evaluate.py configs/tiny.yaml --adapter runs/tiny-sft
    python scripts/evaluate.py configs/tiny_rl.yaml --adapter runs/tiny-sft --adapter runs/tiny-rl

Measures accuracy, with free depth and under each cap of evaluate.caps; depth; how the answer
changes when the reasoning is cut or a value in it is changed, with free depth and capped; what a
monitor can read; a judge's scores (judge.kind); accuracy against depth (evaluate.frontier).

Writes evaluation.json and evaluation.md to the run directory. The same seed gives the same figures.
"""

from pathlib import Path

import _script

from nanoexit.adapters import adapter_folder
from nanoexit.config import load_config
from nanoexit.evaluate import evaluate_run, table
from nanoexit.training import check, load_student, lock_folder


def main() -> None:
    parser = _script.command_line(__doc__)
    parser.add_argument(
        "--adapter",
        metavar="RUN_DIR",
        action="append",
        help="a run to evaluate; may be repeated (default: run.dir)",
    )
    args = parser.parse_intermixed_args()
    configs = []
    for folder in args.adapter or [load_config(args.config, args.overrides).run.dir]:
        config = load_config(args.config, args.overrides)
        config.run.dir = config.run.init = folder
        adapter_folder(folder)
        check(config)
        configs.append(config)
    for folder in {Path(config.run.dir).resolve() for config in configs}:
        lock_folder(folder)  # held until this process ends
    tables = []
    for config in configs:
        model, tokenizer = load_student(config)
        folder = Path(config.run.dir)
        tables.append((folder.name, evaluate_run(model, tokenizer, config, folder, thorough=True)))
    print(f"\n{table(merge(tables))}\n")
    print("written to evaluation.md and evaluation.json in", ", ".join(c.run.dir for c in configs))


def merge(tables: list[tuple[str, list[dict]]]) -> list[dict]:
    """Rows of several runs for one table: the base once, then the students, named by their runs."""
    rows = tables[0][1][:1]
    for name, own in tables:
        rows += [{**row, "variant": name if len(tables) > 1 else row["variant"]} for row in own[1:]]
    return rows


if __name__ == "__main__":
    _script.run_main(main)
