"""The samples of a rollout shard that models can score, and what each model reads before the response.

Legend: N samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_npd.config.settings import AnnotateConfig
from megatron_npd.errors import UserError
from megatron_npd.manifest import read_manifest
from megatron_npd.models.families.base import ModelSpec
from megatron_npd.records import ROLLOUT_SCHEMA, ROLLOUTS_FILE, defined_logprobs
from megatron_npd.store.scores import Ids


@dataclass(frozen=True, kw_only=True)
class ScoringContext:
    """What all shards share: what models can take, and what opens an answer where a sample's prompt does not say it."""

    cfg: AnnotateConfig
    student: ModelSpec
    longest: int  # tokens of prompt and response together that the teacher can score
    shared_vocab_size: int  # teacher and student both know the ids below
    teacher_header: Ids  # of the teacher's chat template
    teacher_start: Ids  # the teacher's BOS or end-of-document token
    student_start: Ids


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples of a shard that can be scored, and those that cannot with the reason."""

    table: pa.Table  # ROLLOUT_SCHEMA, N rows
    prompts: list[Ids]
    teacher_prompts: list[Ids]
    teacher_headers: list[Ids]
    student_headers: list[Ids]
    responses: list[Ids]
    generator_logprobs: list[npt.NDArray[np.float32]]
    quarantine: list[dict[str, str]]  # sample_id, reason, detail

    @property
    def on_distribution_N(self) -> npt.NDArray[np.bool_]:
        """Which were sampled at temperature 1 over the full vocabulary: the policy lag is defined for them."""
        return (self.table["temperature"].to_numpy() == 1) & (self.table["top_p"].to_numpy() == 1)


def read_samples(source: Path, setting: ScoringContext) -> Samples:
    """Read a sealed rollout shard.

    Raises:
        UserError: It is not sealed, damaged, or has other columns.
    """
    policy = read_manifest(source, kind="rollouts-shard").provenance.get("policy_version")
    table = pq.read_table(source / ROLLOUTS_FILE)
    if not table.schema.equals(ROLLOUT_SCHEMA):
        raise UserError(f"{source / ROLLOUTS_FILE} must have the columns {ROLLOUT_SCHEMA.names}, got {table.schema}")
    prompts, own_prompts, responses, logprobs = (
        _Lists.of(table[name]) for name in ("prompt_ids", "teacher_prompt_ids", "response_ids", "logprobs")
    )
    longest, shared_vocab_size = setting.longest, setting.shared_vocab_size
    tokens_N = np.maximum(prompts.lens, own_prompts.lens) + responses.lens
    outside_N = np.logical_or.reduce(
        [ids.any((ids.values < 0) | (ids.values >= shared_vocab_size)) for ids in (prompts, own_prompts, responses)]
    )
    others_N = np.array([name != policy for name in table["policy_version"].to_pylist()], bool)
    headers_N = table["header_len"].to_numpy()
    checks = (
        ("other_policy", others_N, f"the shard is of policy {policy}"),
        ("empty_prompt", prompts.lens == 0, "no prompt token"),
        ("empty_response", responses.lens == 0, "no response token"),
        ("lengths_differ", responses.lens != logprobs.lens, "a response token must have one log-probability"),
        ("header_outside_prompt", (headers_N < 0) | (headers_N > prompts.lens), "header_len is a part of the prompt"),
        ("too_long", tokens_N > longest, f"seq_length and the teacher's context allow {longest} tokens"),
        ("token_outside_vocabulary", outside_N, f"teacher and student both know the ids 0..{shared_vocab_size - 1}"),
        (
            "undefined_logprob",
            logprobs.any(~defined_logprobs(logprobs.values)),
            "of the generator, for a response token: it must be finite and <= 0",
        ),
    )
    failed_N = np.select([mask for _, mask, _ in checks], range(len(checks)), len(checks))
    kept = np.flatnonzero(failed_N == len(checks))
    sample_ids = table["sample_id"].to_pylist()
    quarantine = [
        {"sample_id": sample_ids[index], "reason": checks[failed_N[index]][0], "detail": checks[failed_N[index]][2]}
        for index in np.flatnonzero(failed_N < len(checks))
    ]
    table = table.take(pa.array(kept))
    kept_prompts = prompts.take(kept)
    student_headers, teacher_prompts, teacher_headers = [], [], []
    for prompt, own, header_len in zip(
        kept_prompts, own_prompts.take(kept), table["header_len"].to_pylist(), strict=True
    ):
        header = prompt[len(prompt) - header_len :]
        student_headers.append(header if header_len else setting.student_start)
        teacher_prompts.append(own if len(own) else prompt)
        shared = header if header_len else setting.teacher_start
        teacher_headers.append(setting.teacher_header if len(own) else shared)
    return Samples(
        table=table,
        prompts=kept_prompts,
        teacher_prompts=teacher_prompts,
        teacher_headers=teacher_headers,
        student_headers=student_headers,
        responses=responses.take(kept),
        generator_logprobs=logprobs.take(kept),
        quarantine=quarantine,
    )


@dataclass(frozen=True, kw_only=True)
class _Lists:
    """A column of lists: all values one after another, and where each list starts."""

    values: np.ndarray
    starts: npt.NDArray[np.int32]

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> _Lists:
        array = column.combine_chunks()
        return cls(values=array.values.to_numpy(zero_copy_only=False), starts=array.offsets.to_numpy())

    @property
    def lens(self) -> npt.NDArray[np.int32]:
        return np.diff(self.starts)

    def any(self, flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Whether any of each list's values is flagged."""
        return np.diff(np.concatenate([[0], np.cumsum(flags)])[self.starts]) > 0

    def take(self, indices: npt.NDArray[np.integer]) -> list[np.ndarray]:
        """The lists at ``indices``, as views."""
        return [self.values[self.starts[index] : self.starts[index + 1]] for index in indices]
