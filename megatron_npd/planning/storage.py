"""What a run leaves on the disk, stage by stage: bytes per token and sample of the formats' own tables.

Fixed-size records are counted (``store/streams.py``); Parquet compresses, so a table of the stage's schema is filled
with random rows of the same lengths and written to memory.

Legend: N samples, R response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_npd.records import PACK_SCHEMA, PROMPT_SCHEMA, ROLLOUT_SCHEMA, SAMPLE_SCHEMA, SELECTION_SCHEMA
from megatron_npd.store.streams import stream_items

_SAMPLED_TOKENS = 200_000  # of a table that is written to see how long it becomes
_WORDS = 30_000  # token ids of a text are drawn from about so many, by Zipf's law
_WORD_SHIFT = 2.7  # of the law (Mandelbrot 1953)
# Log-probabilities: half of the tokens that a trained model samples are almost certain (below 0.01 nats), a fifth is
# above 0.67 (Wang et al. 2025, arXiv 2506.01939), and a logit less a log-sum-exp near 16 is a multiple of float32's
# step there, so that many are equal.
_LOG_NATS, _LOG_NATS_SPREAD, _MOST_NATS, _STEP = -4.6, 5.0, 10.0, 2.0**-20
_ALIKE = ("temperature", "top_p", "weight")  # numbers that most samples share


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A round of samples.

    Attributes:
        number: Of them.
        paths: Responses to each prompt, whose prompt they repeat.
        prompt: Mean tokens of a prompt.
        response: Mean tokens of a response.
        vocab_size: V*.
        shard: Samples of a shard.
    """

    number: int
    paths: int
    prompt: float
    response: float
    vocab_size: int
    shard: int

    @property
    def tokens(self) -> float:
        """Of prompts and responses."""
        return self.number * (self.prompt + self.response)


def prompts_bytes(samples: Samples) -> float:
    """Of ``samples.number`` prompts, each once."""
    return samples.number * _row_bytes(PROMPT_SCHEMA, "snappy", replace(samples, paths=1))


def rollouts_bytes(samples: Samples) -> float:
    return samples.number * _row_bytes(ROLLOUT_SCHEMA, "zstd", samples)


def annotations_bytes(samples: Samples, top_k: int) -> float:
    """Of a store; ``top_k`` 0: without a teacher."""
    return samples.number * _row_bytes(SAMPLE_SCHEMA, "snappy", samples) + pairs_bytes(samples, top_k)


def pairs_bytes(samples: Samples, top_k: int) -> float:
    """Of a store's IndexedDataset pairs: its tokens and ``STREAMS``."""
    items = stream_items(top_k).values()
    index = 4 + 8 + 8  # per sequence: its length, its place, the document that it is
    fixed = 4 * samples.tokens + sum(item.itemsize for item in items) * samples.number * samples.response
    return fixed + samples.number * index * (1 + len(items))


def selection_bytes(samples: Samples) -> float:
    return samples.number * _row_bytes(SELECTION_SCHEMA, "snappy", samples)


def packs_bytes(samples: Samples) -> float:
    """Of an index over ``samples.number`` kept samples; Arrow does not compress it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, PACK_SCHEMA):
        pass
    return sink.getvalue().size + samples.number * sum(field.type.bit_width // 8 for field in PACK_SCHEMA)


def checkpoint_bytes(parameters: int, *, bf16: bool) -> float:
    """Weights, float32 main weights and two moments; a float32 run writes its weights as both."""
    return parameters * ((2 if bf16 else 4) + 4 + 8)


@cache
def _row_bytes(schema: pa.Schema, compression: str, samples: Samples) -> float:
    """Bytes of a row of a Parquet file of one shard, its share of the footer included."""
    per_row = samples.prompt + samples.response
    rows = min(samples.number, samples.shard, max(int(_SAMPLED_TOKENS / per_row), 100))
    table = _random_table(schema, replace(samples, number=rows))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=compression)
    return sink.getvalue().size / rows


def _random_table(schema: pa.Schema, samples: Samples) -> pa.Table:
    rng = np.random.default_rng(0)
    return pa.table([_column(field, samples, rng) for field in schema], schema=schema)


def _column(field: pa.Field, samples: Samples, rng: np.random.Generator) -> pa.Array:
    """Random values of a field: ids where it is named so, tokens, log-probabilities; one word elsewhere."""
    number, kind = samples.number, field.type
    if pa.types.is_list(kind):
        if field.nullable:
            return pa.nulls(number, kind)
        prompt = field.name == "prompt_ids"
        parts = -(-number // samples.paths) if prompt else number
        lists = _lists(kind.value_type, parts, samples.prompt if prompt else samples.response, samples.vocab_size, rng)
        return lists.take(pa.array(np.arange(number) // samples.paths)) if prompt else lists
    if pa.types.is_string(kind):
        return pa.array(_texts(field, number, samples.paths, rng), kind)
    if pa.types.is_boolean(kind):
        return pa.array(np.zeros(number, bool))
    if pa.types.is_floating(kind):
        if field.name in _ALIKE:
            return pa.array(np.ones(number), kind)
        return pa.array(rng.standard_normal(number).astype(kind.to_pandas_dtype()))
    if field.name == "seed":
        return pa.array(rng.integers(0, 2**31, number), kind)
    most = {"prompt_len": 2 * samples.prompt, "response_len": 2 * samples.response, "path": samples.paths}
    return pa.array(rng.integers(0, max(int(most.get(field.name, 1)), 1), number), kind)


def _texts(field: pa.Field, number: int, paths: int, rng: np.random.Generator) -> list[str | None]:
    if field.name in ("sample_id", "prompt_id"):  # hexadecimal digits of hashes
        each = paths if field.name == "prompt_id" else 1
        names = [rng.bytes(8).hex() for _ in range(-(-number // each))]
        return [names[index // each] for index in range(number)]
    return [None if field.nullable else "student"] * number


def _lists(kind: Any, number: int, mean: float, vocab_size: int, rng: np.random.Generator) -> pa.Array:
    """Lists of token ids, or of log-probabilities, of lengths around a mean."""
    lengths_N = np.maximum(rng.integers(int(mean / 2), int(1.5 * mean) + 1, number), 1)
    lengths_N[-1] = max(int(lengths_N[-1] + round(mean * number) - lengths_N.sum()), 1)
    starts = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int32)
    nats_R = np.exp(rng.normal(_LOG_NATS, _LOG_NATS_SPREAD, int(starts[-1])))
    values_R: npt.NDArray[Any] = (-np.round(np.minimum(nats_R, _MOST_NATS) / _STEP) * _STEP).astype(np.float32)
    if pa.types.is_integer(kind):
        words = min(_WORDS, vocab_size)
        ranks = 1 / (np.arange(words) + _WORD_SHIFT)
        values_R = rng.choice(words, len(values_R), p=ranks / ranks.sum()).astype(np.int32)
    return pa.ListArray.from_arrays(starts, pa.array(values_R, kind))
