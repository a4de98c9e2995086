"""Stages beside one another (``max_lead``): which, in which order, and how one that fails ends all; no engines."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from megatron_npd.config.cluster import ClusterConfig
from megatron_npd.config.run import NPDConfig
from megatron_npd.config.settings import AnnotateConfig
from megatron_npd.config.training import TrainConfig
from megatron_npd.data.row_schedule import ScheduleEntry
from megatron_npd.errors import UserError
from megatron_npd.manifest import is_sealed, seal
from megatron_npd.platform import get_platform

get_platform("cpu")

from megatron_npd.audit.numbers import busy_shares, json_lines, timeline_of  # noqa: E402
from megatron_npd.pipeline import launch, runner  # noqa: E402
from megatron_npd.pipeline.launch import Job, Launcher  # noqa: E402
from megatron_npd.pipeline.nodes import Nodes  # noqa: E402
from megatron_npd.pipeline.stages import STAGES  # noqa: E402
from megatron_npd.pipeline.work import Context  # noqa: E402
from megatron_npd.run_dir import RunDir  # noqa: E402
from megatron_npd.stoppable import Stopped, Worker, check_stop  # noqa: E402
from megatron_npd.training.schedule import append_entry  # noqa: E402

PATIENCE = 120.0  # seconds until a test that waits for ever fails
Action = Callable[[Context, int], None]


class World:
    """The stages of the table with stand-ins for what they do: each seals its output at once.

    Attributes:
        begun: (stage, index) in the order of beginning.
        served: Policies that the servers were asked for, in order.
        threads: Names of the threads that did something.
        most: By what stages occupy: how many of them were at work at a time, at most.
        instead: What a stage does before it leaves its output, by (stage, index).
        trainer: Begins with the first round's packs.
    """

    def __init__(self, patch: pytest.MonkeyPatch, root: Path, **fields: Any) -> None:
        train = fields.pop("train", TrainConfig(train_iters=2 * (fields.get("updates", 1) + 1)))
        self.cfg = NPDConfig(run_dir=str(root), student="student", train=train, **fields)
        self.run = RunDir(root)
        self.begun: list[tuple[str, int]] = []
        self.served: list[int] = []
        self.threads: set[str] = set()
        self.most: Counter[str] = Counter()
        self.instead: dict[tuple[str, int], Action] = {}
        self.trainer = Trainer(self)
        self._at_work: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.ctx = Context(run=self.run, cfg=self.cfg, servers=cast(Any, self), launcher=cast(Any, None))
        patch.setattr(runner.work, "prompts", void)
        for name in STAGES:
            patch.setitem(STAGES, name, dataclasses.replace(STAGES[name], function=self._function(name)))
        self.run.report.mkdir(parents=True)

    def serve(self, index: int) -> None:
        """In the place of the servers."""
        self.served.append(index)

    def go(self) -> None:
        runner._run(self.ctx, self._report)

    def _report(self, _: Path) -> str:
        assert threading.current_thread() is threading.main_thread()
        return ""

    def _function(self, name: str) -> Action:
        occupied = STAGES[name].occupies

        def function(ctx: Context, index: int) -> None:
            with self._lock:
                self.begun.append((name, index))
                self.threads.add(threading.current_thread().name)
                self._at_work[occupied] += 1
                self.most[occupied] = max(self.most[occupied], self._at_work[occupied])
            try:
                self.instead.get((name, index), lambda *_: None)(ctx, index)
                self.leave(name, index)
            finally:
                with self._lock:
                    self._at_work[occupied] -= 1

        return function

    def leave(self, name: str, index: int) -> None:
        """What a stage leaves."""
        if name == "train":
            self.ctx.trainer = self.ctx.trainer or cast(Any, self.trainer)
            return
        output = STAGES[name].output(self.run, index)
        for path in [output, self.run.held_out.prompts] if name == "prompts" else [output]:
            assert path is not None
            path.mkdir(parents=True, exist_ok=True)
            seal(path, kind=STAGES[name].kind)


class Trainer:
    """In the place of the trainer: a policy at each second look, once the packs are there that it waits for.

    Args:
        world: Its run.
        lead: Rounds that may be missing when it goes on; none, where every round is to be trained on.
        after: What must have begun before it makes its last policy.
    """

    def __init__(self, world: World, lead: int = 0, after: tuple[str, int] | None = None) -> None:
        self.world, self.lead, self.after = world, lead, after
        self.made, self.taken, self.at_work = 0, -1, False

    def running(self) -> bool:
        run, cfg = self.world.run, self.world.cfg
        rounds = cfg.updates + 1
        while self.taken < min(self.made, rounds - 1) and is_sealed(run.packs(self.taken + 1)):
            self.taken += 1
            row = 8 * self.made + self.taken
            about = {"packs": "packs", "round": self.taken, "policy_version": "v0000"}
            append_entry(run.schedule, ScheduleEntry(from_row=row, **about))
        if self.made == rounds or self.taken < max(0, self.made - self.lead):
            return self.made < rounds
        if self.made == rounds - 1 and self.after is not None and self.after not in self.world.begun:
            return True
        self.at_work = not self.at_work
        if not self.at_work:
            self.made += 1
            path = run.checkpoint_at(cfg.train.train_iters * self.made // rounds)
            path.mkdir(parents=True)
            (path / "state.json").write_text(json.dumps({"state": {"policy": self.made}}))
            seal(path, kind="checkpoint")
        return self.made < rounds


def meet(barrier: threading.Barrier) -> Action:
    """Wait for others to be at work too; without them the barrier breaks."""
    return lambda *_: void(barrier.wait(PATIENCE))


def void(*_: object) -> None: ...


def until_stopped(stopped: list[BaseException]) -> Action:
    """Be at work for good, as a rollout whose responses take long, and tell what ended it."""

    def work(*_: object) -> None:
        until = time.monotonic() + PATIENCE
        try:
            while time.monotonic() < until:
                check_stop()
                time.sleep(0.01)
        except BaseException as error:
            stopped.append(error)
            raise

    return work


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if isinstance(thread, Worker)]


def test_without_a_lead_one_stage_after_another_in_this_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, tmp_path, updates=1)
    world.go()
    rounds = ("rollout", "annotate", "select", "pack", "train", "export")
    policy = ("held-out rollout", "measure")
    assert world.begun == [
        ("prompts", 0),
        *((name, index) for index in (0, 1) for name in (*policy, *rounds)),
        *((name, 2) for name in policy),
    ]
    assert world.threads == {threading.main_thread().name} and max(world.most.values()) == 1
    assert world.served == [0, 0, 1, 1, 2]


def test_rounds_overlap_but_nothing_is_occupied_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While round 1 is generated, round 0 is annotated; while round 2 is, round 1 is annotated and round 0 packed."""
    world = World(monkeypatch, tmp_path, updates=3, max_lead=2)
    for stages in ([("rollout", 1), ("annotate", 0)], [("rollout", 2), ("annotate", 1), ("pack", 0)]):
        barrier = threading.Barrier(len(stages))
        world.instead |= {stage: meet(barrier) for stage in stages}
    world.go()
    assert set(world.most.values()) == {1}
    assert set(world.begun) == {
        ("prompts", 0),
        *((name, index) for index in range(4) for name in ("rollout", "annotate", "select", "pack", "train", "export")),
        *((name, index) for index in range(5) for name in ("held-out rollout", "measure")),
    }
    assert len(world.begun) == len(set(world.begun))
    for name in ("rollout", "annotate", "select", "pack", "export", "measure"):
        indices = [index for stage, index in world.begun if stage == name]
        assert indices == sorted(indices), name
    assert workers() == []
    # The books, which all threads write.
    records = json_lines(world.run.seconds, "stage", "round", "seconds", "at")
    assert Counter((record["stage"], record["round"] or 0) for record in records) == Counter(world.begun)
    timeline = timeline_of(records)
    rollout, annotate = (
        next(entry for entry in timeline if (entry["stage"], entry["round"]) == place)
        for place in (("rollout", 1), ("annotate", 0))
    )
    assert rollout["start"] < annotate["end"] and annotate["start"] < rollout["end"]
    assert busy_shares(timeline).keys() == {"servers", "annotator", "trainer"}


