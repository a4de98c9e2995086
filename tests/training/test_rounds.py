"""The trainer that lives through the rounds: what it waits for, appends and replays, whenever it is killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from megatron_npd.config.training import TrainConfig
from megatron_npd.data.row_schedule import ScheduleEntry, load_schedule
from megatron_npd.errors import UserError
from megatron_npd.run_dir import RunDir
from megatron_npd.training import rounds, saving
from megatron_npd.training.batch_loader import BatchLoader
from megatron_npd.training.metrics import is_time
from megatron_npd.training.refresh_schedule import round_boundaries
from megatron_npd.training.schedule import append_entry
from megatron_npd.training.step import TrainStep
from megatron_npd.training.trainer import train
from tests.dist import run_distributed
from tests.training.make_run import config, make_round, read_metrics

STEPS, ROWS, UPDATES = 9, 4, 2  # rounds of 3 steps
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "dp2": (2, {}),
    "tp2 pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "replay": (1, {"replay": 0.25}),
}
MOMENTS = (
    "before round 0 is appended",
    "after round 0 is appended",
    "a step before the mark",
    "before the mark is saved",
    "after the mark is saved",
    "while it waits",
    "before the append",
    "after the append",
    "before the packs are read",
    "a step after the append",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """All rounds of a run, to be shown to a trainer one after another."""
    root = tmp_path_factory.mktemp("made")
    for index in range(UPDATES + 1):
        make_round(root, index)
    return RunDir(root)


def run_config(model: Path, run: Path, **fields: Any) -> TrainConfig:
    """A trainer of a run as the runner starts it."""
    (run / "rounds").mkdir(parents=True, exist_ok=True)
    checkpoints = str(RunDir(run).checkpoints)
    more = {"load": checkpoints, "train_iters": STEPS, "updates": UPDATES, **fields}
    return config(model, run, checkpoints, global_batch_size=ROWS, **more)


def show(made: RunDir, run: RunDir, index: int) -> None:
    """Have the packs of a round be sealed, at once."""
    if not run.round(index).exists():
        shutil.copytree(made.round(index), hidden := run.root / "rounds" / f".{index}")
        hidden.rename(run.round(index))


class Stages:
    """In the place of rounds' clock: seals the next round's packs at the third look, once its policy can be made.

    Attributes:
        waits: Policies of the marked checkpoints that there were at each look.
    """

    def __init__(self, made: RunDir, run: RunDir, moment: str) -> None:
        self.made, self.run, self.moment, self.waits = made, run, moment, list[int]()

    def monotonic(self) -> float:
        return len(self.waits)

    def sleep(self, _: float) -> None:
        policies = next(index for index in range(UPDATES + 2) if not self.run.checkpoint(index + 1))
        if policies and self.moment == "while it waits":
            die()
        self.waits.append(policies)
        if self.waits.count(policies) == 3:
            show(self.made, self.run, policies)


def exact(run: RunDir, metrics: str = "checkpoints/metrics.jsonl") -> list[dict[str, Any]]:
    """The metrics' lines without the times."""
    lines = read_metrics(run.root / metrics)
    return [{name: value for name, value in line.items() if not is_time(name)} for line in lines]


def saved(run: RunDir) -> dict[str, bytes]:
    """Weights and optimizer state of all checkpoints."""
    return {str(path.relative_to(run.root)): path.read_bytes() for path in run.checkpoints.glob("iter_*/*.distcp")}


def marks(run: RunDir) -> dict[int, int]:
    """Policies by the steps of their checkpoints."""
    states = [json.loads(path.read_text())["state"] for path in sorted(run.checkpoints.glob("iter_*/state.json"))]
    return {state["iteration"]: state["policy"] for state in states if "policy" in state}


def alike(run: RunDir, other: RunDir) -> None:
    """Two runs agree bit for bit: metrics, schedule, weights and optimizer."""
    assert exact(run) == exact(other)
    assert run.schedule.read_bytes() == other.schedule.read_bytes()
    assert saved(run) == saved(other) and marks(run) == marks(other)


def die(*_: Any, **__: Any) -> None:
    os._exit(9)


