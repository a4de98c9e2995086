"""Mixed into vLLM's worker class by ``--worker-extension-cls``: the one file of this package that vLLM loads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from megatron_npd.errors import UserError
from megatron_npd.weights import ContentHash, TensorHeader, Weights, model_fingerprint, read_weights

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as _Worker
else:
    _Worker = object

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_DTYPES |= {"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "F8_E8M0": torch.float8_e8m0fnu}
_DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}

_AHEAD = 4  # tensors in memory before they are taken: of a 7B model at most 2.5 GB, mostly 0.5
Item = TypeVar("Item")


class WorkerExtension(_Worker):
    """Methods that ``/collective_rpc`` calls in every worker; answers are JSON, trouble comes back as ``error``."""

    _npd_started: dict[str, Any] | None = None  # the checkpoint that the server was started with
    _npd_fingerprint = ""  # of the directory that is loaded
    _npd_directory = ""  # that is loaded

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

    def npd_load(self, directory: str) -> dict[str, Any]:
        """Put the weights of a checkpoint in the place of the served ones, and clear the cache of the old.

        vLLM itself takes wrong shapes without a word: compare ``npd_describe`` first.

        Returns:
            ``seconds`` and ``weights``, the hash of what was loaded, or ``{"error": words}``.
        """
        start = time.monotonic()
        content = ContentHash()
        self._npd_fingerprint = self._npd_directory = ""
        try:
            self._npd_first()
            weights = read_weights(directory)
            with _loaded_names(self.get_model()) as loaded, _read_ahead(_tensors(weights, content)) as tensors:
                expected = {name for name, _ in self.get_model().named_parameters()}
                self.reload_weights(weights_iterator=tensors)
            if self.vllm_config.model_config.quantization is None and (missing := expected - loaded):
                raise UserError(f"{directory} must hold every parameter of the model, got none for {min(missing)}")
            if len(content) != len(weights.tensors):
                raise UserError(f"{directory} must be read to its end, got {len(content)} of {len(weights.tensors)}")
            self._npd_fingerprint, self._npd_directory = model_fingerprint(directory), directory
        except UserError as error:
            return {"error": str(error)}
        self._npd_repack_heads()
        self.npd_clear()
        return {"seconds": time.monotonic() - start, "weights": content.hexdigest()}

    def npd_clear(self) -> dict[str, Any]:
        """Zero the KV pages: NaN in one spreads to whatever shares it, and outlives reloads and prefix cache resets."""
        for cache in self.model_runner.kv_caches:
            for tensor in cache if isinstance(cache, list | tuple) else [cache]:
                tensor.zero_()
        return {}

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


def _tensors(weights: Weights, content: ContentHash) -> Iterator[tuple[str, torch.Tensor]]:
    for name, header, data in weights.stream():
        content.add(name, str(header), data)
        yield name, _tensor(header, data)


@contextmanager
def _read_ahead(items: Iterator[Item]) -> Iterator[Iterator[Item]]:
    """Take items in a thread, some ahead: the server is paused, and reading and hashing take as long as the rest."""

    def taken() -> Iterator[Item]:
        coming = deque(thread.submit(next, items, None) for _ in range(_AHEAD))
        while (item := coming.popleft().result()) is not None:
            coming.append(thread.submit(next, items, None))
            yield item

    thread = ThreadPoolExecutor(1)
    try:
        yield taken()
    finally:
        thread.shutdown(cancel_futures=True)


def _tensor(header: TensorHeader, data: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(data).view(_DTYPES[header.dtype]).view(header.shape)
