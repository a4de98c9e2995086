"""When a checkpoint becomes the next policy, which the rollout servers are then refreshed with (METHOD section 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from megatron_npd.choices import RefreshRule
from megatron_npd.config.training import TrainConfig
from megatron_npd.errors import UserError

_LAG_DECAY = 0.9  # of the moving average, per step


@dataclass
class Progress:
    """What a rule sees; part of a checkpoint's state, so that a resumed run decides as an undisturbed one.

    Attributes:
        policies: Checkpoints that were marked so far.
        steps: Since the last mark, or the run's start.
        round: Whose rows were trained on last.
        lag: Moving average of k3 over the steps with that round's rows, in nats per token; None: not known.
    """

    policies: int = 0
    steps: int = 0
    round: int = 0
    lag: float | None = None


def round_boundaries(train_iters: int, updates: int) -> list[int]:
    """The steps at which rounds end that are spread evenly over the run, the run's last step included."""
    return [train_iters * (index + 1) // (updates + 1) for index in range(updates + 1)]


def _even(cfg: TrainConfig, iteration: int, _: Progress) -> bool:
    return iteration in round_boundaries(cfg.train_iters, cfg.updates)


def _every_n(cfg: TrainConfig, _: int, progress: Progress) -> bool:
    return progress.steps >= cfg.refresh_interval


def _by_lag(cfg: TrainConfig, iteration: int, progress: Progress) -> bool:
    late = progress.steps >= cfg.refresh_interval
    if late and progress.lag is None:
        raise UserError(
            f"refresh by_lag must be given responses sampled at temperature 1 and top_p 1, got none in the "
            f"{progress.steps} steps to step {iteration}, nor a policy lag; use every_n, or sample such"
        )
    return late and cast(float, progress.lag) > cfg.refresh_lag


# Whether a step's checkpoint is marked, from the settings, the step and what was seen; at most ``updates`` are.
REFRESH: dict[RefreshRule, Callable[[TrainConfig, int, Progress], bool]] = {
    "never": lambda *_: False,
    "even": _even,
    "every_n": _every_n,
    "by_lag": _by_lag,
}


class RefreshSchedule:
    """Marks checkpoints of a run by the rule that its configuration names; its last step's is marked by any rule.

    Args:
        cfg: ``refresh`` and its settings.
        state: From the checkpoint that the run goes on from; None: it begins.
    """

    def __init__(self, cfg: TrainConfig, state: Mapping[str, Any] | None = None) -> None:
        self._cfg, self._rule = cfg, REFRESH[cfg.refresh]
        self.progress = Progress(**(state or {}))

    def after(self, iteration: int, round_index: int, lag: float | None) -> bool:
        """Whether the checkpoint after a step is marked.

        Args:
            iteration: Number of the step, from 1.
            round_index: The round whose rows it trained on.
            lag: Its k3, in nats per token; None: not measured.

        Raises:
            UserError: The rule needs the lag, and no step since the last mark had one.
        """
        progress = self.progress
        progress.steps += 1
        if progress.round != round_index:
            progress.round, progress.lag = round_index, None
        if lag is not None:
            before = lag if progress.lag is None else progress.lag
            progress.lag = _LAG_DECAY * before + (1 - _LAG_DECAY) * lag
        last = iteration == self._cfg.train_iters
        marked = last or (progress.policies < self._cfg.updates and self._rule(self._cfg, iteration, progress))
        if marked:
            progress.policies += 1
            progress.steps = 0
        return marked

    def state(self) -> dict[str, Any]:
        """What the next call of the run is given."""
        return asdict(self.progress)
