"""Teacher records in a batch: gathered whole and checked on the host, taken apart where the loss computes.

The host only moves bytes, a sample's records by one memcpy, and the device receives them as they are; what costs
arithmetic, fp32 and the rescaling, is torch and runs there.

Legend: T tokens, K teacher columns, W words of a record: its 6 K + 4 bytes in int32, rounded up where K is odd.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_npd.errors import UserError
from megatron_npd.records import LOG_TAIL_FLOOR, teacher_record_dtype
from megatron_npd.store.annotation_store import check_token_ids

# fp16 read as int16, where smaller is nearer to 0 for negative numbers: NaN, infinity and what is too large stand out.
_POSITIVE_BITS = int(np.float16(1e-5).view(np.int16))  # what rounding may leave above log 1 = 0
_FINITE_BITS = int(np.float16(-65504.0).view(np.uint16))
_FLOOR_BITS = int(np.float16(LOG_TAIL_FLOOR).view(np.uint16))


def empty_records(T: int, K: int, *, pin_memory: bool = False) -> Tensor:
    """Room for T records, int32 [T, W]."""
    return torch.empty(T, (3 * K + 3) // 2, dtype=torch.int32, pin_memory=pin_memory)


def as_items(records_TW: Tensor, K: int) -> np.ndarray:
    """The same memory as opaque items [T]: numpy copies these by memcpy, where it would copy records field by field."""
    size = teacher_record_dtype(K).itemsize
    return records_TW.numpy().view(np.uint8)[:, :size].view(f"V{size}")[:, 0]


def check_records(records_TW: npt.NDArray[np.int32], K: int, vocab_size: int, where: str) -> None:
    """Refuse records that no distribution could have left, in three passes at the speed of memory.

    Raises:
        UserError: An id is outside ``0 .. vocab_size - 1``, a log-prob is not finite or above 0, or a tail is not in
            [-30, 0).
    """
    if not len(records_TW):
        return
    if int(_column_max(records_TW.view(np.uint32))[:K].max()) >= vocab_size:
        check_token_ids(records_TW[:, :K], vocab_size, where)  # names the id
    logprobs, tail = slice(2 * K, 3 * K), 3 * K
    highest, lowest = _column_max(records_TW.view(np.int16)), _column_max(records_TW.view(np.uint16))
    log_tail_T = records_TW.view(np.int16)[:, tail]
    if highest[logprobs].max() > _POSITIVE_BITS or lowest[logprobs].max() > _FINITE_BITS:
        raise UserError(f"{where} must hold finite log-probs <= 0, got another value; annotate again")
    if highest[tail] >= 0 or lowest[tail] > _FLOOR_BITS or int(log_tail_T.min()) == np.iinfo(np.int16).min:  # is -0.0
        raise UserError(f"{where} must hold log tails in [{LOG_TAIL_FLOOR:g}, 0), got another value; annotate again")


def _column_max(array_TN: np.ndarray) -> np.ndarray:
    """Maximum of each column, over long rows first: numpy is slow at reducing short ones."""
    T, N = array_TN.shape
    return array_TN.reshape(math.gcd(T, 128), -1).max(axis=0).reshape(-1, N).max(axis=0)


def decoded(records_TW: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the loss takes, from records on their device.

    Returns:
        Ids int32 [T, K], a view of the records; log-probs float32 [T, K], rescaled so that their mass is 1 - t_p
        (METHOD section 2: fp16 rounding never gives a mass above 1); log t_p float32 [T].
    """
    ids_TK, logprobs_TK, log_tail_T = taken_apart(records_TW, K)
    # exp2: torch's exp is MKL's, which is slow on AMD processors.
    mass_T = (logprobs_TK * math.log2(math.e)).exp2_() @ logprobs_TK.new_ones(K)
    log_scale_T = torch.log(-torch.expm1(log_tail_T) / mass_T)
    return ids_TK, logprobs_TK.add_(log_scale_T[:, None]), log_tail_T


def taken_apart(records_TW: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of records as ``decoded`` gives them, log-probs as they were stored."""
    halves_TH = records_TW.view(torch.float16)
    # Contiguous before anything is computed: torch is slow on rows of K numbers that are apart in memory.
    logprobs_TK = torch.narrow_copy(halves_TH, 1, 2 * K, K).float()
    return records_TW[:, :K], logprobs_TK, halves_TH[:, 3 * K].float()
