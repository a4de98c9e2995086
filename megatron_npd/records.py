"""What the files between stages hold: Parquet schemas, the teacher's binary record, ids and seeds.

Legend: P prompt tokens, n response tokens, k top-k width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

PROMPTS_FILE = "prompts.parquet"
ROLLOUTS_FILE = "rollouts.parquet"
SAMPLES_FILE = "samples.parquet"
SELECTION_FILE = "selection.parquet"
PACKS_FILE = "packs.arrow"

SEEDS = 2**31  # sampling seeds are below it
SOURCES = ("student", "teacher", "dataset")  # whose a response is: the policy's, another model's, the data's

_IDS = pa.list_(pa.int32())
_FLOATS = pa.list_(pa.float32())

# One row per prompt. teacher_prompt_ids is null where the teacher's chat template gives the same ids as the student's;
# generation_prompt_len counts the last prompt tokens, which open the assistant's turn; extras is the JSON of all other
# columns.
PROMPT_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt_ids", _IDS, nullable=False),
        pa.field("generation_prompt_len", pa.int32(), nullable=False),
        pa.field("teacher_prompt_ids", _IDS),
        pa.field("response", pa.string()),
        pa.field("response_ids", _IDS),
        pa.field("extras", pa.string(), nullable=False),
    ]
)

# One row per response. logprobs: of the raw, full-vocabulary distribution of the generator at temperature 1; of a data
# set's response, that of the policy that served the round, whose version it bears. seed says which those are, too.
ROLLOUT_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("path", pa.int32(), nullable=False),  # 0 is the greedy path where there is one
        pa.field("prompt_ids", _IDS, nullable=False),
        pa.field("generation_prompt_len", pa.int32(), nullable=False),
        pa.field("teacher_prompt_ids", _IDS),
        pa.field("response_ids", _IDS, nullable=False),
        pa.field("logprobs", _FLOATS, nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),  # stop | length
        pa.field(
            "copies", pa.int32(), nullable=False
        ),  # identical responses to the prompt that it stands for, itself too
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("temperature", pa.float32(), nullable=False),  # 0 is greedy
        pa.field("top_p", pa.float32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # of SOURCES
        pa.field("policy_version", pa.string(), nullable=False),
    ]
)

# One row a sample of a store, in the order of the shard's IndexedDataset pairs.
SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("path", pa.int32(), nullable=False),
        pa.field("prompt_len", pa.int32(), nullable=False),
        pa.field("response_len", pa.int32(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("copies", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # of SOURCES
        pa.field("policy_version", pa.string(), nullable=False),
        # Sampled by the student at temperature 1, top_p 1: the policy lag is defined.
        pa.field("on_distribution", pa.bool_(), nullable=False),
        pa.field("teacher_loss", pa.float32(), nullable=False),  # L(y|x), mean nats per token
        pa.field("teacher_loss_unconditional", pa.float32(), nullable=False),  # L(y)
        pa.field("student_loss", pa.float32(), nullable=False),
        pa.field("student_loss_unconditional", pa.float32(), nullable=False),
        pa.field("teacher_logprobs", _FLOATS, nullable=False),  # of the response's own tokens, fp32
    ]
)

# One row a sample of the store, kept or not.
SELECTION_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # of SOURCES
        pa.field("policy_version", pa.string(), nullable=False),
        pa.field("ifd_teacher", pa.float32()),
        pa.field("ifd_student", pa.float32()),
        pa.field("delta", pa.float32()),
        pa.field("zone", pa.string(), nullable=False),  # degenerate | proximal | disconnect | undefined
        pa.field("cut", pa.bool_(), nullable=False),  # finish reason length
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),  # "" where kept
        pa.field("weight", pa.float32(), nullable=False),  # of its loss; mean 1 over the kept response tokens
    ]
)

# One row a segment of a training row, sorted by (row, offset), as one record batch of an Arrow IPC file, which readers
# map. sample_index counts over the store's shards in order.
PACK_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int32(), nullable=False),
        pa.field("offset", pa.int32(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("prompt_len", pa.int32(), nullable=False),
        pa.field("sample_index", pa.int64(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),  # of the sample's loss
    ]
)

LOG_TAIL_FLOOR = -30.0  # of log t_p, METHOD section 2
LOGPROB_ROUNDING = 1e-5  # what fp32 may leave above log 1 = 0
NO_LOGPROB = -9999.0  # what vLLM's server writes for a log-probability that is -inf or not a number


def defined_logprobs(values: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Which numbers a model can give as log-probabilities of what it sampled or scored."""
    return np.isfinite(values) & (values > NO_LOGPROB) & (values <= LOGPROB_ROUNDING)


class BadRecord(Exception):
    """A record of a user that is quarantined: its reason, and what was seen."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def parquet_batches(
    file: pq.ParquetFile, size: int, *, columns: Sequence[str] | None = None, row_groups: Iterable[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """At most ``size`` rows at a time of a Parquet file, or of some of its row groups.

    Each row group is read by itself: asked for several, pyarrow keeps all that it has read until it is at their end.
    """
    for group in range(file.num_row_groups) if row_groups is None else row_groups:
        yield from file.iter_batches(size, row_groups=[group], columns=None if columns is None else list(columns))


def teacher_record_dtype(top_k: int) -> np.dtype:
    """The fixed record of one response token: ``6 k + 4`` bytes (64 at k = 10), little-endian.

    Fields: ``ids`` int32 [k]; ``logprobs`` fp16 [k], descending, full vocabulary; ``log_tail`` fp16, log of the mass
    outside the k, floored at -30; ``reserved``, two bytes that are 0 and that no reader looks at.
    """
    return np.dtype(
        [
            ("ids", "<i4", (top_k,)),
            ("logprobs", "<f2", (top_k,)),
            ("log_tail", "<f2"),
            ("reserved", "<u2"),
        ]
    )


def sample_id(prompt_id: str, round_index: int, path: int) -> str:
    """The id of a response: 16 hex digits of a hash of its prompt, round and path."""
    return hashlib.sha256(f"{prompt_id}\0{round_index}\0{path}".encode()).hexdigest()[:16]


def sample_seed(run_seed: int, round_index: int, prompt_id: str, path: int) -> int:
    """The sampling seed of a response, below ``SEEDS``, from (run, round, prompt, path)."""
    digest = hashlib.sha256(f"{run_seed}\0{round_index}\0{prompt_id}\0{path}".encode()).digest()
    return int.from_bytes(digest[:4], "little") % SEEDS