def _kill(moment: str) -> None:
    """Have this process die without a word when it first comes to the moment."""
    append, extend, step, save = rounds.append_entry, BatchLoader.extend, TrainStep.run, saving.Saver.save

    def appending(path: Path, entry: ScheduleEntry) -> None:
        here = "round 0 is appended" in moment if entry.round == 0 else moment.endswith(" the append")
        here &= moment.startswith(("before", "after"))
        if here and moment.startswith("before"):
            die()
        append(path, entry)
        if here:
            die()

    def stepping(self: TrainStep, batches: Any, iteration: int, ask: Any) -> Any:
        if iteration == {"a step before the mark": 3, "a step after the append": 5}.get(moment):
            die()
        return step(self, batches, iteration, ask)

    def save_or_die(*args: Any, **kwargs: Any) -> None:
        if moment == "before the mark is saved":
            die()
        save(*args, **kwargs)
        if moment == "after the mark is saved":
            die()

    rounds.append_entry, TrainStep.run, saving.Saver.save = appending, stepping, save_or_die
    BatchLoader.extend = die if moment == "before the packs are read" else extend


def _live(rank: int, _: int, cfg: TrainConfig, made: RunDir, moment: str) -> list[int]:
    """Train a run whose rounds appear when their policies can be made; how often rank 0 looked for them."""
    stages = Stages(made, RunDir(Path(cfg.data_path)), moment)
    if rank == 0:
        _kill(moment)
    rounds.time, rounds._TELL_SECONDS = stages, 1.0  # the others are told at each look
    assert train(cfg).finished
    return stages.waits


def _stop_and_resume(rank: int, _: int, cfg: TrainConfig, made: RunDir) -> None:
    """The same by a schedule that somebody else appends to, and a call of train for each round."""
    run = RunDir(Path(cfg.data_path))
    for index, stop in enumerate(round_boundaries(STEPS, UPDATES)):
        if rank == 0:
            show(made, run, index)
            from_row = ROWS * round_boundaries(STEPS, UPDATES)[index - 1] if index else 0
            append_entry(run.schedule, entry(index, from_row))
        with rounds.together():
            pass
        train(replace(cfg, data_path=str(run.schedule), exit_at_iteration=stop))


def entry(index: int, from_row: int) -> ScheduleEntry:
    name = f"rounds/{index:04d}/packs"
    return ScheduleEntry(from_row=from_row, packs=name, round=index, policy_version=f"v{index:04d}")


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, made: RunDir
) -> Callable[[str], RunDir]:
    """The run that one trainer lived through, in a layout."""
    root, runs = tmp_path_factory.mktemp("undisturbed"), dict[str, RunDir]()

    def undisturbed(layout: str) -> RunDir:
        if layout not in runs:
            ranks, fields = LAYOUTS[layout]
            cfg = run_config(tiny_model_dir, root / layout, **fields)
            looks, *others = run_distributed(_live, ranks, cfg, made, "")
            assert looks == [0] * 3 + [1] * 3 + [2] * 3 and not any(others), "it waits for each round, and rank 0 looks"
            runs[layout] = RunDir(root / layout)
        return runs[layout]

    return undisturbed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_trainer_equals_one_stopped_and_resumed_each_round(
    tmp_path: Path, tiny_model_dir: Path, made: RunDir, undisturbed: Callable[[str], RunDir], layout: str
) -> None:
    ranks, fields = LAYOUTS[layout]
    run = undisturbed(layout)
    run_distributed(_stop_and_resume, ranks, run_config(tiny_model_dir, tmp_path, **fields), made)
    alike(run, RunDir(tmp_path))
    assert load_schedule(run.schedule) == [entry(0, 0), entry(1, 12), entry(2, 24)]
    assert marks(run) == {3: 1, 6: 2, 9: 3}
    assert [line["round"] for line in exact(run)] == [0] * 3 + [1] * 3 + [2] * 3
    assert len({line["loss"] for line in exact(run)}) == STEPS and len(saved(run)) >= 3
    if layout == "replay":
        pairs = zip(exact(undisturbed("one process")), exact(run), strict=True)
        assert [one["loss"] == other["loss"] for one, other in pairs] == [True] * 3 + [False] * 6
        other = run_config(tiny_model_dir, tmp_path, replay=0.5, train_iters=STEPS + 1)
        with pytest.raises(UserError, match=r"replay must be 0\.25, with which .* was trained, got 0\.5"):
            train(other)


