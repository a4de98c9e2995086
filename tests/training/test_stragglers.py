"""Which rank is slow: its own time, without that in which it waits for the others, on the log's lines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from megatron_npd.data.prefetch import Prefetcher
from megatron_npd.models import attention
from megatron_npd.training.metrics import average, console_line
from megatron_npd.training.trainer import train
from tests.dist import run_distributed
from tests.helpers import logged, make_tiny_model
from tests.training.make_run import config, make_packs, read_metrics
from tests.training.test_metrics import record

PAUSE, STEPS, MICRO_BATCHES, LAYERS = 0.04, 2, 4, 2
FORWARD, BACKWARD = 1.0, -1.0  # how ``_rotate`` turns
PP2: dict[str, Any] = {"pipeline_model_parallel_size": 2}
# The slow rank of two, what of it is slow, the layout, and how often a step pauses there.
CASES: dict[str, tuple[int, float | str, dict[str, Any], int]] = {
    "dp2-forward": (1, FORWARD, {}, 2 * LAYERS * MICRO_BATCHES // 2),
    "pp2-backward": (0, BACKWARD, PP2, 2 * LAYERS // 2 * MICRO_BATCHES),
    "vpp2-forward": (1, FORWARD, PP2 | {"virtual_pipeline_model_parallel_size": 2}, 2 * LAYERS * MICRO_BATCHES),
    "dp2-data": (1, "data", {}, MICRO_BATCHES // 2),
}


def _train(rank: int, world_size: int, models: dict[str, Path], packs: Path, root: Path) -> list[str]:
    lines: list[str] = []
    rotate, following = attention._rotate, Prefetcher.__next__
    for name, (slow, what, layout, _) in CASES.items():

        def slow_rotate(x: Any, cos: Any, sin: Any, sign: float, slow: int = slow, what: Any = what) -> Any:
            time.sleep(PAUSE * (rank == slow and sign == what))
            return rotate(x, cos, sin, sign)

        def slow_reading(self: Any, slow: int = slow, what: Any = what) -> Any:
            pause = PAUSE * (rank == slow and what == "data")
            time.sleep(pause)
            self._wait += pause
            return following(self)

        attention._rotate, Prefetcher.__next__ = slow_rotate, slow_reading
        model = models["vpp" if "virtual" in str(layout) else "two"]
        with logged() as said:
            train(config(model, packs, root / name, log_interval=2, train_iters=STEPS, lr_warmup_iters=1, **layout))
        lines += said
    return lines


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    root = tmp_path_factory.mktemp("stragglers")
    models = {"two": make_tiny_model(root / "two", num_hidden_layers=LAYERS)}
    models["vpp"] = make_tiny_model(root / "vpp", num_hidden_layers=2 * LAYERS)
    return root, run_distributed(_train, 2, models, make_packs(root), root)[0]


@pytest.mark.parametrize("name", CASES)
def test_the_slow_rank_is_named_with_its_own_time(runs: tuple[Path, list[str]], name: str) -> None:
    slow, what, _, pauses = CASES[name]
    lines = read_metrics(runs[0] / name / "metrics.jsonl")
    assert ["slowest_rank" in line for line in lines] == [False, True], "on the step that has a line in the log"
    step, found, pause = sum(line["step_seconds"] for line in lines) / STEPS, lines[1], pauses * PAUSE
    most = 1.5 * step  # of a step, not of all; ranks do not begin one at the same moment, and this is rank 0's
    if what == "data":
        assert found["data_wait_rank"] == slow and pause <= found["data_wait_max_seconds"] < most
        assert found["compute_max_seconds"] < step - pause / 2, "waiting is no computing"
        return
    least, median, greatest = (found[f"compute_{which}_seconds"] for which in ("min", "median", "max"))
    assert found["slowest_rank"] == slow and pause <= greatest < most
    assert least < greatest - pause / 2, "the other rank waits for it, and that is not its own time"
    assert median == pytest.approx((least + greatest) / 2, rel=1e-3)


def test_the_log_names_it(runs: tuple[Path, list[str]]) -> None:
    shown = [line for line in runs[1] if "ranks compute " in line]
    assert len(shown) == len(CASES)
    assert "ms (slowest 1)" in shown[0] and "ms (slowest 0)" in shown[1] and "ms (rank 1)" in shown[-1]


def test_an_interval_has_the_comparison_of_its_last_step() -> None:
    compared = {"compute_min_seconds": 0.1, "compute_median_seconds": 0.11, "compute_max_seconds": 0.2}
    compared |= {"slowest_rank": 5, "data_wait_max_seconds": 0.004, "data_wait_rank": 3}
    means = average([record(1), record(2, **compared)])
    line = console_line(means, 10, ranks=8)
    assert "ranks compute 100.0 / 110.0 / 200.0 ms (slowest 5), longest data wait 4.0 ms (rank 3), 8 rows" in line
    assert "compute min" not in line and "slowest" not in console_line(record(1), 10)
