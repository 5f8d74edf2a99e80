"""torchrun, except that an error is reported once and the failed process sets the exit code.

    python scripts/torchrun.py --nproc-per-node 2 scripts/train_sft.py configs/tiny.yaml

Takes torchrun's own options, including those for several machines.
"""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def exit_code(codes: list[int]) -> int:
    """Of processes that ended, by a signal if negative: the one that failed by itself comes first.

    torchrun ends the others by a signal, and records them as failed in the same second.
    """
    own = [code for code in codes if code > 0]
    return min(own) if own else 128 - codes[0]


if __name__ == "__main__":
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main()
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        rank, code = next(iter(codes.items()))
        if max(codes.values()) < 0:  # else the process that failed has reported its error
            print(f"process {rank} ended by {signal.Signals(-code).name}", file=sys.stderr)
        sys.exit(exit_code([*codes.values()]))
