"""The data plane at scale: packing, selection, verification, opening and reading, beside rivals and plain copies.

    python benchmarks/data.py                     1.2M samples: 8 minutes, 1.5 GB of disk, removed at the end
    python benchmarks/data.py --samples 120000    a tenth of it

Lengths are log-normal with mean 1500, cut at 32768 tokens; a tenth of a sample is its prompt. The packer sees them as
they are. The run on disk has every sample's index and metadata, but bodies of a hundredth of the length; reading is
measured on a second store with bodies of full length. Teacher rows are random distributions with k = 10.

Rivals are optional: ``pip install trl``; NeMo-RL from a clone on PYTHONPATH. NeMo-RL's packer tries every row for
every sample, so it is timed on fewer and scaled by the square of their number. Times are the shortest of several runs;
of reading, the shortest for each row, averaged over the rows.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measure import best_seconds

from megatron_npd.config.settings import PackConfig, SelectConfig
from megatron_npd.data.packed_dataset import PackedRows, Streams, make_batch
from megatron_npd.data.packing import pack_lengths, pack_selection
from megatron_npd.data.prefetch import Prefetcher
from megatron_npd.data.row_schedule import microbatch_positions
from megatron_npd.log import get_logger, progress, run_main
from megatron_npd.manifest import file_sha256, read_manifest, seal, writing
from megatron_npd.records import SAMPLE_SCHEMA, SAMPLES_FILE, teacher_record_dtype
from megatron_npd.selection.select import select_round
from megatron_npd.store.annotation_store import AnnotationStore, StoreShardWriter
from megatron_npd.store.decode import taken_apart

SEQ_LENGTH, TOP_K, VOCAB_SIZE, SHARD = 32768, 10, 151936, 4096
SHRINK = 100  # of the bodies of the large run
NEMO_SAMPLES = 6000
STEP_SECONDS = 0.02  # of the pretended training step


def sample_lengths(samples: int, seed: int = 0) -> np.ndarray:
    """Tokens of each sample."""
    lengths = np.random.default_rng(seed).lognormal(np.log(1500) - 0.32, 0.8, samples)
    return np.clip(lengths.astype(np.int64), 20, SEQ_LENGTH)


def row(what: str, seconds: float, note: str) -> None:
    """A line of the table."""
    value = f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3f} ms" if seconds < 0.01 else f"{seconds:.3f} s"
    print(f"| {what} | {value} | {note} |", flush=True)


def table(title: str) -> None:
    print(f"\n**{title}**\n\n| what | time | |\n|---|---|---|")


def bench_packing(lengths: np.ndarray, repeat: int) -> None:
    """Ours beside TRL's and NeMo-RL's packers, and a sort of the lengths."""
    table(f"Packing {len(lengths)} lengths into rows of {SEQ_LENGTH}")
    total = int(lengths.sum())

    def fill(rows: int) -> str:
        return f"{100 * total / (rows * SEQ_LENGTH):.4f} % filled"

    rows = int(pack_lengths(lengths, SEQ_LENGTH, 1)[0].max()) + 1
    ours = best_seconds(lambda: pack_lengths(lengths, SEQ_LENGTH, 1), "cpu", repeat)
    row("ours, segments anywhere", ours, fill(rows))
    aligned = best_seconds(lambda: pack_lengths(lengths, SEQ_LENGTH, 16), "cpu", repeat)
    rows = int(pack_lengths(lengths, SEQ_LENGTH, 16)[0].max()) + 1
    row("ours, segments at multiples of 16", aligned, f"{fill(rows)}, the rest is alignment")
    row("a stable sort of the lengths", best_seconds(lambda: np.argsort(-lengths, kind="stable"), "cpu", repeat), "")
    try:
        from trl.data_utils import _pack_bfd  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        print(f"| TRL, best-fit decreasing | not run | {error} |")
    else:
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        lists = pa.table({"ids": pa.LargeListArray.from_arrays(pa.array(offsets), pa.nulls(total))})
        start = time.perf_counter()
        packed = _pack_bfd(lists, SEQ_LENGTH)
        seconds = time.perf_counter() - start
        row("TRL, best-fit decreasing", seconds, f"{fill(len(packed))}; {seconds / ours:.0f} x ours")
    try:
        from nemo_rl.data.packing import algorithms  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        print(f"| NeMo-RL, first-fit decreasing | not run | {error} |")
    else:
        part = lengths[:NEMO_SAMPLES].tolist()
        packer = algorithms.FirstFitDecreasingPacker(SEQ_LENGTH)
        seconds = best_seconds(lambda: packer.pack(part), "cpu", 3) * (len(lengths) / len(part)) ** 2
        note = f"scaled from {len(part)} samples by the square of their number; {seconds / ours:.0f} x ours"
        row("NeMo-RL, first-fit decreasing", seconds, note)


def bench_balance(lengths: np.ndarray, ranks: int = 8, global_batch: int = 64) -> None:
    """How much longer the slowest data-parallel rank computes attention than the mean one."""
    rows, _ = pack_lengths(lengths, SEQ_LENGTH, 16)
    costs = np.bincount(rows, weights=lengths.astype(np.float64) ** 2)
    costs = costs[np.random.default_rng(3).permutation(len(costs))]
    print(f"\nAttention cost of the slowest of {ranks} ranks over the mean, global batches of {global_batch} rows:")
    for what, balanced in (("in the order of position", False), ("balanced", True)):
        ratios, seconds = [], []
        for first in range(0, len(costs) - global_batch, global_batch):
            own = costs[first : first + global_batch]
            start = time.perf_counter()
            layout = {"global_batch_size": global_batch, "micro_batch_size": 1, "dp_size": ranks}
            dealt = [
                microbatch_positions(0, **layout, dp_rank=rank, costs=own if balanced else None)
                for rank in range(ranks)
            ]
            seconds.append((time.perf_counter() - start) / ranks)
            loads = [own[np.concatenate(places)].sum() for places in dealt]
            ratios.append(max(loads) / np.mean(loads))
        print(f"- {what}: mean {np.mean(ratios):.3f}, worst {max(ratios):.3f}; {1e6 * min(seconds):.0f} us per rank")


def make_store(path: Path, lengths: np.ndarray) -> Path:
    """A sealed store of random samples with teacher rows."""
    rng = np.random.default_rng(1)
    prompt_lens = np.maximum(lengths // 10, 1)
    response_lens = np.maximum(lengths - prompt_lens, 1)
    provenance = {"top_k": TOP_K, "vocab_size": VOCAB_SIZE, "round": 0, "policy_version": "v0000"}
    with writing(path), progress(len(lengths), "making the run", "sample") as bar:
        for shard, first in enumerate(range(0, len(lengths), SHARD)):
            part = slice(first, first + SHARD)
            with writing(path / f"shard-{shard:05d}") as directory:
                _write_shard(directory, rng, first, prompt_lens[part], response_lens[part])
                seal(directory, kind="annotations-shard", provenance=provenance)
            bar.update(len(prompt_lens[part]))
        counts = {"in": len(lengths), "kept": len(lengths), "quarantined": {}, "pending": 0}
        seal(path, kind="annotations", provenance=provenance, counts=counts)
    return path


def _write_shard(
    directory: Path, rng: np.random.Generator, first: int, prompt_lens: np.ndarray, response_lens: np.ndarray
) -> None:
    N, R = len(prompt_lens), int(response_lens.sum())
    starts = np.concatenate([[0], np.cumsum(response_lens)])
    records = np.zeros(R, teacher_record_dtype(TOP_K))
    records["ids"] = (rng.integers(0, VOCAB_SIZE, R)[:, None] + 7919 * np.arange(TOP_K)) % VOCAB_SIZE
    shares = rng.standard_exponential((R, TOP_K + 1), dtype=np.float32)
    shares = np.maximum(shares / shares.sum(axis=1, keepdims=True), 1e-7)
    records["logprobs"] = np.log(-np.sort(-shares[:, :TOP_K], axis=1))
    records["log_tail"] = np.log(shares[:, TOP_K])
    generator = -rng.standard_exponential(R, dtype=np.float32)
    token_starts = np.concatenate([[0], np.cumsum(prompt_lens + response_lens)])
    tokens = rng.integers(0, VOCAB_SIZE, token_starts[-1], dtype=np.int32)
    writer = StoreShardWriter(directory, TOP_K, vocab_size=VOCAB_SIZE)
    for index in range(N):
        own = tokens[token_starts[index] : token_starts[index + 1]]
        part = slice(starts[index], starts[index + 1])
        writer.add(own, teacher=records[part], generator=generator[part], checked=True)
    writer.finalize()
    names = [f"{first + index:016x}" for index in range(N)]
    alone = rng.uniform(1, 2, N).astype(np.float32)
    columns = {
        "sample_id": names,
        "prompt_id": names,
        "path": np.zeros(N, np.int32),
        "prompt_len": prompt_lens.astype(np.int32),
        "response_len": response_lens.astype(np.int32),
        "finish_reason": ["stop"] * N,
        "copies": np.ones(N, np.int32),
        "source": ["student"] * N,
        "policy_version": ["v0000"] * N,
        "on_distribution": np.ones(N, bool),
        "teacher_loss": alone * rng.uniform(0.5, 0.9, N).astype(np.float32),
        "teacher_loss_unconditional": alone,
        "student_loss": alone * rng.uniform(0.2, 0.6, N).astype(np.float32),
        "student_loss_unconditional": alone,
        "teacher_logprobs": pa.ListArray.from_arrays(
            starts.astype(np.int32), records["logprobs"][:, 0].astype(np.float32)
        ),
    }
    pq.write_table(pa.table(columns, schema=SAMPLE_SCHEMA), directory / SAMPLES_FILE)


def bench_stages(root: Path, lengths: np.ndarray, repeat: int) -> None:
    """Opening, verification, selection and packing of a store with every sample's index."""
    store_dir = make_store(root / "annotations", np.maximum(lengths // SHRINK, 2))
    shards = sorted(store_dir.glob("shard-*"))
    files = [shard / name for shard in shards for name in read_manifest(shard, verify=False).files]
    num_bytes = sum(file.stat().st_size for file in files)
    table(f"A run of {len(lengths)} samples, {len(shards)} shards, {num_bytes / 1e9:.2f} GB (bodies 1/{SHRINK})")

    def verify() -> None:
        for directory in [store_dir, *shards]:
            read_manifest(directory, full=True)

    bare = best_seconds(lambda: [file_sha256(file) for file in files], "cpu", repeat)
    seconds = best_seconds(verify, "cpu", repeat)
    note = f"{num_bytes / seconds / 1e9:.2f} GB/s, {seconds / bare:.2f} x bare sha256 of the files"
    row("verification, every byte", seconds, note)
    source = np.ones(64 * 2**20, np.uint8)
    target = np.empty_like(source)
    copy = best_seconds(lambda: np.copyto(target, source), "cpu", repeat) * num_bytes / source.size
    row("a copy of as many bytes in memory", copy, f"{num_bytes / copy / 1e9:.1f} GB/s")
    opening = best_seconds(lambda: AnnotationStore(store_dir, verify=False), "cpu", repeat)
    row("opening, verified before", opening, f"{1e6 * opening / len(lengths):.2f} us per sample")
    cfg = PackConfig(seq_length=SEQ_LENGTH)
    selection, packs = root / "selection", root / "packs"
    for what, directory, stage in (
        ("selection", selection, lambda: select_round(store_dir, selection, SelectConfig(tau=1.0))),
        (
            "packing, from sealed selection to sealed packs",
            packs,
            lambda: pack_selection(store_dir, selection, packs, cfg),
        ),
    ):
        start = time.perf_counter()
        stage()
        row(what, time.perf_counter() - start, f"{sum(f.stat().st_size for f in directory.iterdir()) / 1e6:.0f} MB")


def bench_reading(root: Path, samples: int, repeat: int) -> None:
    """Rows of full length: warm, cold, and beside a training step."""
    store_dir, packs_dir = make_store(root / "bodies", sample_lengths(samples, seed=2)), root / "bodies-packs"
    select_round(store_dir, root / "bodies-selection", SelectConfig(filter="none"))
    pack_selection(store_dir, root / "bodies-selection", packs_dir, PackConfig(seq_length=SEQ_LENGTH))
    whole, num_bytes = _read_warm(packs_dir, repeat)
    cold: dict[str, list[float]] = {"cold, as the pages are touched": [], "cold, asked for one row ahead": []}
    end_to_end = []
    for _ in range(repeat):
        for ahead, times in enumerate(cold.values()):
            _drop_caches(store_dir)
            rows = PackedRows(packs_dir, streams=Streams())
            start = time.perf_counter()
            for index in whole:
                if ahead and index + 1 in whole:
                    rows.will_need(index + 1)
                make_batch([(rows, index)])
            times.append((time.perf_counter() - start) / len(whole))
            del rows  # mapped pages would stay in memory
        _drop_caches(store_dir)
        start = time.perf_counter()
        size = sum(len(file.read_bytes()) for file in store_dir.glob("shard-*/*.bin"))
        end_to_end.append((time.perf_counter() - start) * num_bytes / size)
    for what, times in (cold | {"cold, the same files from end to end": end_to_end}).items():
        note = f"a row's bytes; median {1e3 * np.median(times):.1f} ms; {num_bytes / min(times) / 1e9:.2f} GB/s"
        row(what, min(times), note)
    rows = PackedRows(packs_dir, streams=Streams())
    with Prefetcher((make_batch([(rows, index)]).to("cpu") for index in _forever(whole)), depth=4) as items_ahead:
        next(items_ahead)
        items_ahead.take_wait()
        for _ in range(100):
            time.sleep(STEP_SECONDS)
            next(items_ahead)
        row(f"waiting for data, beside steps of {1e3 * STEP_SECONDS:.0f} ms", items_ahead.take_wait() / 100, "a step")


def _read_warm(packs_dir: Path, repeat: int) -> tuple[range, int]:
    """The parts of reading a row that is in memory; returns the full rows and the bytes of one."""
    rows = PackedRows(packs_dir, streams=Streams())
    whole = range(len(rows) - 1)  # the last row is not full
    batches = [make_batch([(rows, index)]) for index in whole]
    segments = np.mean([len(rows.segments(index)) for index in whole])
    num_bytes = SEQ_LENGTH * (teacher_record_dtype(TOP_K).itemsize + 8)
    table(
        f"Rows of {SEQ_LENGTH} tokens, {segments:.0f} segments on average, k = {TOP_K}, {num_bytes / 1e6:.2f} MB each; "
        f"{len(whole)} rows in turn, one core"
    )
    source = np.ones(len(whole) * num_bytes, np.uint8)
    target = np.empty(num_bytes, np.uint8)
    copy = _turns(lambda i: np.copyto(target, source[i * num_bytes : (i + 1) * num_bytes]), len(whole), repeat)
    row("a copy of as many bytes, from as large an array", copy[0], f"median {1e3 * copy[1]:.3f} ms")
    samples_of = [[segment[3] for segment in rows.segments(index)] for index in whole]
    items = np.empty(SEQ_LENGTH, f"V{teacher_record_dtype(TOP_K).itemsize}")

    def gather(index: int) -> None:
        at = 0
        for sample in samples_of[index]:
            records = rows.store.teacher(sample)
            items[at : at + len(records)] = records.view(items.dtype)
            at += len(records)

    def first_reading(index: int) -> None:
        rows.checked[index] = False
        make_batch([(rows, index)])

    def decode_row(index: int) -> None:
        taken_apart(make_batch([(rows, index)]).streams["teacher"], TOP_K)

    for what, action in (
        ("gathering the records alone", gather),
        ("gathered, with tokens and mask (the host's part)", lambda index: make_batch([(rows, index)])),
        ("the same and its records checked, as at its first reading", first_reading),
        ("gathered and decoded: ids (a view), fp32 log-probs, tails", decode_row),
        ("taken apart, rescaled, shifted (the device's part, on the CPU)", lambda index: batches[index].to("cpu")),
        ("both parts, no check", lambda index: make_batch([(rows, index)]).to("cpu")),
        ("asking the kernel for a row ahead", lambda index: rows.will_need(index)),
    ):
        best, median = _turns(action, len(whole), repeat)
        row(what, best, f"median {1e3 * median:.3f} ms; {best / copy[0]:.1f} x copy")
    return whole, num_bytes


def _forever(indices: range) -> Iterator[int]:
    while True:
        yield from indices


def _turns(action: Callable[[int], object], count: int, repeat: int) -> tuple[float, float]:
    """Best and median seconds of an action that takes each index in turn, in several turns.

    The best is each index's own, averaged over them: rows of one sample are read faster than those of many.
    """
    times = np.empty((max(repeat, 5), count))
    for turn in times:
        for index in range(count):
            start = time.perf_counter()
            action(index)
            turn[index] = time.perf_counter() - start
    return float(times.min(axis=0).mean()), float(np.median(times))


def _drop_caches(store_dir: Path) -> None:
    """Take the store's pages out of the page cache, but for those that a process has mapped."""
    for file in store_dir.glob("shard-*/*.bin"):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_200_000)
    parser.add_argument("--bodies", type=int, default=2400, help="samples of full length, for reading")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--parts", default="packing,stages,reading")
    parser.add_argument(
        "--dir", default=None, help="where the run is made and removed; default: the temporary directory"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    get_logger().setLevel("WARNING")
    lengths = sample_lengths(args.samples)
    root = Path(tempfile.mkdtemp(prefix="npd-data-", dir=args.dir))
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, root)
        if "packing" in args.parts:
            bench_packing(lengths, args.repeat)
            bench_balance(lengths)
        if "stages" in args.parts:
            bench_stages(root, lengths, args.repeat)
        if "reading" in args.parts:
            bench_reading(root, args.bodies, args.repeat)


if __name__ == "__main__":
    run_main(lambda: main())