@pytest.mark.parametrize("layout", ["one process", "dp2"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_trainer_goes_on_bit_by_bit(
    tmp_path: Path,
    tiny_model_dir: Path,
    made: RunDir,
    undisturbed: Callable[[str], RunDir],
    layout: str,
    moment: str,
) -> None:
    ranks, fields = LAYOUTS[layout]
    cfg = run_config(tiny_model_dir, tmp_path, **fields)
    with pytest.raises(AssertionError, match=r"a process failed \(exit codes .*\b9\b"):
        run_distributed(_live, ranks, cfg, made, moment)
    run_distributed(_live, ranks, cfg, made, "")
    alike(RunDir(tmp_path), undisturbed(layout))


def test_a_lost_schedule_is_written_again_and_another_one_is_refused(
    tmp_path: Path, tiny_model_dir: Path, made: RunDir, undisturbed: Callable[[str], RunDir]
) -> None:
    run, whole = RunDir(tmp_path), undisturbed("one process")
    cfg = run_config(tiny_model_dir, tmp_path)
    with pytest.raises(AssertionError, match="a process failed"):
        run_distributed(_live, 1, cfg, made, "a step after the append")
    for index in range(3):
        show(made, run, index)
    good = whole.schedule.read_bytes()
    run.schedule.unlink()
    append_entry(run.schedule, replace(entry(0, 0), policy_version="v0007"))
    with pytest.raises(UserError, match=r"schedule.jsonl must begin with the rounds .* got .*v0007.*; restore it, or"):
        train(cfg)
    run.schedule.unlink()
    train(cfg)
    assert run.schedule.read_bytes() == good
    alike(run, whole)


def test_a_waiting_trainer_ends_with_what_started_it(tmp_path: Path, tiny_model_dir: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    (run / "prompts").mkdir(parents=True)
    train = [sys.executable, "-m", "megatron_npd", "train", "--hf-model", str(tiny_model_dir), "--data-path", str(run)]
    code = "import subprocess, sys; from megatron_npd.lifeline import child_environment as e; "
    code += "subprocess.run(sys.argv[1:], env=e())"
    with open(log, "wb") as stream:
        command = [sys.executable, "-c", code, *train, "--platform", "cpu", "--save", str(run / "checkpoints")]
        starter = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 200
        while b"waiting for" not in log.read_bytes():
            assert starter.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        (trainer,) = psutil.Process(starter.pid).children()
    finally:
        starter.kill()
        starter.wait()
    assert not psutil.wait_procs([trainer], timeout=60)[1]
    assert log.read_text().count("waiting for") == 1
    assert f"error: process {starter.pid}, which started this one, must run until this one is done" in log.read_text()


def test_packs_of_another_round_are_refused(tmp_path: Path, tiny_model_dir: Path, made: RunDir) -> None:
    shutil.copytree(made.round(1), tmp_path / "rounds/0000")
    with pytest.raises(UserError, match="0000/packs must hold round 0, got round 1; pack that round again"):
        train(run_config(tiny_model_dir, tmp_path))
    assert not RunDir(tmp_path).schedule.exists()


def test_a_run_whose_policies_nobody_could_make_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    cfg = run_config(tiny_model_dir, tmp_path)
    with pytest.raises(UserError, match="save must be given with the directory of a run, got none"):
        train(replace(cfg, save="", load=""))


# -- rounds ahead of the trainer -----------------------------------------------------------------------------------


def ahead(
    monkeypatch: pytest.MonkeyPatch, cfg: TrainConfig, made: RunDir, shown: dict[int, int], stop: int = 0
) -> list[int]:
    """Train while rounds' packs are sealed during the steps ``shown[round]``, or else when waited for.

    ``stop``: the step in which the trainer is interrupted. Returns the rounds that were waited for.
    """
    run, waits, step = RunDir(Path(cfg.data_path)), list[int](), TrainStep.run

    def stepping(self: TrainStep, batches: Any, iteration: int, ask: Any) -> Any:
        for index, at in shown.items():
            if at == iteration:
                show(made, run, index)
        if iteration == stop:
            raise KeyboardInterrupt
        return step(self, batches, iteration, ask)

    def sleep(_: float) -> None:
        waits.append(len(load_schedule(run.schedule)))
        show(made, run, waits[-1])

    show(made, run, 0)
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "run", stepping)
        patch.setattr(rounds, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
        train(cfg)
    return waits


@pytest.mark.parametrize(
    ("max_lead", "shown", "from_rows", "waits"),
    [
        (1, {1: 1, 2: 2}, [0, 12, 24], []),  # sealed before the mark: each begins with its policy
        (1, {1: 5, 2: 8}, [0, 20, 32], []),  # later: at the next boundary
        (1, {2: 9}, [0, 24, 32], [1, 2]),  # two marked policies without a round would be one too many
        (2, {1: 7, 2: 7}, [0, 28, 32], []),  # both late: one after the other
        (2, {}, [0, 28, 32], [1, 2]),  # after the last mark each trains for a third of the steps
        (5, {1: 9}, [0, 28, 32], [1, 2]),
    ],
)
def test_with_a_lead_rounds_are_taken_when_they_are_seen(
    tmp_path: Path,
    tiny_model_dir: Path,
    made: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    max_lead: int,
    shown: dict[int, int],
    from_rows: list[int],
    waits: list[int],
) -> None:
    run = RunDir(tmp_path / "run")
    cfg = run_config(tiny_model_dir, run.root, max_lead=max_lead)
    assert ahead(monkeypatch, cfg, made, shown) == waits
    assert load_schedule(run.schedule) == [entry(index, row) for index, row in enumerate(from_rows)]
    assert marks(run) == {3: 1, 6: 2, 9: 3}

    # The schedule says all: the same steps by it alone.
    replayed = RunDir(tmp_path / "replayed")
    shutil.copytree(run.root / "rounds", replayed.root / "rounds")
    shutil.copy(run.schedule, replayed.schedule)
    train(
        replace(run_config(tiny_model_dir, replayed.root, updates=0), data_path=str(replayed.schedule), refresh="never")
    )
    assert exact(replayed) == exact(run)
    last = "checkpoints/iter_0000009/"
    assert saved(replayed) == {name: data for name, data in saved(run).items() if name.startswith(last)}


@pytest.mark.parametrize("stop", [8, 9])
def test_a_replayed_trainer_takes_nothing_before_what_is_scheduled(
    tmp_path: Path, tiny_model_dir: Path, made: RunDir, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Round 1 was scheduled for row 28, after the second mark; when these steps are repeated, round 2 is there too."""
    run = RunDir(tmp_path)
    cfg = run_config(tiny_model_dir, run.root, max_lead=2)
    with pytest.raises(KeyboardInterrupt):
        ahead(monkeypatch, cfg, made, {1: 7}, stop)
    scheduled = run.schedule.read_text().splitlines()[:-1]
    shutil.rmtree(run.checkpoint_at(6), ignore_errors=True)  # as if killed before it was whole
    show(made, run, 2)
    ahead(monkeypatch, cfg, made, {1: 7})
    assert run.schedule.read_text().splitlines()[: len(scheduled)] == scheduled
    assert load_schedule(run.schedule) == [entry(0, 0), entry(1, 28), entry(2, 32)]
    assert [line["round"] for line in exact(run)] == [0] * 7 + [1, 2]


# -- when policies are made ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"refresh": "never"}, {9: 1}),
        ({"refresh": "every_n", "refresh_interval": 2}, {2: 1, 4: 2, 9: 3}),
        ({"refresh": "by_lag", "refresh_interval": 2, "refresh_lag": 1e-6}, {2: 1, 4: 2, 9: 3}),
        ({"refresh": "by_lag", "refresh_interval": 2, "refresh_lag": 1e9}, {9: 1}),
    ],
    ids=str,
)
def test_the_rule_decides_at_which_rows_rounds_begin(
    tmp_path: Path,
    tiny_model_dir: Path,
    made: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    expected: dict[int, int],
) -> None:
    run, killed = RunDir(tmp_path / "run"), RunDir(tmp_path / "killed")
    steps = list(expected)[:-1]
    assert ahead(monkeypatch, run_config(tiny_model_dir, run.root, **fields), made, {}) == [1, 2][: len(steps)]
    assert marks(run) == expected
    assert load_schedule(run.schedule) == [entry(index, ROWS * step) for index, step in enumerate([0, *steps])]
    cfg = run_config(tiny_model_dir, killed.root, save_interval_in_mins=1e-9, **fields)  # goes on from any step
    for stop in (4, 6):
        with pytest.raises(KeyboardInterrupt):
            ahead(monkeypatch, cfg, made, {}, stop)
    ahead(monkeypatch, cfg, made, {})
    alike(killed, run)