def test_the_servers_never_go_back_to_an_older_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even in a run that goes on where policy 1 waits to be measured, and round 1, of policy 0, to be generated."""
    world = World(monkeypatch, tmp_path, updates=2, max_lead=1)
    for name in ("prompts", "held-out rollout", "measure", "rollout", "annotate", "select", "pack", "export"):
        world.leave(name, 0)
    while not world.trainer.made:
        world.trainer.running()
    world.go()
    assert world.served == [0, 1, 1, 2, 3]
    assert [place for place in world.begun if place[0].endswith("rollout")] == [
        ("rollout", 1),
        ("held-out rollout", 1),
        ("rollout", 2),
        ("held-out rollout", 2),
        ("held-out rollout", 3),
    ]


def test_a_round_is_generated_once_its_policy_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round r + lead waits for policy r: the servers pause, and what they generated stays."""
    world = World(monkeypatch, tmp_path, updates=3, max_lead=1)

    def look(_: Context, index: int) -> None:
        assert index < 2 or is_sealed(world.run.policy(index - 1))

    world.instead |= {("rollout", index): look for index in range(4)}
    world.go()
    assert all(is_sealed(world.run.rollouts(index)) for index in range(4))


def test_the_first_error_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, tmp_path, updates=2, max_lead=1)
    barrier, stopped = threading.Barrier(2), list[BaseException]()

    def generate(ctx: Context, index: int) -> None:
        barrier.wait(PATIENCE)
        until_stopped(stopped)(ctx, index)

    def fail(*_: object) -> None:
        barrier.wait(PATIENCE)
        raise UserError("annotate must exit with 0, got 1; see its messages above")

    world.instead |= {("rollout", 1): generate, ("annotate", 0): fail}
    with pytest.raises(UserError, match="annotate must exit with 0, got 1"):
        world.go()
    assert [type(error) for error in stopped] == [Stopped]
    assert workers() == [] and not is_sealed(world.run.rollouts(1)) and not is_sealed(world.run.annotations(0))
    world.instead.clear()
    world.go()  # again: it goes on where it stopped
    assert Counter(world.begun)["rollout", 0] == 1 and is_sealed(world.run.policy(3))


