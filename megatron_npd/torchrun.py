"""torchrun, as ``python -m megatron_npd.torchrun``, that ends with the process that started it and leaves no files."""

from __future__ import annotations

import os
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from megatron_npd.errors import USER_ERROR
from megatron_npd.lifeline import end_with_starter

if __name__ == "__main__":
    end_with_starter()
    try:
        main(["--log-dir", os.devnull, *sys.argv[1:]])  # else it makes a directory in /tmp at each start
    except ChildFailedError as error:
        if error.get_first_failure()[1].exitcode != USER_ERROR:
            raise
        sys.exit(USER_ERROR)  # it is told already
