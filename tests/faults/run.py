"""The full number of fault tests, by one command; prints the table of docs/reliability.md, exit code 1 on any failure.

``python tests/faults/run.py --kills 200 --flips 10000 --truncations 2000 --fuzz 100000``
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_npd.log import get_logger
from megatron_npd.platform import get_platform

get_platform("cpu")

from tests.faults.damage import Readers, fuzz  # noqa: E402
from tests.faults.stages import Bench  # noqa: E402
from tests.faults.world import STAGES  # noqa: E402


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
    options = parser.parse_args()
    rng = random.Random(options.seed)
    get_logger().setLevel("ERROR")
    wrong: list[str] = []

    def report(what: str, ends: Counter[str], broken: list[str], start: float) -> None:
        ended = ", ".join(f"{number} {end}" for end, number in ends.most_common())
        print(f"| {what} | {ends.total()} | {ended} | {len(broken)} | {time.monotonic() - start:.0f} s |", flush=True)
        for line in broken[:20]:
            print(f"    WRONG {line}", flush=True)
        wrong.extend(broken)

    print("| fault | number | how it ended | broken promises | time |\n|---|---|---|---|---|")
    with Bench() as bench:
        readers = Readers(bench.whole, bench.inputs, bench.root)
        for how, number in (("flip", options.flips), ("cut", options.truncations)):
            start = time.monotonic()
            results, broken = readers.damage(rng, number, how)
            for kind, ends in results.items():
                report(f"{how}, {kind}", ends, [line for line in broken if _about(line, kind)], start)
            wrong.extend(broken)
        start = time.monotonic()
        results, broken = fuzz(readers, rng, options.fuzz)
        for name, ends in results.items():
            report(f"fuzz, {name}", ends, [line for line in broken if f"fuzz of {name}:" in line], start)
        for stage in options.stages:
            points = {
                "every boundary": bench.boundaries(stage, rng, options.boundaries),
                "random moments": bench.moments(stage, rng, options.kills),
                "full disk": [("full", at, 0.0) for at in _spread(bench.events[stage], options.full_disk)],
                "short writes": [("short", 0, 0.0)],
            }
            for name, where in points.items():
                start = time.monotonic()
                report(f"{stage}, {name}", *bench.disturb(stage, where), start)
            start = time.monotonic()
            report(f"{stage}, two writers", *bench.two_writers(stage, options.two_writers), start)
    print(f"{len(wrong)} broken promises" if wrong else "no broken promises")
    return 1 if wrong else 0


def _about(line: str, kind: str) -> bool:
    return f"{kind}/" in line or f"{kind}s/" in line or f"{kind}." in line or (kind == "policy" and "policies/" in line)


def _spread(events: int, number: int) -> list[int]:
    """At most ``number`` of the events 1 .. ``events``, evenly."""
    step = max(1, events // max(number, 1))
    return list(range(1, events + 1, step))[:number]


if __name__ == "__main__":
    sys.exit(main())
