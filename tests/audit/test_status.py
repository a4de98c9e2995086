"""What ``npd status`` says of a run that is under way, and of what is none."""

from __future__ import annotations

import json
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

from megatron_npd.audit.status import status  # noqa: E402
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
    assert "round 0 rollout 2.5 s done" in table and "round 0 pack done" in table
    assert "round 0 train step 12 of 40, loss 1.5000, policy lag 0.250 (bound 0.1)" in table
    assert "round 1 rollout 18 of 60 responses" in table and "round 1 annotate to do" in table
    with _run_lock(tmp_path):
        assert status(tmp_path).startswith(f"{tmp_path}: running\n")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must be the directory of a run, got no config\.json"):
        status(tmp_path)
