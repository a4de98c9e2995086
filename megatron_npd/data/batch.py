"""One micro-batch of packed rows: as it is read, compact and on the host, and as the model and the loss take it.

Legend: T tokens of the micro-batch (rows x seq_length), K teacher columns, S segments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megatron_npd.store.decode import decoded
from megatron_npd.store.streams import STREAMS


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Rows laid end to end; segments attend only to themselves.

    A stream that this rank does not read is None: tokens belong to the first pipeline stage; labels, mask and what the
    objective reads of ``store.streams.STREAMS`` to the last; every stage has positions and cu_seqlens. Label, mask and
    items of streams at a position are those of the token that follows it in its segment; the mask is 1 where that token
    is the response's.

    Attributes:
        tokens: int64 [1, T].
        position_ids: int64 [1, T], counted from 0 in each segment.
        cu_seqlens: int32 [S + 1] on the CPU; covers all T, the padding included.
        max_seqlen: Longest segment, in tokens.
        labels: int64 [1, T]; an arbitrary id in range where the mask is 0.
        loss_mask: float32 [1, T], 1 or 0.
        weights: float32 [T], weight of the token's loss; None where all are 1.
        teacher_ids: int32 [T, K], distinct in a row and in range, arbitrary where the mask is 0.
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
    weights: Tensor | None
    teacher_ids: Tensor | None
    teacher_logprobs: Tensor | None
    teacher_log_tail: Tensor | None
    generator_logprobs: Tensor | None = None

    def to(self, device: torch.device | str) -> PackedBatch:
        """A copy on ``device``; cu_seqlens stays on the CPU, where the model reads it without a synchronisation."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor) and field.name != "cu_seqlens"
        }
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class HostBatch:
    """What ``PackedBatch`` is made from, in the types of the store: 73 bytes per token go to the device at k = 10.

    A stream that this rank does not read is None.

    Attributes:
        tokens_T: int32 [T]; read for the labels too.
        mask_T: bool [T].
        weights_T: float32 [T]; None where all are 1.
        cu_seqlens: int32 [S + 1].
        max_seqlen: Longest segment, in tokens.
        streams: What is read of ``store.streams.STREAMS``, by name: ``teacher`` int32 [T, W], the records as
            ``decode.empty_records`` lays them out; others float32 [T].
        top_k: K.
        feeds_tokens: Whether the model of this rank takes the tokens, or only the loss their labels.
    """

    tokens_T: Tensor | None
    mask_T: Tensor | None
    weights_T: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    streams: Mapping[str, Tensor]
    top_k: int
    feeds_tokens: bool

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on ``device``, where it is taken apart, widened and rescaled."""
        tokens_T = None if self.tokens_T is None else self.tokens_T.to(device, non_blocking=True)
        T = int(self.cu_seqlens[-1])
        bounds = self.cu_seqlens.to(device, non_blocking=True).long()
        starts_T = torch.repeat_interleave(bounds[:-1], bounds.diff(), output_size=T)
        labels = loss_mask = ids_TK = logprobs_TK = log_tail_T = None
        if self.mask_T is not None:
            assert tokens_T is not None
            mask_T = self.mask_T.to(device, non_blocking=True)
            labels = (tokens_T.roll(-1) * mask_T).long()[None]  # rolled, a segment's end holds the next one's token
            loss_mask = mask_T.float()[None]
        streams = {name: values.to(device, non_blocking=True) for name, values in self.streams.items()}
        if "teacher" in streams:
            ids_TK, logprobs_TK, log_tail_T = decoded(streams.pop("teacher"), self.top_k)
        return PackedBatch(
            tokens=tokens_T.long()[None] if tokens_T is not None and self.feeds_tokens else None,
            position_ids=torch.arange(T, device=device).sub_(starts_T)[None],
            cu_seqlens=self.cu_seqlens,
            max_seqlen=self.max_seqlen,
            labels=labels,
            loss_mask=loss_mask,
            weights=None if self.weights_T is None else self.weights_T.to(device, non_blocking=True),
            teacher_ids=ids_TK,
            teacher_logprobs=logprobs_TK,
            teacher_log_tail=log_tail_T,
            **{STREAMS[name].field: values_T for name, values_T in streams.items()},
        )
