"""How many requests a server is given at once, on stand-ins with queues of their own."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any

import pytest

from megatron_npd.config.settings import RolloutConfig
from megatron_npd.serving import asking
from megatron_npd.serving.load import Load, waiting_requests
from megatron_npd.serving.pool import ServerPool
from megatron_npd.serving.protocol import Failure, Request, Response
from tests.serving.fake import EOS, FakeServer

CFG = RolloutConfig(max_model_len=64, max_tokens=20, concurrency=8, request_timeout=60.0, server_patience=0.0)
METRICS = """# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="policy"} 3.0
vllm:num_requests_waiting{engine="1",model_name="policy"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="policy",reason="capacity"} 3.0
"""


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_QUEUE_SECONDS", 0.02)
    monkeypatch.setattr(asking, "_PARK_SECONDS", 0.005)


def requests(number: int) -> list[Request]:
    return [Request(key=n, token_ids=[3 + n] * 5, max_tokens=20, stop_ids=[EOS], seed=n) for n in range(number)]


class Slots:
    """A server that works on so many requests at a time, each for ``seconds``, and says how many wait."""

    def __init__(self, server: FakeServer, slots: int, seconds: float) -> None:
        self.free, self.seconds = threading.Semaphore(slots), seconds
        self.lock, self.present, self.working = threading.Lock(), 0, 0
        self.seen: list[int] = []  # how many were there at each look
        server.trouble, server.metrics = self.work, self.metrics

    def work(self, body: dict[str, Any]) -> None:
        if body["sampling_params"]["max_tokens"] == 1:
            return
        with self.lock:
            self.present += 1
        with self.free:
            with self.lock:
                self.working += 1
            time.sleep(self.seconds)
            with self.lock:
                self.working -= 1
                self.present -= 1

    def metrics(self) -> str:
        with self.lock:
            self.seen.append(self.present)
            return f'vllm:num_requests_waiting{{engine="0"}} {float(self.present - self.working)}\n'


def ask(number: int, *servers: FakeServer, cfg: RolloutConfig = CFG) -> dict[int, Response | Failure]:
    results: dict[int, Response | Failure] = {}
    pool = ServerPool([server.url for server in servers], cfg)
    pool.check()

    def on_result(request: Request, result: Response | Failure) -> None:
        assert request.key not in results
        results[request.key] = result

    pool.run(requests(number), on_result)
    return results


def test_the_queue_of_all_engines_is_read() -> None:
    assert waiting_requests(METRICS) == 5
    assert waiting_requests("vllm:num_requests_waiting 0.0\n") == 0
    for silent in ("", "python_gc_objects 3\n", METRICS.replace("3.0", "x"), METRICS.replace("3.0", "inf")):
        assert waiting_requests(silent) is None


def test_a_server_with_a_queue_has_what_it_works_on() -> None:
    load = Load(100)
    load.in_flight = 100
    load.see(waiting=60)
    assert load.limit == 40
    load.see(waiting=0)  # they had only to be taken in
    assert load.limit == 100
    load.see(waiting=80)
    load.in_flight = 20
    for expected in (25, 31, 38, 47):
        load.see(waiting=0)
        assert load.limit == expected
    load.see(waiting=500)  # of others too
    assert load.limit == 1
    for _ in range(40):
        load.see(waiting=0)
    assert load.limit == load.bound == 100


@pytest.mark.parametrize("number", [2, 8, 11])
def test_few_requests_are_shared(number: int) -> None:
    with FakeServer() as first, FakeServer() as second:
        for server in (first, second):
            server.trouble = lambda _: time.sleep(0.3)
        ask(number, first, second)
        assert abs(len(first.asked) - len(second.asked)) <= 1


def test_who_has_a_queue_gets_no_more_and_the_answers_are_the_same() -> None:
    """The slow server works on one request at a time: what it was given at the start waits, nothing else does."""
    number = 300
    with FakeServer() as alone:
        expected = ask(number, alone)
    with FakeServer() as slow, FakeServer() as fast:
        one, many = Slots(slow, 1, 0.03), Slots(fast, 8, 0.02)
        assert ask(number, slow, fast) == expected
        assert one.present == many.present == 0 and max(many.seen) <= CFG.concurrency
        assert len(slow.asked) + len(fast.asked) == number and CFG.concurrency < len(slow.asked)
        late = one.seen[len(one.seen) // 2 : -len(one.seen) // 4]  # what it was given at the start is done by then
        assert late and max(late) <= CFG.concurrency // 2


def test_servers_that_say_nothing_of_a_queue_have_what_is_asked_for() -> None:
    cfg = dataclasses.replace(CFG, concurrency=4)
    with FakeServer() as server:
        busy = Slots(server, 1, 0.02)
        calls: list[str] = []

        def silent() -> str:
            calls.append("/metrics")
            busy.metrics()
            return "vllm:generation_tokens_total 3\n"

        server.metrics = silent
        assert len(ask(20, server, cfg=cfg)) == 20
        assert len(calls) == 1 and max(busy.seen) <= 4, "nobody asks twice"


def test_a_limit_that_falls_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers beyond it wait; all of them end once there is nothing to ask."""
    seen: list[int] = []
    monkeypatch.setattr(Load, "see", lambda self, waiting: (seen.append(self.in_flight), setattr(self, "limit", 2))[0])
    with FakeServer() as server:
        slots = Slots(server, 8, 0.02)
        assert len(ask(60, server)) == 60
    assert slots.present == 0 and max(seen[5:]) <= 2
