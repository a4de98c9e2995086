"""Sequential, overlapping and on-policy schedules on 8, 64 and 512 devices, by simulation: hours, and what each part
of near-policy distillation takes off them.

    python benchmarks/schedules.py [--responses 50000] [--epochs 1]         half a minute, no engine

Costs are those that were measured. ``paper``: one node of 8 NPUs (METHOD section 5: rollout 300 h, annotation 18,
training 42 for ten epochs over 1.2M responses; lengths are not given: log-normal, sigma 1, mean 1500, prompts 256);
its 208 tokens per second and device are two requests at a time with steps of 9.6 ms (docs/planner.md). ``vllm``: the
same, but servers with 128 places, whose steps become longer by a hundredth for each request. ``cpu``: this package's
engines on one core (docs/benchmarks.md): steps of 3.7 ms and 0.14 ms per request, 5.6 ms per response of 85 tokens and
its prompt for the teacher, 4.5 to train on it, mean 85, at most 400, prompts 60; 2 s per round for export and refresh.

Each row of the table changes one thing of the row above it:

- on-policy, padded: each step generates, scores and trains on a batch of its own; a batch is decoded, scored and
  trained on as long as its longest response, as ``generate`` of transformers and padded trainers do it;
- free places: a server decodes only what is not finished;
- packing: teacher and trainer work on tokens, not on padding;
- a round for many steps: responses are generated, and scored, for a whole round before it is trained on;
- overlap: servers and trainer have devices of their own, split where it is shortest; ``max_lead`` 1.

A device works on whole responses. Nothing is said of communication, loading and failures.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from megatron_npd.log import run_main
from megatron_npd.planning.splits import RoundTime, run_seconds

DEVICES = (8, 64, 512)
BATCH = 512  # responses of a step


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What was measured; seconds of one device.

    Attributes:
        step: A decoding step with no request.
        per_request: What each request adds to it.
        places: Requests that a server works on at a time.
        scored: The teacher's forward, per token.
        trained: A training step, per token.
        refresh: Between rounds.
        mean: Tokens of a response, log-normal with sigma 1.
        longest: Of a response, in tokens.
        prompt: Tokens of a prompt.
    """

    step: float
    per_request: float
    places: int
    scored: float
    trained: float
    refresh: float
    mean: float
    longest: int
    prompt: int


_NODE_SECONDS = 8 * 3600 / (1.2e6 * (1500 + 256))  # of a device per token, for an hour of the paper's
_PAPER = Costs(
    step=0.0096,
    per_request=0.0,
    places=2,
    scored=18 * _NODE_SECONDS,
    trained=4.2 * _NODE_SECONDS,
    refresh=60.0,
    mean=1500,
    longest=32768,
    prompt=256,
)
COSTS = {
    "paper": _PAPER,
    "vllm": replace(_PAPER, per_request=0.000096, places=128),
    "cpu": Costs(
        step=0.0037,
        per_request=0.00014,
        places=128,
        scored=0.0056 / 145,
        trained=0.0045 / 145,
        refresh=2.0,
        mean=85,
        longest=400,
        prompt=60,
    ),
}


def draw_lengths(costs: Costs, number: int) -> npt.NDArray[np.int64]:
    """Tokens of so many responses."""
    median = costs.mean * np.exp(-0.5)
    drawn = median * np.exp(np.random.default_rng(0).normal(size=number))
    return np.clip(drawn, 1, costs.longest).astype(np.int64)


def decode(costs: Costs, lengths: Sequence[int], *, padded: bool) -> float:
    """Seconds that one server takes for responses; ``padded``: batches of its places, each until its longest ends."""
    if padded:
        batches = [lengths[first : first + costs.places] for first in range(0, len(lengths), costs.places)]
        return sum(max(batch) * (costs.step + costs.per_request * len(batch)) for batch in batches)
    seconds, steps = 0.0, 0
    waiting, ends = iter(lengths[costs.places :]), list(lengths[: costs.places])  # ends: in steps, of what is worked on
    heapq.heapify(ends)
    while ends:
        end = heapq.heappop(ends)
        seconds += (end - steps) * (costs.step + costs.per_request * (len(ends) + 1))
        steps = end
        if (length := next(waiting, None)) is not None:
            heapq.heappush(ends, steps + length)
    return seconds


