"""What a run on several nodes tells the others, and what of an interrupted trainer is noted; without engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_npd.config.run import NPDConfig
from megatron_npd.errors import UserError
from megatron_npd.platform import get_platform

get_platform("cpu")

from megatron_npd.pipeline import runner  # noqa: E402
from megatron_npd.pipeline.launch import Launcher  # noqa: E402
from megatron_npd.pipeline.servers import Servers  # noqa: E402
from megatron_npd.pipeline.stages import Stage  # noqa: E402
from megatron_npd.pipeline.work import Context  # noqa: E402
from megatron_npd.run_dir import RunDir  # noqa: E402


def refuse(*_: Any) -> None:
    raise UserError("lr must be this node's, got none; mend it")


@pytest.mark.parametrize("refused_by", ["check_run", "keep_config", "_run_lock"])
def test_what_the_first_node_is_refused_for_reaches_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_by: str
) -> None:
    """They would wait for its first command for ever."""
    monkeypatch.setattr(runner, "check_run", lambda _: None)
    monkeypatch.setattr(runner, refused_by, refuse)
    cfg = NPDConfig(run_dir=str(tmp_path / "run"), nnodes=2, train_nodes=1, attempt="7")
    with pytest.raises(UserError, match="this node's"):
        runner.run_npd(cfg, lambda _: "")
    assert (tmp_path / "run/attempts/7/failed").read_text() == "node 0: lr must be this node's, got none; mend it\n"


class DyingTrainer:
    """Runs when it is asked first, and has failed when it is asked again."""

    asked = 0

    def running(self) -> bool:
        self.asked += 1
        if self.asked > 1:
            raise UserError("train must exit with 0, got 1")
        return True


def test_a_trainer_that_dies_ends_the_run_and_its_seconds_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(ctx: Context, _: int) -> None:
        ctx.trainer = DyingTrainer()  # type: ignore[assignment]
        ctx.trainer.running()

    def tasks(_: int) -> list[runner.Task]:
        prompts = Stage(name="prompts", per="run", output=lambda *_: None, function=start, done=lambda *_: True)
        train = Stage(name="train", per="round", output=lambda *_: None, background=True, function=start)
        return [runner.Task(prompts, 0), runner.Task(train, 0)]

    monkeypatch.setattr(runner, "tasks", tasks)
    monkeypatch.setattr(runner.work, "prompts", lambda *_: None)
    cfg, run = NPDConfig(), RunDir(tmp_path)
    ctx = Context(run=run, cfg=cfg, servers=Servers(run, cfg), launcher=Launcher(cfg))
    with pytest.raises(UserError, match="train must exit with 0, got 1"):
        runner._run(ctx, lambda _: "")
    assert [json.loads(line)["stage"] for line in run.seconds.read_text().splitlines()] == ["train"]
