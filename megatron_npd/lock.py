"""One writer at a time: a lock file that names its holder, for directories that several machines may share.

The lock is the kernel's (``flock``), which ends with its holder however that dies. Some network file systems keep
such locks on each machine alone, so the file also says who holds it: a holder on this machine is dead once the kernel
gives the lock out again, one on another machine is believed until its file is removed by hand, unless it belongs to an
earlier start of the same Slurm job. The epoch counts the
holders; ``check_lock`` tells one that was declared dead too early, before it seals anything.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_npd.errors import UserError

LOCK = ".lock"
_held: dict[Path, bytes] = {}  # lock file -> what it must say


def _machine() -> dict[str, str]:
    """Name of this machine, and of its running kernel: containers change the first, reboots the second."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"host": socket.gethostname(), "boot": boot}


def _start() -> dict[str, str]:
    """The Slurm job that this process belongs to, and which of the job's starts that is; nothing outside of Slurm."""
    job = os.environ.get("SLURM_JOB_ID")
    return {"job": job, "start": os.environ.get("SLURM_RESTART_COUNT", "0")} if job else {}


def kernel_lock(fd: int, directory: str | Path) -> bool:
    """Take the kernel's lock of an open file of ``directory``; whether nobody else had it.

    Raises:
        UserError: The file system has no locks.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{directory} must be on a file system with locks, got '{error.strerror}' from flock; mount it with "
            "its flock option, or use another directory"
        ) from error
    return True


@contextmanager
def hold_lock(directory: str | Path, *, name: str = LOCK, trust_remote_holder: bool = True) -> Iterator[None]:
    """Hold ``directory/.lock``; a dead holder's is taken over.

    Args:
        directory: It must exist.
        name: Of the lock file, where it is for a part of the directory alone.
        trust_remote_holder: Stop for a holder on another machine whose lock the kernel gives out. False where what is
            written is safe without, and a job that starts again elsewhere must not wait for a hand.

    Raises:
        UserError: Another process holds it, or one on another machine may; the message names it.
    """
    directory = Path(directory)
    path = directory / name
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        if not kernel_lock(fd, directory):
            raise UserError(
                f"{directory} must have one writer, got a second one beside {_words(_read(fd))}; wait for it or stop it"
            )
        before, here, start = _read(fd), _machine(), _start()
        elsewhere = not any(before.get(name) == value != "" for name, value in here.items())
        # Slurm starts a job anew, maybe on other nodes, when nothing of its earlier starts is alive.
        requeued = start and before.get("job") == start["job"] and before.get("start") != start["start"]
        if trust_remote_holder and before.get("pid") and elsewhere and not requeued:
            raise UserError(
                f"{directory} must have one writer, got a second one beside {_words(before)}; if that one is gone, "
                f"remove {path} and rerun"
            )
        epoch = before.get("epoch")
        epoch = epoch + 1 if isinstance(epoch, int) else 1
        _write(fd, text := json.dumps({"epoch": epoch, "pid": os.getpid(), **here, **start}).encode() + b"\n")
        _held[key := directory.resolve() / name] = text
        try:
            yield
        finally:
            del _held[key]
            if _content(fd) == text:
                _write(fd, json.dumps({"epoch": epoch}).encode() + b"\n")
    finally:
        os.close(fd)


def check_lock(directory: str | Path) -> None:
    """Insist, where this process holds the lock of ``directory``, that nobody has taken it over since.

    Raises:
        UserError: The lock file names another holder or is gone.
    """
    path = Path(directory) / LOCK
    text = _held.get(Path(directory).resolve() / LOCK)
    now = path.read_bytes() if path.is_file() else b""
    if text is not None and now != text:
        raise UserError(
            f"{directory} must keep its writer (process {os.getpid()}), got a lock of {_words(_parse(now))}; this one "
            "stops, let the other finish or run again"
        )


def _content(fd: int) -> bytes:
    return os.pread(fd, 4096, 0)


def _read(fd: int) -> dict[str, Any]:
    return _parse(_content(fd))


def _parse(text: bytes) -> dict[str, Any]:
    """What a lock file says; nothing where it is empty or was cut by a kill."""
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    return {}


def _write(fd: int, text: bytes) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, text, 0)


def _words(holder: dict[str, Any]) -> str:
    if not holder.get("pid"):
        return "one that does not name itself"
    return f"process {holder['pid']} on {holder.get('host')} (epoch {holder.get('epoch')})"
