"""Memory of prompts' ids, selection, packing and packed data set by the sample, and of the data sets of all ranks.

    python benchmarks/data_memory.py                         2 M samples, 8 ranks
    python benchmarks/data_memory.py --samples 20000000      6 GB of disk, removed at the end

Samples have a prompt of 1 to 3 tokens, a response of 2 and one teacher column: what counts here is what is kept beside
their bodies. Stages run in processes of their own; the figure is the peak of their anonymous memory above what it was
before the stage. Ranks open the data set one after another, the first verifies it, each reads some rows, and all stay;
the figure is the largest sum of their proportional set sizes (PSS), in which pages that they share count once: the
interpreter and torch included. Memory is looked at twenty times per second.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_npd.config.settings import PackConfig, SelectConfig
from megatron_npd.data.packing import pack_selection
from megatron_npd.data.seen import Seen
from megatron_npd.log import get_logger, progress, run_main
from megatron_npd.manifest import config_hash, seal, writing
from megatron_npd.records import SAMPLE_SCHEMA, SAMPLES_FILE, teacher_record_dtype
from megatron_npd.selection.select import select_round
from megatron_npd.store.annotation_store import StoreShardWriter

SHARD, SEQ_LENGTH, RESPONSE = 4096, 256, 2
PROVENANCE = {"top_k": 1, "vocab_size": 1000, "round": 0, "policy_version": "v0000"}


def make_store(path: Path, samples: int) -> None:
    """A sealed store; its shards hold the same bodies in files of their own, and ids of their own."""
    with writing(path), progress(samples, "making the store", "sample") as bar:
        for shard, first in enumerate(range(0, samples, SHARD)):
            size = min(SHARD, samples - first)
            with writing(path / f"shard-{shard:05d}") as directory:
                _write_shard(directory, first, size, path / "shard-00000" if shard and size == SHARD else None)
                seal(directory, kind="annotations-shard", provenance=PROVENANCE)
            bar.update(size)
        counts = {"in": samples, "kept": samples, "quarantined": {}, "pending": 0}
        seal(path, kind="annotations", provenance=PROVENANCE, counts=counts)


def _write_shard(directory: Path, first: int, size: int, bodies: Path | None) -> None:
    rng = np.random.default_rng(first)
    prompt_lens = np.arange(size, dtype=np.int32) % 3 + 1
    if bodies is not None:
        for name in ("tokens.bin", "tokens.idx", "teacher.bin", "teacher.idx", "generator.bin", "generator.idx"):
            shutil.copyfile(bodies / name, directory / name)
    else:
        records = np.zeros(RESPONSE, teacher_record_dtype(1))
        records["logprobs"], records["log_tail"] = np.log(0.5), np.log(0.5)
        generator = np.full(RESPONSE, -1.0, np.float32)
        writer = StoreShardWriter(directory, 1, vocab_size=1000)
        for length in prompt_lens.tolist():
            writer.add(np.arange(length + RESPONSE), teacher=records, generator=generator)
        writer.finalize()
    names = [f"{number:016x}" for number in range(first, first + size)]
    ones = np.ones(size, np.int32)
    columns = {name: rng.uniform(0.5, 1, size).astype(np.float32) for name in SAMPLE_SCHEMA.names if "loss" in name}
    columns |= {"sample_id": names, "prompt_id": names, "path": 0 * ones, "prompt_len": prompt_lens, "copies": ones}
    columns |= {"response_len": RESPONSE * ones, "finish_reason": ["stop"] * size, "policy_version": ["v0000"] * size}
    columns |= {"source": ["student"] * size}
    columns |= {"on_distribution": ones == 1, "teacher_logprobs": [np.zeros(RESPONSE, np.float32)] * size}
    pq.write_table(pa.table(columns, schema=SAMPLE_SCHEMA), directory / SAMPLES_FILE)


def _memory(pid: int | str, file: str, key: str) -> int:
    line = next(line for line in Path(f"/proc/{pid}/{file}").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def remember_ids(samples: int) -> None:
    """What ``prepare_prompts`` keeps of every prompt until the file's end."""
    seen = Seen()
    for line in range(1, samples + 1):
        seen.add(f"prompt {line}", config_hash(line), line)


