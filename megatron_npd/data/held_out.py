"""Prompts that never train, on which each policy is compared with the teacher; chosen by a hash of their tokens.

Legend: N records.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_npd.log import get_logger
from megatron_npd.manifest import MANIFEST, Manifest, file_sha256, read_manifest, seal, sealed_from, writing
from megatron_npd.quarantine import QUARANTINE_FILE
from megatron_npd.records import PROMPT_SCHEMA, PROMPTS_FILE, parquet_batches

HELD_OUT_FILE = "held_out.parquet"
REASON = "held_out"
_LARGEST_SHARE = 0.1  # of the records
_FEWEST = 8  # fewer would measure nothing
_BATCH = 4096


def hold_out(directory: Path, count: int) -> int:
    """Move ``count`` prompts from ``prompts.parquet`` into ``held_out.parquet`` beside it, in the file's order.

    Every record of a held-out prompt leaves, whatever its id and response, with a line in ``quarantine.jsonl``; the
    first one is held out for all of them. At most a tenth of the records leaves, and none where that would be fewer
    than 8 prompts; a prompt with more records than an eighth of that tenth stays.

    Returns:
        The number of records that left.
    """
    source, rest = directory / PROMPTS_FILE, directory / f".{PROMPTS_FILE}"
    digests_N = _digests(source)
    _, places, numbers = np.unique(digests_N, return_index=True, return_counts=True)
    most = int(_LARGEST_SHARE * len(digests_N))
    few = numbers <= most // _FEWEST
    count = min(count, int((np.cumsum(numbers[few]) <= most).sum()))
    if count < _FEWEST:
        return 0
    places = np.sort(places[few][:count])
    leaves_N = np.isin(digests_N, digests_N[places])
    with (
        pq.ParquetWriter(rest, PROMPT_SCHEMA) as kept,
        pq.ParquetWriter(directory / HELD_OUT_FILE, PROMPT_SCHEMA) as held,
        open(directory / QUARANTINE_FILE, "a", encoding="utf-8") as quarantine,
    ):
        for first, batch in _batches(source):
            leaves = leaves_N[first : first + len(batch)]
            kept.write_batch(batch.filter(pa.array(~leaves)))
            held.write_batch(batch.take(_within(places, first, batch)))
            for prompt_id in batch["prompt_id"].filter(pa.array(leaves)).to_pylist():
                line = {"prompt_id": prompt_id, "reason": REASON, "detail": "kept from training, to measure on"}
                quarantine.write(json.dumps(line) + "\n")
    rest.replace(source)
    get_logger().info("%d prompts are held out, to measure on: they do not train", count)
    return int(leaves_N.sum())


def prepare_held_out(source: Path, out_dir: Path, count: int, *, training: Path) -> Manifest | None:
    """Seal ``out_dir`` (kind ``prompts``) with the ``count`` prompts of a file that its tokens' hashes choose.

    Args:
        source: ``held_out.parquet`` of sealed prompts, or ``prompts.parquet`` of others.
        out_dir: Directory to seal.
        count: Prompts at most.
        training: ``prompts.parquet`` of those that train: what stands there too is passed over.

    Returns:
        The manifest, which counts the records of the source that train as ``also_training``; None where all do.
    """
    stop_ids = read_manifest(source.parent, kind="prompts", verify=False).provenance["stop_ids"]
    origins = {"prompts_sha256": source, "training_sha256": training}
    provenance = {name: file_sha256(file.parent / MANIFEST) for name, file in origins.items()}
    provenance |= {"file": source.name, "held_out": count, "stop_ids": stop_ids}
    if manifest := sealed_from(out_dir, kind="prompts", provenance=provenance):
        return manifest
    digests_N = _digests(source)
    trains_N = np.isin(digests_N, _digests(training))
    if trains_N.any():
        message = "%d of %d prompts to measure on are among those that train (%s): what is measured on them flatters"
        get_logger().warning(message, trains_N.sum(), len(trains_N), training)
    if trains_N.all():
        return None
    places = np.flatnonzero(~trains_N)[_choose(digests_N[~trains_N], count)]
    with writing(out_dir) as directory, pq.ParquetWriter(directory / PROMPTS_FILE, PROMPT_SCHEMA) as table:
        for first, batch in _batches(source):
            table.write_batch(batch.take(_within(places, first, batch)))
        table.close()
        counts = {"in": len(places), "kept": len(places), "quarantined": {}, "also_training": int(trains_N.sum())}
        return seal(directory, kind="prompts", provenance=provenance, counts=counts)


def _within(places: npt.NDArray[np.int64], first: int, batch: pa.RecordBatch) -> pa.Array:
    """Those of a file's places that lie in a batch, counted from its beginning."""
    return pa.array(places[(places >= first) & (places < first + len(batch))] - first)


def _choose(digests_N: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.int64]:
    """The first places of the ``count`` smallest hashes, ascending."""
    _, places = np.unique(digests_N, return_index=True)
    return np.sort(places[:count])


def _digests(source: Path) -> npt.NDArray[np.uint64]:
    """A hash of each record's prompt tokens."""
    hashes = [
        hashlib.sha256(ids.values.to_numpy().tobytes()).digest()[:8]
        for _, batch in _batches(source, ["prompt_ids"])
        for ids in batch["prompt_ids"]
    ]
    return np.frombuffer(b"".join(hashes), "<u8")


def _batches(source: Path, columns: list[str] | None = None) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The records of a file, some at a time, with the number of those before."""
    first = 0
    with pq.ParquetFile(source) as file:
        for batch in parquet_batches(file, _BATCH, columns=columns):
            yield first, batch
            first += len(batch)
