"""torchrun whose last word is the failed process's own message, and whose exit code is its own.

python scripts/launch.py --standalone --nproc_per_node=4 relabel/generate.py ...
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    logging.disable(logging.ERROR)  # its account of which process it ends, and how
    try:
        main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