def run_stage(root: Path, stage: str, samples: int) -> None:
    """A stage in this process: says when it begins, and its seconds."""
    stages = {
        "prompts' ids": lambda: remember_ids(samples),
        "selection": lambda: select_round(root / "store", root / "selection", SelectConfig(filter="none")),
        "packing": lambda: pack_selection(
            root / "store", root / "selection", root / "packs", PackConfig(seq_length=SEQ_LENGTH)
        ),
    }
    from megatron_npd.store.annotation_store import _indexed_dataset

    _indexed_dataset()  # megatron-core's memory is not the stage's
    print(_memory("self", "status", "RssAnon"), flush=True)
    started = time.perf_counter()
    stages[stage]()
    print(time.perf_counter() - started)


def run_rank(root: Path, rank: int) -> None:
    """The data set of one rank: open, read some rows, say seconds and private bytes, and wait."""
    from megatron_npd.data.packed_dataset import PackedDataset, Streams

    started, before = time.perf_counter(), _memory("self", "status", "RssAnon")
    data = PackedDataset(root / "packs", seed=0, streams=Streams(), verify=rank == 0)
    for position in range(rank, rank + 800, 8):
        data.batch([position])
    print(time.perf_counter() - started, _memory("self", "status", "RssAnon") - before, flush=True)
    sys.stdin.read()


class Peak:
    """The largest sum of a key of /proc over processes, while in the ``with`` block."""

    def __init__(self, file: str, key: str) -> None:
        self.file, self.key, self.bytes = file, key, 0
        self.processes: list[subprocess.Popen] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            with contextlib.suppress(OSError, StopIteration):  # one that has just ended
                now = sum(_memory(process.pid, self.file, self.key) for process in list(self.processes))
                self.bytes = max(self.bytes, now)

    def start(self, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, __file__, *arguments]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.processes.append(process)
        return process

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for process in self.processes:
            process.communicate("")


def row(what: str, seconds: float, num_bytes: float, samples: int) -> None:
    print(
        f"| {what} | {seconds:.1f} s | {num_bytes / 2**30:.3f} GiB | {num_bytes / samples:.1f} B per sample |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2_000_000)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--dir", default=None, help="where the run is made and removed")
    parser.add_argument("--stage", default="", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    get_logger().setLevel("ERROR")
    if args.stage:
        return run_stage(Path(args.dir), args.stage, args.samples)
    if args.rank >= 0:
        return run_rank(Path(args.dir), args.rank)
    root = Path(tempfile.mkdtemp(prefix="npd-memory-", dir=args.dir))
    try:
        started = time.perf_counter()
        make_store(root / "store", args.samples)
        seconds = time.perf_counter() - started
        print(f"{args.samples} samples in {-(-args.samples // SHARD)} shards, made in {seconds:.0f} s")
        print("\n| what | time | memory | |\n|---|---|---|---|")
        for stage in ("prompts' ids", "selection", "packing"):
            with Peak("status", "RssAnon") as peak:
                process = peak.start("--dir", str(root), "--stage", stage, "--samples", str(args.samples))
                assert process.stdout is not None
                before, seconds = int(process.stdout.readline()), float(process.stdout.readline())
            row(stage, seconds, peak.bytes - before, args.samples)
        results = []
        with Peak("smaps_rollup", "Pss:") as peak:
            for rank in range(args.ranks):
                process = peak.start("--dir", str(root), "--rank", str(rank))
                assert process.stdout is not None
                results.append([float(number) for number in process.stdout.readline().split()])
            time.sleep(1)
        seconds, own = results[0]
        row("data set, the first rank's own", seconds, own, args.samples)
        if others := results[1:]:
            seconds, own = np.mean(others, axis=0).tolist()
            row("data set, another rank's own", seconds, own, args.samples)
        row(f"{args.ranks} ranks, sum of PSS", sum(result[0] for result in results), peak.bytes, args.samples)
    finally:
        shutil.rmtree(root)
    return None


if __name__ == "__main__":
    run_main(main)
