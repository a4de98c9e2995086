"""One shard of the annotation store: what was scored becomes records and columns, checked, written and sealed.

Legend: R response tokens of a shard, N samples of a shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_npd.manifest import Manifest, seal, writing
from megatron_npd.quarantine import write_quarantine
from megatron_npd.records import SAMPLES_FILE, defined_logprobs, teacher_record_dtype
from megatron_npd.store.annotation_store import SHARD_KIND, StoreShardWriter
from megatron_npd.store.scores import Scores, mean_loss
from megatron_npd.store.teacher_records import RECORD_RULES, broken_records, count_in_top_k
from megatron_npd.teacher.samples import Samples


def write_shard(
    out: Path,
    samples: Samples,
    *,
    teacher: Scores,
    teacher_alone: Scores | None,
    student_loss_unconditional: npt.NDArray[np.float32] | None,
    vocab_size: int,
    provenance: Mapping[str, Any],
) -> Manifest:
    """Write and seal a shard of kind ``annotations-shard``.

    Args:
        out: Directory to seal.
        samples: What was scored, and what was quarantined before.
        teacher: The teacher's scores of each response after its prompt, with the top-k.
        teacher_alone: The same after the generation prompt alone; None: not scored, its losses are NaN.
        student_loss_unconditional: L(y) of the student, nats per token, float32 [N]; None as well.
        vocab_size: V*.
        provenance: What made it.

    Returns:
        Its manifest (counts: ``in`` = ``kept`` + sum of ``quarantined``, ``response_tokens``, and how many of
        these are ``in_top_k``).
    """
    nan_N = np.full(len(samples.responses), np.nan, np.float32)
    losses = {
        "teacher_loss": teacher.losses(),
        "teacher_loss_unconditional": nan_N if teacher_alone is None else teacher_alone.losses(),
        "student_loss": mean_loss(_joined(samples.generator_logprobs, np.float32), teacher.starts_N),
        "student_loss_unconditional": nan_N if student_loss_unconditional is None else student_loss_unconditional,
    }
    assert all(len(loss_N) == len(nan_N) for loss_N in losses.values())
    records_R = _records(teacher)
    kept, refused = _checked(samples, teacher, records_R, vocab_size)
    quarantine = samples.quarantine + refused
    reasons = Counter(entry["reason"] for entry in quarantine)
    counts = {
        "in": len(kept) + reasons.total(),
        "kept": len(kept),
        "quarantined": dict(sorted(reasons.items())),
        "pending": 0,
        "response_tokens": int(np.diff(teacher.starts_N)[kept].sum()),
        "in_top_k": sum(
            count_in_top_k(records_R[slice(*teacher.starts_N[index : index + 2])], samples.responses[index])
            for index in kept.tolist()
        ),
    }
    with writing(out) as directory:
        _write_files(directory, samples, teacher, records_R, losses, kept, vocab_size)
        write_quarantine(directory, quarantine)
        return seal(directory, kind=SHARD_KIND, provenance=provenance, counts=counts)


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts])


def _records(teacher: Scores) -> np.ndarray:
    """The store's records of all response tokens."""
    assert teacher.ids_RK is not None and teacher.logprobs_RK is not None and teacher.log_tail_R is not None
    records_R = np.zeros(int(teacher.starts_N[-1]), teacher_record_dtype(teacher.ids_RK.shape[1]))
    records_R["ids"] = teacher.ids_RK
    with np.errstate(over="ignore"):  # what fp16 cannot hold is refused by _checked
        records_R["logprobs"] = teacher.logprobs_RK
    records_R["log_tail"] = teacher.log_tail_R
    return records_R


def _checked(
    samples: Samples, teacher: Scores, records_R: np.ndarray, vocab_size: int
) -> tuple[npt.NDArray[np.int64], list[dict[str, str]]]:
    """The samples whose scores a model can have given, and those quarantined."""
    sampled_R = teacher.sampled_logprobs_R
    reasons = ["", *(reason for reason, _ in RECORD_RULES), "sampled_logprob_undefined"]
    undefined_R = ~defined_logprobs(sampled_R)
    codes_R = np.where(undefined_R, len(reasons) - 1, broken_records(records_R, vocab_size))
    worst_N = np.maximum.reduceat(codes_R, teacher.starts_N[:-1]) if len(codes_R) else codes_R
    ids = samples.table["sample_id"]
    refused = [
        {"sample_id": ids[index].as_py(), "reason": reasons[worst_N[index]], "detail": "of the teacher's scores"}
        for index in np.flatnonzero(worst_N).tolist()
    ]
    return np.flatnonzero(worst_N == 0), refused


def _write_files(
    out: Path,
    samples: Samples,
    teacher: Scores,
    records_R: np.ndarray,
    losses: dict[str, npt.NDArray[np.float32]],
    kept: npt.NDArray[np.int64],
    vocab_size: int,
) -> None:
    starts_N = teacher.starts_N
    store = StoreShardWriter(out, records_R.dtype["ids"].shape[0], vocab_size=vocab_size)
    for index in kept.tolist():
        tokens = np.concatenate([samples.prompts[index], samples.responses[index]])
        records = records_R[starts_N[index] : starts_N[index + 1]]
        store.add(tokens, teacher=records, generator=samples.generator(index), checked=True)
    store.finalize()
    logprobs = pa.ListArray.from_arrays(starts_N.astype(np.int32), teacher.sampled_logprobs_R)
    table = samples.sample_table({**losses, "teacher_logprobs": logprobs})
    pq.write_table(table.take(pa.array(kept)), out / SAMPLES_FILE)
