"""What a store holds for each response token beside the tokens, as one table that writer, readers and audit go by.

A further stream of one number per response token (advantages, old log-probabilities) is one entry of ``STREAMS`` and
one field of ``data.batch.PackedBatch``.

Legend: R response tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_npd.errors import UserError
from megatron_npd.records import LOG_TAIL_FLOOR, NO_LOGPROB, defined_logprobs, teacher_record_dtype
from megatron_npd.store.teacher_records import check_teacher_records


@dataclass(frozen=True, kw_only=True)
class ResponseStream:
    """The IndexedDataset pair of its name in each shard: one sequence per sample, one item per response token.

    Attributes:
        number: Of the pair, as megatron-core indexes it.
        item: dtype of an item, a whole number of numbers, from ``top_k``; None where the store has no such stream.
        filler: An item [1], from ``top_k``, for positions that predict no response token.
        check: Called with items [R], V* and where they are; raises UserError for what no stage leaves.
        field: Of ``data.batch.PackedBatch``, float32 [T]; empty: the batch takes the items apart itself.
    """

    number: np.dtype
    item: Callable[[int], np.dtype | None]
    filler: Callable[[int], np.ndarray]
    check: Callable[[np.ndarray, int, str], None]
    field: str = ""


def check_logprobs(values_R: np.ndarray, vocab_size: int, where: str) -> None:
    """Refuse what no model gives as log-probabilities of sampled tokens; NaN stands where there is none.

    Raises:
        UserError: A value is infinite, above 0, or vLLM's word for -inf.
    """
    if (broken_R := ~(defined_logprobs(values_R) | np.isnan(values_R))).any():
        token = int(np.flatnonzero(broken_R)[0])
        raise UserError(
            f"{where}: generator log-probs must be above {NO_LOGPROB:g} and <= 0, or NaN, got {values_R[token]} at "
            f"response token {token}; annotate again"
        )


def _teacher_filler(top_k: int) -> np.ndarray:
    """Distinct ids and a distribution."""
    record = np.zeros(1, teacher_record_dtype(top_k))
    record["ids"], record["logprobs"], record["log_tail"] = np.arange(top_k), -np.log(max(top_k, 1)), LOG_TAIL_FLOOR
    return record


STREAMS = {
    "teacher": ResponseStream(
        number=np.dtype("<u2"),
        item=lambda top_k: teacher_record_dtype(top_k) if top_k else None,
        filler=_teacher_filler,
        check=check_teacher_records,
    ),
    "generator": ResponseStream(
        number=np.dtype("<f4"),
        item=lambda _: np.dtype("<f4"),
        filler=lambda _: np.full(1, np.nan, "<f4"),
        check=check_logprobs,
        field="generator_logprobs",
    ),
}


def stream_items(top_k: int) -> dict[str, np.dtype]:
    """Name and item dtype of the streams of a store of this ``top_k``."""
    items = {name: stream.item(top_k) for name, stream in STREAMS.items()}
    return {name: item for name, item in items.items() if item is not None}


def undefined_logprobs(n: int) -> np.ndarray:
    """The ``generator`` stream of a response whose generator is not known, or for which no lag is defined."""
    return np.full(n, np.nan, np.float32)
