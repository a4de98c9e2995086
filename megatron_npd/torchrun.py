"""torchrun, as ``python -m megatron_npd.torchrun``, that ends with the process that started it and leaves no files.

SIGTERM and SIGUSR1 are the ranks' to take, a trainer's save and end by themselves: torchrun would end them after 30 s
at SIGTERM, and die of the other.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from megatron_npd.errors import USER_ERROR
from megatron_npd.lifeline import end_with_starter, has_lost_starter


def _pass_on(number: int, _: FrameType | None) -> None:
    ranks = psutil.Process().children()
    if has_lost_starter() or not ranks:
        raise SignalException(f"got {signal.Signals(number).name}", signal.Signals(number))
    for rank in ranks:
        rank.send_signal(number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _pass_on)
    signal.signal(signal.SIGUSR1, _pass_on)
    end_with_starter()
    try:
        # Without the log directory it makes one in /tmp at each start.
        main(["--log-dir", os.devnull, "--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as error:
        if error.get_first_failure()[1].exitcode != USER_ERROR:
            raise
        sys.exit(USER_ERROR)  # it is told already
