"""CPU seconds of a contender: its whole process tree over time, for ``loop.py`` and ``long_tail.py``."""

from __future__ import annotations

import bisect
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil


class TreeClock:
    """CPU seconds of a process and all its descendants, those that have ended included, and when files appeared.

    Args:
        process: The root.
        directory: Where to look for files.
        pattern: Of files that are written once a policy is whole, below ``directory``.

    Attributes:
        seconds: So far.
        seen: CPU seconds when each file was first there.
        at: Times of the epoch at which it looked, and ``spent``, the CPU seconds until each.
    """

    def __init__(self, process: subprocess.Popen[Any], directory: Path, pattern: str) -> None:
        self._root, self._directory, self._pattern = psutil.Process(process.pid), directory, pattern
        self._spent: dict[tuple[int, float], float] = {}
        self.seen: dict[Path, float] = {}
        self.at, self.spent = [time.time()], [0.0]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def seconds(self) -> float:
        return sum(self._spent.values())

    def until(self, moment: float) -> float:
        """CPU seconds until a time of the epoch; between two looks as if they had been spent evenly."""
        right = bisect.bisect_left(self.at, moment)
        if right in (0, len(self.at)):
            return self.spent[min(right, len(self.at) - 1)]
        share = (moment - self.at[right - 1]) / (self.at[right] - self.at[right - 1])
        return self.spent[right - 1] + share * (self.spent[right] - self.spent[right - 1])

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        while self._look():
            for path in self._directory.glob(self._pattern):
                self.seen.setdefault(path, self.seconds)
            time.sleep(0.1)
        for path in self._directory.glob(self._pattern):
            self.seen.setdefault(path, self.seconds)

    def _look(self) -> bool:
        """Whether the root still runs."""
        try:
            processes = [self._root, *self._root.children(recursive=True)]
            running = self._root.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
        for process in processes:
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    self._spent[process.pid, process.create_time()] = times.user + times.system
            except psutil.NoSuchProcess:
                continue
        self.at.append(time.time())
        self.spent.append(self.seconds)
        return running


def contend(command: Sequence[str], directory: Path, pattern: str) -> TreeClock:
    """Run a contender with one thread a process, in an empty directory that keeps its ``log``; exits if it fails."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        )
        clock = TreeClock(process, directory, pattern)
        code = process.wait()
        clock.join()
    if code:
        sys.exit(f"error: {command[2:4]} must exit with 0, got {code}; see {directory / 'log'}")
    return clock
