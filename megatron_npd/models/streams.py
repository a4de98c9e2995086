"""Tensors on their way between files: read row by row, made ahead in a bound of memory, hashed as they are written.

Legend: R rows; C all other dimensions.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from megatron_npd.errors import UserError
from megatron_npd.stoppable import check_stop

_BLOCK_BYTES = 2**24  # of numbers on their way through another type or to other columns
_LARGE = 2**18  # bytes, which take 0.1 ms to hash


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


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows of a tensor, as many as fit into a part of memory.

    Attributes:
        name: The tensor.
        first: The first row.
        shape: Of these rows, [R, ...].
        last: Whether the tensor ends with them.
    """

    name: str
    first: int
    shape: tuple[int, ...]
    last: bool


def blocks(name: str, shape: tuple[int, ...], dtype: torch.dtype, block_bytes: int) -> Iterator[Block]:
    """Cut a tensor into blocks of at most so many bytes, or one row."""
    rows = max(1, block_bytes // (torch.Size(shape[1:]).numel() * dtype.itemsize))
    for first in range(0, shape[0], rows):
        count = min(rows, shape[0] - first)
        yield Block(name=name, first=first, shape=(count, *shape[1:]), last=first + count == shape[0])


def in_order(
    fill: Callable[[Block, Tensor], object], work: Sequence[Block], dtypes: Mapping[str, torch.dtype], workers: int
) -> Generator[tuple[Block, Tensor], None, None]:
    """Blocks in order, filled ahead by threads: three more than there are threads lie in memory at a time.

    Args:
        fill: Gives a block its numbers; called in several threads.
        work: The blocks.
        dtypes: Type of each tensor.
        workers: Threads.

    Returns:
        Each block with its numbers, which stay until the one after the next is asked for.
    """
    sizes = [torch.Size(block.shape).numel() * dtypes[block.name].itemsize for block in work]
    # Memory that is used again costs a tenth of what new pages do.
    memory = [np.empty(max(sizes), np.uint8) for _ in range(workers + 3)]
    waiting: deque[tuple[Block, Tensor, Future[object]]] = deque()

    def taken() -> tuple[Block, Tensor]:
        check_stop()
        block, tensor, future = waiting.popleft()
        future.result()
        return block, tensor

    pool = ThreadPoolExecutor(workers)
    try:
        for number, (block, size) in enumerate(zip(work, sizes, strict=True)):
            if len(waiting) == len(memory) - 1:
                yield taken()
            data = torch.from_numpy(memory[number % len(memory)][:size])  # a storage of its own, as torch.save wants it
            tensor = data.view(dtypes[block.name]).view(block.shape)
            waiting.append((block, tensor, pool.submit(fill, block, tensor)))
        while waiting:
            yield taken()
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
            OSError: It cannot be written.
        """
        self.path, self.bytes = path, 0
        self.failure: OSError | None = None
        self._sha256 = hashlib.sha256()
        self._pools = ThreadPoolExecutor(1), ThreadPoolExecutor(1)  # one for each hash: its bytes come in order
        self._hashing: list[Future[None]] = []
        self._stream = open(path, "wb")  # noqa: SIM115  (closed by ``close``)

    def write(self, data: bytes | memoryview, also: Any = None) -> int:
        """Append bytes; they must stay as they are until ``settle`` or ``close`` has returned.

        Args:
            data: The bytes.
            also: Another hash to update with them, which is done once the file is closed.

        Raises:
            OSError: The disk is full.
        """
        view = memoryview(data)
        if view.nbytes < _LARGE:
            view = memoryview(bytes(view))
        for pool, digest in zip(self._pools, (self._sha256, also), strict=True):
            if digest is not None:
                self._hashing.append(pool.submit(digest.update, view))
        try:
            for start in range(0, view.nbytes, _LARGE):  # the system caches small parts in memory that it has at hand
                self._stream.write(view[start : start + _LARGE])
        except OSError as error:
            error.filename = str(self.path)
            self.failure = error
            raise
        self.bytes += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """For torch.save."""

    def close(self) -> str:
        """Write what is left and return the content's sha256, in hex."""
        for pool in self._pools:
            pool.shutdown()
        self.settle()
        self._stream.close()
        return self._sha256.hexdigest()

    def settle(self) -> None:
        """Wait until all that was appended is hashed; call it before each next part, whose making goes on meanwhile."""
        for future in self._hashing:
            future.result()
        self._hashing.clear()
