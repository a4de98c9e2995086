"""How the tensors of a checkpoint come to the disk: each rank writes its share, in this process, and hashes it.

Data-parallel ranks hold the same weights: they share the writing, by megatron-core's fully parallel strategies.
"""

from __future__ import annotations

import functools
import queue
import sys
import threading
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.utils import _DistWrapper

from megatron_npd.errors import UserError
from megatron_npd.manifest import file_sha256
from megatron_npd.models.checkpoint_files import first_failure
from megatron_npd.platform.mcore_versions import NEWER, SAVE_OPTIONS


class Writing:
    """This rank's part of one writing; all ranks make it together, and ``finish`` it together.

    Args:
        tensors: megatron-core's sharded state.
        path: An empty directory.
        in_background: A thread writes, and the state may change before ``finish``: what lies in the host's memory is
            copied first. Else all is written at the return.
    """

    def __init__(self, tensors: dict[str, Any], path: Path, *, in_background: bool) -> None:
        # The writer hands its results over through a queue of this module, which is by default another process's.
        if filesystem_async._results_queue is None:
            filesystem_async._results_queue = queue.Queue()
        save: Any = FullyParallelSaveStrategyWrapper(_InProcessSave("torch_dist", 1, thread_count=2), _sharing_group())
        options = {"async_sharded_save": True, **SAVE_OPTIONS}
        tensors = _canonical(tensors) if NEWER else tensors  # what is no tensor is pickled among them
        self._request: Any = dist_checkpointing.save(tensors, str(path), save, **options)
        self._arguments = list(self._request.async_fn_args)
        if self._request.preload_fn is not None:
            self._arguments[1] = self._request.preload_fn()
            if in_background:
                self._arguments[1] = list(map(_copied, self._request.async_fn_args[1], self._arguments[1]))
        self._hashes: dict[str, str] = {}
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True) if in_background else None
        if self._thread is None:
            self._write()
        else:
            self._thread.start()

    def _write(self) -> None:
        try:
            if self._request.async_fn is not None:
                self._request.async_fn(*self._arguments)
                for file, name, _ in self._arguments[1]:
                    if Path(file).is_file():  # it is not where the disk was full: ``finish`` says so
                        self._hashes[name] = file_sha256(file)
        except Exception as error:
            self._error = error

    def done(self) -> bool:
        """Whether this rank's part is on the disk, or failed."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> dict[str, str]:
        """Wait for all parts, and write the index; all ranks call it together.

        Returns:
            sha256 of the files with tensors, by name.

        Raises:
            CheckpointException, OSError, UserError: A rank could not write.
        """
        if self._thread is not None:
            self._thread.join()
        errors: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, self._error and str(self._error))
        if self._error is not None:
            raise self._error
        for error in filter(None, errors):
            raise UserError(error)
        for finalize in self._request.finalize_fns:
            finalize()
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self._hashes)
        return {name: digest for part in parts for name, digest in part.items()}


def load_strategy() -> Any:
    """Has each of the ranks that hold the same weights read a share of them, and give it to the others."""
    strategy = _Loading() if NEWER else TorchDistLoadShardedStrategy()
    return FullyParallelLoadStrategyWrapper(strategy, _sharing_group())


def _sharing_group() -> Any:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _canonical(state: Any) -> Any:
    """A state whose pickle depends on what it holds alone, not on the order or the identity of its parts."""
    if isinstance(state, dict):
        return {_canonical(key): _canonical(state[key]) for key in sorted(state, key=str)}
    if type(state) in (list, tuple):
        return type(state)(map(_canonical, state))
    return sys.intern(state) if type(state) is str else state


def _copied(given: Any, loaded: Any) -> Any:
    """The tensors of a file, with memory of their own; those that came from a device have it already."""
    file, name, (data, tensors) = loaded
    on_host = [tensor.is_cpu for _, tensor in given[2][1]]
    own = [(item, x.clone() if same else x) for (item, x), same in zip(tensors, on_host, strict=True)]
    return file, name, (data, own)


class _Loading(TorchDistLoadShardedStrategy):
    """megatron-core's strategy, where a rank's failure is every rank's: newer ones leave the others waiting."""

    def load(self, *arguments: Any, **options: Any) -> Any:
        load, loaded = super().load, []

        def read() -> None:
            try:
                loaded.append(load(*arguments, **options))
            except CheckpointException as error:
                raise first_failure(error) from error

        _DistWrapper(None, True, 0).all_gather("load", read)
        return loaded[0]


class _InProcessSave(TorchDistSaveShardedStrategy):
    """megatron-core's strategy without its writer processes: forking a process that runs threads may hang it."""

    def _get_save_and_finalize_callbacks(self, *arguments: Any, **options: Any) -> Any:
        request = super()._get_save_and_finalize_callbacks(*arguments, **options)
        if request.async_fn is None:  # nothing to write on this rank
            return request
        assert isinstance(request.async_fn, functools.partial), "megatron-core binds the transforms to its writer"
        transforms = request.async_fn.args[0]
        return request._replace(async_fn=functools.partial(_write, transforms))


def _write(transforms: list[Any], rank: int, buckets: list[Any], results: queue.Queue[Any]) -> None:
    """Write this rank's files one after another; the same results as megatron-core's writer processes give."""
    written: dict[int, Any] = {}
    write: Any = filesystem_async.FileSystemWriterAsync.write_preloaded_data
    write = getattr(write, "__wrapped__", write)  # which has the garbage collector off, as a forked writer needs it
    for index, bucket in enumerate(buckets):
        answers: Any = queue.Queue()
        tickets: Any = queue.Queue()
        tickets.put(index)
        write(transforms, index, bucket, answers, tickets, use_fsync=True)
        _, outcome = answers.get()
        if isinstance(outcome, Exception):
            chain: list[BaseException] = [outcome]
            while chain[-1].__context__ is not None:
                chain.append(chain[-1].__context__)
            # torch.save's complaint about its own file hides the system's, which says what to do.
            results.put(next((error for error in chain if isinstance(error, OSError)), outcome))
            return
        written[index] = outcome
    results.put(written)
