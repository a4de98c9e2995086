"""One micro-batch of packed rows, as the model and the loss take it.

Legend: T tokens of the micro-batch (rows x seq_length), K teacher columns, S segments.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Rows laid end to end; segments attend only to themselves.

    A stream that this rank does not read is None: tokens belong to the first pipeline stage; labels, mask and teacher
    to the last; every stage has positions and cu_seqlens. Label, mask and teacher row at a position are those of the
    token that follows it in its segment; the mask is 1 where that token is the response's.

    Attributes:
        tokens: int64 [1, T].
        position_ids: int64 [1, T], counted from 0 in each segment.
        cu_seqlens: int32 [S + 1] on the CPU; covers all T, the padding included.
        max_seqlen: Longest segment, in tokens.
        labels: int64 [1, T]; an arbitrary id in range where the mask is 0.
        loss_mask: float32 [1, T], 1 or 0.
        teacher_ids: int64 [T, K], distinct in a row and in range, arbitrary where the mask is 0.
        teacher_logprobs: float32 [T, K], natural logs, rescaled so that a row's mass is 1 - exp(teacher_log_tail).
        teacher_log_tail: float32 [T], log of the mass outside the K.
        generator_logprobs: float32 [T], log-probability of the label under the policy that sampled it; NaN where the
            policy lag is not defined (METHOD section 4).
    """

    tokens: Tensor | None
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    labels: Tensor | None
    loss_mask: Tensor | None
    teacher_ids: Tensor | None
    teacher_logprobs: Tensor | None
    teacher_log_tail: Tensor | None
    generator_logprobs: Tensor | None

    def to(self, device: torch.device | str) -> PackedBatch:
        """A copy on ``device``; cu_seqlens stays on the CPU, where the model reads it without a synchronisation."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor) and field.name != "cu_seqlens"
        }
        return replace(self, **moved)
