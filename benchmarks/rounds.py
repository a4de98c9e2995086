"""What a small round costs beside its engines' work: CPU seconds per stage, of rounds of 256 responses.

    make quickstart
    OMP_NUM_THREADS=1 python benchmarks/rounds.py [--rounds 12] [--prompts 256] [--quickstart runs/quickstart]

A run of the quickstart's models that is refreshed every ten steps, one stage after another, one thread a process.
Engines' work is generation (client, API and engine), the teacher's forward and the optimizer steps; beside it are
packing, saving, exporting, refreshing and whatever lies between stages. CPU seconds of the whole process tree, by the
times that the run notes; the first two rounds, in which things start, are left out. The bar is 5 %.
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


def stage_seconds(run: RunDir, clock: Any) -> dict[str, float]:
    """CPU seconds of each stage from round ``LEFT_OUT`` on, and those between stages."""
    with open(run.seconds) as lines:
        stages = sorted((json.loads(line) for line in lines), key=lambda stage: stage["at"])
    with open(run.metrics) as lines:
        steps = [json.loads(line) for line in lines]
    first = next(stage["at"] for stage in stages if stage["stage"] == "refresh" and stage["round"] == LEFT_OUT)
    last = stages[-1]["at"] + stages[-1]["seconds"]
    found, ended = defaultdict[str, float](float), first
    for stage in stages:
        start, end = stage["at"], stage["at"] + stage["seconds"]
        if start < first:
            continue
        spent = clock.until(end) - clock.until(start)
        found["between stages"] += max(0.0, clock.until(start) - clock.until(ended))
        ended = end
        if stage["stage"] == "train":  # alone at work: its seconds are steps' and the checkpoint's
            own = [step["step_seconds"] for step in steps if step["round"] == stage["round"]]
            share = min(1.0, sum(own) / stage["seconds"])
            found["train: steps"] += share * spent
            found["train: save, wait"] += (1 - share) * spent
        else:
            found[stage["stage"]] += spent
    found["between stages"] += clock.until(last) - clock.until(ended)
    return found


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
        "updates": args.rounds - 1,
        "rollout.prompts-per-round": args.prompts,
        "annotate.unconditional": "false",
        "train.refresh": "every_n",
        "train.refresh-interval": STEPS,
        "train.train-iters": STEPS * args.rounds,
        "train.lr-warmup-iters": 0,
        "eval.held-out": 0,
    }
    command = [sys.executable, "-m", "megatron_npd", "run", *(f"--{name}={value}" for name, value in flags.items())]
    clock = contend(command, args.work, "policies/v*/manifest.json")
    found, rounds = stage_seconds(RunDir(args.work), clock), args.rounds - LEFT_OUT
    engines = sum(found[name] for name in ENGINES)
    print("| part | CPU s per round | of the engines' work |\n|---|---|---|")
    for name, seconds in sorted(found.items(), key=lambda item: (item[0] not in ENGINES, -item[1])):
        print(f"| {name} | {seconds / rounds:.3f} | {seconds / engines:.1%} |")
    beside = sum(found.values()) - engines
    print(f"| beside the engines | {beside / rounds:.3f} | {beside / engines:.1%} |")


if __name__ == "__main__":
    main()
