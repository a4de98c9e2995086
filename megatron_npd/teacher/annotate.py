"""The annotation stage: a sealed round of rollouts in, the annotation store out (``data/store.py``).

A sample has four losses from three forwards: student without the prompt, then teacher with and without it; the
student's loss with the prompt is the mean of the generator's own log-probabilities. One model is resident at a time,
the student first, for memory and for layout: a 72B teacher runs on 8 tensor-parallel ranks, by which the 28 heads of a
7B student cannot be divided. Only the student's losses, one number a sample, are carried over, in memory.

Legend: R response tokens of a shard, N samples of a shard, P prompt tokens, n response tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_npd.config import AnnotateConfig
from megatron_npd.data.scores import Ids, Scores, mean_loss
from megatron_npd.data.store import RECORD_RULES, SHARD_KIND, STORE_KIND, StoreShardWriter, broken_records
from megatron_npd.data.tokenizer import check_vocabularies, document_start, load_tokenizer, turn_header
from megatron_npd.log import UserError, get_logger, progress
from megatron_npd.manifest import (
    MANIFEST,
    Manifest,
    check_quarantined,
    file_sha256,
    read_manifest,
    seal,
    sealed_from,
    writing,
)
from megatron_npd.models.families.base import load_spec
from megatron_npd.platform.initialize import initialize_distributed
from megatron_npd.records import (
    LOGPROB_ROUNDING,
    QUARANTINE_FILE,
    SAMPLE_SCHEMA,
    SAMPLES_FILE,
    teacher_record_dtype,
)
from megatron_npd.teacher.samples import Samples, Setting, read_samples
from megatron_npd.teacher.scorer import Scorer

_FINGERPRINT_BYTES = 2**20


def annotate_round(
    rollouts_dir: str | Path,
    out_dir: str | Path,
    *,
    teacher_dir: str | Path,
    student_dir: str | Path,
    cfg: AnnotateConfig,
) -> Manifest | None:
    """Annotate every rollout shard and seal ``out_dir`` as a store (``data/store.py``); every rank calls it.

    Shard s belongs to data-parallel rank s mod the data-parallel size, and its content depends on the rollout shard
    and the models alone. Sealed shards are kept: a killed stage goes on at the first unsealed one, and an ``out_dir``
    sealed from the same input is left as it is.

    Args:
        rollouts_dir: Sealed directory of kind ``rollouts``.
        out_dir: Directory to seal.
        teacher_dir: Hugging Face directory of the teacher.
        student_dir: Hugging Face directory of the student that generated the rollouts.
        cfg: Settings.

    Returns:
        The manifest on rank 0 (counts: ``in`` = ``kept`` + sum of ``quarantined``, and ``response_tokens``), None on
        the other ranks.

    Raises:
        UserError: Input, models or layout are refused, or no sample could be scored.
    """
    rollouts_dir, out_dir = Path(rollouts_dir), Path(out_dir)
    layout = {
        "tensor_model_parallel_size": cfg.tensor_model_parallel_size,
        "pipeline_model_parallel_size": cfg.pipeline_model_parallel_size,
    }
    initialize_distributed(**layout)
    rank = dist.get_rank()
    rollouts = read_manifest(rollouts_dir, kind="rollouts", verify=rank == 0)
    names = (PurePosixPath(name) for name in rollouts.files)
    shards = sorted(str(name.parent) for name in names if name.name == MANIFEST)
    setting = _setting(teacher_dir, student_dir, cfg)
    provenance = {
        "rollouts_sha256": file_sha256(rollouts_dir / MANIFEST),
        "teacher": model_fingerprint(teacher_dir),
        "student": model_fingerprint(student_dir),
        "top_k": cfg.top_k,
        "vocab_size": setting.student.vocab_size,
        "bf16": cfg.bf16,
        "seq_length": cfg.seq_length,
        "round": rollouts.provenance["round"],
        "policy_version": rollouts.provenance["policy_version"],
    }
    if _rank0(lambda: sealed_from(out_dir, kind=STORE_KIND, provenance=provenance) is not None):
        return read_manifest(out_dir, kind=STORE_KIND) if rank == 0 else None
    with writing(out_dir, resume=True) if rank == 0 else nullcontext():
        pending = _rank0(
            lambda: {
                name for name in shards if sealed_from(out_dir / name, kind=SHARD_KIND, provenance=provenance) is None
            }
        )
        if pending:
            student_losses = _student_losses(rollouts_dir, shards, pending, setting)
            initialize_distributed(**layout)
            teacher = Scorer(teacher_dir, vocab_size=setting.student.vocab_size, **_scorer_settings(cfg))
            reasons: Counter[str] = Counter()
            for name in _own(shards, pending):
                source, out = rollouts_dir / name, out_dir / name
                reasons += _annotate_shard(source, out, teacher, setting, student_losses[name], provenance)
                check_quarantined(reasons, rollouts.counts["kept"], cfg.max_quarantined, rollouts_dir)
        dist.barrier()
        if rank != 0:
            return None
        return _seal_round(out_dir, shards, provenance, cfg)


def model_fingerprint(hf_dir: str | Path) -> str:
    """16 hex digits that tell one model from another: configuration, sizes, first and last MiB of each weight file.

    A full hash of a 72B teacher takes minutes; a changed model differs in its headers or in these weights.
    """
    digest = hashlib.sha256((Path(hf_dir) / "config.json").read_bytes())
    for file in sorted(Path(hf_dir).glob("*.safetensors")):
        with open(file, "rb") as stream:
            size = stream.seek(0, 2)
            digest.update(f"{file.name} {size}".encode())
            for start in (0, max(size - _FINGERPRINT_BYTES, 0)):
                stream.seek(start)
                digest.update(stream.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]


def _rank0(question: Callable[[], Any]) -> Any:
    """Rank 0's answer, on every rank: ranks must not read the file system at different moments."""
    answer = [question() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def _setting(teacher_dir: str | Path, student_dir: str | Path, cfg: AnnotateConfig) -> Setting:
    teacher, student = load_spec(teacher_dir), load_spec(student_dir)
    vocab_size = min(teacher.vocab_size, student.vocab_size)
    if cfg.top_k > vocab_size:
        raise UserError(f"top_k must be at most the vocabulary ({vocab_size}), got {cfg.top_k}; lower it")
    student_tokenizer, teacher_tokenizer = load_tokenizer(student_dir), load_tokenizer(teacher_dir)
    check_vocabularies(student_tokenizer, teacher_tokenizer)
    return Setting(
        cfg=cfg,
        teacher=teacher,
        student=student,
        teacher_header=np.array(turn_header(teacher_tokenizer)),
        teacher_start=np.array([document_start(teacher_tokenizer)]),
        student_start=np.array([document_start(student_tokenizer)]),
    )


def _scorer_settings(cfg: AnnotateConfig) -> dict[str, Any]:
    return {"seq_length": cfg.seq_length, "micro_batch_size": cfg.micro_batch_size, "bf16": cfg.bf16}


def _own(shards: list[str], pending: set[str]) -> list[str]:
    """The pending shards of this data-parallel rank."""
    own = shards[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    return [name for name in own if name in pending]


def _writes() -> bool:
    """Whether this rank is the one of its model copy that holds the scores and hands them on."""
    return parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0


def _student_losses(
    rollouts_dir: Path, shards: list[str], pending: set[str], setting: Setting
) -> dict[str, npt.NDArray[np.float32]]:
    """L(y) of the student for each scorable sample of each pending shard, on every rank."""
    # The widest layout within the teacher's that the student's heads allow; its other ranks are data-parallel.
    width = math.gcd(setting.cfg.tensor_model_parallel_size, setting.student.num_kv_heads)
    initialize_distributed(tensor_model_parallel_size=width)
    student = Scorer(setting.student.path, **_scorer_settings(setting.cfg))
    losses = {}
    for name in _own(shards, pending):
        samples = read_samples(rollouts_dir / name, setting)
        scores = _score(student, samples.student_headers, samples.responses, 0, f"student {name}")
        if scores is not None and _writes():
            losses[name] = scores.losses()
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, losses)
    return {name: values for part in gathered for name, values in part.items()}


def _score(scorer: Scorer, prefixes: list[Ids], responses: list[Ids], top_k: int, title: str) -> Scores | None:
    """``Scorer.score`` under a progress bar."""
    tokens = sum(map(len, prefixes)) + sum(map(len, responses)) - len(responses)
    with progress(tokens, title, "tok") as bar:
        return scorer.score(prefixes, responses, top_k=top_k, on_tokens=bar.update)


def _annotate_shard(
    source: Path,
    out: Path,
    teacher: Scorer,
    setting: Setting,
    student_loss_alone: npt.NDArray[np.float32],
    provenance: dict[str, Any],
) -> Counter[str]:
    """Score one shard on all ranks of this model copy; one of them writes and seals it, counting what it sets aside."""
    started = time.monotonic()
    samples = read_samples(source, setting)
    scores = _score(teacher, samples.teacher_prompts, samples.responses, setting.cfg.top_k, f"teacher {out.name}")
    alone = _score(teacher, samples.teacher_headers, samples.responses, 0, f"teacher {out.name}, responses alone")
    if not _writes():
        return Counter()
    assert scores is not None and alone is not None and len(student_loss_alone) == len(samples.responses)
    losses = {
        "teacher_loss": scores.losses(),
        "teacher_loss_alone": alone.losses(),
        "student_loss": mean_loss(_joined(samples.generator_logprobs, np.float32), scores.starts_N),
        "student_loss_alone": student_loss_alone,
    }
    records_R = _records(samples, scores)
    kept, refused = _checked(samples, scores, records_R, setting.student.vocab_size)
    quarantine = samples.quarantine + refused
    reasons = Counter(entry["reason"] for entry in quarantine)
    counts = {
        "in": len(kept) + reasons.total(),
        "kept": len(kept),
        "quarantined": dict(sorted(reasons.items())),
        "pending": 0,
        "response_tokens": int(np.diff(scores.starts_N)[kept].sum()),
    }
    with writing(out) as directory:
        _write_shard(directory, samples, scores, records_R, losses, kept, setting.student.vocab_size)
        lines = "".join(json.dumps(entry) + "\n" for entry in quarantine)
        (directory / QUARANTINE_FILE).write_text(lines, encoding="utf-8")
        seal(directory, kind=SHARD_KIND, provenance=provenance, counts=counts)
    seconds = max(time.monotonic() - started, 1e-9)
    rate = counts["response_tokens"] / seconds
    get_logger().info("%s: %d samples, %.0f response tokens/s", out, counts["kept"], rate)
    return reasons


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts])


