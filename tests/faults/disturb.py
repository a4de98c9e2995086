"""Makes the process it is installed in die, or its disk fail, at the N-th thing that it does to the file system.

Events are raw writes (of Python's files and of pyarrow's, safetensors' and torch's, which are led through Python's),
fsync, rename, replace, mkdir, unlink, rmdir, truncate and pwrite.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from pathlib import Path
from typing import Any

MODES = ("kill", "torn", "full", "short")


class Disturbance:
    """Counts events; installed once, for the rest of the process.

    Args:
        mode: ``kill``: die before event ``at``. ``torn``: the same, but a write is done by half. ``full``: from event
            ``at`` on, writes fail as on a full disk. ``short``: every write takes half of what it is given.
        at: Number of the event, from 1; 0: never.
    """

    def __init__(self, mode: str, at: int) -> None:
        self.mode, self.at, self.count = mode, at, 0

    def event(self) -> bool:
        """Whether the disk is full by now; does not return where this is the event to die at."""
        self.count += 1
        if self.mode in ("kill", "torn") and self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.mode == "full" and bool(self.at) and self.count >= self.at

    def write(self, raw: io.FileIO, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.mode == "torn" and self.count + 1 == self.at:
            io.FileIO.write(raw, view[: len(view) // 2])
        if self.event():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), raw.name)
        half = self.mode == "short" and len(view) > 1
        return io.FileIO.write(raw, view[: len(view) // 2] if half else view)

    def install(self) -> None:
        disturbance, real_open = self, builtins.open

        class Raw(io.FileIO):
            def write(self, data: Any, /) -> int:
                return disturbance.write(self, data)

        def opened(
            file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, *args: Any, **more: Any
        ) -> Any:
            # The process tree's hashes are in memory, and how many are kept there depends on time: no event.
            if not set(mode) & set("wax+") or isinstance(file, int) or str(file).startswith("/proc/"):
                return real_open(file, mode, buffering, encoding, *args, **more)
            raw = Raw(os.fspath(file), mode.replace("b", "").replace("t", ""))
            if buffering == 0:
                return raw
            buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
            if "b" in mode:
                return buffered
            return io.TextIOWrapper(buffered, encoding or "utf-8", *args, line_buffering=buffering == 1, **more)

        builtins.open = io.open = opened  # type: ignore[assignment]
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "ftruncate", "pwrite"):
            setattr(os, name, self._counted(getattr(os, name), name in ("mkdir", "pwrite")))
        _lead_through_python()

    def _counted(self, real: Any, needs_room: bool) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if self.event() and needs_room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
            return real(*args, **options)

        return call


def _lead_through_python() -> None:
    """Let pyarrow and torch write into Python's files."""
    import pyarrow.parquet as pq
    import torch

    class Writer(pq.ParquetWriter):
        def __init__(self, where: Any, schema: Any, **options: Any) -> None:
            self.own_file = open(where, "wb") if isinstance(where, str | Path) else None  # noqa: SIM115
            super().__init__(self.own_file or where, schema, **options)

        def close(self) -> None:
            super().close()
            if self.own_file is not None:
                self.own_file.close()

    real_save = torch.save

    def save(value: Any, where: Any, *args: Any, **options: Any) -> None:
        if not isinstance(where, str | Path):
            return real_save(value, where, *args, **options)
        with open(where, "wb") as stream:
            real_save(value, stream, *args, **options)

    torch.save = save
    pq.ParquetWriter = pq.core.ParquetWriter = Writer  # type: ignore[misc]
