"""Stores of responses that nobody scores: tokens, and the generator's log-probabilities where there are any.

What SFT and SeqKD train on goes the same way as what a teacher has scored: a store, then packs over it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_npd.errors import UserError
from megatron_npd.log import get_logger, progress
from megatron_npd.manifest import MANIFEST, Manifest, file_sha256, read_manifest, seal, sealed_from, writing
from megatron_npd.quarantine import QUARANTINE_FILE, check_quarantined, in_words, write_quarantine
from megatron_npd.records import PROMPTS_FILE, SAMPLE_SCHEMA, SAMPLES_FILE, parquet_batches, sample_id
from megatron_npd.store.annotation_store import SHARD_KIND, STORE_KIND, StoreShardWriter
from megatron_npd.store.responses import read_responses
from megatron_npd.store.scores import mean_loss, response_starts
from megatron_npd.store.streams import undefined_logprobs

DATA_POLICY = "data"  # policy version of responses that come from a data set
_BATCH = 1024  # prompts read at a time


def store_prompts(prompts_dir: str | Path, store_dir: str | Path, *, vocab_size: int) -> Manifest:
    """Seal a store of ``top_k`` 0 from prompts with their responses; one sealed from the same input is left.

    Args:
        prompts_dir: Sealed directory of kind ``prompts``.
        store_dir: Directory to seal.
        vocab_size: V* of the model that will train.

    Raises:
        UserError: As ``pack_prompts``.
    """
    prompts_dir, store_dir = Path(prompts_dir), Path(store_dir)
    read_manifest(prompts_dir, kind="prompts")
    provenance = {
        "top_k": 0,
        "vocab_size": vocab_size,
        "round": 0,
        "policy_version": DATA_POLICY,
        "prompts_sha256": file_sha256(prompts_dir / MANIFEST),
    }
    if manifest := sealed_from(store_dir, kind=STORE_KIND, provenance=provenance):
        return manifest
    with writing(store_dir) as directory:
        counts = _write_prompt_store(prompts_dir, directory, vocab_size)
        return seal(directory, kind=STORE_KIND, provenance=provenance, counts=counts)


def _write_prompt_store(prompts_dir: Path, store_dir: Path, vocab_size: int) -> dict[str, Any]:
    reasons: Counter[str] = Counter()
    kept = total = 0
    with (
        writing(store_dir / "shard-00000") as shard,
        pq.ParquetFile(prompts_dir / PROMPTS_FILE) as prompts,
        pq.ParquetWriter(shard / SAMPLES_FILE, SAMPLE_SCHEMA) as samples,
        open(store_dir / QUARANTINE_FILE, "w", encoding="utf-8") as quarantine,
        progress(prompts.metadata.num_rows, "store", "sample") as bar,
    ):
        writer = StoreShardWriter(shard, 0, vocab_size=vocab_size)
        for batch in parquet_batches(prompts, _BATCH, columns=["prompt_id", "prompt_ids", "response_ids"]):
            rows = []
            for prompt in batch.to_pylist():
                tokens = np.array(prompt["prompt_ids"] + (prompt["response_ids"] or []))
                problem = {}
                if not prompt["response_ids"]:
                    problem = {"reason": "no_response"}
                elif tokens.max() >= vocab_size:
                    detail = f"token {tokens.max()}, but the embedding of the model to train has {vocab_size} rows"
                    problem = {"reason": "token_outside_vocabulary", "detail": detail}
                if problem:
                    reasons[problem["reason"]] += 1
                    quarantine.write(json.dumps({"prompt_id": prompt["prompt_id"], **problem}) + "\n")
                    continue
                writer.add(tokens, generator=undefined_logprobs(len(prompt["response_ids"])))
                rows.append(_data_sample(prompt))
            samples.write_table(pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA))
            kept, total = kept + len(rows), total + batch.num_rows
            bar.update(batch.num_rows)
        writer.finalize()
        samples.close()
        if not kept:
            raise UserError(
                f"{prompts_dir} must hold prompts with responses that the model can read, got none, but "
                f"{in_words(reasons)}; give response in the prompts, and prepare them with the tokenizer of the model "
                "that will train"
            )
        if outside := reasons["token_outside_vocabulary"]:
            message = "%d of %d prompts of %s have tokens beyond the model's vocabulary and do not train; see %s"
            get_logger().warning(message, outside, total, prompts_dir, QUARANTINE_FILE)
        seal(shard, kind=SHARD_KIND, provenance={"top_k": 0, "vocab_size": vocab_size}, counts={"samples": kept})
    return {"in": total, "kept": kept, "quarantined": dict(reasons), "pending": 0}


def _data_sample(prompt: Mapping[str, Any]) -> dict[str, Any]:
    nan = float("nan")
    return {
        "sample_id": sample_id(prompt["prompt_id"], 0, 0),
        "prompt_id": prompt["prompt_id"],
        "path": 0,
        "prompt_len": len(prompt["prompt_ids"]),
        "response_len": len(prompt["response_ids"]),
        "finish_reason": "stop",
        "copies": 1,
        "source": "dataset",
        "policy_version": DATA_POLICY,
        "on_distribution": False,
        "teacher_loss": nan,
        "teacher_loss_unconditional": nan,
        "student_loss": nan,
        "student_loss_unconditional": nan,
        "teacher_logprobs": [],
    }


def store_rollouts(
    rollouts_dir: str | Path, store_dir: str | Path, *, vocab_size: int, max_quarantined: float = 0.1
) -> Manifest:
    """Seal a store of ``top_k`` 0 from a round of responses, shard by shard; one sealed from the same input is left.

    The losses of a teacher are NaN in it, so that it is packed without a selection.

    Args:
        rollouts_dir: Sealed directory of kind ``rollouts``.
        store_dir: Directory to seal.
        vocab_size: V* of the model that will train.
        max_quarantined: Share of the responses that may be quarantined.

    Raises:
        UserError: More are quarantined than may be, or the directory is sealed from other input.
    """
    rollouts_dir, store_dir = Path(rollouts_dir), Path(store_dir)
    read_manifest(rollouts_dir, kind="rollouts")
    provenance = _of_rollouts(rollouts_dir, vocab_size)
    if manifest := sealed_from(store_dir, kind=STORE_KIND, provenance=provenance):
        return manifest
    books, reasons = Counter[str](), Counter[str]()
    shards = sorted(rollouts_dir.glob("shard-*"))
    with writing(store_dir) as directory, progress(len(shards), "store", "shard") as bar:
        for shard in shards:
            counts = dict(_write_rollouts(shard, directory / shard.name, vocab_size).counts)
            reasons.update(counts.pop("quarantined"))
            books.update(counts)
            bar.update()
        if not books["kept"]:
            raise UserError(
                f"{rollouts_dir} must hold responses that the model can read, got none of {books['in']}, but "
                f"{in_words(reasons)}; generate them with the tokenizer of the model that will train"
            )
        check_quarantined(reasons, books["in"], max_quarantined, rollouts_dir)
        counts = {**books, "quarantined": dict(sorted(reasons.items()))}
        return seal(directory, kind=STORE_KIND, provenance=provenance, counts=counts)


def _of_rollouts(rollouts: Path, vocab_size: int) -> dict[str, Any]:
    """What the store of a round, or of one of its shards, is made from."""
    about = read_manifest(rollouts, verify=False).provenance
    made = {"top_k": 0, "vocab_size": vocab_size, "rollouts_sha256": file_sha256(rollouts / MANIFEST)}
    return made | {name: about[name] for name in ("round", "policy_version")}


def _write_rollouts(source: Path, out: Path, vocab_size: int) -> Manifest:
    read = read_responses(source, vocab_size=vocab_size, known_to="the model that will train knows")
    reasons = Counter(entry["reason"] for entry in read.quarantine)
    starts_N = response_starts(read.responses)
    logprobs_R = np.concatenate([np.zeros(0, np.float32), *read.generator_logprobs])
    with writing(out) as directory:
        writer = StoreShardWriter(directory, 0, vocab_size=vocab_size)
        for index, (prompt, response) in enumerate(zip(read.prompts, read.responses, strict=True)):
            writer.add(np.concatenate([prompt, response]), generator=read.generator(index), checked=True)
        writer.finalize()
        pq.write_table(read.sample_table({"student_loss": mean_loss(logprobs_R, starts_N)}), directory / SAMPLES_FILE)
        write_quarantine(directory, read.quarantine)
        counts = {
            "in": len(read.responses) + reasons.total(),
            "kept": len(read.responses),
            "quarantined": dict(sorted(reasons.items())),
            "pending": 0,
            "response_tokens": int(starts_N[-1]),
        }
        return seal(directory, kind=SHARD_KIND, provenance=_of_rollouts(source, vocab_size), counts=counts)
