"""Logging, progress bars, and how a command ends."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from megatron_npd.errors import USER_ERROR, UserError
from megatron_npd.lifeline import end_with_starter, has_starter
from megatron_npd.stoppable import StoppedBySignal

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_DISK_ERRORS += (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)  # something in the way
_DISK_ERRORS += (errno.ENOTSUP, errno.ENOSYS, errno.ENODEV, errno.ENOLCK, errno.ESTALE)  # what some file systems lack


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        rank = os.environ.get("RANK", "0")
        where = f" rank {rank}" if rank != "0" else ""
        level = "" if record.levelno == logging.INFO else f" {record.levelname}"
        return f"[{time.strftime('%H:%M:%S')}{where}{level}] {record.getMessage()}"


def get_logger() -> logging.Logger:
    """The package's logger: INFO on rank 0, warnings on the others, to stderr."""
    logger = logging.getLogger("megatron_npd")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter())
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    return logger


def wrote(what: object, next_command: str = "") -> None:
    """Say at the end of a command what it wrote and, where a user runs the stages one by one, which comes next.

    Args:
        what: Directory, file or state that is there now.
        next_command: The command that takes it, as far as it is known.
    """
    note = f"; next: {next_command}" if next_command and not has_starter() else ""
    get_logger().info("wrote %s%s", what, note)


def progress(total: int | None, desc: str, unit: str, initial: int = 0) -> tqdm:
    """A progress bar with rate and time left; silent where stderr is not a terminal or the rank is not 0.

    Args:
        total: Number of units the work has, or None where it is not known.
        desc: What is being done.
        unit: Name of one unit (``"tok"``, ``"sample"``, ``"step"``).
        initial: Units finished before, by an interrupted attempt.
    """
    hidden = not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"
    return tqdm(total=total, desc=desc, unit=unit, initial=initial, disable=hidden, dynamic_ncols=True, leave=False)


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command's ``main`` and exit: 0 when it finished or a signal stopped it so that it can go on, 2 after a user
    error, 130 after Ctrl-C.

    A disk that is full, read-only, broken or closed to us, or has something else in the place of a file or directory
    that we write, is a user error too; other exceptions keep their traceback
    (exit code 1). A command that another of our processes started ends with it.
    """
    end_with_starter()
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = USER_ERROR
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = f" for {error.filename}" if error.filename else ""
        print(
            f"error: the disk must have room and take our files, got '{error.strerror}'{where}; mend that, or use "
            "another file system, and run the same command again, finished work is kept",
            file=sys.stderr,
            flush=True,
        )
        code = USER_ERROR
    except StoppedBySignal as stop:
        print(f"stopped by {stop.name}; run the same command again to go on", file=sys.stderr, flush=True)
        code = 0
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code)
