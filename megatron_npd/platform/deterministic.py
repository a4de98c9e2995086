"""Results that are the same to the bit each time: what Megatron's ``--deterministic-mode`` asks of torch and libraries.

Of this package's own kernels none needs it: each program of a Triton kernel writes a row alone, without atomics.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_npd.errors import UserError
from megatron_npd.platform import get_platform


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Within it torch has deterministic operations alone, flash attention's backward among them, or raises.

    The libraries' variables of the environment are set where they are not; enter it before they are read.

    Args:
        on: Whether to; False: nothing is changed.

    Raises:
        UserError: A variable has another value, or is set too late: this process has joined others.
    """
    if not on:
        yield
        return
    for name, allowed in get_platform().deterministic_environment.items():
        if dist.is_initialized() and name not in os.environ:
            raise UserError(
                f"{name} must be set before the ranks join with deterministic_mode, got it unset; export {name}="
                f"{allowed[0]}"
            )
        if (value := os.environ.setdefault(name, allowed[0])) not in allowed:
            raise UserError(
                f"{name} must be {' or '.join(allowed)} with deterministic_mode, got {value}; unset it, and it is "
                f"{allowed[0]}"
            )
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_deterministic_debug_mode(before)
