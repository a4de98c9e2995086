"""NVIDIA GPUs: megatron-core as it is; Transformer Engine's and Apex's optimizers where they are installed."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_npd.platform.base import (
    GroupStepAdamW,
    PlatformUnavailable,
    Segments,
    assert_megatron_not_imported,
    attention_by_segment,
    has_fused_adam,
    install_adamw,
    silence_library_warnings,
)


class Device:
    """See ``base.Platform``."""

    name = "cuda"
    distributed_backend = "nccl"
    visible_devices_env = "CUDA_VISIBLE_DEVICES"
    fuses_swiglu = True
    vocab_multiple = 128
    # NCCL: those that Megatron allows. Ring has every collective; NVLS adds in the order of arrival.
    deterministic_environment: Mapping[str, tuple[str, ...]] = {
        "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
        "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
    }

    def check_available(self) -> None:
        if not torch.backends.cuda.is_built():
            raise PlatformUnavailable("this torch was built without CUDA")
        if not torch.cuda.is_available():
            raise PlatformUnavailable("torch finds no CUDA device")

    def prepare(self) -> None:
        assert_megatron_not_imported()
        silence_library_warnings()
        # One hardware queue: tensor-parallel communication starts in the order it was issued. Read at CUDA's start.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if not has_fused_adam():
            install_adamw(GroupStepAdamW)

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cuda", local_rank)

    def set_device(self, local_rank: int) -> None:
        torch.cuda.set_device(local_rank)

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000

    def device_names(self) -> list[str]:
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]

    def max_memory_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    def release_memory(self) -> None:
        torch.cuda.empty_cache()

    def packed_attention(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, softmax_scale: float) -> Tensor:
        varlen = _varlen_attention()
        if varlen is None or q.dtype not in (torch.float16, torch.bfloat16):
            return attention_by_segment(q, k, v, segments, softmax_scale)
        bounds, bounds_kv = (_to_device(tuple(x.tolist()), q.device) for x in (segments.cu_seqlens, segments.keys))
        longest = (segments.longest, segments.longest_kv or segments.longest)
        return varlen(q, k, v, (bounds, bounds_kv), longest, softmax_scale)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def adamw(self) -> type[torch.optim.Optimizer]:
        from megatron.core import optimizer

        return optimizer.Adam


@functools.lru_cache(maxsize=32)
def _to_device(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """cu_seqlens on the GPU: one copy a row, shared by its layers."""
    return torch.tensor(bounds, dtype=torch.int32).pin_memory().to(device, non_blocking=True)


@functools.lru_cache(maxsize=1)
def _varlen_attention() -> Callable[..., Tensor] | None:
    """Torch's variable-length flash attention behind one signature: its arguments differ between versions.

    Like FlashAttention it takes a segment's queries for the last of its keys where there are fewer of them.

    Returns:
        None where torch has none, or one whose scale cannot be given.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = inspect.signature(varlen_attn).parameters
    if "scale" not in names or not {"window_size", "is_causal"} & names.keys():
        return None
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bounds: tuple[Tensor, Tensor],
        longest: tuple[int, int],
        softmax_scale: float,
    ) -> Tensor:
        options = dict(causal, scale=softmax_scale)
        if "enable_gqa" in names:
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        elif q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        out = varlen_attn(q, k, v, *bounds, *longest, **options)
        assert isinstance(out, Tensor)
        return out

    return attention
