"""Files that outlive a power cut: flushed to the disk, and put in place as a whole."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def fsync_path(path: str | Path) -> None:
    """Flush a file or a directory entry to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fsync(fd, path)
    finally:
        os.close(fd)


def fsync(fd: int, path: str | Path) -> None:
    """Flush an open file or directory to the disk; ``path`` is what an error names."""
    try:
        os.fsync(fd)
    except OSError as error:
        # Some FUSE and network file systems do not sync directories: there a name is as safe as they make it.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS) or not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(error.errno, f"{error.strerror} (fsync)", str(path)) from error


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Write a small file so that a reader sees the old content or the new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as stream:
        stream.write(data.encode() if isinstance(data, str) else data)
        stream.flush()
        fsync(stream.fileno(), path)
    os.replace(temporary, path)
    fsync_path(path.parent)
