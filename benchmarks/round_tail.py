"""The end of a round: how long servers stand idle because the last responses are long, or wait in another's queue.

    python benchmarks/round_tail.py               a second, no server

Servers are simulated, token by token: a step of a server takes 4 ms and 0.14 ms for each request that it works on (a
small model of vLLM's on a CPU: 259 tokens per second with one request, 6000 with 128). What is asked, when, and of whom
is as in ``serving/asking.py``: a free place takes the next request; ``Load`` is the program's own. Response lengths are
log-normal (sigma 1, median 150 tokens, at most 2048). Prompts differ in their mean by the part of the variance that is
named, the rest is the sampling's; what is expected of a prompt is the mean of its responses in an earlier round.
"""

from __future__ import annotations

import argparse
import heapq
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from megatron_npd.log import run_main
from megatron_npd.serving.load import Load

STEP, PER_REQUEST = 0.004, 0.00014  # seconds
LOOK = 1.0  # seconds between two looks at a queue
MEDIAN, SIGMA, LONGEST = 150, 1.0, 2048  # tokens


@dataclass
class Server:
    """A server: ``slots`` requests at a time, the others wait in its queue."""

    slots: int
    load: Load
    slowness: float = 1.0
    running: list[int] = field(default_factory=list)  # tokens left
    queue: deque[int] = field(default_factory=deque)
    stepping: bool = False

    def step(self) -> float:
        """Begin a step; the seconds that it takes."""
        while self.queue and len(self.running) < self.slots:
            self.running.append(self.queue.popleft())
        self.stepping = bool(self.running)
        return self.slowness * (STEP + PER_REQUEST * len(self.running))

    def end_step(self) -> None:
        """Each request has a token more; those that are finished leave."""
        left = [tokens - 1 for tokens in self.running if tokens > 1]
        self.load.in_flight -= len(self.running) - len(left)
        self.running, self.stepping = left, False


def simulate(lengths: np.ndarray, servers: list[Server], adapts: bool) -> tuple[float, float]:
    """Ask for responses of these lengths, in this order.

    Returns:
        Seconds of the round, and of them those after the last request was sent.
    """
    requests, now, sent = deque(lengths.tolist()), 0.0, 0.0
    events: list[tuple[float, int]] = []  # when, and whose step ends; -1: a look at the queues

    def give() -> None:
        nonlocal sent
        while requests and (free := [s for s in servers if s.load.in_flight < s.load.limit]):
            server = min(free, key=lambda s: s.load.in_flight)
            server.queue.append(requests.popleft())
            server.load.in_flight += 1
            sent = now
        for index, server in enumerate(servers):
            if not server.stepping and (server.queue or server.running):
                heapq.heappush(events, (now + server.step(), index))

    give()
    if adapts:
        heapq.heappush(events, (LOOK, -1))
    while any(server.load.in_flight for server in servers) or requests:
        now, who = heapq.heappop(events)
        if who < 0:
            for server in servers:
                server.load.see(len(server.queue))
            heapq.heappush(events, (now + LOOK, -1))
        else:
            servers[who].end_step()
        give()
    return now, now - sent


def make_lengths(prompts: int, paths: int, share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a round's responses, and what an earlier round lets expect of them, in the order of the file."""
    own = rng.normal(0.0, SIGMA * np.sqrt(share), (prompts, 1))

    def one_round() -> np.ndarray:
        noise = rng.normal(0.0, SIGMA * np.sqrt(1 - share), (prompts, paths))
        return np.clip(MEDIAN * np.exp(own + noise), 1, LONGEST).astype(int)

    return one_round().ravel(), one_round().mean(axis=1).repeat(paths)


def fresh(slots: list[int], concurrency: int, slowness: list[float] | None = None) -> list[Server]:
    """Servers that have nothing yet."""
    slow = slowness or [1.0] * len(slots)
    return [Server(slots=n, load=Load(concurrency), slowness=factor) for n, factor in zip(slots, slow, strict=True)]


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--paths", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=128)
    options = parser.parse_args()
    rng, concurrency = np.random.default_rng(0), options.concurrency
    print(
        "| servers | order | variance between prompts | round, s | after the last request, s |\n|---|---|---|---|---|"
    )
    for number in (1, 4):
        for share in (0.25, 0.5, 0.75):
            lengths, expected = make_lengths(options.prompts, options.paths, share, rng)
            orders = [("file", np.arange(len(lengths))), ("expected", np.argsort(-expected, kind="stable"))]
            for name, order in [*orders, ("known", np.argsort(-lengths, kind="stable"))]:
                whole, tail = simulate(lengths[order], fresh([concurrency] * number, concurrency), adapts=False)
                print(f"| {number} | {name} | {share:.0%} | {whole:.1f} | {tail:.1f} |", flush=True)
    print("\n| two servers | order | limit | round, s | after the last request, s |\n|---|---|---|---|---|")
    lengths, expected = make_lengths(options.prompts, options.paths, 0.5, rng)
    by_length = lengths[np.argsort(-expected, kind="stable")]
    unequal = {
        "alike": ([concurrency] * 2, [1.0, 1.0]),
        "one with an eighth of the places": ([concurrency, concurrency // 8], [1.0, 1.0]),
        "one with an eighth, four times slower": ([concurrency, concurrency // 8], [1.0, 4.0]),
        "one four times slower": ([concurrency] * 2, [1.0, 4.0]),
    }
    for name, (slots, slowness) in unequal.items():
        for order, asked, adapts in (("file", lengths, False), ("file", lengths, True), ("expected", by_length, True)):
            whole, tail = simulate(asked, fresh(slots, concurrency, slowness), adapts)
            limit = "by the queue" if adapts else "constant"
            print(f"| {name} | {order} | {limit} | {whole:.1f} | {tail:.1f} |", flush=True)


if __name__ == "__main__":
    run_main(main)
