"""What a run is doing, from its files alone: each stage with its state and time, and where the work in progress is."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from megatron_npd.audit.numbers import json_lines, read_metrics
from megatron_npd.config.command_line import parse_config
from megatron_npd.config.run import NPDConfig
from megatron_npd.errors import UserError
from megatron_npd.lock import LOCK
from megatron_npd.manifest import is_sealed, read_manifest
from megatron_npd.pipeline.launch import Launcher
from megatron_npd.pipeline.runner import tasks
from megatron_npd.pipeline.servers import Servers
from megatron_npd.pipeline.work import Context
from megatron_npd.run_dir import RunDir


def status(run_dir: str | Path) -> str:
    """The state of a run as a text table; nothing of it is changed, and nobody is asked.

    Raises:
        UserError: The directory is not that of a run.
    """
    run = RunDir(Path(run_dir))
    if not run.config.is_file():
        raise UserError(f"{run.root} must be the directory of a run, got no {run.config.name}; give npd run's run_dir")
    cfg = parse_config(NPDConfig, ["--config", str(run.config), f"--run_dir={run.root}"])
    ctx = Context(run=run, cfg=cfg, servers=Servers(run, cfg), launcher=Launcher(cfg))
    seconds: Counter[tuple[str, int | None]] = Counter()
    for record in json_lines(run.seconds, "stage", "round", "seconds"):
        seconds[record["stage"], record["round"]] += record["seconds"]
    lines = [f"{run.root}: {'running' if _is_held(run.root / LOCK) else 'no runner on this machine'}"]
    for task in tasks(cfg.updates + 1):
        done = task.done(ctx)
        took = seconds[task.stage.name, None if task.stage.per == "run" else task.index]
        state = "done" if done else _progress(ctx, task.stage.name, task.index) or "to do"
        lines.append(f"{task.place:<12} {task.stage.name:<16} {f'{took:.1f} s' if took else '':>10}  {state}".rstrip())
    return "\n".join(lines)


def _progress(ctx: Context, stage: str, index: int) -> str:
    """How far a stage is that is not done; empty where it has not begun, or does not show it."""
    run, cfg = ctx.run, ctx.cfg
    if stage == "rollout" and run.rollouts(index).is_dir() and is_sealed(run.prompts):
        wanted = read_manifest(run.prompts, verify=False).counts["kept"] * (
            cfg.rollout.greedy_paths + cfg.rollout.sampled_paths
        )
        sealed = [path for path in run.rollouts(index).glob("shard-*") if is_sealed(path)]
        there = sum(read_manifest(path, verify=False).counts["in"] for path in sealed)
        there += sum(max(path.read_bytes().count(b"\n") - 1, 0) for path in run.rollouts(index).glob("*.journal"))
        return f"{there} of {wanted} responses"
    if stage == "train" and (steps := read_metrics(run)) and steps[-1]["round"] == index:
        last = steps[-1]
        lag = f", policy lag {last['lag_k3']:.3f} (bound {cfg.train.refresh_lag:g})" if last.get("lag_k3") else ""
        return f"step {last['iteration']} of {cfg.train.train_iters}, loss {last['loss']:.4f}{lag}"
    return ""


def _is_held(path: Path) -> bool:
    """Whether a process of this machine holds the lock; it is only looked at, so that no runner is kept out."""
    try:
        inode = os.stat(path).st_ino
        with open("/proc/locks") as locks:
            return any(line.split()[-3].endswith(f":{inode}") and "->" not in line for line in locks)
    except OSError:
        return False
