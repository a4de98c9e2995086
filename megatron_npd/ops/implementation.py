"""Which implementation computes: the caller's choice, or the one for the tensors' device."""

from __future__ import annotations

from functools import cache
from typing import get_args

import torch

from megatron_npd.choices import Impl
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger


def use_triton(impl: str, device: torch.device, *, name: str = "impl") -> bool:
    """Whether the Triton kernels compute for tensors on ``device``.

    Args:
        impl: ``auto`` takes Triton for tensors on a CUDA device where it is installed, and says once what it took.
        device: Where the logits are.
        name: What the caller's user calls it.

    Raises:
        UserError: ``impl`` is unknown, or is ``triton`` where its kernels cannot run.
    """
    if impl not in get_args(Impl):
        raise UserError(f"{name} must be auto, torch or triton, got {impl!r}; leave it out")
    if impl == "torch":
        return False
    obstacle = "" if device.type == "cuda" else f"tensors on {device.type}"
    if impl == "triton" or not obstacle:
        try:
            from megatron_npd.ops import distill_loss_triton
        except ImportError as error:
            obstacle = f"no Triton ({error})"
        else:
            if distill_loss_triton.INTERPRETED and impl == "triton":
                return True
    if impl == "auto":
        _log_once(f"ops: impl auto is torch, with {obstacle}" if obstacle else "ops: impl auto is triton")
    elif obstacle:
        raise UserError(
            f"{name} must be one that can run, got 'triton' with {obstacle}; use auto, or set TRITON_INTERPRET=1 "
            "before the first import for Triton's interpreter"
        )
    return not obstacle


@cache
def _log_once(line: str) -> None:
    get_logger().info(line)
