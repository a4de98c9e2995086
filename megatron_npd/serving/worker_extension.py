"""Mixed into vLLM's worker class by ``--worker-extension-cls``: the one file of this package that vLLM loads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Condition, Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_npd.errors import UserError
from megatron_npd.limits import free_memory
from megatron_npd.weights import ContentHash, TensorHeader, model_fingerprint, read_weights

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as _Worker
else:
    _Worker = object

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_DTYPES |= {"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "F8_E8M0": torch.float8_e8m0fnu}
_DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}

_KEPT_SECONDS = 1800.0  # that weights wait in memory to be loaded; a refresh loads them as soon as all have read
_AHEAD = 4  # tensors in memory before they are taken, whatever is free: of a 7B model at most 2.5 GB, mostly 0.5


class WorkerExtension(_Worker):
    """Methods that ``/collective_rpc`` calls in every worker; answers are JSON, trouble comes back as ``error``."""

    _npd_started: dict[str, Any] | None = None  # the checkpoint that the server was started with
    _npd_fingerprint = ""  # of the directory that is loaded
    _npd_directory = ""  # that is loaded
    _npd_staged: _Reader | None = None  # what is to be loaded next

    def npd_describe(self, directory: str = "") -> dict[str, Any]:
        """Headers of a checkpoint as this worker sees it.

        Args:
            directory: Empty: the checkpoint that the server was started with, read once, by the first load.

        Returns:
            ``tensors`` and ``config`` (``Weights.describe``), the served model's ``vocab_size``, ``dtype``
            and ``quantization`` (or None), the ``directory`` that is loaded and its ``fingerprint``, or ``{"error":
            words}``.
        """
        try:
            found = read_weights(directory).describe() if directory else self._npd_first()
        except UserError as error:
            return {"error": str(error)}
        model = self.vllm_config.model_config
        served = {"vocab_size": model.get_vocab_size(), "dtype": str(model.dtype), "quantization": model.quantization}
        loaded = {"directory": self._npd_directory, "fingerprint": self._npd_fingerprint}
        return {**found, **loaded, **served}

    def npd_stage(self, directory: str) -> dict[str, Any]:
        """Begin to read and hash a checkpoint for ``npd_load``, while the served weights go on generating.

        Args:
            directory: Empty: let go of what is in memory.

        Returns:
            Nothing, or ``{"error": words}``.
        """
        if self._npd_staged is not None:
            self._npd_staged.close()
        self._npd_staged = None
        try:
            self._npd_staged = _Reader(directory) if directory else None
        except (UserError, OSError) as error:
            return {"error": str(error)}
        return {}

    def npd_staged(self) -> dict[str, Any]:
        """How far ``npd_stage`` is: ``ready``, whether all is in memory that finds room there, or ``error``."""
        staged = self._npd_staged
        if staged is not None and staged.error is not None:
            return {"error": str(staged.error)}
        return {"ready": staged is None or staged.ready}

    def npd_load(self, directory: str) -> dict[str, Any]:
        """Put the weights of a checkpoint in the place of the served ones, and clear the cache of the old.

        vLLM itself takes wrong shapes without a word: compare ``npd_describe`` first. What ``npd_stage`` read of the
        same directory is taken from memory.

        Returns:
            ``seconds`` and ``weights``, the hash of what was loaded, or ``{"error": words}``.
        """
        start = time.monotonic()
        self._npd_fingerprint = self._npd_directory = ""
        try:
            self._npd_first()
            with self._npd_reader(directory) as reader, _loaded_names(self.get_model()) as loaded:
                expected = {name for name, _ in self.get_model().named_parameters()}
                self.reload_weights(weights_iterator=iter(reader))
            if self.vllm_config.model_config.quantization is None and (missing := expected - loaded):
                raise UserError(f"{directory} must hold every parameter of the model, got none for {min(missing)}")
            if reader.taken != (number := len(reader.weights.tensors)):
                raise UserError(f"{directory} must be read to its end, got {reader.taken} of {number}")
            self._npd_fingerprint, self._npd_directory = reader.fingerprint, directory
        except (UserError, OSError) as error:
            return {"error": str(error)}
        self._npd_repack_heads()
        self.npd_clear()
        return {"seconds": time.monotonic() - start, "weights": reader.content.hexdigest()}

    def npd_clear(self) -> dict[str, Any]:
        """Zero the KV pages: NaN in one spreads to whatever shares it, and outlives reloads and prefix cache resets."""
        for cache in self.model_runner.kv_caches:
            for tensor in cache if isinstance(cache, list | tuple) else [cache]:
                tensor.zero_()
        return {}

    def _npd_reader(self, directory: str) -> _Reader:
        """What ``npd_stage`` reads of a directory that has not changed since, or a new one."""
        staged, self._npd_staged = self._npd_staged, None
        if staged is not None:
            if staged.error is None and staged.files == _files(directory):
                return staged
            staged.close()
        return _Reader(directory)

    def _npd_first(self) -> dict[str, Any]:
        if self._npd_started is None:
            self._npd_started = read_weights(self.vllm_config.model_config.model).describe()
        return self._npd_started

    def _npd_repack_heads(self) -> None:
        """Let heads that share the embedding's weight see the new one: on a CPU vLLM keeps a packed copy of the old."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return
        modules = list(self.get_model().modules())
        heads = [module for module in modules if isinstance(module, ParallelLMHead)]  # the embedding was loaded itself
        for module in heads or [module for module in modules if isinstance(module, VocabParallelEmbedding)]:
            module.quant_method.process_weights_after_loading(module)


