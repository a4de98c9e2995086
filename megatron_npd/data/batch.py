"""One micro-batch of packed rows: as it is read, compact and on the host, and as the model and the loss take it.

Legend: T tokens of the micro-batch on this rank (rows x seq_length / context-parallel size), K teacher columns, S
segments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megatron_npd.models.zigzag import ContextShare
from megatron_npd.store.decode import decoded
from megatron_npd.store.streams import STREAMS


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Rows laid end to end, or a context-parallel rank's share of each segment; segments attend only to themselves.

    A stream that this rank does not read is None: tokens belong to the first pipeline stage; labels, mask and what the
    objective reads of ``store.streams.STREAMS`` to the last; every stage has positions and cu_seqlens. Label, mask and
    items of streams at a position are those of the token that follows it in its segment; the mask is 1 where that token
    is the response's.

    Attributes:
        tokens: int64 [1, T].
        position_ids: int64 [1, T], counted from 0 in each segment.
        cu_seqlens: int32 [S + 1] on the CPU; covers the whole rows, the padding included, on every rank.
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
    """What ``PackedBatch`` is made from, in the types of the store: 77 bytes per token go to the device at k = 10.

    A stream that this rank does not read is None.

    Attributes:
        tokens_T: int32 [T].
        labels_T: int32 [T], the response's tokens, each where it is predicted; 0 elsewhere.
        mask_T: bool [T].
        weights_T: float32 [T]; None where all are 1.
        cu_seqlens: int32 [S + 1], of the whole rows.
        max_seqlen: Longest segment, in tokens.
        streams: What is read of ``store.streams.STREAMS``, by name: ``teacher`` int32 [T, W], the records as
            ``decode.empty_records`` lays them out; others float32 [T].
        top_k: K.
        share: What of each segment this rank holds.
    """

    tokens_T: Tensor | None
    labels_T: Tensor | None
    mask_T: Tensor | None
    weights_T: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    streams: Mapping[str, Tensor]
    top_k: int
    share: ContextShare

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on ``device``, where it is taken apart, widened and rescaled."""
        tokens_T, labels_T, mask_T, weights_T = (
            None if values is None else values.to(device, non_blocking=True)
            for values in (self.tokens_T, self.labels_T, self.mask_T, self.weights_T)
        )
        T = int(self.cu_seqlens[-1]) // self.share.size
        ids_TK = logprobs_TK = log_tail_T = None
        streams = {name: values.to(device, non_blocking=True) for name, values in self.streams.items()}
        if "teacher" in streams:
            ids_TK, logprobs_TK, log_tail_T = decoded(streams.pop("teacher"), self.top_k)
        return PackedBatch(
            tokens=None if tokens_T is None else tokens_T.long()[None],
            position_ids=self.share.positions(self.cu_seqlens.to(device, non_blocking=True), T)[None],
            cu_seqlens=self.cu_seqlens,
            max_seqlen=self.max_seqlen,
            labels=None if labels_T is None else labels_T.long()[None],
            loss_mask=None if mask_T is None else mask_T.float()[None],
            weights=weights_T,
            teacher_ids=ids_TK,
            teacher_logprobs=logprobs_TK,
            teacher_log_tail=log_tail_T,
            **{STREAMS[name].field: values_T for name, values_T in streams.items()},
        )
