"""The full number of fault tests, by one command; prints the table of docs/reliability.md, exit code 1 on any failure.

``python tests/faults/run.py --kills 200 --flips 10000 --truncations 2000 --fuzz 100000 --jobs 2``
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_npd.log import get_logger
from megatron_npd.platform import get_platform

get_platform("cpu")

from tests.faults.damage import Readers, fuzz  # noqa: E402
from tests.faults.stages import Bench  # noqa: E402
from tests.faults.world import STAGES  # noqa: E402


@dataclass(kw_only=True)
class Row:
    """A line of the table: what was done, how it ended, which promises were broken, seconds of all jobs together."""

    what: str
    ends: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    seconds: float = 0.0


# A task is given its job's bench, its random numbers, its share and the number of shares.
Task = Callable[[Bench, random.Random, int, int], list[Row]]
_bench: Bench  # of this job: each has inputs, an undisturbed run, a server and processes of its own


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="kills a stage at random moments")
    parser.add_argument("--boundaries", type=int, default=10**9, help="events of a stage to die before and to tear")
    parser.add_argument("--full-disk", type=int, default=20, help="events of a stage from which the disk is full")
    parser.add_argument("--two-writers", type=int, default=5, help="times that two processes run a stage")
    parser.add_argument("--flips", type=int, default=10_000, help="bits flipped, over all kinds of files")
    parser.add_argument("--truncations", type=int, default=2_000, help="files cut, over all kinds of files")
    parser.add_argument("--fuzz", type=int, default=100_000, help="made-up inputs, over all readers")
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=list(STAGES), help="stages to disturb")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the work and nothing else")
    options = parser.parse_args()
    tasks: list[Task] = [
        partial(_damage, number=number, how=how)
        for how, number in (("flip", options.flips), ("cut", options.truncations), ("fuzz", options.fuzz))
        if number
    ]
    for stage in options.stages:
        tasks += [
            partial(_boundaries, stage=stage, number=options.boundaries),
            partial(_random_kills, stage=stage, number=options.kills),
            partial(_full_disk, stage=stage, number=options.full_disk),
            partial(_short_writes, stage=stage),
            partial(_two_writers, stage=stage, number=options.two_writers),
        ]
    if "annotations" in options.stages:
        tasks.append(partial(_followed, number=options.kills))
    wrong, shares = 0, range(options.jobs)
    print("| fault | number | how it ended | broken promises | seconds |\n|---|---|---|---|---|", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context, initializer=_begin) as pool:
        futures = [
            [pool.submit(_work, task, f"{options.seed}/{number}/{share}", share, len(shares)) for share in shares]
            for number, task in enumerate(tasks)
        ]
        for shared in futures:
            for row in _together(shared):
                ended = ", ".join(f"{number} {end}" for end, number in row.ends.most_common())
                print(
                    f"| {row.what} | {row.ends.total()} | {ended} | {len(row.broken)} | {row.seconds:.0f} |", flush=True
                )
                for line in row.broken[:20]:
                    print(f"    WRONG {line}", flush=True)
                wrong += len(row.broken)
    print(f"{wrong} broken promises" if wrong else "no broken promises")
    return 1 if wrong else 0


def _begin() -> None:
    global _bench
    get_logger().setLevel("ERROR")
    _bench = Bench()
    Finalize(None, _bench.__exit__, exitpriority=1)  # these processes do not run atexit


def _work(task: Task, seed: str, share: int, shares: int) -> list[Row]:
    start = time.monotonic()
    rows = task(_bench, random.Random(seed), share, shares)
    for row in rows:
        row.seconds = (time.monotonic() - start) / len(rows)
    return rows


def _together(shared: Iterable[Future[list[Row]]]) -> Iterable[Row]:
    rows: dict[str, Row] = {}
    for future in shared:
        for row in future.result():
            whole = rows.setdefault(row.what, Row(what=row.what))
            whole.ends += row.ends
            whole.broken += row.broken
            whole.seconds += row.seconds
    return rows.values()


def _part(number: int, share: int, shares: int) -> int:
    return number // shares + (share < number % shares)


def _damage(bench: Bench, rng: random.Random, share: int, shares: int, *, number: int, how: str) -> list[Row]:
    readers, number = Readers(bench.whole, bench.inputs, bench.root / f"{how}-{share}"), _part(number, share, shares)
    results, broken = fuzz(readers, rng, number) if how == "fuzz" else readers.damage(rng, number, how)
    return [
        Row(what=f"{how}, {kind}", ends=ends, broken=[line for line in broken if line.startswith(f"{kind}: ")])
        for kind, ends in results.items()
    ]


def _boundaries(bench: Bench, rng: random.Random, share: int, shares: int, *, stage: str, number: int) -> list[Row]:
    points = bench.boundaries(stage, rng, _part(number, share, shares), share=share, shares=shares)
    ends, broken = bench.disturb(stage, points)
    return [Row(what=f"{stage}, every boundary", ends=ends, broken=broken)]


def _random_kills(bench: Bench, rng: random.Random, share: int, shares: int, *, stage: str, number: int) -> list[Row]:
    ends, broken = bench.random_kills(stage, rng, _part(number, share, shares))
    return [Row(what=f"{stage}, random moments", ends=ends, broken=broken)]


def _full_disk(bench: Bench, rng: random.Random, share: int, shares: int, *, stage: str, number: int) -> list[Row]:
    events = bench.events[stage]
    evenly = range(1, events + 1, max(1, events // max(number, 1)))[:number]
    ends, broken = bench.disturb(stage, [("full", at, 0.0) for at in evenly[share::shares]])
    return [Row(what=f"{stage}, full disk", ends=ends, broken=broken)]


def _short_writes(bench: Bench, rng: random.Random, share: int, shares: int, *, stage: str) -> list[Row]:
    ends, broken = bench.disturb(stage, [("short", 0, 0.0)] if share == 0 else [])
    return [Row(what=f"{stage}, short writes", ends=ends, broken=broken)]


def _two_writers(bench: Bench, rng: random.Random, share: int, shares: int, *, stage: str, number: int) -> list[Row]:
    ends, broken = bench.two_writers(stage, _part(number, share, shares))
    return [Row(what=f"{stage}, two writers", ends=ends, broken=broken)]


def _followed(bench: Bench, rng: random.Random, share: int, shares: int, *, number: int) -> list[Row]:
    ends, broken = bench.followed(rng, _part(number, share, shares))
    return [Row(what="rollouts and annotations side by side, random moments", ends=ends, broken=broken)]


if __name__ == "__main__":
    sys.exit(main())
