"""Runs a recipe: starts every stage whose inputs are sealed, until nothing of the run is left to do.

A stage whose output is sealed is skipped, so the runner may be stopped anywhere and started again. The trainer is a
command of its own that lives through the rounds, as do the servers and the annotator; ``max_lead`` bounds how many
rounds may be ahead of the trainer.

With ``max_lead`` 0 one stage is at work at a time, here in the main thread; with ``take_turns`` what it needs is alone
on the devices. Else each has a thread of its own, one at a time on the servers, one on the ranks, and one of each stage
on the host: while round 1 is generated, round 0 is annotated, selected, packed and trained on. What needs a model's
ranks is then a command, so that these threads share no state of megatron-core; the main thread starts them, writes the
reports, and ends all when one of them fails.
"""

from __future__ import annotations

import os
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_npd.config.run import NPDConfig
from megatron_npd.data.row_schedule import load_schedule
from megatron_npd.errors import UserError
from megatron_npd.lock import LOCK, kernel_lock
from megatron_npd.log import get_logger
from megatron_npd.manifest import is_sealed
from megatron_npd.pipeline import work
from megatron_npd.pipeline.environment import note_seconds, timed
from megatron_npd.pipeline.launch import LAUNCHERS, Launcher, command_line
from megatron_npd.pipeline.nodes import Nodes
from megatron_npd.pipeline.preflight import check_run
from megatron_npd.pipeline.resume import keep_config
from megatron_npd.pipeline.servers import Servers, run_server_node
from megatron_npd.pipeline.signals import Signals
from megatron_npd.pipeline.stages import STAGES, Stage
from megatron_npd.pipeline.work import Context
from megatron_npd.run_dir import RunDir, version
from megatron_npd.stoppable import StoppedBySignal, Worker, check_stop

_POLL_SECONDS = 0.2

Report = Callable[[Path], str]


def run_npd(cfg: NPDConfig, report: Report) -> str:
    """Run near-policy distillation to its end, or go on where an earlier call stopped.

    With several nodes each calls it: the first one runs the stages, the others start what they are told to.

    Args:
        cfg: Configuration of the whole run.
        report: Writes the report of a run's directory, and returns its text table; called after each round that took
            long enough, and at the end.

    Returns:
        The text table of the report; empty on other nodes than the first.

    Raises:
        UserError: The configuration, the models or the prompts cannot be used, results depend on what was changed, or
            a stage failed, on this node or another.
        StoppedBySignal: SIGTERM or SIGUSR1 came, here or to another node, or ``exit_duration_in_mins`` are over; the
            trainer has saved.
    """
    run = RunDir(Path(cfg.run_dir))
    with ExitStack() as stack:
        signals = Signals(cfg.exit_duration_in_mins)
        if cfg.launcher == "torchrun":  # on Ray the command that was typed takes them
            stack.enter_context(signals)
        nodes = None
        if cfg.nnodes > 1 and cfg.launcher == "torchrun":
            # Before anything that may be refused on this node alone: the others would wait for it.
            signals.nodes = nodes = Nodes(run, cfg)
            stack.enter_context(nodes)
        check_run(cfg)
        run.root.mkdir(parents=True, exist_ok=True)
        if cfg.node_rank == 0:
            stack.enter_context(_run_lock(run.root))
            keep_config(run, cfg)
        if nodes is not None and cfg.serves:
            run_server_node(run, cfg, nodes)
            return ""
        signals.launcher = launcher = stack.enter_context(LAUNCHERS[cfg.launcher](cfg, nodes))
        if cfg.node_rank:
            launcher.follow()
            return ""
        servers = stack.enter_context(Servers(run, cfg, launcher))
        ctx = Context(run=run, cfg=cfg, servers=servers, launcher=launcher)
        _run(ctx, _seldom(report))
        ctx.annotator.close()
        return report(run.root)


def _seldom(report: Report) -> Callable[[Path], None]:
    """A report that takes a hundredth of the time at most: rounds of a second must not wait for its figures."""
    after = 0.0

    def write(run: Path) -> None:
        nonlocal after
        started = time.monotonic()
        if started >= after:
            report(run)
            after = time.monotonic() + 100 * (time.monotonic() - started)

    return write