def _records(samples: Samples, teacher: Scores) -> np.ndarray:
    """The store's records of all response tokens."""
    assert teacher.ids_RK is not None and teacher.logprobs_RK is not None and teacher.log_tail_R is not None
    records_R = np.empty(int(teacher.starts_N[-1]), teacher_record_dtype(teacher.ids_RK.shape[1]))
    records_R["ids"] = teacher.ids_RK
    with np.errstate(over="ignore"):  # what fp16 cannot hold is refused by _checked
        records_R["logprobs"] = teacher.logprobs_RK
    records_R["log_tail"] = teacher.log_tail_R
    defined_R = np.repeat(samples.on_distribution_N, np.diff(teacher.starts_N))
    records_R["generator_logprob"] = np.where(defined_R, _joined(samples.generator_logprobs, np.float32), np.nan)
    return records_R


def _checked(
    samples: Samples, teacher: Scores, records_R: np.ndarray, vocab_size: int
) -> tuple[npt.NDArray[np.int64], list[dict[str, str]]]:
    """The samples whose scores a model can have given, and those set aside."""
    sampled_R = teacher.sampled_logprobs_R
    reasons = ["", *(reason for reason, _ in RECORD_RULES), "sampled_logprob_undefined"]
    undefined_R = ~(np.isfinite(sampled_R) & (sampled_R <= LOGPROB_ROUNDING))
    codes_R = np.where(undefined_R, len(reasons) - 1, broken_records(records_R, vocab_size))
    worst_N = np.maximum.reduceat(codes_R, teacher.starts_N[:-1]) if len(codes_R) else codes_R
    ids = samples.table["sample_id"]
    refused = [
        {"sample_id": ids[index].as_py(), "reason": reasons[worst_N[index]], "detail": "of the teacher's scores"}
        for index in np.flatnonzero(worst_N).tolist()
    ]
    return np.flatnonzero(worst_N == 0), refused