def test_a_trainer_that_dies_ends_the_rollout_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, tmp_path, updates=2, max_lead=1)
    stopped = list[BaseException]()
    world.instead["rollout", 1] = until_stopped(stopped)

    def die() -> bool:
        raise UserError("train must exit with 0, got -9")

    monkeypatch.setattr(world.trainer, "running", die)
    with pytest.raises(UserError, match="train must exit with 0, got -9"):
        world.go()
    assert len(stopped) == 1 and workers() == []
    assert "train" in [record["stage"] for record in json_lines(world.run.seconds)]


def test_ctrl_c_ends_what_is_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, tmp_path, updates=2, max_lead=1)
    stopped = list[BaseException]()
    world.instead["rollout", 1] = until_stopped(stopped)

    def interrupt() -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(world.trainer, "running", interrupt)
    with pytest.raises(KeyboardInterrupt):
        world.go()
    assert len(stopped) == 1 and workers() == []


def test_a_round_that_nobody_will_train_on_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer is through with rounds 0 and 1 when round 2 is still being generated: the run ends."""
    world = World(monkeypatch, tmp_path, updates=2, max_lead=1)
    stopped = list[BaseException]()
    world.instead["rollout", 2] = until_stopped(stopped)
    world.trainer = Trainer(world, lead=1, after=("rollout", 2))
    world.go()
    assert len(stopped) == 1 and not is_sealed(world.run.rollouts(2))
    assert is_sealed(world.run.policy(3)) and is_sealed(world.run.held_out.annotations(3))
    left = {(task.stage.name, task.index) for task in runner.needless(world.ctx, runner.tasks(3))}
    assert left == {(name, 2) for name in ("rollout", "annotate", "select", "pack")}
    world.go()  # a finished run repeats nothing
    assert Counter(world.begun)["rollout", 2] == 1


def test_a_follower_begins_with_the_rollouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``annotate.follow_seconds``: one annotator at a time, each beside its own round."""
    world = World(monkeypatch, tmp_path, updates=1, max_lead=1, annotate=AnnotateConfig(follow_seconds=60.0))
    for index in (0, 1):
        barrier = threading.Barrier(2)

        def generate(ctx: Context, index: int, barrier: threading.Barrier = barrier) -> None:
            ctx.generating = index  # as ``work.rollout`` says
            barrier.wait(PATIENCE)
            ctx.generating = None

        world.instead |= {("rollout", index): generate, ("annotate", index): meet(barrier)}
    world.go()
    assert world.most["ranks"] == 1 and is_sealed(world.run.policy(2))