def plan(cfg: NPDConfig) -> str:
    """What this node would do, without starting anything: stages with their state, and what it would start."""
    run, lines = RunDir(Path(cfg.run_dir)), [f"node {cfg.node_rank} of {cfg.nnodes}:"]
    if cfg.serves:
        ports = f"{cfg.server_port} to {cfg.server_port + cfg.rollout.num_servers - 1}"
        return f"{lines[0]} {cfg.rollout.num_servers} servers on ports {ports}, until the run is done"
    ctx = Context(run=run, cfg=cfg, servers=Servers(run, cfg), launcher=Launcher(cfg))
    for task in tasks(cfg.updates + 1) if cfg.node_rank == 0 else []:
        lines.append(
            f"{task.place:<12} {task.stage.name:<16} {task.stage.needs:<8} {'done' if task.done(ctx) else 'to do'}"
        )
    for command, fields in (
        ("annotate", ctx.annotator.settings()),
        ("train", work.trainer_settings(run, cfg)),
    ):
        if command == "train" or not ctx.annotator.here:
            lines.append(shlex.join(command_line(cfg, command, fields)))
    return "\n".join(lines)


def results(cfg: NPDConfig) -> str:
    """Where a finished run left its policy and its report, as two lines."""
    run = RunDir(Path(cfg.run_dir))
    return f"policy  {run.policy(rounds_of(run, cfg))}\nreport  {run.report / 'report.html'}"


@dataclass
class Task:
    """A stage of the table for one policy or round of a run.

    Attributes:
        stage: Of the table.
        index: Number of the policy or round; 0 where the stage is there once in a run.
        started: When the trainer began with it, until its seconds are noted; monotonic clock.
        worker: The thread that does it, where stages overlap, until its end is seen.
    """

    stage: Stage
    index: int
    started: float | None = None
    worker: Worker | None = None

    @property
    def at_work(self) -> bool:
        """Whether it was begun and its end was not seen."""
        return self.started is not None or self.worker is not None

    @property
    def place(self) -> str:
        """What of the run it belongs to, in words."""
        return {"run": "run", "policy": f"policy {version(self.index)}", "round": f"round {self.index}"}[self.stage.per]

    def done(self, ctx: Context) -> bool:
        """Whether nothing is left to do."""
        if self.stage.done is not None:
            return self.stage.done(ctx, self.index)
        output = self.stage.output(ctx.run, self.index)
        return output is not None and is_sealed(output)

    def ready(self, ctx: Context) -> bool:
        """Whether all that it reads is there."""
        if self.stage.ready is not None:
            return self.stage.ready(ctx, self.index)
        output = self.stage.output(ctx.run, self.index)
        inputs = [] if output is None else [os.path.normpath(output / name) for name in self.stage.inputs]
        return all(map(is_sealed, inputs))


def tasks(rounds: int) -> list[Task]:
    """All that a run of so many rounds has to do, in the order in which it is done where nothing runs ahead."""
    found = [Task(stage, 0) for stage in STAGES.values() if stage.per == "run"]
    for index in range(rounds + 1):
        found += [Task(stage, index) for stage in STAGES.values() if stage.per == "policy"]
        found += [Task(stage, index) for stage in STAGES.values() if stage.per == "round" and index < rounds]
    return found


def _run(ctx: Context, report: Callable[[Path], object]) -> None:
    pending = tasks(ctx.cfg.updates + 1)
    if ctx.overlaps:  # rollouts may need an older policy than what is measured beside them: none comes back
        pending.sort(key=partial(_order, ctx))
    left = needless(ctx, pending)
    pending = [task for task in pending if task not in left]
    if any(task.stage.name == "annotate" and not task.done(ctx) for task in pending):
        work.check_teacher_servers(ctx)
    if pending[0].done(ctx):
        work.prompts(ctx, 0)  # they must still come from the same file
    else:
        _start(ctx, pending[0], threading.Event())
    try:
        _work_off(ctx, pending, report)
    finally:
        _stop(pending)
        for task in pending:  # what the trainer did not finish took its time too
            if task.started is not None:
                _note(ctx, task)


def _order(ctx: Context, task: Task) -> int:
    """Which comes first of tasks that need the same; those of equal numbers stay in the order of the table."""
    policy = task.stage.policy(ctx, task.index) if task.stage.policy is not None else None
    return task.index if policy is None else policy


