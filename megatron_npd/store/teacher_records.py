"""What a teacher's records must be, and how many response tokens stand among its most likely ones.

Legend: R records, n response tokens, k top-k width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.records import LOG_TAIL_FLOOR, NO_LOGPROB, defined_logprobs

LEAST_IN_TOP_K = 0.5  # share of the response tokens; a record shifted by a token leaves far fewer
MASS_TOLERANCE = 1e-3
_FP16_RELATIVE = 2.0**-11  # half a unit in the last place
_CHUNK = 8192  # records checked at a time, so that intermediates stay in the cache
RECORD_RULES = (  # reason by which a sample is quarantined, rule; in the order of ``broken_records``
    ("teacher_id_outside_vocabulary", "teacher ids must be token ids in 0..{last}"),
    ("teacher_id_twice", "teacher ids must be distinct"),
    ("teacher_logprob_undefined", f"teacher log-probs must be finite, above {NO_LOGPROB:g} and <= 0"),
    ("teacher_logprobs_unsorted", "teacher log-probs must be descending"),
    ("teacher_tail_undefined", f"log_tail must be in [{LOG_TAIL_FLOOR:g}, 0)"),
    ("teacher_mass", f"top-k mass + tail mass must be 1 within {MASS_TOLERANCE:g}"),
)


def broken_records(records_R: np.ndarray, vocab_size: int) -> npt.NDArray[np.int8]:
    """Find teacher records that no probability distribution could have left.

    Ids are in range and distinct; log-probabilities defined (``defined_logprobs``) and descending; ``log_tail`` in
    [-30, 0); the mass of the k and of the tail sum to 1 within 1e-3 and the rounding of fp16.

    Args:
        records_R: ``teacher_record_dtype(k)`` [R].
        vocab_size: V*.

    Returns:
        The first rule that each record breaks, as 1 + its place in ``RECORD_RULES``; 0: none. int8 [R].
    """
    result_R = np.zeros(len(records_R), np.int8)
    for start in range(0, len(records_R), _CHUNK):
        records = records_R[start : start + _CHUNK]
        ids_RK, logprobs_RK = np.sort(records["ids"], axis=1), records["logprobs"].astype(np.float32)
        log_tail_R = records["log_tail"].astype(np.float32)
        logs_RK1 = np.concatenate([logprobs_RK, log_tail_R[:, None]], axis=1)
        with np.errstate(over="ignore", invalid="ignore"):  # of records that break an earlier rule
            mass_RK1 = np.exp(logs_RK1)
            tolerance_R = MASS_TOLERANCE + _FP16_RELATIVE * (mass_RK1 * np.abs(logs_RK1)).sum(axis=1)
            broken = (
                (ids_RK[:, 0] < 0) | (ids_RK[:, -1] >= vocab_size),
                (np.diff(ids_RK, axis=1) == 0).any(axis=1),
                ~defined_logprobs(logprobs_RK).all(axis=1),
                (np.diff(logprobs_RK, axis=1) > 0).any(axis=1),
                ~((log_tail_R >= LOG_TAIL_FLOOR) & (log_tail_R < 0)),
                ~(np.abs(mass_RK1.sum(axis=1) - 1) <= tolerance_R),
            )
        result_R[start : start + _CHUNK] = np.select(broken, range(1, len(broken) + 1), 0)
    return result_R


def check_teacher_records(records: np.ndarray, vocab_size: int, where: str) -> None:
    """Refuse teacher records of which one breaks a rule of ``broken_records``; ``where`` names file and record.

    Raises:
        UserError: A rule is broken.
    """
    broken_n = broken_records(records, vocab_size)
    if broken_n.any():
        token = int(np.flatnonzero(broken_n)[0])
        rule = RECORD_RULES[broken_n[token] - 1][1].format(last=vocab_size - 1)
        raise UserError(f"{where}: {rule}, got {records[token]} at response token {token}; annotate again")


def count_in_top_k(records_n: np.ndarray, response_n: npt.NDArray[np.integer]) -> int:
    """How many tokens of a response are among the ids of their records."""
    return int((records_n["ids"] == response_n[:, None]).any(axis=1).sum())


def warn_of_few_in_top_k(counts: Mapping[str, Any], where: object) -> None:
    """Say so where fewer response tokens are among the teacher's top-k than a teacher of the same task leaves.

    Args:
        counts: ``in_top_k`` of ``response_tokens``.
        where: Names the store.
    """
    if (share := counts["in_top_k"] / max(counts["response_tokens"], 1)) < LEAST_IN_TOP_K:
        get_logger().warning(
            "%s: only %.1f %% of the response tokens are among the teacher's top-k; are records shifted by a token, "
            "or of another tokenizer or other responses? npd show --sample shows them side by side",
            where,
            100 * share,
        )
