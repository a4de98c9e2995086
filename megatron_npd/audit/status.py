"""What a run is doing, from its files alone: each stage with its state, rate and time, its servers, its policy lag."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_npd.audit.numbers import duration, json_lines, read_metrics
from megatron_npd.config.command_line import parse_config
from megatron_npd.config.run import NPDConfig
from megatron_npd.data.prompt_rows import rows_of_round
from megatron_npd.errors import UserError
from megatron_npd.lock import LOCK
from megatron_npd.manifest import MANIFEST, is_sealed, read_manifest
from megatron_npd.pipeline.environment import read_json
from megatron_npd.pipeline.launch import Launcher
from megatron_npd.pipeline.runner import needless, tasks
from megatron_npd.pipeline.servers import Servers
from megatron_npd.pipeline.work import Context
from megatron_npd.run_dir import RunDir

_LAST_STEPS = 20  # of which the trainer's speed is the mean


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """One stage of one policy or round.

    Attributes:
        place: Policy or round, in words.
        stage: Its name.
        seconds: That it took so far, in calls that have ended; 0: none.
        state: In words: done, to do, or where it is.
        rate: How fast it is or was, in words; empty: not known.
        left: Seconds that it still takes; None: not known.
    """

    place: str
    stage: str
    seconds: float
    state: str
    rate: str
    left: float | None


@dataclass(frozen=True, kw_only=True)
class Status:
    """A run as it is.

    Attributes:
        root: Its directory.
        running: Whether a runner of this machine works on it.
        stages: In the order in which they are done where nothing runs ahead.
        servers: What the rollout servers serve and which of them are asked or lost, in words; empty: nobody is asked.
        lag: Policy lag of the last step, with its bound, in words; empty: not known.
        left: Seconds that all stages still take; None: not known.
    """

    root: Path
    running: bool
    stages: Sequence[StageStatus]
    servers: Sequence[str]
    lag: str
    left: float | None


@dataclass(frozen=True, kw_only=True)
class _Pace:
    """How far a stage is: of how much, in what unit, how fast.

    Attributes:
        words: Where it is; empty: it has not begun, or does not show it.
        share: That is done.
        rate: In words; empty: not known.
        left: Seconds that it still takes by its own speed; None: not known.
    """

    words: str = ""
    share: float = 0.0
    rate: str = ""
    left: float | None = None


@dataclass
class _Reader:
    """What is read once for all stages of a run."""

    ctx: Context
    seconds: dict[tuple[str, int | None], float] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)


def status(run_dir: str | Path) -> str:
    """The state of a run as a text table; nothing of it is changed, and nobody is asked.

    Raises:
        UserError: The directory is not that of a run.
    """
    found = read_status(run_dir)
    lines = [f"{found.root}: {'running' if found.running else 'no runner on this machine'}"]
    for entry in found.stages:
        took = f"{entry.seconds:.1f} s" if entry.seconds else ""
        words = ", ".join(filter(None, [entry.state, entry.rate]))
        lines.append(f"{entry.place:<12} {entry.stage:<16} {took:>10}  {words}".rstrip())
    lines += [f"servers: {words}" for words in found.servers]
    if found.left:
        lines.append(f"about {duration(found.left)} left")
    return "\n".join(lines)


def read_status(run_dir: str | Path) -> Status:
    """The state of a run; nothing of it is changed, and nobody is asked.

    Raises:
        UserError: The directory is not that of a run, or holds damaged files.
    """
    run = find_run(run_dir)
    cfg = parse_config(NPDConfig, ["--config", str(run.config), f"--run_dir={run.root}"])
    ctx = Context(run=run, cfg=cfg, servers=Servers(run, cfg), launcher=Launcher(cfg))
    reader = _Reader(ctx, steps=read_metrics(run))
    for record in json_lines(run.seconds, "stage", "round", "seconds"):
        key = (record["stage"], record["round"])
        reader.seconds[key] = reader.seconds.get(key, 0.0) + record["seconds"]
    stages: list[StageStatus] = []
    waiting: list[float | None] = []  # of all but training
    known: dict[str, float] = {}
    every = tasks(cfg.updates + 1)
    left_out = needless(ctx, every)
    for task in every:
        name, index = task.stage.name, task.index
        took, done = reader.seconds.get((name, None if task.stage.per == "run" else index), 0.0), task.done(ctx)
        pace = _pace(reader, name, index, took, done)
        left = 0.0 if done or task in left_out else pace.left
        if left is None and name in known:
            left = (1 - pace.share) * known[name]
        if name != "train":  # what needs nothing but the host is short beside the others
            waiting.append(0.0 if left is None and task.stage.needs == "host" else left)
        if done and took:
            known[name] = took
        state = "done" if done else "not needed" if task in left_out else pace.words or "to do"
        stages.append(StageStatus(place=task.place, stage=name, seconds=took, state=state, rate=pace.rate, left=left))
    return Status(
        root=run.root,
        running=is_held(run.root / LOCK),
        stages=stages,
        servers=_servers(run),
        lag=_lag(reader),
        left=_left(
            reader, waiting, all(entry.state in ("done", "not needed") for entry in stages if entry.stage == "train")
        ),
    )


def find_run(run_dir: str | Path) -> RunDir:
    """The run of a directory; raises UserError where it is none."""
    run = RunDir(Path(run_dir))
    if not run.config.is_file():
        raise UserError(f"{run.root} must be the directory of a run, got no {run.config.name}; give npd run's run_dir")
    return run


def _left(reader: _Reader, waiting: Sequence[float | None], trained: bool) -> float | None:
    """Seconds to the run's end, from the trainer's speed and what the other stages took in earlier rounds."""
    cfg, steps, known = reader.ctx.cfg, reader.steps, [seconds for seconds in waiting if seconds is not None]
    speed = 0.0 if trained else _step_seconds(steps)
    if len(known) < len(waiting) or speed is None:
        return None
    training = (cfg.train.train_iters - steps[-1]["iteration"]) * speed if steps else 0.0
    return max(training, sum(known)) if cfg.max_lead else training + sum(known)


def _pace(reader: _Reader, stage: str, index: int, took: float, done: bool) -> _Pace:
    """How far a stage is, and how fast."""
    run, cfg = reader.ctx.run, reader.ctx.cfg
    if stage == "train":
        return _training_pace(reader, index, done)
    if stage not in ("rollout", "annotate") or not is_sealed(run.prompts):
        return _Pace()
    directory, unit = (run.rollouts(index), "responses") if stage == "rollout" else (run.annotations(index), "samples")
    if not directory.is_dir():
        return _Pace()
    if done:
        if not is_sealed(directory):  # nobody scores
            return _Pace()
        there = _count(directory, "in")
        return _Pace(rate=f"{there / took:.1f} {unit}/s" if took else "")
    paths = cfg.rollout.greedy_paths + cfg.rollout.sampled_paths
    wanted = len(rows_of_round(_count(run.prompts, "kept"), cfg.rollout.prompts_per_round, index)) * paths
    if stage == "annotate" and is_sealed(run.rollouts(index)):
        wanted = _count(run.rollouts(index), "kept")
    shards = [path for path in directory.glob("shard-*") if is_sealed(path)]
    journals = list(directory.glob("*.journal"))
    there = sum(_count(path, "in") for path in shards)
    there += sum(max(path.read_bytes().count(b"\n") - 1, 0) for path in journals)
    words, share = f"{there} of {wanted} {unit}", min(there / wanted, 1.0) if wanted else 0.0
    begun = _mtime(directory / LOCK)  # of this call; what an earlier one left says nothing of its speed
    written = [_mtime(path / MANIFEST) for path in shards] + [_mtime(path) for path in journals]
    if took or not there or not begun or min(written) < begun or max(written) <= begun:
        return _Pace(words=words, share=share)
    rate = there / (max(written) - begun)
    return _Pace(words=words, share=share, rate=f"{rate:.1f} {unit}/s", left=max(wanted - there, 0) / rate)


def _training_pace(reader: _Reader, index: int, done: bool) -> _Pace:
    steps = [step for step in reader.steps if step["round"] == index]
    if not steps:
        return _Pace()
    rates = [step["tokens_per_second"] for step in steps[-_LAST_STEPS:] if step.get("tokens_per_second") is not None]
    rate = f"{sum(rates) / len(rates):.0f} tokens/s" if rates else ""
    if done or steps[-1] is not reader.steps[-1]:
        return _Pace(rate=rate)
    lag = f", policy lag {words}" if (words := _lag(reader)) else ""
    last, whole = steps[-1], reader.ctx.cfg.train.train_iters
    return _Pace(words=f"step {last['iteration']} of {whole}, loss {last['loss']:.4f}{lag}", rate=rate)


def _step_seconds(steps: Sequence[dict[str, Any]]) -> float | None:
    """Mean of the last steps; None: none has said how long it took."""
    taken = [step["step_seconds"] for step in steps[-_LAST_STEPS:] if step.get("step_seconds") is not None]
    return sum(taken) / len(taken) if taken else None


def _lag(reader: _Reader) -> str:
    if not reader.steps or not reader.steps[-1].get("lag_k3"):
        return ""
    return f"{reader.steps[-1]['lag_k3']:.3f} (bound {reader.ctx.cfg.train.refresh_lag:g})"


def _servers(run: RunDir) -> list[str]:
    """What the runner keeps of its rollout servers while it has any."""
    known = read_json(run.servers, {})
    if not known:
        return []
    asked, lost = known.get("asked", []), known.get("lost", {})
    words = f"policy {known.get('policy') or 'unknown'} on {len(asked)} asked" + (f", {len(lost)} lost" if lost else "")
    return [f"{words} (since {known.get('written')})", *(f"{url} is lost: {why}" for url, why in lost.items())]


def _count(directory: Path, name: str) -> int:
    return read_manifest(directory, verify=False).counts[name]


def _mtime(path: Path) -> float:
    """Seconds, by the file system's clock; 0 where there is no such file."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def is_held(path: Path) -> bool:
    """Whether a process of this machine holds the lock; it is only looked at, so that no runner is kept out."""
    try:
        inode = os.stat(path).st_ino
        with open("/proc/locks") as locks:
            return any(line.split()[-3].endswith(f":{inode}") and "->" not in line for line in locks)
    except OSError:
        return False
