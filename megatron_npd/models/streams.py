"""Tensors on their way between files: read row by row, made ahead within a bound of memory, hashed as they are written.

Legend: R rows; C all other dimensions.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch
from torch import Tensor

from megatron_npd.errors import UserError
from megatron_npd.stoppable import check_stop

_T = TypeVar("_T")
_BLOCK_BYTES = 2**24  # of numbers on their way through another type or to other columns
_WORTH_A_THREAD = 2**18  # bytes, hashed in 0.1 ms


def default_workers() -> int:
    """Threads that read and convert; four of them keep up with the one that writes."""
    return min(4, len(os.sched_getaffinity(0)))


def read_rows(file: Path, start: int, dtype: torch.dtype, out_RC: Tensor) -> None:
    """Fill a tensor with numbers that lie one row after another in a file, cast to its type.

    Args:
        file: The file.
        start: Byte at which the first row begins.
        dtype: Type that the numbers have in the file.
        out_RC: What to fill, [R, ...], with any strides.

    Raises:
        UserError: The file cannot be read, or ends before.
    """
    try:
        with open(file, "rb", buffering=0) as stream:
            stream.seek(start)
            if out_RC.dtype == dtype and out_RC.is_contiguous():
                _fill(stream, out_RC)
                return
            rows = max(1, _BLOCK_BYTES // max(1, out_RC[:1].numel() * dtype.itemsize))
            block_RC = torch.empty((min(rows, len(out_RC)), *out_RC.shape[1:]), dtype=dtype)
            for part_RC in out_RC.split(rows):
                _fill(stream, block_RC[: len(part_RC)])
                part_RC.copy_(block_RC[: len(part_RC)])
    except (OSError, EOFError) as error:
        raise UserError(f"{file} must be readable as it was when it was opened, got {error}; restore it") from error


def _fill(stream: BinaryIO, tensor: Tensor) -> None:
    view = as_bytes(tensor).numpy().data
    while view:
        if not (count := stream.readinto(view)):  # pyright: ignore[reportAttributeAccessIssue]  (of a raw file)
            raise EOFError(f"its end {len(view)} bytes too early")
        view = view[count:]


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's own memory, uint8 [bytes]."""
    return tensor.view(-1).view(torch.uint8)


def in_order(
    make: Callable[[str], _T], sizes: Mapping[str, int], *, workers: int, held_bytes: int
) -> Generator[tuple[str, _T], None, None]:
    """Results of ``make`` in the order of ``sizes``, made ahead by threads.

    Args:
        make: Gives the result of a name; called in several threads.
        sizes: Name -> bytes that its result takes.
        workers: Threads.
        held_bytes: What all results together may take that are begun and that the caller has not done with (it has
            when it asks for the next one): one alone may take more.
    """
    waiting: deque[tuple[str, Future[_T]]] = deque()
    held = 0
    pool = ThreadPoolExecutor(workers)
    try:
        for name, size in (*sizes.items(), (None, 0)):
            while waiting and (name is None or held + size > held_bytes):
                check_stop()
                first, future = waiting.popleft()
                result = future.result()
                del future
                yield first, result
                del result
                held -= sizes[first]
            if name is not None:
                waiting.append((name, pool.submit(make, name)))
                held += size
    finally:
        pool.shutdown(cancel_futures=True)


class HashedFile:
    """A file that is written from its begin to its end, and hashed beside.

    Attributes:
        path: The file.
        bytes: What has been written.
        failure: What a write ended in: torch.save says of it only that there was one.
    """

    def __init__(self, path: Path) -> None:
        """Create it.

        Raises:
            UserError: It cannot be written.
        """
        self.path, self.bytes = path, 0
        self.failure: OSError | None = None
        self._sha256 = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self._stream = open(path, "wb")  # noqa: SIM115  (closed by ``close``)

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes; OSError where the disk is full."""
        view = memoryview(data)
        hashing = None
        if view.nbytes < _WORTH_A_THREAD:
            self._sha256.update(view)
        else:
            hashing = self._pool.submit(self._sha256.update, view)
        try:
            self._stream.write(view)
        except OSError as error:
            error.filename = str(self.path)
            self.failure = error
            raise
        finally:
            if hashing is not None:
                hashing.result()
        self.bytes += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """For torch.save."""

    def close(self) -> str:
        """Write what is left and return the content's sha256, in hex."""
        self._pool.shutdown()
        self._stream.close()
        return self._sha256.hexdigest()
