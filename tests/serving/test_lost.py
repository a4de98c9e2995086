"""Servers that are lost in the middle of a round, on stand-ins: the others go on, what comes back is asked again."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_npd.config.settings import RolloutConfig
from megatron_npd.errors import UserError
from megatron_npd.serving import asking
from megatron_npd.serving.pool import ServerPool
from megatron_npd.serving.protocol import Failure, Request, Response
from megatron_npd.serving.refresh import refresh
from megatron_npd.serving.server import tag
from megatron_npd.weights import read_weights
from tests.serving.fake import CONTENT, EOS, FakeServer, Launched, Trouble, die_after
from tests.serving.test_refresh import serve

CFG = RolloutConfig(max_model_len=64, max_tokens=20, concurrency=4, request_timeout=60.0, server_patience=0.0)
REQUESTS = [Request(key=n, token_ids=[3 + n] * 5, max_tokens=20, stop_ids=[EOS], seed=n) for n in range(60)]

Results = dict[int, Response | Failure]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_RETRY_DELAYS", (0.01, 0.02))
    monkeypatch.setattr(asking, "_LOOK_SECONDS", 0.05)


def ask(pool: ServerPool) -> Results:
    results: Results = {}
    pool.check()

    def on_result(request: Request, result: Response | Failure) -> None:
        assert request.key not in results, "asked for twice"
        results[request.key] = result

    pool.run(REQUESTS, on_result)
    return results


@pytest.fixture(scope="module")
def expected() -> Results:
    with FakeServer() as server:
        return ask(ServerPool([server.url], CFG))


def hang_after(server: FakeServer, answers: int) -> Trouble:
    def trouble(_: dict[str, Any]) -> None:
        while len(server.asked) > answers and not server.dead:
            time.sleep(0.1)

    return trouble


@pytest.mark.parametrize(
    ("how", "answers"), [(die_after, 0), (die_after, 1), (die_after, 7), (die_after, 25), (hang_after, 7)]
)
def test_the_others_answer_what_a_lost_server_worked_on(expected: Results, how: Any, answers: int) -> None:
    with FakeServer() as first, FakeServer() as second:
        first.trouble = how(first, answers)
        second.trouble = lambda _: time.sleep(0.01)
        timeout = 3.0 if how is hang_after else CFG.request_timeout
        pool = ServerPool([first.url, second.url], dataclasses.replace(CFG, request_timeout=timeout))
        assert ask(pool) == expected
        assert pool.urls == [second.url] and list(pool.lost) == [first.url]
        assert f"{first.url} must generate" in str(pool.lost[first.url])
    assert len(first.asked) + len(second.asked) <= len(REQUESTS) + 3 * CFG.concurrency


def test_what_all_servers_leave_is_an_error_and_nothing_is_lost(expected: Results) -> None:
    with FakeServer() as first, FakeServer() as second:
        for server in (first, second):
            server.trouble = die_after(server, 10)
        results: Results = {}
        pool = ServerPool([first.url, second.url], dataclasses.replace(CFG, server_patience=0.3))
        start = time.monotonic()
        with pytest.raises(UserError, match=r"must generate, got .*run the same again"):
            pool.run(REQUESTS, lambda request, result: results.update({request.key: result}))
        assert time.monotonic() - start > 0.3
    assert 0 < len(results) < len(REQUESTS) and all(expected[key] == result for key, result in results.items())


def hold(until: Callable[[], bool]) -> Trouble:
    """A server that answers its last half of the requests once ``until`` holds, or late."""
    count = itertools.count()

    def trouble(_: dict[str, Any]) -> None:
        deadline = time.monotonic() + 40.0 * (next(count) > len(REQUESTS) // 2)
        while not until() and time.monotonic() < deadline:
            time.sleep(0.02)

    return trouble


def come_back(server: FakeServer, pool: ServerPool, version: str = "", trouble: Trouble = lambda _: None) -> None:
    """Let it answer again once the pool has lost it."""

    def later() -> None:
        while server.url not in pool.lost:
            time.sleep(0.01)
        server.trouble, server.version = trouble, version or server.version
        server.dead = False

    threading.Thread(target=later, daemon=True).start()


@pytest.mark.parametrize("others", [0, 1])
def test_a_given_server_that_answers_again_is_asked_again(expected: Results, others: int) -> None:
    with FakeServer() as server, FakeServer() as other:
        server.trouble, other.trouble = die_after(server, 5), hold(lambda: len(server.asked) > 5 + CFG.concurrency)
        pool = ServerPool([server.url, other.url][: 1 + others], dataclasses.replace(CFG, server_patience=30.0))
        come_back(server, pool)
        assert ask(pool) == expected
        assert pool.lost == {} and len(server.asked) > 5 + CFG.concurrency


def test_a_server_that_comes_back_with_other_weights_gets_those_of_the_others(tiny_model_dir: Path) -> None:
    content = read_weights(tiny_model_dir).content_hash()
    with serve(tiny_model_dir) as first, serve(tiny_model_dir) as second:
        pool = ServerPool([first.url, second.url], CFG)
        refresh(pool, tiny_model_dir, "v0001")
        first.trouble, second.trouble = die_after(first, 5), hold(lambda: len(first.asked) > 5 + CFG.concurrency)
        come_back(first, pool, version=f"v0000-{CONTENT}")
        results = ask(pool)
        assert first.version == tag("v0001", content) and len(first.asked) > 5 + CFG.concurrency
    assert {result.versions for result in results.values() if isinstance(result, Response)} == {(first.version,)}


def test_a_server_with_other_weights_that_nobody_knows_is_not_asked(expected: Results) -> None:
    with FakeServer() as first, FakeServer() as second:
        first.trouble = die_after(first, 5)
        pool = ServerPool([first.url, second.url], CFG)
        come_back(first, pool, version=f"v0007-{CONTENT}")
        second.trouble = hold(lambda: "must serve" in str(pool.lost.get(first.url)))
        assert ask(pool) == expected
        assert f"must serve v0000-{CONTENT}, got v0007-{CONTENT}" in str(pool.lost[first.url])


def test_what_brings_servers_down_fails_alone() -> None:
    """It is asked for three times; what else was in flight is asked for again."""
    with FakeServer() as first, FakeServer() as second, FakeServer() as third, FakeServer() as fourth:
        servers = [first, second, third, fourth]

        def deadly(server: FakeServer) -> Trouble:
            def trouble(body: dict[str, Any]) -> None:
                if body["token_ids"] == REQUESTS[20].token_ids:
                    server.dead = True

            return trouble

        for server in servers:
            server.trouble = deadly(server)
        pool = ServerPool([server.url for server in servers], dataclasses.replace(CFG, concurrency=1))
        results = ask(pool)
        assert len(pool.urls) == 1
    failed = {key: result for key, result in results.items() if isinstance(result, Failure)}
    assert len(results) == len(REQUESTS) and failed.keys() == {20}
    assert failed[20] == Failure(reason="server_lost", detail="in flight on 3 servers that were lost")


def test_the_innocent_that_were_in_flight_with_it_are_asked_alone(expected: Results) -> None:
    """One server, which comes back each time: the same requests would be in flight together until all are lost."""
    deaths = 0
    with FakeServer() as server:
        pool = ServerPool([server.url], dataclasses.replace(CFG, server_patience=30.0))

        def deadly(body: dict[str, Any]) -> None:
            nonlocal deaths
            if body["token_ids"] != REQUESTS[1].token_ids:
                time.sleep(0.02)  # in flight with it
            elif not server.dead:
                deaths, server.dead = deaths + 1, True
                come_back(server, pool, trouble=deadly)

        server.trouble = deadly
        results = ask(pool)
    assert results.keys() == expected.keys() and deaths > 2
    assert {key for key, result in results.items() if result != expected[key]} == {1}
    assert results[1] == Failure(reason="server_lost", detail="in flight on 3 servers that were lost")


def test_a_server_with_nan_that_dies_as_well_is_lost(expected: Results) -> None:
    with FakeServer() as first, FakeServer() as second:
        undefined = itertools.count()

        def trouble(body: dict[str, Any]) -> Any:
            if body["token_ids"] == REQUESTS[0].token_ids and next(undefined) == 0:  # twice would be the model's
                return {"token_ids": [3], "finish_reason": "length", "logprobs": {"content": [{"logprob": None}]}}
            if body["sampling_params"]["max_tokens"] > 1 and first.answered:
                time.sleep(0.1)
                first.dead = True
                first.socket.close()
            return None

        pool = ServerPool([first.url, second.url], CFG)
        pool.check()
        first.trouble, second.trouble = trouble, hold(lambda: first.answered > 0)
        assert ask(pool) == expected
        assert list(pool.lost) == [first.url]


def test_an_error_of_the_caller_is_not_lost_with_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_MOST_LOST", 1)
    with FakeServer() as first, FakeServer() as second:
        pool = ServerPool([first.url, second.url], dataclasses.replace(CFG, concurrency=2))

        def trouble(body: dict[str, Any]) -> None:
            first.dead = first.dead or body["token_ids"] != REQUESTS[0].token_ids  # the second that it is asked
            while body["token_ids"] == REQUESTS[0].token_ids and first.url not in pool.lost:
                time.sleep(0.01)

        def on_result(request: Request, result: Response | Failure) -> None:
            if request.key == 0:
                raise UserError("every problem must be answered")

        first.trouble = trouble
        with pytest.raises(UserError, match="every problem must be answered"):
            pool.run(REQUESTS, on_result)
        assert list(pool.lost) == [first.url]


def test_nobody_waits_for_a_server_that_starts_when_the_round_ends() -> None:
    """Neither after an error nor after Ctrl-C, which cancel alike; a start takes minutes."""
    with FakeServer() as first, FakeServer() as second:
        starting = Launched(first, seconds=60.0)
        pool = ServerPool([first.url, second.url], CFG, [starting, Launched(second)])
        first.trouble = die_after(first, 0)

        def on_result(request: Request, result: Response | Failure) -> None:
            if starting.starts:
                raise UserError("enough")
            time.sleep(0.05)

        start = time.monotonic()
        with pytest.raises(UserError, match="enough"):
            pool.run(REQUESTS, on_result)
        assert starting.starts == 1 and time.monotonic() - start < 30.0
        assert pool.urls == [second.url]