def test_a_command_ends_with_the_thread_that_waits_for_it(tmp_path: Path) -> None:
    ended, jobs = threading.Event(), list[Job]()
    launcher = Launcher(NPDConfig())

    def work() -> None:
        jobs.append(Job("sleep", ["sleep", "600"]))
        jobs[0].wait()

    with launcher:
        worker = Worker(work, ended)
        while not jobs:
            time.sleep(0.01)
        assert jobs[0].running()
        worker.stop = True
        worker.join(PATIENCE)
        assert isinstance(worker.error, Stopped) and ended.is_set()
        with pytest.raises(UserError, match="sleep must exit with 0, got -15"):
            jobs[0].running()


def test_it_ends_on_all_nodes_and_that_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third node sees its part fail before the word reaches it that the command is to end."""
    cfgs = [ClusterConfig(nnodes=4, train_nodes=3, node_rank=rank, master_addr="a", attempt="7") for rank in range(3)]
    sides = [Nodes(RunDir(tmp_path), cfg) for cfg in cfgs]
    sides[0].state.mkdir(parents=True)
    parts: dict[int, list[str]] = {0: ["sleep", "600"], 1: ["sleep", "600"], 2: ["false"]}
    monkeypatch.setattr(launch, "command_line", lambda cfg, *_: parts[cfg.node_rank])
    launchers = [Launcher(cfg, side) for cfg, side in zip(cfgs, sides, strict=True)]
    ended, jobs = threading.Event(), list[Job]()

    def work() -> None:
        jobs.append(launchers[0].start("annotate", {"top_k": 4}))
        jobs[0].wait()

    worker = Worker(work, ended)
    followers = [Worker(launcher.follow, threading.Event()) for launcher in launchers[1:]]
    try:
        looks = [0]
        while looks != [0, 0, 1]:
            assert not ended.wait(0.01)
            looks = [min(job.looks, 1) for launcher in launchers for job in launcher._jobs]
        worker.stop = True
        assert ended.wait(PATIENCE)
        sides[0]._done.touch()
        for follower in followers:
            follower.join(PATIENCE)
            assert follower.done and follower.error is None
        assert isinstance(worker.error, Stopped) and not any(launcher._jobs for launcher in launchers[1:])
    finally:
        for launcher in launchers:
            launcher.__exit__()


def test_what_the_stages_of_a_lead_need_is_in_the_plan(tmp_path: Path) -> None:
    """Annotators are commands there, in one process too."""
    flags: dict[str, Any] = {"run_dir": str(tmp_path), "teacher": "teacher", "student": "student"}
    assert "-m megatron_npd annotate" not in runner.plan(NPDConfig(**flags))
    assert "-m megatron_npd annotate" in runner.plan(NPDConfig(**flags, max_lead=1))
