"""What a run keeps of its rollout servers, for those who look at it."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_npd.config.run import NPDConfig
from megatron_npd.config.settings import RolloutConfig
from megatron_npd.pipeline.servers import Servers
from megatron_npd.run_dir import RunDir
from megatron_npd.serving.server import ServerLost
from tests.serving.test_refresh import serve


def test_who_is_asked_for_what_is_on_disk_while_servers_serve(tiny_model_dir: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path)

    def told() -> dict:
        return json.loads(run.servers.read_text())

    with serve(tiny_model_dir) as one, serve(tiny_model_dir) as two:
        rollout = RolloutConfig(urls=(one.url, two.url), max_model_len=64)
        with Servers(run, NPDConfig(student=str(tiny_model_dir), rollout=rollout)) as servers:
            assert not run.servers.exists()
            pool = servers.serve(0)
            assert told()["policy"] == "v0000" and told()["asked"] == sorted([one.url, two.url]) and not told()["lost"]
            pool.lose(two.url, ServerLost("the server must answer\n  | its log"))
            assert told()["asked"] == [one.url] and told()["lost"] == {two.url: "the server must answer"}
            assert pool.find(two.url)
            assert told()["asked"] == sorted([one.url, two.url]) and not told()["lost"]
        assert not run.servers.exists()


def test_a_run_goes_on_where_nobody_can_look(tiny_model_dir: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with serve(tiny_model_dir) as server:
        rollout = RolloutConfig(urls=(server.url,), max_model_len=64)
        with Servers(run, NPDConfig(student=str(tiny_model_dir), rollout=rollout)) as servers:
            run.servers.mkdir(parents=True)
            assert servers.serve(0).urls == [server.url]
