"""A window of steps under torch's profiler, as Megatron's ``--profile`` has it: a trace per rank, for Perfetto."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_npd.config.training import TrainConfig
from megatron_npd.log import get_logger
from megatron_npd.training.metrics import metrics_file


class Profiling:
    """Profiles the steps of a window on the ranks that are named; a context.

    Args:
        cfg: ``profile`` and its window and ranks; traces lie beside the metrics, in ``profile/``.
    """

    def __init__(self, cfg: TrainConfig) -> None:
        self._window = range(cfg.profile_step_start, cfg.profile_step_end)
        self._rank = dist.get_rank()
        self._on = cfg.profile and self._rank in cfg.profile_ranks
        self._directory = (metrics_file(cfg) or Path(cfg.save or ".") / "metrics").parent / "profile"
        self._stack = ExitStack()
        self._profiler: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Begin the window at its first step, from 1, or where a resumed run comes into it."""
        if self._on and self._profiler is None and step in self._window:
            self._profiler = self._stack.enter_context(torch.profiler.profile(with_stack=True, record_shapes=True))

    def after(self, step: int) -> None:
        """End it after its last step, and write the trace."""
        if self._profiler is not None and step + 1 not in self._window:
            self._end()

    def _end(self) -> None:
        assert self._profiler is not None
        self._stack.close()
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"rank-{self._rank:04d}.json.gz"
        self._profiler.export_chrome_trace(str(path))
        get_logger().info("steps %d to %d: %s", self._window.start, self._window.stop - 1, path)
        self._profiler, self._on = None, False

    def __enter__(self) -> Profiling:
        return self

    def __exit__(self, *_: object) -> None:
        if self._profiler is not None:
            self._end()
