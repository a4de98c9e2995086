"""The order of a refresh, and what becomes of servers that fail half-way, on stand-in servers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_npd.cli.refresh import main
from megatron_npd.config.settings import RolloutConfig
from megatron_npd.errors import UserError
from megatron_npd.serving.pool import UNUSABLE, ServerPool
from megatron_npd.serving.refresh import refresh
from megatron_npd.serving.server import ServerLost, tag
from megatron_npd.weights import read_weights
from tests.helpers import make_tiny_model
from tests.serving.fake import CONTENT, FakeServer, Launched, fake_answer, fake_prompt_logprobs

CFG = RolloutConfig(max_model_len=64)


def serve(model_dir: Path) -> FakeServer:
    server = FakeServer()
    held = [str(model_dir)]
    server.version = tag("v0000", read_weights(model_dir).content_hash())

    def load(directory: str) -> dict[str, Any]:
        held[0] = directory
        return {"weights": read_weights(directory).content_hash()}

    server.headers_of = lambda directory: read_weights(directory or model_dir).describe() | {"directory": held[0]}
    server.loads = load
    return server


def test_order_of_calls(tiny_model_dir: Path) -> None:
    with serve(tiny_model_dir) as server:
        refresh(ServerPool([server.url], CFG), tiny_model_dir, "v0001")
        assert server.called == [
            "npd_describe",
            "npd_describe",
            "npd_stage",
            "npd_staged",
            "/pause?mode=wait",
            "/update_weight_version",  # as unusable
            "npd_load",
            "/reset_prefix_cache",
            "/update_weight_version",
            "/resume",
        ]
        assert server.version == tag("v0001", read_weights(tiny_model_dir).content_hash())


def test_nothing_is_paused_before_all_have_read_the_weights(tiny_model_dir: Path) -> None:
    with serve(tiny_model_dir) as quick, serve(tiny_model_dir) as slow:

        def staged() -> dict[str, Any]:
            assert "/pause?mode=wait" not in quick.called + slow.called
            return {"ready": slow.called.count("npd_staged") == 3}

        slow.staged = staged
        refresh(ServerPool([quick.url, slow.url], CFG), tiny_model_dir, "v0001")
        assert slow.called.count("npd_staged") == 3 and quick.called.count("npd_staged") == 1
        assert "/pause?mode=wait" in quick.called and "/pause?mode=wait" in slow.called


def test_weights_that_cannot_be_read_pause_nobody(tiny_model_dir: Path) -> None:
    with serve(tiny_model_dir) as good, serve(tiny_model_dir) as bad:
        bad.staged = lambda: {"error": "no such file"}
        with pytest.raises(UserError, match=f"{bad.url} must do npd_staged, got: no such file"):
            refresh(ServerPool([good.url, bad.url], CFG), tiny_model_dir, "v0001")
        for server in (good, bad):
            assert server.called == [*2 * ["npd_describe"], "npd_stage", "npd_staged", "npd_stage"]  # the last lets go


def test_what_is_not_loaded_is_let_go_of(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the runner is stopped in between."""
    with serve(tiny_model_dir) as server:
        pool = ServerPool([server.url], CFG)

        def stopped(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("megatron_npd.serving.refresh._pause", stopped)
        with pytest.raises(KeyboardInterrupt):
            refresh(pool, tiny_model_dir, "v0001")
        assert server.called[-2:] == ["/resume", "npd_stage"]


def test_a_server_of_a_release_that_reads_nothing_ahead_is_told(tiny_model_dir: Path) -> None:
    with serve(tiny_model_dir) as server:
        server.refuses = "npd_stage"
        with pytest.raises(UserError, match=f"{server.url} must do npd_stage, got 403; restart it with this release"):
            refresh(ServerPool([server.url], CFG), tiny_model_dir, "v0001")
        assert "/pause?mode=wait" not in server.called


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("other") / "model", seed=5)


def fail_once(server: FakeServer, directory: Path, how: Callable[[], dict[str, Any]]) -> None:
    loads = server.loads
    server.loads = lambda given: how() if given == str(directory) else loads(given)


@pytest.mark.parametrize("weights", [{"error": "no such tensor"}, {"weights": CONTENT}], ids=["refused", "others"])
def test_all_servers_or_none(tiny_model_dir: Path, other_dir: Path, weights: dict[str, str]) -> None:
    """Where one cannot load the new policy, all serve the old one, of which they know the directory."""
    with serve(tiny_model_dir) as good, serve(tiny_model_dir) as bad:
        pool = ServerPool([good.url, bad.url], CFG)
        refresh(pool, tiny_model_dir, "v0001")
        before = good.version
        fail_once(bad, other_dir, lambda: weights)
        with pytest.raises(UserError, match=f"on {bad.url}|{bad.url} must do npd_load"):
            refresh(pool, other_dir, "v0002")
        assert good.version == bad.version == before
        assert good.called[-1] == bad.called[-1] == "/resume" and not pool.lost
        assert [call for call in good.called if call == "npd_load"] == ["npd_load"] * 3  # first, new, back
        assert pool.check(version="v0001") == before
        bad.loads = lambda given: {"weights": read_weights(given).content_hash()}
        refresh(pool, other_dir, "v0002")
        assert good.version == bad.version == tag("v0002", read_weights(other_dir).content_hash())


