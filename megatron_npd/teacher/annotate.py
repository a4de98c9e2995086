"""The annotation stage: a sealed round of rollouts in, the annotation store out (``data/store.py``).

Teacher and student are both resident: every shard is then read, scored and sealed once, and the student, the smaller
of the two, is what that costs in memory. A sample has four losses from three forwards: teacher with and without the
prompt, student without it; the student's loss with it is the mean of the generator's own log-probabilities.

Legend: R response tokens of a shard, N samples of a shard, P prompt tokens, n response tokens.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_npd.config import AnnotateConfig
from megatron_npd.data.store import SHARD_KIND, STORE_KIND, StoreShardWriter
from megatron_npd.data.tokenizer import check_vocabularies, document_start, load_tokenizer, turn_header
from megatron_npd.log import UserError, get_logger, progress
from megatron_npd.manifest import MANIFEST, Manifest, file_sha256, read_manifest, seal, sealed_from, writing
from megatron_npd.models.families.base import load_spec
from megatron_npd.platform.initialize import initialize_distributed
from megatron_npd.records import (
    QUARANTINE_FILE,
    ROLLOUT_SCHEMA,
    ROLLOUTS_FILE,
    SAMPLE_SCHEMA,
    SAMPLES_FILE,
    teacher_record_dtype,
)
from megatron_npd.teacher.scorer import Ids, Scorer, Scores, mean_loss

_FINGERPRINT_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class _Models:
    """The two scorers, and what opens an answer where a sample's prompt has no turn header of the model's own."""

    teacher: Scorer
    student: Scorer
    teacher_header: Ids  # of the teacher's chat template
    teacher_start: Ids  # the teacher's BOS or end-of-document token
    student_start: Ids


@dataclass(frozen=True, kw_only=True)
class _Samples:
    """The samples of a shard that can be scored, and those that cannot with the reason."""

    table: pa.Table  # ROLLOUT_SCHEMA, N rows
    prompts: list[Ids]
    teacher_prompts: list[Ids]
    teacher_headers: list[Ids]
    student_headers: list[Ids]
    responses: list[Ids]
    generator_logprobs: list[npt.NDArray[np.float32]]
    quarantine: list[dict[str, str]]


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
    initialize_distributed(
        tensor_model_parallel_size=cfg.tensor_model_parallel_size,
        pipeline_model_parallel_size=cfg.pipeline_model_parallel_size,
    )
    rank = dist.get_rank()
    rollouts = read_manifest(rollouts_dir, kind="rollouts", verify=rank == 0)
    names = (PurePosixPath(name) for name in rollouts.files)
    shards = sorted(str(name.parent) for name in names if name.name == MANIFEST)
    vocab_size, teacher_vocab_size = load_spec(student_dir).vocab_size, load_spec(teacher_dir).vocab_size
    if cfg.top_k > min(vocab_size, teacher_vocab_size):
        raise UserError(
            f"top_k must be at most the vocabulary ({min(vocab_size, teacher_vocab_size)}), got {cfg.top_k}; lower it"
        )
    provenance = {
        "rollouts_sha256": file_sha256(rollouts_dir / MANIFEST),
        "teacher": model_fingerprint(teacher_dir),
        "student": model_fingerprint(student_dir),
        "top_k": cfg.top_k,
        "vocab_size": vocab_size,
        "bf16": cfg.bf16,
        "seq_length": cfg.seq_length,
        "round": rollouts.provenance["round"],
        "policy_version": rollouts.provenance["policy_version"],
    }
    if _rank0(lambda: sealed_from(out_dir, kind=STORE_KIND, provenance=provenance) is not None):
        return read_manifest(out_dir, kind=STORE_KIND) if rank == 0 else None
    with writing(out_dir, resume=True) if rank == 0 else nullcontext():
        pending = _rank0(
            lambda: [
                name for name in shards if sealed_from(out_dir / name, kind=SHARD_KIND, provenance=provenance) is None
            ]
        )
        models = _load_models(teacher_dir, student_dir, cfg, vocab_size)
        started, tokens = time.monotonic(), 0
        dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        for index, name in enumerate(shards):
            if index % dp_size == dp_rank and name in pending:
                title = f"annotate {index + 1}/{len(shards)}"
                tokens += _annotate_shard(rollouts_dir / name, out_dir / name, models, cfg, provenance, title)
        dist.barrier()
        if rank != 0:
            return None
        seconds = time.monotonic() - started
        get_logger().info("annotated %d shards, %.0f tokens/s on this rank", len(pending), tokens / max(seconds, 1e-9))
        return _seal_round(out_dir, shards, provenance)


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


def _load_models(teacher_dir: str | Path, student_dir: str | Path, cfg: AnnotateConfig, vocab_size: int) -> _Models:
    student_tokenizer, teacher_tokenizer = load_tokenizer(student_dir), load_tokenizer(teacher_dir)
    check_vocabularies(student_tokenizer, teacher_tokenizer)
    settings = {"seq_length": cfg.seq_length, "micro_batch_size": cfg.micro_batch_size, "bf16": cfg.bf16}
    return _Models(
        teacher=Scorer(teacher_dir, vocab_size=vocab_size, **settings),
        student=Scorer(student_dir, **settings),
        teacher_header=np.array(turn_header(teacher_tokenizer)),
        teacher_start=np.array([document_start(teacher_tokenizer)]),
        student_start=np.array([document_start(student_tokenizer)]),
    )


def _annotate_shard(
    source: Path, out: Path, models: _Models, cfg: AnnotateConfig, provenance: dict[str, Any], title: str
) -> int:
    """Score one shard on all ranks of this model copy; one of them writes and seals it. Returns tokens scored."""
    samples = _read_samples(source, models, cfg)
    passes = (
        (models.teacher, samples.teacher_prompts, cfg.top_k),
        (models.teacher, samples.teacher_headers, 0),
        (models.student, samples.student_headers, 0),
    )
    responses = sum(map(len, samples.responses)) - len(samples.responses)
    total = sum(sum(map(len, prefixes)) + responses for _, prefixes, _ in passes)
    with progress(total, title, "tok") as bar:
        scores = [
            scorer.score(prefixes, samples.responses, top_k=top_k, on_tokens=bar.update)
            for scorer, prefixes, top_k in passes
        ]
    if parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
        teacher, teacher_alone, student_alone = scores
        assert teacher is not None and teacher_alone is not None and student_alone is not None
        losses = {
            "teacher_loss": teacher.losses(),
            "teacher_loss_alone": teacher_alone.losses(),
            "student_loss": mean_loss(_joined(samples.generator_logprobs, np.float32), teacher.starts_N),
            "student_loss_alone": student_alone.losses(),
        }
        with writing(out):
            _write_shard(out, samples, teacher, losses, models.student.spec.vocab_size)
            reasons = Counter(entry["reason"] for entry in samples.quarantine)
            kept = len(samples.responses)
            seal(
                out,
                kind=SHARD_KIND,
                provenance=provenance,
                counts={
                    "in": kept + reasons.total(),
                    "kept": kept,
                    "quarantined": dict(sorted(reasons.items())),
                    "response_tokens": int(teacher.starts_N[-1]),
                },
            )
    return total


def _read_samples(source: Path, models: _Models, cfg: AnnotateConfig) -> _Samples:
    read_manifest(source, kind="rollouts-shard")
    table = pq.read_table(source / ROLLOUTS_FILE)
    if not table.schema.equals(ROLLOUT_SCHEMA):
        raise UserError(f"{source / ROLLOUTS_FILE} must have the columns {ROLLOUT_SCHEMA.names}, got {table.schema}")
    prompts, responses, logprobs, own_prompts = (
        _lists(table[name]) for name in ("prompt_ids", "response_ids", "logprobs", "teacher_prompt_ids")
    )
    has_own = table["teacher_prompt_ids"].is_valid().to_pylist()
    teacher_prompts = [own if has else prompt for own, has, prompt in zip(own_prompts, has_own, prompts, strict=True)]
    longest = min(cfg.seq_length, models.teacher.spec.max_position_embeddings)
    ids_end = min(models.student.spec.vocab_size, models.teacher.spec.vocab_size)
    kept, quarantine = [], []
    for index, sample_id in enumerate(table["sample_id"].to_pylist()):
        prompt, response, logprob = teacher_prompts[index], responses[index], logprobs[index]
        assert len(prompts[index]) and len(prompt) and len(response) == len(logprob), f"{source} sample {sample_id}"
        length = max(len(prompts[index]), len(prompt)) + len(response)
        if not len(response):
            problem = ("empty_response", "no response token")
        elif length > longest:
            problem = ("too_long", f"{length} tokens; seq_length and the teacher's context allow {longest}")
        elif not _in_range((prompt, prompts[index], response), ids_end):
            problem = ("token_outside_vocabulary", f"a token id is not in 0..{ids_end - 1}, known to both models")
        elif not np.isfinite(logprob).all():
            problem = ("logprob_not_finite", "a log-probability of the generator is not finite")
        else:
            kept.append(index)
            continue
        quarantine.append({"sample_id": sample_id, "reason": problem[0], "detail": problem[1]})
    header_lens = table["header_len"].to_pylist()
    student_headers, teacher_headers = [], []
    for index in kept:
        header = prompts[index][len(prompts[index]) - header_lens[index] :]
        student_headers.append(header if len(header) else models.student_start)
        shared = header if len(header) else models.teacher_start
        teacher_headers.append(models.teacher_header if has_own[index] else shared)
    return _Samples(
        table=table.take(kept),
        prompts=[prompts[index] for index in kept],
        teacher_prompts=[teacher_prompts[index] for index in kept],
        teacher_headers=teacher_headers,
        student_headers=student_headers,
        responses=[responses[index] for index in kept],
        generator_logprobs=[logprobs[index] for index in kept],
        quarantine=quarantine,
    )


def _lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The lists of a column as views of one array."""
    array = column.combine_chunks()
    values = array.values.to_numpy(zero_copy_only=False)
    return [values[start:end] for start, end in pairwise(array.offsets.to_pylist())]


