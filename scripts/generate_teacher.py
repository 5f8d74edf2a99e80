"""Write the teacher's traces and nothing else: what train_sft.py would write first, to be shared by several runs.

    python scripts/generate_teacher.py configs/tiny.yaml data.traces=runs/tiny-traces
    torchrun --nproc-per-node 2 scripts/generate_teacher.py configs/tiny.yaml data.traces=runs/tiny-traces

Interrupted, the same command goes on where it stopped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanoexit.config import load_config, parser
from nanoexit.errors import run_script
from nanoexit.teacher import make_traces, traces_folder
from nanoexit.training import is_main, load_student, processes


def main() -> None:
    args = parser(__doc__).parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    with processes(config):
        model, tokenizer = load_student(config)
        traces = make_traces(model, tokenizer, config)
        if is_main():
            tokens = sum(len(t.tokens) for t in traces)
            ended = sum(t.finish == "stop" for t in traces)
            print(f"{len(traces)} traces, {tokens} tokens, {ended / len(traces):.0%} ended by themselves, in {traces_folder(config)}")


if __name__ == "__main__":
    run_script(main)
