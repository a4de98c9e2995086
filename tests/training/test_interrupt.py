"""A run that is asked to stop saves and goes on later as if nothing had been; what is not finite changes nothing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_npd import lifeline
from megatron_npd.audit.verify import verify_run
from megatron_npd.config.training import TrainConfig
from megatron_npd.errors import UserError
from megatron_npd.training import rounds
from megatron_npd.training.batch_loader import GlobalBatch
from megatron_npd.training.step import TrainStep
from megatron_npd.training.trainer import TrainResult, train
from tests.dist import run_distributed
from tests.training.make_run import column, config, make_packs, make_round, read_metrics
from tests.training.test_trainer import exact

STOPPED = 3  # the step in which a run is asked to stop


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_packs(tmp_path_factory.mktemp("packs"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, packs: Path) -> TrainConfig:
    """A run of one process that nothing disturbed."""
    cfg = config(tiny_model_dir, packs, tmp_path_factory.mktemp("whole") / "run", train_iters=6)
    train(cfg)
    return cfg


def _signalled(rank: int, _: int, cfg: TrainConfig, number: int, at: int) -> TrainResult:
    """Train while this process gets a signal in a step, if its rank is the last."""
    step = TrainStep.run

    def run(self: TrainStep, batches: Any, iteration: int, ask: Any) -> Any:
        if iteration == at and rank == int(os.environ.get("WORLD_SIZE", "1")) - 1:
            os.kill(os.getpid(), number)
        return step(self, batches, iteration, ask)

    TrainStep.run = run  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return train(cfg)
    finally:
        TrainStep.run = step


def test_a_signal_saves_and_the_next_call_goes_on_bit_by_bit(
    tmp_path: Path, tiny_model_dir: Path, packs: Path, whole: TrainConfig
) -> None:
    cfg = config(tiny_model_dir, packs, tmp_path / "run", train_iters=6)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    result = _signalled(0, 1, cfg, signal.SIGUSR1, STOPPED)
    assert (result.iteration, result.interrupted, result.finished) == (STOPPED, "SIGUSR1", False)
    assert (tmp_path / "run/iter_0000003/manifest.json").is_file()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == handlers
    result = _signalled(0, 1, cfg, signal.SIGTERM, 6)
    assert result.finished and not result.interrupted  # it came in the last step, which ends the run as it is
    assert exact(result.metrics_path) == exact(Path(whole.save) / "metrics.jsonl")
    assert not (tmp_path / "run/iter_0000003").exists()  # the end replaces it
    assert not verify_run(tmp_path / "run").problems


def test_a_signal_to_one_rank_stops_all(tmp_path: Path, tiny_model_dir: Path, packs: Path, whole: TrainConfig) -> None:
    cfg = config(tiny_model_dir, packs, tmp_path / "run", train_iters=6)
    first, second = run_distributed(_signalled, 2, cfg, signal.SIGTERM, STOPPED)
    assert first.iteration == second.iteration == STOPPED
    assert (first.interrupted, second.interrupted) == ("a signal to another rank", "SIGTERM")
    result = train(cfg)  # in one process, over the same samples in the same order
    files = (Path(whole.save) / "metrics.jsonl", result.metrics_path)
    expected, got = (column(path, "samples_sha256") for path in files)
    assert result.finished and got == expected
    expected, got = (column(path, "loss") for path in files)
    assert got == pytest.approx(expected, abs=1e-5)


def test_time_that_is_up_stops_it_and_without_save_is_refused(
    tmp_path: Path, tiny_model_dir: Path, packs: Path
) -> None:
    limit: dict[str, Any] = {"exit_duration_in_mins": 1e-9}
    result = train(config(tiny_model_dir, packs, tmp_path / "run", **limit))
    assert (result.iteration, result.interrupted) == (1, "exit_duration_in_mins 1e-09")
    with pytest.raises(UserError, match="save must be given with exit_duration_in_mins"):
        train(config(tiny_model_dir, packs, **limit))


def test_a_wait_for_packs_is_interrupted(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rounds").mkdir()
    cfg = config(tiny_model_dir, tmp_path, tmp_path / "save", train_iters=4, lr_warmup_iters=0, updates=1)
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(rounds, "time", clock)
    result = train(cfg)  # for the first round
    assert (result.iteration, result.interrupted) == (0, "SIGTERM")
    make_round(tmp_path, 0)
    result = train(cfg)  # for the second
    assert (result.iteration, result.interrupted) == (2, "SIGTERM")
    assert (tmp_path / "save/iter_0000002").is_dir()


def test_a_process_whose_starter_is_gone_ends_at_once(
    tiny_model_dir: Path, packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifeline._lost, "is_set", lambda: True)
    cfg = config(tiny_model_dir, packs, tmp_path / "run", train_iters=6)
    with pytest.raises(AssertionError, match=f"-{signal.SIGTERM:d}"):
        run_distributed(_signalled_without_starter, 1, cfg)
    assert not list((tmp_path / "run").glob("iter_*"))


def _signalled_without_starter(rank: int, world: int, cfg: TrainConfig) -> None:
    lifeline._lost.set()
    _signalled(rank, world, cfg, signal.SIGTERM, 2)


def _not_finite(rank: int, world: int, cfg: TrainConfig, at: tuple[int, ...], where: str) -> None:
    """Train while in some steps the loss, or its gradient, is NaN on the last rank alone."""
    loss, run, now = TrainStep._loss, TrainStep.run, [0]

    def stepping(self: TrainStep, batches: Any, iteration: int, ask: Any) -> Any:
        now[0] = iteration
        return run(self, batches, iteration, ask)

    def losing(self: TrainStep, *args: Any) -> Any:
        total, count, sums = loss(self, *args)
        if now[0] in at and rank == world - 1:
            if where == "loss":
                sums[0, 0] = torch.inf
            total = total * torch.nan
        return total, count, sums

    TrainStep._loss, TrainStep.run = losing, stepping  # pyright: ignore[reportAttributeAccessIssue]
    try:
        train(cfg)
    finally:
        TrainStep._loss, TrainStep.run = loss, run


def weights(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("*.distcp")}


@pytest.mark.parametrize(("where", "fields"), [("loss", {}), ("gradient norm", {"bf16": True})])
def test_a_step_that_is_not_finite_changes_nothing(
    tmp_path: Path, tiny_model_dir: Path, packs: Path, where: str, fields: dict[str, Any]
) -> None:
    cfg = config(tiny_model_dir, packs, tmp_path / "run", train_iters=4, save_interval=1, **fields)
    run_distributed(_not_finite, 2, cfg, (2, 3), where)
    after = [weights(tmp_path / f"run/iter_000000{step}") for step in (1, 2, 3, 4)]
    assert after[0] == after[1] == after[2] != after[3]
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [line["skipped"] for line in lines] == [0, 1, 1, 0]
    assert [line["grad_norm"] is None for line in lines] == [False, True, True, False]
    assert [line["loss"] is None for line in lines] == [False, where == "loss", where == "loss", False]
    notes = read_metrics(tmp_path / "run/skipped.jsonl")
    assert [note["iteration"] for note in notes] == [2, 3]
    for note, line in zip(notes, lines[1:3], strict=True):
        assert GlobalBatch(samples=note["samples"], attention_cost=0.0).sha256 == line["samples_sha256"]
        assert note[where.replace(" ", "_")] in ("nan", "inf")