def _work_off(ctx: Context, pending: list[Task], report: Callable[[Path], object]) -> None:
    ended, turn = threading.Event(), ""  # a thread has; what holds the devices
    while True:
        training = ctx.trainer is not None and ctx.trainer.running()  # asked first: it seals before it ends
        left = needless(ctx, pending)
        _stop(left)
        pending = [task for task in pending if task not in left]
        # What lies further ahead of the trainer cannot be done yet, nor be ready.
        horizon = min((task.index for task in pending), default=0) + ctx.cfg.max_lead + 1
        near = [task for task in pending if task.index <= horizon or task.at_work]
        finished = [task for task in near if _finished(ctx, task)]
        pending, near = ([task for task in some if task not in finished] for some in (pending, near))
        busy = {task.stage.occupies for task in near if task.at_work}
        able = [task for task in near if not task.at_work and task.stage.occupies not in busy]
        if ctx.cfg.take_turns:  # what has the devices goes on with all that it can
            able.sort(key=lambda task: task.stage.needs != "host" and task.stage.occupies != turn)
        ready = next((task for task in able if task.ready(ctx)), None)
        if ready is not None:
            if ctx.cfg.take_turns and ready.stage.needs != "host":
                turn = ready.stage.occupies
                _make_room(ctx, turn)
            if ready.stage.name == "rollout" and ready.index:
                report(ctx.run.root)  # what the rounds before left
            _start(ctx, ready, ended)
        elif finished:
            continue
        elif training or any(task.worker is not None for task in pending):
            ended.wait(_POLL_SECONDS)
            ended.clear()
        elif any(task.stage.background and task.at_work for task in pending):
            # It ended well before its goal: it was asked to, here or on another node, whose word may come later.
            raise StoppedBySignal("what stopped the trainer")
        elif pending:
            raise UserError(
                f"{pending[0].place}: {pending[0].stage.name} must get its inputs, got none, and nothing that makes "
                "them is running; see the messages above"
            )
        else:
            return


def needless(ctx: Context, pending: Sequence[Task]) -> list[Task]:
    """Tasks of rounds that nobody trains on: the trainer ended after fewer refreshes, or before they were packed."""
    run, cfg = ctx.run, ctx.cfg
    rounds, unused = rounds_of(run, cfg), set[int]()
    if ctx.overlaps and is_sealed(run.checkpoint_at(cfg.train.train_iters)) and run.schedule.exists():
        unused = set(range(rounds)) - {entry.round for entry in load_schedule(run.schedule)}
    return [
        task
        for task in pending
        if task.index >= rounds + (task.stage.per == "policy")
        or (task.index in unused and task.stage.per == "round" and task.stage.kind not in ("checkpoint", "policy"))
    ]


def _stop(tasks: Iterable[Task]) -> None:
    """End the threads that do tasks: those that can be stopped soon, the others when they are through."""
    workers = [task.worker for task in tasks if task.worker is not None]
    for worker in workers:
        worker.stop = True
    for worker in workers:
        worker.join()


def rounds_of(run: RunDir, cfg: NPDConfig) -> int:
    """Rounds of a run: those planned, or those that there were where its trainer ended after fewer refreshes."""
    last = run.checkpoint_at(cfg.train.train_iters)
    if (marked := run.marked(last)) is not None and is_sealed(last):
        return min(marked, cfg.updates + 1)
    return cfg.updates + 1


def _start(ctx: Context, task: Task, ended: threading.Event) -> None:
    """Do a task, or begin what the trainer or a thread does, which sets ``ended`` at its end."""
    stage, index = task.stage, task.index
    get_logger().info("%s: %s", task.place, stage.name)
    if (output := stage.output(ctx.run, index)) is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    if stage.background:
        task.started = time.monotonic()
        stage.function(ctx, index)
    elif ctx.overlaps and stage.per != "run":
        task.worker = Worker(partial(_do, ctx, task), ended)
    else:
        _do(ctx, task)


def _make_room(ctx: Context, turn: str) -> None:
    """End whatever else holds the devices of this run's nodes; servers that were given have their own."""
    if turn != "trainer" and ctx.trainer is not None:
        ctx.trainer.wait()  # it ends at each refresh
    if turn != "ranks":
        ctx.annotator.close()
    if turn != "servers":
        ctx.servers.stop()


def _do(ctx: Context, task: Task) -> None:
    stage, index = task.stage, task.index
    policy = stage.policy(ctx, index) if stage.policy is not None else None
    if policy is not None:  # before the stage's clock starts: a server's start and refresh have their own
        ctx.servers.serve(policy)
        check_stop()
    with timed(ctx.run, stage.name, None if stage.per == "run" else index):
        stage.function(ctx, index)
    if not task.done(ctx):
        output = stage.output(ctx.run, index)
        raise UserError(f"{task.place}: {stage.name} must leave a sealed {output}, got none; see the messages above")


def _finished(ctx: Context, task: Task) -> bool:
    """Whether nothing is left to do; raises what ended the task's thread."""
    if task.worker is not None:
        if not task.worker.done:
            return False
        if task.worker.error is not None:
            raise task.worker.error
        task.worker = None
    if not task.done(ctx):
        return False
    if task.started is not None:
        _note(ctx, task)
    return True


def _note(ctx: Context, task: Task) -> None:
    assert task.started is not None
    note_seconds(ctx.run, task.stage.name, task.index, time.monotonic() - task.started)
    task.started = None


@contextmanager
def _run_lock(run: Path) -> Iterator[None]:
    with open(run / LOCK, "a") as lock:
        if not kernel_lock(lock.fileno(), run):
            raise UserError(f"{run} must have one runner, got a second; wait for the first or stop it")
        yield
