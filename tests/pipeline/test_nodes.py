"""What a run on several nodes tells the others, and what of an interrupted trainer is noted; without engines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest

from megatron_npd.config.cluster import ClusterConfig
from megatron_npd.config.run import NPDConfig
from megatron_npd.config.settings import AnnotateConfig
from megatron_npd.errors import UserError
from megatron_npd.platform import get_platform

get_platform("cpu")

from megatron_npd.pipeline import nodes, runner, servers  # noqa: E402
from megatron_npd.pipeline.launch import Launcher  # noqa: E402
from megatron_npd.pipeline.servers import Servers  # noqa: E402
from megatron_npd.pipeline.signals import Signals  # noqa: E402
from megatron_npd.pipeline.stages import Stage  # noqa: E402
from megatron_npd.pipeline.work import Context  # noqa: E402
from megatron_npd.run_dir import RunDir  # noqa: E402
from megatron_npd.serving.server import ServerLost  # noqa: E402
from megatron_npd.stoppable import StoppedBySignal  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


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


def test_a_first_node_that_was_killed_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves no word; the others miss its sign of life."""
    monkeypatch.setattr(nodes, "SILENT_SECONDS", 3.0)
    fields = {"nnodes": 2, "train_nodes": 1, "attempt": "7"}
    program = (
        "import sys, time; from pathlib import Path; from megatron_npd.config.cluster import ClusterConfig\n"
        "from megatron_npd.pipeline.nodes import Nodes; from megatron_npd.run_dir import RunDir\n"
        f"with Nodes(RunDir(Path(sys.argv[1])), ClusterConfig(**{fields!r})): time.sleep(600)"
    )
    first = subprocess.Popen([sys.executable, "-c", program, tmp_path], env=os.environ | {"PYTHONPATH": str(ROOT)})
    with (
        pytest.raises(UserError, match="the first node must give a sign of life every 3 s, got none"),
        Signals(0.0) as signals,
        nodes.Nodes(RunDir(tmp_path), ClusterConfig(**fields, node_rank=1)) as second,
    ):
        signals.nodes = second
        try:
            while not (second.state / "alive").exists():
                time.sleep(0.1)
        finally:
            first.kill()
            first.wait()
        time.sleep(60)
    assert (tmp_path / "attempts/7/failed").read_text().startswith("node 1: the first node must give a sign")


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
        ctx.trainer = trainer = cast(Any, DyingTrainer())  # a stand-in
        trainer.running()

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


def test_the_teachers_servers_are_asked_before_the_first_stage(tmp_path: Path, tiny_model_dir: Path) -> None:
    fields = {"backend": "vllm", "urls": ("http://127.0.0.1:9",)}  # the discard port: nobody answers
    cfg = NPDConfig(teacher=str(tiny_model_dir), student=str(tiny_model_dir), annotate=AnnotateConfig(**fields))
    run = RunDir(tmp_path)
    ctx = Context(run=run, cfg=cfg, servers=Servers(run, cfg), launcher=Launcher(cfg))
    with pytest.raises(UserError, match=r"server http://127\.0\.0\.1:9 must answer"):
        runner._run(ctx, lambda _: "")
    assert not run.prompts.exists()


class Dying:
    """A stand-in for a server: it dies so many times."""

    url = "http://here:1"

    def __init__(self, times: int) -> None:
        self.times, self.restarted = times, 0

    def check_alive(self) -> None:
        if self.times > self.restarted:
            raise ServerLost("it must be running, got an end")

    def restart(self) -> None:
        self.restarted += 1


def test_a_node_of_servers_starts_again_what_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few times; the round goes on meanwhile on the other servers."""
    monkeypatch.setattr(servers, "POLL_SECONDS", 0.0)
    looks = iter([False] * 10 + [True])
    server = Dying(2)
    servers.watch_servers([cast(Any, server)], lambda: next(looks))
    assert server.restarted == 2
    with pytest.raises(ServerLost):
        servers.watch_servers([cast(Any, Dying(100))], lambda: False)


def test_a_node_that_a_signal_stops_tells_the_others_at_once(tmp_path: Path) -> None:
    """Before its trainer has saved: without it the ranks of all end, which another node would take for a failure."""
    fields = {"nnodes": 2, "master_addr": "a", "attempt": "7"}
    with (
        pytest.raises(StoppedBySignal),
        Signals(0.0) as signals,
        nodes.Nodes(RunDir(tmp_path), ClusterConfig(**fields, node_rank=1)) as second,
    ):
        signals.nodes = second
        first = nodes.Nodes(RunDir(tmp_path), ClusterConfig(**fields))
        call = first.call("serve", {})
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(60)
        finally:
            assert (tmp_path / "attempts/7/stopped").exists()
            os.kill(os.getpid(), signal.SIGUSR1)  # a later one changes nothing
            before = time.monotonic()
            first.end(call)  # whose marks nobody will leave
            assert time.monotonic() - before < nodes.SILENT_SECONDS / 2
    assert not (tmp_path / "attempts/7/failed").exists()
