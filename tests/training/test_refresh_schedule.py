"""The rules that say when a checkpoint becomes a policy, each as it is listed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from megatron_npd.config.run import NPDConfig
from megatron_npd.config.settings import RolloutConfig
from megatron_npd.config.training import TrainConfig
from megatron_npd.errors import UserError
from megatron_npd.training.refresh_schedule import REFRESH, RefreshSchedule

STEPS = 40


def config(**fields: Any) -> TrainConfig:
    return TrainConfig(**{"train_iters": STEPS, "updates": 3, "refresh_interval": 4, "refresh_lag": 0.1, **fields})


def lag_of(step: int) -> float:
    """Rises over a round and a half."""
    return 0.02 * (step % 15) * (1 + 0.5 * np.sin(step))


def decide(cfg: TrainConfig, *, resumed: bool = False) -> list[int]:
    """The steps that are marked where each round begins at once; ``resumed``: through the state at each step."""
    schedule, marked = RefreshSchedule(cfg), []
    for step in range(1, cfg.train_iters + 1):
        if resumed:
            schedule = RefreshSchedule(cfg, json.loads(json.dumps(schedule.state())))
        if schedule.after(step, len(marked), lag_of(step)):
            marked.append(step)
            assert schedule.progress.policies == len(marked)
    return marked


@pytest.mark.parametrize("rule", REFRESH)
@pytest.mark.parametrize("updates", [0, 1, 3, 20])
def test_the_last_step_is_marked_and_no_more_than_the_updates_before_it(rule: str, updates: int) -> None:
    marked = decide(config(refresh=rule, updates=updates))
    assert marked[-1] == STEPS and len(marked) <= updates + 1
    assert updates == 0 or rule == "never" or len(marked) > 1


@pytest.mark.parametrize("rule", REFRESH)
def test_a_resumed_run_decides_as_an_undisturbed_one(rule: str) -> None:
    cfg = config(refresh=rule, updates=20)
    assert decide(cfg, resumed=True) == decide(cfg)


def test_steps_of_the_rules() -> None:
    assert decide(config(refresh="never")) == [40]
    assert decide(config(refresh="even")) == [10, 20, 30, 40]
    assert decide(config(refresh="every_n", refresh_interval=7)) == [7, 14, 21, 40]
    assert decide(config(refresh="every_n", refresh_interval=39, updates=1)) == [39, 40]


def test_the_lags_moving_average_asks_for_a_policy_at_some_distance() -> None:
    def marked(lags: list[float], **fields: Any) -> list[int]:
        schedule = RefreshSchedule(config(refresh="by_lag", **fields))
        return [step for step, lag in enumerate(lags, start=1) if schedule.after(step, 0, lag)]

    assert marked([0.0] * 3 + [0.5] * 5) == [6]  # (1 - 0.9^n) * 0.5 passes 0.1 at the third, 0.136
    assert marked([0.2] * 8) == [4, 8], "not before the interval is over"
    assert marked([0.0999] * 39) == []
    assert marked([5.0] + [0.0] * 20, refresh_lag=3.9) == []  # 5 * 0.9^3 at the fourth


def test_the_average_is_of_the_round_that_trains() -> None:
    schedule = RefreshSchedule(config(refresh="by_lag"))
    assert [schedule.after(step, 0, 9.0) for step in range(1, 5)] == [False, False, False, True]
    assert not any(schedule.after(step, 1, 0.01) for step in range(5, 20))
    assert schedule.progress.lag == pytest.approx(0.01)
    assert schedule.after(20, 2, 0.3) and schedule.progress.lag == pytest.approx(0.3)


def test_steps_without_a_lag_change_no_average_and_a_run_without_any_is_told() -> None:
    schedule = RefreshSchedule(config(refresh="by_lag"))
    for step, lag in enumerate((0.04, None, None, None, None), start=1):
        assert not schedule.after(step, 0, lag)
    assert schedule.progress.lag == 0.04
    schedule = RefreshSchedule(config(refresh="by_lag"))
    assert not any(schedule.after(step, 0, None) for step in (1, 2, 3))
    with pytest.raises(UserError, match=r"refresh by_lag must be given responses sampled .* in the 4 steps to step 4"):
        schedule.after(4, 0, None)


@pytest.mark.parametrize("fields", [{"sampled_paths": 0}, {"temperature": 0.7}, {"top_p": 0.9}], ids=str)
def test_a_run_that_would_not_know_the_lag_is_refused_before_it_begins(fields: dict[str, Any]) -> None:
    train = TrainConfig(refresh="by_lag", refresh_interval=1)
    NPDConfig(train=train)
    with pytest.raises(UserError, match=r"train.refresh must be another than by_lag .* use every_n"):
        NPDConfig(train=train, rollout=RolloutConfig(**fields))


def test_the_rules_that_need_an_interval_say_so() -> None:
    for rule in ("every_n", "by_lag"):
        with pytest.raises(UserError, match=f"refresh_interval must be at least 1 with refresh {rule}, got 0"):
            config(refresh=rule, refresh_interval=0)
