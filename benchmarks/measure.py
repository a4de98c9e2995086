"""What the benchmarks measure with: shortest time, peak memory, the speed at which this machine copies."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_npd.errors import UserError


def require_device(device: str) -> None:
    """Refuse a device that is not there."""
    accelerator = torch.accelerator.current_accelerator()
    if device != "cpu" and (accelerator is None or accelerator.type != device):
        raise UserError(f"--device {device} must be there, got {accelerator}; run this on a machine that has it")


def hardware(device: str, threads: int) -> str:
    """Where the figures come from, in words."""
    if device == "cpu":
        return f"cpu, {threads} threads, torch {torch.__version__}"
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def best_seconds(
    action: Callable[[], object], device: str, repeat: int, prepare: Callable[[], object] = lambda: None
) -> float:
    """The shortest of ``repeat`` runs (what others add is the rest of the machine), without ``prepare`` before each."""
    times = []
    for _ in range(repeat):
        prepare()
        _synchronize(device)
        start = time.perf_counter()
        action()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def copy_bandwidth(device: str, num_bytes: int, repeat: int) -> float:
    """Bytes a second, read and written, of copying a buffer of ``num_bytes``."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / best_seconds(lambda: target.copy_(source), device, repeat)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def peak_bytes(action: Callable[[], object], device: str) -> int:
    """Peak memory of ``action`` above what the process held before it."""
    gc.collect()
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of resident memory
        before = _status("VmRSS")
        action()
        return _status("VmHWM") - before
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    action()
    return torch.accelerator.max_memory_allocated() - before
