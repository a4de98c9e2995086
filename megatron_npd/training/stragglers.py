"""Which rank is slow: each rank's own time in forwards and backwards, and its wait for data, compared at log lines.

megatron-core's StragglerDetector needs CUDA, and opens a port to anybody.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.distributed as dist

from megatron_npd.config.training import TrainConfig
from megatron_npd.platform import get_platform
from megatron_npd.platform.base import local_rank
from megatron_npd.training.metrics import is_logged

_OWN = ("forward-compute", "backward-compute")


class ComputeClock:
    """The time in which this rank computes: ``config.timers`` of megatron-core's schedules, which start and stop it.

    What stages send one another and the sums over data-parallel ranks are outside of it. Inside of a forward and a
    backward tensor-, context- and expert-parallel ranks wait for one another: they are slow together.
    """

    def __init__(self) -> None:
        self._platform = get_platform()
        self._spans: list[tuple[Any, Any]] = []

    def __call__(self, name: str, log_level: int = 0) -> ComputeClock | _NoTimer:
        return self if name in _OWN else _NO_TIMER

    def start(self) -> None:
        """A forward or backward begins; once more before its end: only now."""
        self._begin = self._platform.mark()

    def stop(self) -> None:
        self._spans.append((self._begin, self._platform.mark()))

    def take(self) -> float:
        """Seconds since the last call; the device has to have finished."""
        seconds = sum(self._platform.seconds_between(*span) for span in self._spans)
        self._spans.clear()
        return seconds


class _NoTimer:
    def start(self, barrier: bool = False) -> None:
        pass

    def stop(self, barrier: bool = False) -> None:
        pass


_NO_TIMER = _NoTimer()


class Stragglers:
    """Compares the ranks on the steps that have a log line, by means of the steps since the last one.

    Args:
        cfg: ``log_interval``.
        clock: Of this rank's steps.
        stop: Step at which this call of ``train`` ends.
    """

    def __init__(self, cfg: TrainConfig, clock: ComputeClock, stop: int) -> None:
        self._cfg, self._clock, self._stop = cfg, clock, stop
        self._device = get_platform().device(local_rank())
        self._steps: list[tuple[float, float]] = []

    def after(self, iteration: int, data_wait: float) -> dict[str, Any]:
        """Take note of a finished step; called by all ranks.

        Args:
            iteration: Its number.
            data_wait: Seconds in which this rank waited for micro-batches.

        Returns:
            On steps with a log line, where there are several ranks: least, median and greatest
            ``compute_*_seconds`` of a step, the ``slowest_rank``, and the longest wait for data with its rank.
        """
        computed = self._clock.take()
        if dist.get_world_size() == 1:
            return {}
        self._steps.append((computed, data_wait))
        if not is_logged(self._cfg, iteration, self._stop):
            return {}
        ranks = torch.zeros(dist.get_world_size(), 2, device=self._device)
        ranks[dist.get_rank()] = torch.tensor(self._steps).mean(0)
        self._steps.clear()
        dist.all_reduce(ranks)
        computing, waiting = ranks.t().tolist()
        return {
            "compute_min_seconds": min(computing),
            "compute_median_seconds": statistics.median(computing),
            "compute_max_seconds": max(computing),
            "slowest_rank": computing.index(max(computing)),
            "data_wait_max_seconds": max(waiting),
            "data_wait_rank": waiting.index(max(waiting)),
        }
