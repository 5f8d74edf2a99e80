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
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        own = [code for code in codes.values() if code > 0]  # others were ended by torchrun
        if own:  # that process has already reported the error
            sys.exit(min(own))
        rank, code = next(iter(codes.items()))
        print(f"process {rank} ended by {signal.Signals(-code).name}", file=sys.stderr)
        sys.exit(128 - code)