def test_a_server_that_cannot_go_back_is_marked_and_left_out(tiny_model_dir: Path, other_dir: Path) -> None:
    with serve(tiny_model_dir) as good, serve(tiny_model_dir) as bad:
        bad.load_status = 500
        pool = ServerPool([good.url, bad.url], CFG)
        with pytest.raises(
            UserError, match=rf"(?s){bad.url} must accept /collective_rpc, got 500.*is tagged 'unusable'"
        ):
            refresh(pool, other_dir, "v0001")
        assert good.version == tag("v0000", read_weights(tiny_model_dir).content_hash()) and bad.version == UNUSABLE
        assert good.called[-1] == bad.called[-1] == "/resume"
        assert pool.urls == [good.url] and "may hold mixed weights" in str(pool.lost[bad.url])
        pool.check(version="v0000")
        bad.load_status = 200
        refresh(pool, other_dir, "v0001")  # loads the others' weights where it was left out
        assert pool.check(version="v0001") == bad.version and sorted(pool.urls) == sorted([good.url, bad.url])


def test_a_server_that_dies_in_a_refresh_does_not_stop_the_others(tiny_model_dir: Path, other_dir: Path) -> None:
    with serve(tiny_model_dir) as good:
        with serve(tiny_model_dir) as dying:
            pool = ServerPool([good.url, dying.url], CFG)
            pool.check()

            def die() -> dict[str, Any]:
                dying.dead = True
                dying.socket.close()
                raise ConnectionError

            fail_once(dying, other_dir, die)
            refresh(pool, other_dir, "v0001")
        assert good.version == tag("v0001", read_weights(other_dir).content_hash())
        assert pool.urls == [good.url] and list(pool.lost) == [dying.url]


def break_off() -> dict[str, Any]:
    raise ConnectionError


def test_the_only_server_is_started_again_with_the_new_policy(tiny_model_dir: Path, other_dir: Path) -> None:
    with serve(tiny_model_dir) as fake:
        server = Launched(fake)
        pool = ServerPool([fake.url], CFG, [server])
        fail_once(fake, other_dir, break_off)
        refresh(pool, other_dir, "v0001")
        assert pool.urls == [fake.url] and not pool.lost
        assert fake.version == pool.served == tag("v0001", read_weights(other_dir).content_hash())


def test_no_server_lies_while_it_loads(tiny_model_dir: Path, other_dir: Path) -> None:
    """What ends there, ours or the server's process, leaves no new weights under the name of the old ones."""
    with serve(tiny_model_dir) as server:
        loads, seen = server.loads, []
        server.loads = lambda directory: seen.append(server.version) or loads(directory)
        refresh(ServerPool([server.url], CFG), other_dir, "v0001")
        assert seen == [UNUSABLE]


def test_a_server_found_again_that_cannot_take_the_weights_does_not_lie(tiny_model_dir: Path) -> None:
    with serve(tiny_model_dir) as first, serve(tiny_model_dir) as second:
        pool = ServerPool([first.url, second.url], CFG)
        refresh(pool, tiny_model_dir, "v0001")
        pool.lose(second.url, ServerLost("as the test wants it"))
        second.version, second.load_status = f"v0000-{CONTENT}", 500
        assert not pool.find(second.url)
        assert second.version == UNUSABLE and second.called[-1] == "/resume"


def test_a_server_that_is_late_to_pause_does_not_stay_so(
    tiny_model_dir: Path, other_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tiny_model_dir) as good, serve(tiny_model_dir) as late:
        pool = ServerPool([good.url, late.url], CFG)
        control = pool.control

        def answer(url: str, path: str, **arguments: Any) -> Any:
            result = control(url, path, **arguments)
            if (url, path) == (late.url, "/pause") and not pool.lost:
                raise ServerLost("late")
            return result

        monkeypatch.setattr(pool, "control", answer)
        good.load_status = 500
        with pytest.raises(UserError, match="got 500"):
            refresh(pool, other_dir, "v0001")
        assert late.url in pool.lost and late.called[-2:] == ["/resume", "npd_stage"]


def test_the_command_tells_of_servers_that_took_nothing(tiny_model_dir: Path) -> None:
    with serve(tiny_model_dir) as server:
        urls = f"{server.url},http://127.0.0.1:1"
        with pytest.raises(UserError, match=r"(?s)all servers must take .*, got 1 of 2; .*127\.0\.0\.1:1 must answer"):
            main(["--urls", urls, "--policy", str(tiny_model_dir), "--version", "v0001"])


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
    other = make_tiny_model(tmp_path / "other", num_hidden_layers=1)
    with serve(tiny_model_dir) as first, serve(other) as second:
        before = first.version, second.version
        with pytest.raises(UserError, match=f"must match what {second.url} serves, got tensor model.layers.1"):
            refresh(ServerPool([first.url, second.url], CFG), tiny_model_dir, "v0001")
        assert (first.version, second.version) == before
        assert set(first.called + second.called) == {"npd_describe"}


