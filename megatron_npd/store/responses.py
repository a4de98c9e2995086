"""The responses of a rollout shard that models can read, and the rows of a store for them.

Legend: N samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_npd.errors import UserError
from megatron_npd.manifest import read_manifest
from megatron_npd.records import ROLLOUT_SCHEMA, ROLLOUTS_FILE, SAMPLE_SCHEMA, defined_logprobs
from megatron_npd.store.scores import Ids
from megatron_npd.store.streams import undefined_logprobs


@dataclass(frozen=True, kw_only=True)
class Responses:
    """The samples of a shard that can be read, and those that cannot with the reason."""

    table: pa.Table  # ROLLOUT_SCHEMA, N rows
    prompts: list[Ids]
    own_prompts: list[Ids]  # what the teacher reads in place of the prompt, empty where that is the same
    responses: list[Ids]
    generator_logprobs: list[npt.NDArray[np.float32]]
    quarantine: list[dict[str, str]]  # sample_id, reason, detail

    @cached_property
    def on_distribution_N(self) -> npt.NDArray[np.bool_]:
        """Which the student sampled at temperature 1 over the full vocabulary: the policy lag is defined for them."""
        plain_N = (self.table["temperature"].to_numpy() == 1) & (self.table["top_p"].to_numpy() == 1)
        return plain_N & np.array([source == "student" for source in self.table["source"].to_pylist()], bool)

    def generator(self, index: int) -> npt.NDArray[np.float32]:
        """The ``generator`` stream of a sample."""
        logprobs = self.generator_logprobs[index]
        return logprobs if self.on_distribution_N[index] else undefined_logprobs(len(logprobs))

    def sample_table(self, scores: Mapping[str, Any]) -> pa.Table:
        """The rows of ``records.SAMPLE_SCHEMA``, from columns of losses and log-probs; NaN where there are none."""
        N, nan = len(self.table), np.full(len(self.table), np.nan, np.float32)
        columns: dict[str, Any] = {name: nan for name in SAMPLE_SCHEMA.names if "loss" in name}
        columns |= {name: self.table[name] for name in SAMPLE_SCHEMA.names if name in self.table.schema.names}
        columns |= {
            "prompt_len": np.array([len(prompt) for prompt in self.prompts], np.int32),
            "response_len": np.array([len(response) for response in self.responses], np.int32),
            "on_distribution": self.on_distribution_N,
            "teacher_logprobs": pa.array([[]] * N, SAMPLE_SCHEMA.field("teacher_logprobs").type),
            **scores,
        }
        return pa.table({name: columns[name] for name in SAMPLE_SCHEMA.names}, schema=SAMPLE_SCHEMA)


def read_responses(source: Path, *, vocab_size: int, known_to: str, longest: int | None = None) -> Responses:
    """Read a sealed rollout shard.

    Args:
        source: The shard.
        vocab_size: Ids are below it.
        known_to: Who knows these ids, for the quarantine.
        longest: Tokens of prompt and response together that can be scored; None: any number.

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
    tokens_N = np.maximum(prompts.lens, own_prompts.lens) + responses.lens
    outside_N = np.logical_or.reduce(
        [ids.any((ids.values < 0) | (ids.values >= vocab_size)) for ids in (prompts, own_prompts, responses)]
    )
    others_N = np.array([name != policy for name in table["policy_version"].to_pylist()], bool)
    openings_N = table["generation_prompt_len"].to_numpy()
    too_long_N = tokens_N > (np.inf if longest is None else longest)
    checks = (
        ("other_policy", others_N, f"the shard is of policy {policy}"),
        ("empty_prompt", prompts.lens == 0, "no prompt token"),
        ("empty_response", responses.lens == 0, "no response token"),
        ("lengths_differ", responses.lens != logprobs.lens, "a response token must have one log-probability"),
        (
            "generation_prompt_outside",
            (openings_N < 0) | (openings_N > prompts.lens),
            "generation_prompt_len is a part of the prompt",
        ),
        ("too_long", too_long_N, f"seq_length and the teacher's context allow {longest} tokens"),
        ("token_outside_vocabulary", outside_N, f"{known_to} the ids 0..{vocab_size - 1}"),
        (
            "undefined_logprob",
            logprobs.any(~defined_logprobs(logprobs.values)),
            "of the generator, for a response token: it must be finite and <= 0",
        ),
    )
    failed_N = np.select([mask for _, mask, _ in checks], range(len(checks)), len(checks))
    kept = np.flatnonzero(failed_N == len(checks))
    sample_ids = table["sample_id"].to_pylist()
    return Responses(
        table=table.take(pa.array(kept)),
        prompts=prompts.take(kept),
        own_prompts=own_prompts.take(kept),
        responses=responses.take(kept),
        generator_logprobs=logprobs.take(kept),
        quarantine=[
            {"sample_id": sample_ids[index], "reason": checks[failed_N[index]][0], "detail": checks[failed_N[index]][2]}
            for index in np.flatnonzero(failed_N < len(checks))
        ],
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
