"""Whether two runs left the same: every weight, every pack, and each number of every training step.

    python benchmarks/equal_runs.py runs/a runs/b

For a change that must not change results: make quickstart with the commit before and after it, on one machine with
OMP_NUM_THREADS=1. Times always differ; a diagnostic that differs is printed with its largest difference.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from megatron_npd.training.metrics import is_time


def equal_weights(first: Path, second: Path) -> bool:
    ours, theirs = load_file(first), load_file(second)
    return ours.keys() == theirs.keys() and all(tensor.equal(theirs[name]) for name, tensor in ours.items())


def differences(first: Path, second: Path) -> dict[str, float]:
    """The largest difference of each metric that both runs have, of those that differ."""
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in (first, second)]
    found: dict[str, float] = {}
    for ours, theirs in zip(*lines, strict=True):
        for name in ours.keys() & theirs.keys():
            if ours[name] != theirs[name] and not is_time(name):
                numbers = np.array([ours[name], theirs[name]], dtype=float)
                found[name] = max(found.get(name, 0.0), float(np.ptp(numbers)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN")
    first, second = parser.parse_args().runs
    for pattern, same in (
        ("*.safetensors", equal_weights),
        ("packs.arrow", lambda a, b: a.read_bytes() == b.read_bytes()),
    ):
        for file in sorted(first.rglob(pattern)):
            name = file.relative_to(first)
            print("equal    " if same(file, second / name) else "DIFFERENT", name)
    for file in sorted(first.rglob("metrics.jsonl")):
        name = file.relative_to(first)
        for metric, largest in sorted(differences(file, second / name).items()):
            print(f"{name}: {metric} differs by at most {largest:.3g}")


if __name__ == "__main__":
    main()
