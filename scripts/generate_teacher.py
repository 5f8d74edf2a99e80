"""Write only the teacher's traces, which train_sft.py would otherwise write first.

    python scripts/generate_teacher.py configs/tiny.yaml
    torchrun --nproc-per-node 2 scripts/generate_teacher.py configs/tiny.yaml data.traces=traces

The same command continues interrupted work, with or without --resume. train_sft.py with the same
config uses the traces; a folder named in data.traces can serve several runs.
"""

import _script

from nanoexit.config import load_config
from nanoexit.teacher import make_traces
from nanoexit.training import check, is_main, load_student, processes


def main() -> None:
    args = _script.command_line(__doc__, resume=True).parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    check(config)
    with processes(config):
        model, tokenizer = load_student(config)
        traces = make_traces(model, tokenizer, config)
        if is_main():
            tokens = sum(len(t.tokens) for t in traces)
            ended = sum(t.finish == "stop" for t in traces) / len(traces)
            where = config.data.traces or f"{config.run.dir}/traces"
            print(f"{len(traces)} traces, {tokens} tokens, {ended:.0%} with an end token: {where}")


if __name__ == "__main__":
    _script.run_main(main)
