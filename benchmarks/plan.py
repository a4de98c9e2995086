"""Storage as `npd plan` has it, beside what the rounds of a run that is there take: `python benchmarks/plan.py RUN`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from megatron_npd.manifest import read_manifest
from megatron_npd.planning.storage import (
    Samples,
    annotations_bytes,
    packs_bytes,
    rollouts_bytes,
    selection_bytes,
)
from megatron_npd.run_dir import RunDir
from megatron_npd.store.annotation_store import AnnotationStore


def main() -> None:
    """Print a line per kind of directory, over all rounds that are packed, and one for all of them."""
    run = RunDir(Path(sys.argv[1]))
    cfg = json.loads((run.root / "config.json").read_text())["rollout"]
    planned: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for packs in sorted(run.root.glob("rounds/*/packs")):
        store = AnnotationStore(packs.with_name("annotations"))
        samples = Samples(
            number=len(store),
            paths=cfg["greedy_paths"] + cfg["sampled_paths"],
            prompt=float(store.prompt_lens.mean()),
            response=float(store.response_lens.mean()),
            vocab_size=store.vocab_size,
            shard=cfg["shard_size"],
        )
        planned["rollouts"] += round(rollouts_bytes(samples))
        planned["annotations"] += round(annotations_bytes(samples, store.top_k))
        planned["selection"] += round(selection_bytes(samples))
        kept = read_manifest(packs).counts["kept"]
        planned["packs"] += round(packs_bytes(samples) * kept / len(store))
        for name in ("rollouts", "annotations", "selection", "packs"):
            found[name] += sum(file.stat().st_size for file in packs.with_name(name).rglob("*") if file.is_file())
    print(f"{'':<12} {'planned MB':>10} {'found MB':>10}")
    for name, size in [*planned.items(), ("all", planned.total())]:
        there = found[name] or found.total()
        print(f"{name:<12} {size / 1e6:>10.2f} {there / 1e6:>10.2f} {100 * (size / there - 1):>+8.1f} %")


if __name__ == "__main__":
    main()