def generate(costs: Costs, lengths: npt.NDArray[np.int64], devices: int, *, padded: bool = False) -> float:
    """Seconds until the last server has done its share, dealt in turn."""
    shares = [lengths[device::devices].tolist() for device in range(min(devices, len(lengths)))]
    return max(decode(costs, share, padded=padded) for share in shares)


def work(per_token: float, costs: Costs, lengths: npt.NDArray[np.int64], devices: int, *, padded: bool) -> float:
    """Seconds to score or train on a batch: tokens are spread evenly, a device has a response at least."""
    tokens = lengths + costs.prompt
    total = len(tokens) * tokens.max() if padded else tokens.sum()
    return per_token * max(total / devices, tokens.max())


def on_policy(costs: Costs, lengths: npt.NDArray[np.int64], devices: int, *, places: bool, packs: bool) -> float:
    """Seconds of an epoch in which each step generates, scores and trains on its own batch."""
    seconds = 0.0
    for first in range(0, len(lengths), BATCH):
        batch = lengths[first : first + BATCH]
        seconds += generate(costs, batch, devices, padded=not places)
        seconds += work(costs.scored + costs.trained, costs, batch, devices, padded=not packs)
    return seconds


def round_time(costs: Costs, lengths: npt.NDArray[np.int64], serving: int, training: int, epochs: int) -> RoundTime:
    """Of one round on these devices."""
    steps = [lengths[first : first + BATCH] for first in range(0, len(lengths), BATCH)]
    return RoundTime(
        rollout=generate(costs, lengths, serving) + costs.refresh,
        annotate=work(costs.scored, costs, lengths, training, padded=False),
        train=epochs * sum(work(costs.trained, costs, step, training, padded=False) for step in steps),
    )


def near_policy(costs: Costs, lengths: npt.NDArray[np.int64], devices: int, rounds: int, epochs: int) -> list[float]:
    """Seconds of rounds one after the other on all devices, and of overlapping ones by the best split."""
    part = lengths[: len(lengths) // rounds]
    turns = run_seconds(rounds, round_time(costs, part, devices, devices, epochs), max_lead=0, follow=False)
    splits = sorted({max(1, min(devices - 1, round(devices * share / 16))) for share in range(1, 16)})
    each = [round_time(costs, part, serving, devices - serving, epochs) for serving in splits]
    return [turns, min(run_seconds(rounds, times, max_lead=1, follow=True) for times in each)]


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3, help="of near-policy distillation: refreshes + 1")
    parser.add_argument("--epochs", type=int, default=1, help="visits of each response; on-policy generates for each")
    options = parser.parse_args()
    print("| costs | schedule | " + " | ".join(f"{devices} devices, h | x" for devices in DEVICES) + " |")
    print("|---|---|" + "---|" * 2 * len(DEVICES))
    for name, costs in COSTS.items():
        lengths = draw_lengths(costs, options.responses)
        rows: dict[str, list[float]] = {}
        for devices in DEVICES:
            steps = [
                options.epochs * on_policy(costs, lengths, devices, places=places, packs=packs)
                for places, packs in ((False, False), (True, False), (True, True))
            ]
            found = steps + near_policy(costs, lengths, devices, options.rounds, options.epochs)
            names = ("on-policy, padded", "free places", "packing", "a round for many steps", "overlap")
            for row, seconds in zip(names, found, strict=True):
                rows.setdefault(row, []).append(seconds)
        for row, seconds in rows.items():
            first = rows["on-policy, padded"]
            cells = [f"{s / 3600:.3g} | {f / s:.2g}" for s, f in zip(seconds, first, strict=True)]
            print(f"| {name} | {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_main(main)
