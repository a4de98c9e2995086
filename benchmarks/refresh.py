"""A sparse update of a running vLLM server: how long it is paused, beside reading and hashing the weights once.

    python benchmarks/refresh.py                  1 GB of random weights: 2 minutes, 2 GB of disk, removed at the end
    python benchmarks/refresh.py --layers 2       a smaller model

The model has the shape of Qwen2.5-0.5B in bfloat16, with random weights. Two policies of it are loaded by turns. One
read is ``Weights.content_hash``: every byte read, looked at for NaN and hashed with sha256, as before each load. Files
come from the page cache. Times are the shortest of several.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from annotate import make_model
from measure import best_seconds

from megatron_npd.config.settings import RolloutConfig
from megatron_npd.log import get_logger, run_main
from megatron_npd.serving.pool import ServerPool
from megatron_npd.serving.refresh import Refreshed, refresh
from megatron_npd.weights import read_weights


def make_policy(path: Path, layers: int, seed: int) -> Path:
    """A model with random weights."""
    torch.manual_seed(seed)
    return make_model(path, layers, "bfloat16")


def read_files(directory: Path) -> None:
    """Read every byte and do nothing with it."""
    for file in directory.glob("*.safetensors"):
        with open(file, "rb", buffering=0) as stream:
            buffer = bytearray(2**24)
            while stream.readinto(buffer):
                pass


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="of the model; 24: 0.99 GB")
    parser.add_argument("--repeat", type=int, default=5, help="refreshes measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="npd-refresh-") as folder:
        policies = [make_policy(Path(folder) / f"policy{seed}", options.layers, seed) for seed in range(2)]
        size = read_weights(policies[0]).nbytes
        bare = best_seconds(lambda: read_files(policies[1]), "cpu", options.repeat)
        cfg = RolloutConfig(max_model_len=512, concurrency=4, server_args=("--skip-tokenizer-init",))
        with ServerPool.open(policies[0], cfg, version="v0000", log_dir=Path(folder)) as pool:
            done: list[Refreshed] = []
            reads, totals = [], []
            for index in range(options.repeat):
                policy = policies[(index + 1) % 2]
                reads.append(best_seconds(lambda: read_weights(policy).content_hash(), "cpu", 1))  # noqa: B023
                start = time.perf_counter()
                done.append(refresh(pool, policy, f"v{index + 1:04d}"))
                totals.append(time.perf_counter() - start)
        (url,) = pool.servers
        pauses, loads, read = [one.pauses[url] for one in done], [one.loads[url] for one in done], min(reads)
        get_logger().info("pauses %s, reads %s", [round(x, 2) for x in pauses], [round(x, 2) for x in reads])
        print(f"weights of {size / 1e9:.2f} GB, {options.repeat} refreshes, shortest\n")
        print("| what | seconds | GB/s | of one read with sha256 |\n|---|---|---|---|")
        rows = [("one bare read", bare), ("one read with sha256", read), ("load in the server", min(loads))]
        rows += [("pause of the server", min(pauses)), ("whole refresh, with the checks before and after", min(totals))]
        for what, seconds in rows:
            print(f"| {what} | {seconds:.2f} | {size / seconds / 1e9:.2f} | {seconds / read:.2f} |")


if __name__ == "__main__":
    run_main(main)