@contextmanager
def _loaded_names(model: Any) -> Iterator[set[str]]:
    """Parameters that a vLLM model's ``load_weights`` filled meanwhile; vLLM only warns of those that it did not."""
    names: set[str] = set()
    load = model.load_weights

    def recording(weights: Any) -> set[str]:
        loaded = load(weights)
        names.update(loaded)
        return loaded

    model.load_weights = recording
    try:
        yield names
    finally:
        del model.load_weights


class _Reader:
    """The tensors of a checkpoint, read, looked at and hashed in a thread, ahead of who takes them; a context manager.

    It reads on while there is room in memory: with all of it there, taking it waits for no file system. What nobody
    takes for ``_KEPT_SECONDS`` is let go: whoever asked for it is gone.

    Attributes:
        weights: The checkpoint.
        files: Its directory and files as they were before.
        fingerprint: Of its directory.
        content: The hash of what has been read.
        taken: How many tensors have been taken.
        error: Why it cannot be read on; who takes gets it too.
    """

    def __init__(self, directory: str) -> None:
        self.files = _files(directory)
        self.weights, self.fingerprint = read_weights(directory), model_fingerprint(directory)
        self.content, self.taken = ContentHash(), 0
        self.error: Exception | None = None
        self._tensors: deque[tuple[str, torch.Tensor]] = deque()
        self._changed = Condition()
        self._full = self._ended = self._closed = False
        Thread(target=self._read, name="npd-reader", daemon=True).start()

    @property
    def ready(self) -> bool:
        """Whether it waits for nothing but the tensors to be taken."""
        return self._full or self._ended

    def close(self) -> None:
        """Let go of what has not been taken."""
        with self._changed:
            self._closed = True
            self._tensors.clear()
            self._changed.notify_all()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tensors or self._ended)
                if not self._tensors:
                    break
                tensor = self._tensors.popleft()
                self.taken += 1
                self._changed.notify_all()
            yield tensor
        if self.error is not None:
            raise self.error

    def _read(self) -> None:
        try:
            for name, header, data in self.weights.stream():
                self.content.add(name, str(header), data)
                with self._changed:
                    self._tensors.append((name, _tensor(header, data)))
                    self._changed.notify_all()
                    self._full = not self._has_room()
                    waited = self._changed.wait_for(self._has_room, _KEPT_SECONDS)
                    self._full = False
                    if self._closed or not (waited or self.taken):
                        return
        except Exception as error:
            self.error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
                if not self._changed.wait_for(lambda: self.taken or self._closed, _KEPT_SECONDS):
                    self._tensors.clear()
                    self.error = self.error or UserError(f"{self.weights.directory} must be loaded once it is read")

    def _has_room(self) -> bool:
        return self._closed or len(self._tensors) < _AHEAD or free_memory() > 0


def _files(directory: str) -> list[tuple[str, int, int]]:
    """Path, size and time of change of each file."""
    found = [(path, path.stat()) for path in sorted(Path(directory).iterdir())]
    return [(str(path), status.st_size, status.st_mtime_ns) for path, status in found]


def _tensor(header: TensorHeader, data: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(data).view(_DTYPES[header.dtype]).view(header.shape)
