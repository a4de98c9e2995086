"""The CPU: megatron-core over gloo, for laptops, tests and conversion.

megatron-core asks for CUDA by name in many places. ``prepare`` redirects those requests, all of them here;
each is an error on a machine without a GPU, so nothing that works elsewhere changes its meaning.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._device import _device_constructors

from megatron_npd.platform.base import (
    GroupStepAdamW,
    Segments,
    alias_tensor_type,
    assert_megatron_not_imported,
    attention_by_segment,
    install_adamw,
    resident_bytes,
    silence_library_warnings,
)
from megatron_npd.platform.cpu_attention import grouped_attention

_FACTORIES = ("tensor", "zeros", "ones", "empty", "empty_like")  # those that megatron-core calls with device="cuda"


class Device:
    """See ``base.Platform``."""

    name = "cpu"
    distributed_backend = "gloo"
    visible_devices_env = ""
    fuses_swiglu = False  # uncompiled, its backward takes twice the time
    vocab_multiple = 1
    deterministic_environment: Mapping[str, tuple[str, ...]] = {}

    def check_available(self) -> None:
        return

    def prepare(self) -> None:
        assert_megatron_not_imported()
        silence_library_warnings()
        _redirect_cuda()
        with _no_compiler():
            from megatron.core.tensor_parallel import random

        random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
        random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
        install_adamw(GroupStepAdamW)

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def set_device(self, local_rank: int) -> None:
        return

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def synchronize(self) -> None:
        return

    def mark(self) -> float:
        return time.perf_counter()

    def seconds_between(self, begin: float, end: float) -> float:
        return end - begin

    def device_names(self) -> list[str]:
        return []

    def max_memory_bytes(self) -> int:
        return resident_bytes()

    def release_memory(self) -> None:
        return

    def packed_attention(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, softmax_scale: float) -> Tensor:
        if segments.cu_seqlens_kv is not None:
            return attention_by_segment(q, k, v, segments, softmax_scale)
        return grouped_attention(q, k, v, segments.cu_seqlens, softmax_scale)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype != torch.float32:
            return F.rms_norm(x, weight.shape, weight, eps)
        return _RMSNorm.apply(x, weight, eps)

    def adamw(self) -> type[torch.optim.Optimizer]:
        return GroupStepAdamW


class _RMSNorm(torch.autograd.Function):
    """torch's norm in half its time: on the CPU that one is made of a dozen passes over the tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grad_outputs
        unit, scale, weight = ctx.saved_tensors
        product = grad * unit
        mean = torch.matmul(product, weight).div_(unit.shape[-1]).unsqueeze(-1)
        grad_x = (grad * weight).addcmul_(unit, mean, value=-1.0).mul_(scale)
        return grad_x, product.flatten(0, -2).sum(0), None


@contextmanager
def _no_compiler() -> Iterator[None]:
    """``torch.compile`` gives back what it is given.

    megatron-core asks it for fused functions that the CPU does without, and what it imports takes longer than all of
    megatron-core, in every process.
    """
    compiler = torch.compile
    torch.compile = lambda model=None, **_: _same if model is None else model  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


def _same(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _redirect_cuda() -> None:
    """Send megatron-core's requests for CUDA to the CPU; before ``megatron.core`` is imported, once a process."""
    cpu = torch.device("cpu")
    _device_constructors()  # cached on its first call: torch.device contexts must know the functions, not our wrappers
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name), cpu))
    torch.cuda.is_available = lambda: False
    torch.cuda.device_count = lambda: 0
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment]
    torch.cuda.current_stream = lambda device=None: None  # type: ignore[assignment]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.manual_seed = lambda seed: None if seed is None else _manual_seed(seed)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    alias_tensor_type(
        {
            "torch.FloatTensor": "torch.cuda.FloatTensor",
            "torch.HalfTensor": "torch.cuda.HalfTensor",
            "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
        }
    )


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _on_cpu(factory: Callable[..., Tensor], cpu: torch.device) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None:
            return factory(*args, **kwargs)
        if torch.device(device).type == "cuda":
            device = cpu
        return factory(*args, device=device, **kwargs)

    return wrapped
