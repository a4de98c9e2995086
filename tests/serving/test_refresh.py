"""The order of a refresh, and what becomes of servers that fail half-way, on stand-in servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_npd.config.settings import RolloutConfig
from megatron_npd.errors import UserError
from megatron_npd.serving.pool import UNUSABLE, ServerPool
from megatron_npd.serving.refresh import refresh
from megatron_npd.serving.server import tag
from megatron_npd.weights import read_weights
from tests.serving.fake import CONTENT, FakeServer

CFG = RolloutConfig(max_model_len=64)


def serve(model_dir: Path) -> FakeServer:
    server = FakeServer()
    server.headers_of = lambda directory: read_weights(directory or model_dir).describe()
    server.loads = lambda directory: {"weights": read_weights(directory).content_hash()}
    return server


def test_order_of_calls(tiny_model_dir: Path) -> None:
    with serve(tiny_model_dir) as server:
        refresh(ServerPool([server.url], CFG), tiny_model_dir, "v0001")
        assert server.called == [
            "npd_describe",
            "npd_describe",
            "/pause?mode=wait",
            "npd_load",
            "/reset_prefix_cache",
            "/update_weight_version",
            "/resume",
        ]
        assert server.version == tag("v0001", read_weights(tiny_model_dir).content_hash())


def test_a_failure_while_loading_marks_that_server_and_resumes_it(tiny_model_dir: Path) -> None:
    with serve(tiny_model_dir) as good, serve(tiny_model_dir) as bad:
        bad.load_status = 500
        pool = ServerPool([good.url, bad.url], CFG)
        with pytest.raises(
            UserError, match=rf"(?s){bad.url} must accept /collective_rpc, got 500.*is tagged 'unusable'"
        ):
            refresh(pool, tiny_model_dir, "v0001")
        assert good.version.startswith("v0001-") and bad.version == UNUSABLE
        assert good.called[-1] == bad.called[-1] == "/resume"
        with pytest.raises(UserError, match=f"{bad.url} must serve policy v0001, got unusable"):
            pool.check(version="v0001")
        with pytest.raises(UserError, match=f"{bad.url} must hold whole weights"):
            pool.check()
        bad.load_status = 200
        refresh(pool, tiny_model_dir, "v0001")
        pool.check(version="v0001")


def test_a_prefix_cache_that_stays_is_a_failure(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(tiny_model_dir) as server:
        pool = ServerPool([server.url], CFG)
        control = pool.control

        def refusing(url: str, path: str, **arguments):
            answer = control(url, path, **arguments)
            return {"success": False} if path == "/reset_prefix_cache" else answer

        monkeypatch.setattr(pool, "control", refusing)
        with pytest.raises(UserError, match=r"must drop its prefix cache"):
            refresh(pool, tiny_model_dir, "v0001")
        assert server.version == UNUSABLE and server.called[-1] == "/resume"


def test_one_server_of_another_model_stops_all_before_anything_is_loaded(tiny_model_dir: Path, tmp_path: Path) -> None:
    from tests.helpers import make_tiny_model

    other = make_tiny_model(tmp_path / "other", num_hidden_layers=1)
    with serve(tiny_model_dir) as first, serve(other) as second:
        with pytest.raises(UserError, match=f"must match what {second.url} serves, got tensor model.layers.1"):
            refresh(ServerPool([first.url, second.url], CFG), tiny_model_dir, "v0001")
        assert first.version == second.version == tag("v0000", CONTENT)
        assert set(first.called + second.called) == {"npd_describe"}


def test_versions_that_mean_something_else_are_refused(tiny_model_dir: Path) -> None:
    pool = ServerPool(["http://127.0.0.1:1"], CFG)
    for version in ("", UNUSABLE):
        with pytest.raises(UserError, match="version must be a name"):
            refresh(pool, tiny_model_dir, version)


def test_a_server_without_the_extension_is_told(tiny_model_dir: Path) -> None:
    with FakeServer() as server:
        server.headers_of = lambda directory: {"error": "no config.json"}
        with pytest.raises(UserError, match=f"{server.url} must do npd_describe, got: no config.json"):
            refresh(ServerPool([server.url], CFG), tiny_model_dir, "v0001")
