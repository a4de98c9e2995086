"""Ascend NPUs. Written against torch_npu's documentation and not run on a device yet: see the README's status table.

``torch_npu.contrib.transfer_to_npu`` sends ``torch.cuda`` calls and ``device="cuda"`` to the NPU, which covers what
``cpu.py`` does by hand. Kernels of this package use no int64 atomics, which the NPU lacks.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_npd.platform.base import (
    GroupStepAdamW,
    PlatformUnavailable,
    Segments,
    Tensors,
    alias_tensor_type,
    assert_megatron_not_imported,
    install_adamw,
    silence_library_warnings,
)

_MASK_SIZE = 2048  # of the compressed causal mask that sparse modes 2 to 4 of npu_fusion_attention expect
_LEFT_UP_CAUSAL = 2  # sparse mode: query i of a segment sees its keys 0..i
_RIGHT_DOWN_CAUSAL = 3  # the same counted from the ends: the last query sees all keys


class Device:
    """See ``base.Platform``."""

    name = "npu"
    distributed_backend = "hccl"
    visible_devices_env = "ASCEND_RT_VISIBLE_DEVICES"
    fuses_swiglu = True
    vocab_multiple = 128
    deterministic_environment: Mapping[str, tuple[str, ...]] = {"HCCL_DETERMINISTIC": ("true",)}

    def check_available(self) -> None:
        if importlib.util.find_spec("torch_npu") is None:
            raise PlatformUnavailable("torch_npu is not installed")
        try:
            importlib.import_module("torch_npu")
        except (ImportError, OSError) as error:
            raise PlatformUnavailable(
                f"torch_npu cannot be imported ({error}); is CANN's set_env.sh sourced?"
            ) from error
        if not _npu().is_available():
            raise PlatformUnavailable("torch_npu finds no NPU device")

    def prepare(self) -> None:
        assert_megatron_not_imported()
        silence_library_warnings()
        importlib.import_module("torch_npu.contrib.transfer_to_npu")
        alias_tensor_type(
            {
                "torch.npu.FloatTensor": "torch.cuda.FloatTensor",
                "torch.npu.HalfTensor": "torch.cuda.HalfTensor",
                "torch.npu.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
            }
        )
        install_adamw(NPUAdamW)
        install_swiglu()

    def device(self, local_rank: int) -> torch.device:
        return torch.device("npu", local_rank)

    def set_device(self, local_rank: int) -> None:
        _npu().set_device(local_rank)

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)
        _npu().manual_seed_all(seed)

    def synchronize(self) -> None:
        _npu().synchronize()

    def mark(self) -> Any:
        event = _npu().Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000

    def device_names(self) -> list[str]:
        return [_npu().get_device_name(index) for index in range(_npu().device_count())]

    def max_memory_bytes(self) -> int:
        return _npu().max_memory_allocated()

    def release_memory(self) -> None:
        _npu().empty_cache()

    def packed_attention(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, softmax_scale: float) -> Tensor:
        import torch_npu  # pyright: ignore[reportMissingImports]

        return torch_npu.npu_fusion_attention(
            q,
            k,
            v,
            q.shape[1],
            "TND",
            atten_mask=_causal_mask(q.device),
            scale=softmax_scale,
            actual_seq_qlen=segments.cu_seqlens[1:].tolist(),
            actual_seq_kvlen=segments.keys[1:].tolist(),
            sparse_mode=_LEFT_UP_CAUSAL if segments.cu_seqlens_kv is None else _RIGHT_DOWN_CAUSAL,
        )[0]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        import torch_npu  # pyright: ignore[reportMissingImports]

        return torch_npu.npu_rms_norm(x, weight, epsilon=eps)[0]

    def adamw(self) -> type[torch.optim.Optimizer]:
        return NPUAdamW


class NPUAdamW(GroupStepAdamW):
    """AdamW by the NPU's fused kernel.

    Not ``torch_npu.optim.NpuFusedAdamW``: that one keeps the step count by parameter, and moves parameters and
    gradients into buffers of its own, which cuts them off from megatron-core's.
    """

    def update(
        self, params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, group: dict[str, Any]
    ) -> None:
        import torch_npu  # pyright: ignore[reportMissingImports]

        beta1, beta2 = group["betas"]
        done = group["step"] - 1  # the kernel multiplies the powers once more by the betas
        for p, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
            torch_npu.npu_apply_adam_w(
                beta1**done,
                beta2**done,
                group["lr"],
                group["weight_decay"],
                beta1,
                beta2,
                group["eps"],
                grad.contiguous(),
                None,
                False,
                False,
                out=(p.data, exp_avg, exp_avg_sq),
            )


def _npu() -> Any:
    """``torch.npu``, which torch_npu puts there."""
    return torch.npu  # pyright: ignore[reportAttributeAccessIssue]


def install_swiglu() -> None:
    """Have megatron-core's MLPs use the NPU's SwiGLU; importing anything of it has given them its own by now."""
    from megatron.core.transformer import mlp
    from megatron.core.transformer.moe import shared_experts

    mlp.bias_swiglu_impl = shared_experts.bias_swiglu_impl = _swiglu


def _swiglu(x: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
    """In the place of megatron-core's ``bias_swiglu_impl``, which is compiled: gate and up [..., 2F] -> [..., F]."""
    import torch_npu  # pyright: ignore[reportMissingImports]

    return torch_npu.npu_swiglu(x if bias is None else x + bias, dim=-1)


@functools.lru_cache(maxsize=8)
def _causal_mask(device: torch.device) -> Tensor:
    """True above the diagonal: the mask that stands for any length in the compressed sparse modes."""
    return torch.ones(_MASK_SIZE, _MASK_SIZE, dtype=torch.bool, device=device).triu(1)
