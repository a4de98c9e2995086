"""Teacher records taken apart: ids and halves into arrays of their own, checked, and the log-probs that the loss takes.

The host only moves bytes and checks them (an item at a time: a row of 32768 tokens in half a millisecond); what costs
arithmetic, fp32 and the rescaling, is torch and runs where the loss does.

Legend: T tokens, K teacher columns.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_npd.data.store import check_token_ids
from megatron_npd.log import UserError
from megatron_npd.records import LOG_TAIL_FLOOR, record_parts, teacher_record_dtype

# fp16 read as int16, where smaller is nearer to 0 for negative numbers: NaN, infinity and what is too large stand out.
_POSITIVE_BITS = int(np.float16(1e-5).view(np.int16))  # what rounding may leave above log 1 = 0
_FINITE_BITS = int(np.float16(-65504.0).view(np.uint16))
_FLOOR_BITS = int(np.float16(LOG_TAIL_FLOOR).view(np.uint16))


def empty_parts(T: int, K: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float16]]:
    """Arrays to gather records into: ids int32 [T, K]; log-probs, log t_p and generator's log-prob fp16 [T, K + 2]."""
    return np.empty((T, K), np.int32), np.empty((T, K + 2), np.float16)


def as_items(array: np.ndarray) -> np.ndarray:
    """A contiguous [T, N] array as [T] opaque items, to assign ``record_parts`` to."""
    return array.view(f"V{array.shape[1] * array.itemsize}").reshape(len(array))


def check_parts(
    ids_TK: npt.NDArray[np.int32], halves_TK2: npt.NDArray[np.float16], vocab_size: int, where: str
) -> None:
    """Refuse records that no distribution could have left, in two passes at the speed of memory.

    Raises:
        UserError: An id is outside ``0 .. vocab_size - 1``, a log-prob is not finite or above 0, or a tail is not in
            [-30, 0).
    """
    if ids_TK.size and int(ids_TK.view(np.uint32).max()) >= vocab_size:
        check_token_ids(ids_TK, vocab_size, where)  # names the id
    if not halves_TK2.size:
        return
    highest, lowest = _column_max(halves_TK2.view(np.int16)), _column_max(halves_TK2.view(np.uint16))
    log_tail_T = halves_TK2[:, -2].view(np.int16)
    if highest[:-2].max() > _POSITIVE_BITS or lowest[:-2].max() > _FINITE_BITS:
        raise UserError(f"{where} must hold finite log-probs <= 0, got another value; annotate again")
    if highest[-2] >= 0 or lowest[-2] > _FLOOR_BITS or int(log_tail_T.min()) == np.iinfo(np.int16).min:  # that is -0.0
        raise UserError(f"{where} must hold log tails in [{LOG_TAIL_FLOOR:g}, 0), got another value; annotate again")


def _column_max(array_TN: np.ndarray) -> np.ndarray:
    """Maximum of each column, over long rows first: numpy is slow at reducing short ones."""
    T, N = array_TN.shape
    return array_TN.reshape(math.gcd(T, 128), -1).max(axis=0).reshape(-1, N).max(axis=0)


def rescaled(halves_TK2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the loss takes, from the halves of the records, on their device.

    Returns:
        Log-probs float32 [T, K], rescaled so that their mass is 1 - t_p (METHOD section 2: fp16 rounding never gives
        a mass above 1); log t_p float32 [T]; generator's log-probs float32 [T].
    """
    floats_TK2 = halves_TK2.float()
    logprobs_TK, log_tail_T, generator_T = floats_TK2[:, :-2], floats_TK2[:, -2].clone(), floats_TK2[:, -1].clone()
    # exp over whole rows, which are contiguous; the matrix-vector product then steps over the last two numbers.
    mass_T = floats_TK2.exp()[:, :-2] @ floats_TK2.new_ones(logprobs_TK.shape[1])
    log_kept_T = torch.log(-torch.expm1(log_tail_T))
    return logprobs_TK.add_((log_kept_T - torch.log(mass_T))[:, None]), log_tail_T, generator_T


def decode_teacher(records_T: np.ndarray, vocab_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn teacher records into what the loss takes.

    Args:
        records_T: ``teacher_record_dtype(K)`` [T].
        vocab_size: V*.

    Returns:
        ids int32 [T, K]; log-probs float32 [T, K], log t_p float32 [T], generator's log-probs float32 [T] as
        ``rescaled`` gives them.

    Raises:
        UserError: As ``check_parts``.
    """
    ids_TK, halves_TK2 = empty_parts(len(records_T), records_T.dtype["ids"].shape[0])
    as_items(ids_TK)[:], as_items(halves_TK2)[:] = record_parts(records_T)
    check_parts(ids_TK, halves_TK2, vocab_size, "the teacher records")
    return torch.from_numpy(ids_TK), *rescaled(torch.from_numpy(halves_TK2))


def filler_parts(T: int, K: int) -> tuple[np.ndarray, np.ndarray]:
    """What stands where no record is needed, as ``record_parts``: distinct ids, a distribution, no lag."""
    records = np.empty(T, teacher_record_dtype(K))
    records["ids"], records["logprobs"] = np.arange(K), -np.log(max(K, 1))
    records["log_tail"], records["generator_logprob"] = LOG_TAIL_FLOOR, np.nan
    ids, halves = record_parts(records)
    return ids.copy(), halves.copy()
