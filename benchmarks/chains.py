"""Chains of calculations whose number of steps is log-normal: problems with long-tailed answers for tiny models.

Amounts are added and taken away in turn; the answer counts its steps down, eight tokens each, and ends as GSM8K's do::

    Tom has 14 coins. He finds 5 more. He loses 2. How many coins does Tom have after 4 of these in turn?
    4:14+5=19
    3:19-2=17
    2:17+5=22
    1:22-2=20
    #### 20

    python benchmarks/chains.py --out DIR [--seed 1]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from itertools import accumulate
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "quickstart"))
from problems import NAMES, THINGS

MEDIAN_STEPS, SPREAD = 8, 0.85  # of the log-normal
STEPS = range(2, 49)  # answers of 20 to 400 tokens
VALUES = range(1, 61)
SPLITS = {"teacher": 9000, "student": 2000, "npd": 3000, "test": 200}


def draw(rng: random.Random) -> dict:
    """One problem as a record: ``messages`` and ``response``."""
    steps = 0
    while steps not in STEPS:
        steps = round(MEDIAN_STEPS * math.exp(SPREAD * rng.gauss(0, 1)))
    while True:  # long chains stay among the known numbers only where gains and losses are about equal
        start, gain, loss = rng.randint(1, 20), rng.randint(1, 9), rng.randint(1, 9)
        changes = [gain if step % 2 else -loss for step in range(1, steps + 1)]
        values = list(accumulate(changes, initial=start))
        if all(value in VALUES for value in values):
            break
    name, thing = rng.choice(list(NAMES)), rng.choice(THINGS)
    question = f"{name} has {start} {thing}. {NAMES[name]} finds {gain} more. {NAMES[name]} loses {loss}. "
    question += f"How many {thing} does {name} have after {steps} of these in turn?"
    lines = [f"{steps - step}:{values[step]}{change:+d}={values[step + 1]}" for step, change in enumerate(changes)]
    return {"messages": [{"role": "user", "content": question}], "response": "\n".join([*lines, f"#### {values[-1]}"])}


def write_splits(out_dir: Path, seed: int = 1) -> None:
    """Write ``<split>.jsonl`` for every split; no question occurs twice."""
    rng = random.Random(seed)
    pool: dict[str, dict] = {}
    while len(pool) < sum(SPLITS.values()):
        record = draw(rng)
        pool.setdefault(record["messages"][0]["content"], record)
    records = iter(pool.values())
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, size in SPLITS.items():
        (out_dir / f"{name}.jsonl").write_text("".join(json.dumps(next(records)) + "\n" for _ in range(size)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the JSONL files")
    parser.add_argument("--seed", type=int, default=1, help="seed of the draw")
    args = parser.parse_args()
    write_splits(args.out, args.seed)


if __name__ == "__main__":
    main()
