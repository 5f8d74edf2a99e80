"""torchrun, except that an error is reported once and the failed process sets the exit code.

    python scripts/torchrun.py --nproc-per-node 2 scripts/train_sft.py configs/tiny.yaml

Takes torchrun's own options, including those for several machines.
"""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:  # it has already reported the error
            sys.exit(failure.exitcode)
        print(f"process {rank} ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        sys.exit(128 - failure.exitcode)
