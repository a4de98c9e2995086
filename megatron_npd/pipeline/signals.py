"""What asks a run to stop and to be gone on with later: SIGTERM, Slurm's warning SIGUSR1, or its time is up."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from megatron_npd.pipeline.launch import Launcher
from megatron_npd.pipeline.nodes import Nodes
from megatron_npd.stoppable import StoppedBySignal

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Signals:
    """A context in which the first signal ends this node's part of a run as Ctrl-C does, but with exit code 0.

    The trainer is told at once, so that it saves while the rest ends. Later signals change nothing.

    Args:
        minutes: After which the run is to stop by itself; 0: never.

    Attributes:
        nodes: The way to the other nodes, where there are any: if one of those failed, so does this one.
        launcher: What has started the trainer, once it is there.
    """

    def __init__(self, minutes: float) -> None:
        self.nodes: Nodes | None = None
        self.launcher: Launcher | None = None
        self._stopped = False
        self._timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGUSR1)) if minutes else None

    def _stop(self, number: int, _: FrameType | None) -> None:
        if self._stopped:
            return
        if self.nodes is not None:
            self.nodes.check()
            self.nodes.tell_stopped()  # before the trainer ends: no other node must take that for a failure
        self._stopped = True
        if self.launcher is not None:
            self.launcher.ask_to_stop()
        raise StoppedBySignal(signal.Signals(number).name)

    def __enter__(self) -> Signals:
        self._before = []
        if threading.current_thread() is threading.main_thread():  # no other takes signals
            self._before = [signal.signal(number, self._stop) for number in _SIGNALS]
            if self._timer is not None:
                self._timer.daemon = True
                self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in zip(_SIGNALS, self._before, strict=False):
            signal.signal(number, handler)
