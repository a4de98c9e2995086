"""What a small round costs beside its engines' work: CPU seconds per stage, of rounds of 256 responses.

    make quickstart
    OMP_NUM_THREADS=1 python benchmarks/rounds.py [--rounds 12] [--prompts 256] [--quickstart runs/quickstart]

A run of the quickstart's models that is refreshed every ten steps, one stage after another, one thread a process.
Engines' work is generation (client, API and engine), the teacher's forward and the optimizer steps; beside it are
packing, saving, exporting, refreshing and whatever lies between stages. CPU seconds of the whole process tree, by the
times that the run notes; the first two rounds, in which things start, are left out. What of a round's training is its
steps, and what the checkpoint and the waiting for packs, follows from a second run with ten times as many steps in a
round. The bar is 5 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from clock import contend

from megatron_npd.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ("rollout", "annotate", "train: steps")
LEFT_OUT = 2  # rounds
STEPS = 10  # of a round
MORE = 10  # times as many in the second run


def stage_seconds(run: RunDir, clock: Any) -> dict[str, float]:
    """CPU seconds per round of each stage from round ``LEFT_OUT`` on, and of those between stages."""
    with open(run.seconds) as lines:
        stages = sorted((json.loads(line) for line in lines), key=lambda stage: stage["at"])
    first = next(stage["at"] for stage in stages if stage["stage"] == "refresh" and stage["round"] == LEFT_OUT)
    last = stages[-1]["at"] + stages[-1]["seconds"]
    found, ended = defaultdict[str, float](float), first
    for stage in stages:
        start, end = stage["at"], stage["at"] + stage["seconds"]
        if start < first:
            continue
        found[stage["stage"]] += clock.until(end) - clock.until(start)
        found["between stages"] += max(0.0, clock.until(start) - clock.until(ended))
        ended = end
    found["between stages"] += clock.until(last) - clock.until(ended)
    rounds = len({stage["round"] for stage in stages if stage["stage"] == "train"}) - LEFT_OUT
    return {name: seconds / rounds for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"), help="its work directory")
    parser.add_argument("--work", type=Path, default=Path("runs/rounds"), help="where the run is left")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=256, help="per round, one response to each")
    args = parser.parse_args()
    student, teacher = (max((args.quickstart / name).glob("hf-*")) for name in ("student", "teacher"))
    flags = {
        "config": ROOT / "examples" / "quickstart" / "npd.yaml",
        "run-dir": args.work,
        "student": student,
        "teacher": teacher,
        "prompts": args.quickstart / "data" / "npd.jsonl",
        "platform": "cpu",
        "rollout.prompts-per-round": args.prompts,
        "annotate.unconditional": "false",
        "train.refresh": "every_n",
        "train.lr-warmup-iters": 0,
        "eval.held-out": 0,
    }

    def run(rounds: int, steps: int) -> dict[str, float]:
        own = {"updates": rounds - 1, "train.refresh-interval": steps, "train.train-iters": steps * rounds}
        command = [sys.executable, "-m", "megatron_npd", "run", *(f"--{k}={v}" for k, v in (flags | own).items())]
        clock = contend(command, args.work, "policies/v*/manifest.json")
        return stage_seconds(RunDir(args.work), clock)

    found, longer = run(args.rounds, STEPS), run(LEFT_OUT + 2, MORE * STEPS)
    steps = (longer["train"] - found["train"]) / (MORE - 1)
    found |= {"train: steps": steps, "train: save, wait": found.pop("train") - steps}
    engines = sum(found[name] for name in ENGINES)
    print("| part | CPU s per round | of the engines' work |\n|---|---|---|")
    for name, seconds in sorted(found.items(), key=lambda item: (item[0] not in ENGINES, -item[1])):
        print(f"| {name} | {seconds:.3f} | {seconds / engines:.1%} |")
    beside = sum(found.values()) - engines
    print(f"| beside the engines | {beside:.3f} | {beside / engines:.1%} |")


if __name__ == "__main__":
    main()
