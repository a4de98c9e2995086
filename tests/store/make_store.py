"""A small sealed store of random samples, for the tests of store, packing, packed data set and selection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from megatron_npd.manifest import seal, writing
from megatron_npd.records import LOG_TAIL_FLOOR, SAMPLE_SCHEMA, SAMPLES_FILE, teacher_record_dtype
from megatron_npd.store.annotation_store import StoreShardWriter
from megatron_npd.store.decode import as_items, check_records, decoded, empty_records

VOCAB_SIZE = 97


def make_records(rng: np.random.Generator, n: int, top_k: int, vocab_size: int = VOCAB_SIZE) -> np.ndarray:
    """Teacher records of ``n`` random softmax distributions, as an annotator would leave them."""
    logits = rng.normal(scale=2.0, size=(n, vocab_size))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    order = np.argsort(-logprobs, axis=1, kind="stable")
    records = np.zeros(n, teacher_record_dtype(top_k))
    records["ids"] = order[:, :top_k]
    records["logprobs"] = np.take_along_axis(logprobs, order[:, :top_k], axis=1)
    outside = np.exp(np.take_along_axis(logprobs, order[:, top_k:], axis=1)).sum(axis=1)
    records["log_tail"] = np.maximum(np.log(np.maximum(outside, 1e-30)), LOG_TAIL_FLOOR)
    return records


def make_generator(rng: np.random.Generator, n: int) -> np.ndarray:
    """Log-probabilities of ``n`` sampled tokens."""
    return -rng.exponential(size=n).astype(np.float32)


def make_store(
    path: Path,
    lengths: Sequence[tuple[int, int]],
    *,
    top_k: int = 4,
    shards: int = 2,
    vocab_size: int = VOCAB_SIZE,
    seed: int = 0,
    columns: Mapping[str, Sequence[Any]] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Seal a store of samples with the given (prompt, response) lengths; ``columns`` override sample columns."""
    rng = np.random.default_rng(seed)
    meta = {"top_k": top_k, "vocab_size": vocab_size, "round": 0, "policy_version": "v0000", **(provenance or {})}
    with writing(path):
        for shard, indices in enumerate(np.array_split(np.arange(len(lengths)), shards)):
            with writing(path / f"shard-{shard:05d}") as directory:
                writer = StoreShardWriter(directory, top_k, vocab_size=vocab_size)
                rows = []
                for index in indices.tolist():
                    prompt_len, response_len = lengths[index]
                    tokens = rng.integers(0, vocab_size, prompt_len + response_len)
                    streams: dict[str, Any] = (
                        {"teacher": make_records(rng, response_len, top_k, vocab_size)} if top_k else {}
                    )
                    writer.add(tokens, generator=make_generator(rng, response_len), **streams)
                    row = {
                        "sample_id": f"s{index:06d}",
                        "prompt_id": f"p{index:06d}",
                        "path": 0,
                        "prompt_len": prompt_len,
                        "response_len": response_len,
                        "finish_reason": "stop",
                        "copies": 1,
                        "source": "student",
                        "policy_version": "v0000",
                        "on_distribution": True,
                        "teacher_loss": 0.5,
                        "teacher_loss_unconditional": 1.0,
                        "student_loss": 0.4,
                        "student_loss_unconditional": 1.0,
                        "teacher_logprobs": [-0.5] * response_len,
                    }
                    rows.append(row | {name: values[index] for name, values in (columns or {}).items()})
                writer.finalize()
                pq.write_table(pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA), directory / SAMPLES_FILE)
                seal(directory, kind="annotations-shard", counts={"samples": len(rows)})
        seal(path, kind="annotations", provenance=meta, counts={"samples": len(lengths)})
    return path


def decode_teacher(records_T: np.ndarray, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher records as the loss takes them, by the steps of the packed data set.

    Args:
        records_T: ``teacher_record_dtype(K)`` [T].
        vocab_size: V*.

    Returns:
        As ``decoded``.

    Raises:
        UserError: As ``check_records``.
    """
    K = records_T.dtype["ids"].shape[0]
    records_TW = empty_records(len(records_T), K)
    items = as_items(records_TW, K)
    items[:] = records_T.view(items.dtype)
    check_records(records_TW.numpy(), K, vocab_size, "the teacher records")
    return decoded(records_TW, K)
