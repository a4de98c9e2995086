"""Why a training run stops before its last step: SIGTERM, Slurm's warning SIGUSR1, or its time is up."""

from __future__ import annotations

import os
import signal
import threading
import time
from math import inf
from types import FrameType

import torch.distributed as dist

from megatron_npd.config.training import TrainConfig
from megatron_npd.lifeline import has_lost_starter

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):
    """Raised on all ranks where a run is to stop while it waits for data: all that it did is saved."""


class Interrupt:
    """What asks a run to save after the step that it is in, and to stop; a context, in which signals are noted.

    Signals are taken where there is a directory to save to, and in a process's main thread; else they end the process
    at once, as they do where the process that started this one is gone: nobody waits then.

    Args:
        cfg: ``save`` and ``exit_duration_in_mins``.

    Attributes:
        reason: What asked for it, in words; empty: nothing, or it came to another rank.
    """

    def __init__(self, cfg: TrainConfig) -> None:
        self.reason = ""
        self._minutes = cfg.exit_duration_in_mins
        self._until = time.monotonic() + 60 * self._minutes if self._minutes else inf
        self._takes = bool(cfg.save) and threading.current_thread() is threading.main_thread()

    def asked(self) -> bool:
        """Whether this rank was asked; only rank 0 looks at the time: no two clocks agree."""
        if not self.reason and time.monotonic() >= self._until and dist.get_rank() == 0:
            self.reason = f"exit_duration_in_mins {self._minutes:g}"
        return bool(self.reason)

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self.reason and has_lost_starter():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.reason = self.reason or signal.Signals(number).name

    def __enter__(self) -> Interrupt:
        self._before = [signal.signal(number, self._note) for number in SIGNALS] if self._takes else []
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(SIGNALS, self._before, strict=False):
            signal.signal(number, handler)
