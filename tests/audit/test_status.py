"""What ``npd status`` says of a run that is under way, and of what is none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_npd.config.command_line import parse_config
from megatron_npd.config.run import NPDConfig
from megatron_npd.errors import UserError
from megatron_npd.manifest import seal
from megatron_npd.pipeline.resume import keep_config
from megatron_npd.platform import get_platform
from megatron_npd.run_dir import RunDir

get_platform("cpu")

from megatron_npd.audit.numbers import duration  # noqa: E402
from megatron_npd.audit.status import read_status, status  # noqa: E402
from megatron_npd.pipeline.runner import _run_lock  # noqa: E402


def seal_with(path: Path, kept: int) -> None:
    path.mkdir(parents=True)
    seal(path, kind="test", counts={"in": kept, "kept": kept, "quarantined": {}, "pending": 0})


def test_a_run_under_way(tmp_path: Path) -> None:
    flags = ["--teacher=t", "--student=s", "--prompts=p.jsonl", "--updates=1", "--train.train-iters=40"]
    keep_config(RunDir(tmp_path), parse_config(NPDConfig, [f"--run-dir={tmp_path}", *flags]))
    seal_with(tmp_path / "prompts", 30)
    for name in ("rollouts", "annotations", "selection", "packs"):
        seal_with(tmp_path / "rounds" / "0000" / name, 60)
    (tmp_path / "rounds" / "0001" / "rollouts").mkdir(parents=True)
    seal_with(tmp_path / "rounds" / "0001" / "rollouts" / "shard-00000", 16)
    (tmp_path / "rounds" / "0001" / "rollouts" / "responses-00001.journal").write_text("settings\na\nb\nc, cut")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "seconds.jsonl").write_text(
        "".join(
            json.dumps({"stage": stage, "round": index, "seconds": 1.25}) + "\n"
            for stage, index in (("prompts", None), ("rollout", 0), ("rollout", 0))
        )
    )
    step = {"iteration": 12, "round": 0, "loss": 1.5, "lag_k3": 0.25}
    (tmp_path / "report" / "metrics.jsonl").write_text(json.dumps(step) + "\n" + '{"iteration": 13, "ro')
    table = [" ".join(line.split()) for line in status(tmp_path).splitlines()]
    assert table[0] == f"{tmp_path}: no runner on this machine"
    assert "run prompts 1.2 s done" in table
    assert "round 0 rollout 2.5 s done, 24.0 responses/s" in table and "round 0 pack done" in table
    assert "round 0 train step 12 of 40, loss 1.5000, policy lag 0.250 (bound 0.1)" in table
    assert "round 1 rollout 18 of 60 responses" in table and "round 1 annotate to do" in table
    with _run_lock(tmp_path):
        assert status(tmp_path).startswith(f"{tmp_path}: running\n")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must be the directory of a run, got no config\.json"):
        status(tmp_path)


STAGES = ("rollout", "annotate", "select", "pack")


def begin(path: Path, *flags: str) -> RunDir:
    """A run of two rounds of 40 steps with 30 prompts, of which nothing is measured."""
    (path / "report").mkdir(parents=True)
    required = ["--teacher=t", "--student=s", "--prompts=p.jsonl", "--updates=1", "--train.train-iters=40"]
    keep_config(RunDir(path), parse_config(NPDConfig, [f"--run-dir={path}", *required, "--eval.held-out=0", *flags]))
    seal_with(path / "prompts", 30)
    return RunDir(path)


def note(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def finish_round_0(run: RunDir) -> None:
    for name in ("rollouts", "annotations", "selection", "packs"):
        seal_with(run.round(0) / name, 60)
    note(run.seconds, [{"stage": stage, "round": 0, "seconds": 10.0} for stage in STAGES])


def steps(last: int) -> list[dict]:
    times = {"step_seconds": 0.5, "tokens_per_second": 1000.0}
    return [{"iteration": step, "round": 0, "loss": 1.5, "lag_k3": 0.0, **times} for step in range(1, last + 1)]


@pytest.mark.parametrize(
    ("flags", "left"),
    [
        # 30 steps, and four stages of round 1 as in round 0, half of one of them done; an export is short
        ([], 30 * 0.5 + 4 * 10 - 5),
        (["--max-lead=1"], 4 * 10 - 5),  # meanwhile
        (["--max-lead=1", "--train.train-iters=1000"], 990 * 0.5),
    ],
)
def test_time_left(tmp_path: Path, flags: list[str], left: float) -> None:
    run = begin(tmp_path, *flags)
    finish_round_0(run)
    note(run.metrics, steps(10))
    run.rollouts(1).mkdir(parents=True)
    seal_with(run.rollouts(1) / "shard-00000", 30)
    known = read_status(tmp_path)
    assert known.left == pytest.approx(left)
    by_name = {(entry.place, entry.stage): entry for entry in known.stages}
    assert by_name["round 1", "rollout"].left == pytest.approx(5) and by_name["round 0", "rollout"].left == 0
    assert by_name["round 0", "train"].rate == "1000 tokens/s"
    assert status(tmp_path).splitlines()[-1] == f"about {duration(left)} left"


def test_nothing_is_said_of_time_that_nobody_knows(tmp_path: Path) -> None:
    run = begin(tmp_path)
    assert read_status(tmp_path).left is None and "left" not in status(tmp_path)
    finish_round_0(run)
    assert read_status(tmp_path).left is None  # how long a step takes
    note(run.metrics, steps(10))
    assert read_status(tmp_path).left is not None
    note(run.seconds, [{"stage": stage, "round": 0, "seconds": 10.0} for stage in STAGES[1:]])
    assert read_status(tmp_path).left is None  # how long a rollout takes


@pytest.mark.parametrize(
    ("before", "rate"), [(0, "3.0 responses/s"), (-40, "")], ids=["of this call", "of an earlier call too"]
)
def test_the_first_rollout_is_timed_by_its_files(tmp_path: Path, before: float, rate: str) -> None:
    """From the lock that its call took to what was written last."""
    run = begin(tmp_path)
    seal_with(run.rollouts(0) / "shard-00000", 20)
    (run.rollouts(0) / ".lock").write_text("{}")
    (run.rollouts(0) / "responses-00001.journal").write_text("settings\n" + 10 * "a\n")
    os.utime(run.rollouts(0) / ".lock", (1000, 1000))
    os.utime(run.rollouts(0) / "shard-00000" / "manifest.json", (1005 + before, 1005 + before))
    os.utime(run.rollouts(0) / "responses-00001.journal", (1010, 1010))
    entry = next(entry for entry in read_status(tmp_path).stages if entry.stage == "rollout")
    assert (entry.state, entry.rate) == ("30 of 60 responses", rate)
    assert entry.left == (pytest.approx(10) if rate else None)


def test_servers_are_told(tmp_path: Path) -> None:
    run = begin(tmp_path)
    assert not read_status(tmp_path).servers
    told = {"policy": "v0001", "asked": ["http://a:1", "http://a:2"], "lost": {"http://a:3": "it must answer"}}
    run.servers.write_text(json.dumps(told | {"written": "2026-01-02T03:04:05+00:00"}))
    assert read_status(tmp_path).servers == [
        "policy v0001 on 2 asked, 1 lost (since 2026-01-02T03:04:05+00:00)",
        "http://a:3 is lost: it must answer",
    ]
    assert "servers: http://a:3 is lost: it must answer" in status(tmp_path)
