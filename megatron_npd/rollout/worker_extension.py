"""Mixed into vLLM's worker class by ``--worker-extension-cls``: the one file of this package that vLLM loads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from megatron_npd.log import UserError
from megatron_npd.rollout.headers import read_headers

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as _Worker
else:
    _Worker = object


class WorkerExtension(_Worker):
    """Methods that ``/collective_rpc`` calls in every worker; answers are JSON, trouble comes back as ``error``."""

    _npd_started: dict[str, Any] | None = None

    def npd_describe(self, directory: str = "") -> dict[str, Any]:
        """Headers of a checkpoint as this worker sees it.

        Args:
            directory: Empty: the checkpoint that the server was started with, read once, on the first call.

        Returns:
            The fields of ``Headers``, or ``{"error": words}``.
        """
        try:
            if directory:
                return asdict(read_headers(directory))
            if self._npd_started is None:
                self._npd_started = asdict(read_headers(self.vllm_config.model_config.model))
            return self._npd_started
        except UserError as error:
            return {"error": str(error)}

    def npd_load(self, directory: str) -> dict[str, Any]:
        """Put the weights of a checkpoint in the place of the served ones.

        vLLM itself takes wrong shapes and missing tensors without a word: compare ``npd_describe`` first.

        Returns:
            ``{"seconds": s}``.
        """
        start = time.monotonic()
        self.reload_weights(weights_iterator=_stream(Path(directory), read_headers(directory).files))
        self._npd_repack_heads()
        return {"seconds": time.monotonic() - start}

    def _npd_repack_heads(self) -> None:
        """Let heads that share the embedding's weight see the new one: on a CPU vLLM keeps a packed copy of the old."""
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return
        for module in self.get_model().modules():
            if isinstance(module, VocabParallelEmbedding):
                module.quant_method.process_weights_after_loading(module)


def _stream(directory: Path, files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name in files:
        with safe_open(directory / name, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                yield key, tensors.get_tensor(key)