def _in_range(parts: tuple[Ids, ...], end: int) -> bool:
    return all(part.min() >= 0 and part.max() < end for part in parts)


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts])


def _write_shard(
    out: Path, samples: _Samples, teacher: Scores, losses: dict[str, npt.NDArray[np.float32]], vocab_size: int
) -> None:
    assert teacher.ids_RK is not None and teacher.logprobs_RK is not None and teacher.log_tail_R is not None
    table, starts_N = samples.table, teacher.starts_N
    on_distribution_N = (table["temperature"].to_numpy() == 1) & (table["top_p"].to_numpy() == 1)
    top_k = teacher.ids_RK.shape[1]
    records_R = np.empty(int(starts_N[-1]), teacher_record_dtype(top_k))
    records_R["ids"] = teacher.ids_RK
    records_R["logprobs"] = teacher.logprobs_RK
    records_R["log_tail"] = teacher.log_tail_R
    defined_R = np.repeat(on_distribution_N, np.diff(starts_N))
    records_R["generator_logprob"] = np.where(defined_R, _joined(samples.generator_logprobs, np.float32), np.nan)
    store = StoreShardWriter(out, top_k, vocab_size=vocab_size)
    for prompt, response, (start, end) in zip(samples.prompts, samples.responses, pairwise(starts_N), strict=True):
        store.add(np.concatenate([prompt, response]), records_R[start:end])
    store.finalize()
    columns = {name: table[name] for name in SAMPLE_SCHEMA.names if name in table.schema.names}
    columns |= {
        "prompt_len": np.array([len(prompt) for prompt in samples.prompts], np.int32),
        "response_len": np.diff(starts_N).astype(np.int32),
        "on_distribution": on_distribution_N,
        "teacher_logprobs": pa.ListArray.from_arrays(starts_N.astype(np.int32), teacher.sampled_logprobs_R),
        **losses,
    }
    pq.write_table(pa.table(columns, schema=SAMPLE_SCHEMA), out / SAMPLES_FILE)
    lines = "".join(json.dumps(entry) + "\n" for entry in samples.quarantine)
    (out / QUARANTINE_FILE).write_text(lines, encoding="utf-8")


def _seal_round(out_dir: Path, shards: list[str], provenance: dict[str, Any]) -> Manifest:
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
    return seal(out_dir, kind=STORE_KIND, provenance=provenance, counts=counts | {"quarantined": dict(reasons)})