def answer_otherwise(server: FakeServer, when: Callable[[], bool], shift: float | None) -> None:
    """Give the log-probabilities of prompts changed by ``shift`` nats; None: undefined."""

    def trouble(body: dict[str, Any]) -> bytes | None:
        positions = fake_prompt_logprobs(body)
        if positions is None or not when():
            return None
        for entry in (entry for position in positions[1:] for entry in (position or {}).values()):
            entry["logprob"] = None if shift is None else entry["logprob"] - shift
        return json.dumps({"choices": [fake_answer(body, "")], "prompt_logprobs": positions}).encode()

    server.trouble = trouble


@pytest.mark.parametrize(
    ("shift", "message"), [(0.6, r"got 0\.6 nats apart, over 0\.5"), (None, "NaN or infinity among ")]
)
def test_a_server_that_computes_otherwise_is_as_one_that_refuses(
    tiny_model_dir: Path, other_dir: Path, shift: float | None, message: str
) -> None:
    with serve(tiny_model_dir) as good, serve(tiny_model_dir) as bad:
        pool = ServerPool([good.url, bad.url], CFG)
        refresh(pool, tiny_model_dir, "v0001")
        before = good.version
        answer_otherwise(bad, lambda: bad.version.startswith("v0002"), shift)
        good.called.clear()
        with pytest.raises(UserError, match=rf"{bad.url} with the weights v0002-\w+ must give .*{message}"):
            refresh(pool, other_dir, "v0002")
        assert good.version == bad.version == before and not pool.lost
        assert pool.check(version="v0001") == before
        order = [call for call in good.called if call in ("npd_load", "/resume") or "pause" in call]
        assert order == 2 * ["/pause?mode=wait", "npd_load", "/resume"]  # nothing is loaded where requests run
        answer_otherwise(bad, lambda: True, 0.4)  # as kernels may differ whose type is not known
        refresh(pool, other_dir, "v0002")
        assert good.version == bad.version != before


def test_what_float32_may_differ_by_is_less(tiny_model_dir: Path) -> None:
    with serve(tiny_model_dir) as good, serve(tiny_model_dir) as bad:
        for server in (good, bad):
            described = server.headers_of
            server.headers_of = lambda directory, d=described: d(directory) | {"dtype": "torch.float32"}
        pool = ServerPool([good.url, bad.url], CFG)
        answer_otherwise(bad, lambda: True, 0.02)
        with pytest.raises(UserError, match=r"got 0\.02 nats apart, over 0\.01"):
            refresh(pool, tiny_model_dir, "v0001")
        answer_otherwise(bad, lambda: True, 0.005)
        refresh(pool, tiny_model_dir, "v0001")


def test_the_same_weights_give_what_they_gave_before(tiny_model_dir: Path, other_dir: Path) -> None:
    """Also where there is no other server to compare with; not where the old weights gave nothing of use."""
    with serve(tiny_model_dir) as server:
        pool = ServerPool([server.url], CFG)
        refresh(pool, tiny_model_dir, "v0001")
        before = server.version
        answer_otherwise(server, lambda: server.version.startswith("v0002"), 1.0)
        with pytest.raises(UserError, match=f"v0002-.* must give .* of {server.url} with the weights {before}, got 1 "):
            refresh(pool, tiny_model_dir, "v0002")
        assert server.version == before and not pool.lost
        refresh(pool, other_dir, "v0002")  # of other weights nothing is known
        answer_otherwise(server, lambda: server.version.startswith("v0002"), None)
        refresh(pool, tiny_model_dir, "v0003")
        assert server.version == tag("v0003", read_weights(tiny_model_dir).content_hash())


def test_a_server_that_goes_back_and_computes_otherwise_is_marked_and_left_out(
    tiny_model_dir: Path, other_dir: Path
) -> None:
    with serve(tiny_model_dir) as good, serve(tiny_model_dir) as bad:
        pool = ServerPool([good.url, bad.url], CFG)
        refresh(pool, tiny_model_dir, "v0001")
        before = good.version
        answer_otherwise(bad, lambda: bad.called.count("npd_load") > 1, 1.0)
        with pytest.raises(UserError, match=rf"(?s)v0002-.*{bad.url} computes otherwise than before.*is tagged 'unus"):
            refresh(pool, other_dir, "v0002")
        assert (good.version, bad.version) == (before, UNUSABLE)
        assert pool.urls == [good.url] and list(pool.lost) == [bad.url]


def test_a_server_found_again_must_compute_as_the_others(tiny_model_dir: Path) -> None:
    with serve(tiny_model_dir) as first, serve(tiny_model_dir) as second:
        pool = ServerPool([first.url, second.url], CFG)
        refresh(pool, tiny_model_dir, "v0001")
        pool.lose(second.url, ServerLost("as the test wants it"))
        second.version = f"v0000-{CONTENT}"
        answer_otherwise(second, lambda: True, 1.0)
        for _ in range(2):  # not by its tag alone either
            assert not pool.find(second.url) and second.version == UNUSABLE
        answer_otherwise(second, lambda: False, 1.0)
        assert pool.find(second.url) and second.version == first.version


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