def _write_shard(
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
        store.add(tokens, records_R[starts_N[index] : starts_N[index + 1]], checked=True)
    store.finalize()
    table = samples.table.take(pa.array(kept))
    columns = {name: table[name] for name in SAMPLE_SCHEMA.names if name in table.schema.names}
    logprobs = pa.ListArray.from_arrays(starts_N.astype(np.int32), teacher.sampled_logprobs_R)
    columns |= {
        "prompt_len": np.array([len(samples.prompts[index]) for index in kept], np.int32),
        "response_len": np.diff(starts_N)[kept].astype(np.int32),
        "on_distribution": samples.on_distribution_N[kept],
        "teacher_logprobs": logprobs.take(pa.array(kept)),
        **{name: values_N[kept] for name, values_N in losses.items()},
    }
    pq.write_table(pa.table(columns, schema=SAMPLE_SCHEMA), out / SAMPLES_FILE)


def _seal_round(out_dir: Path, shards: list[str], provenance: dict[str, Any], cfg: AnnotateConfig) -> Manifest:
    manifests = [read_manifest(out_dir / name, kind=SHARD_KIND, verify=False) for name in shards]
    reasons: Counter[str] = Counter()
    for manifest in manifests:
        reasons.update(manifest.counts["quarantined"])
    counts = {name: sum(manifest.counts[name] for manifest in manifests) for name in ("in", "kept", "response_tokens")}
    if reasons:
        dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        get_logger().warning("%d of %d samples of %s quarantined: %s", reasons.total(), counts["in"], out_dir, dropped)
    if not counts["kept"]:
        raise UserError(f"{out_dir} must hold a scored sample, got none; see {QUARANTINE_FILE} in its shards")
    check_quarantined(reasons, counts["in"], cfg.max_quarantined, out_dir)
    counts |= {"quarantined": dict(sorted(reasons.items())), "pending": 0}
    return seal(out_dir, kind=STORE_KIND, provenance=provenance, counts=counts)
