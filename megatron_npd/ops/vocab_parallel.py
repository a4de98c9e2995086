"""A vocabulary sharded into equal slices over a tensor-parallel group: ownership of ids, and the loss's one collective.

Legend: T tokens, V columns of this rank's slice, K teacher ids, R ranks of the group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_npd.errors import UserError


@dataclass(frozen=True, kw_only=True)
class VocabShard:
    """This rank's slice of the vocabulary.

    Attributes:
        width: Columns of the slice, V; the same on every rank.
        columns: How many of them, from the first on, are of the vocabulary; the others are padding.
        rank: Position of the slice, counted from 0.
        size: Number of slices.
        group: Process group that holds them; None for one slice.
    """

    width: int
    columns: int
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def local(self, ids: Tensor) -> Tensor:
        """Columns of ``ids`` in this slice, int64; ``columns`` (one past the last) where another rank owns the id.

        A buffer with one spare column can be gathered from and scattered to with the result: an id owned elsewhere
        meets the spare column, never a real one.
        """
        if self.size == 1:
            return ids
        index = ids - self.rank * self.width
        return torch.where((index >= 0) & (index < self.columns), index, self.columns)


def vocab_shard(width: int, vocab_size: int | None, group: dist.ProcessGroup | None) -> VocabShard:
    """The slice of ``width`` columns that this rank of ``group`` owns of a vocabulary of ``vocab_size``.

    Raises:
        UserError: The group's slices together are narrower than the vocabulary.
    """
    size = 1 if group is None else dist.get_world_size(group)
    rank = dist.get_rank(group) if size > 1 else 0
    total = size * width
    if vocab_size is None:
        vocab_size = total
    if not 0 < vocab_size <= total:
        raise UserError(
            f"vocab_size must be in [1, {total}] (ranks of the group x columns of logits_TV), got {vocab_size}; give "
            "the whole vocabulary's size, without the padding that makes it divisible"
        )
    columns = min(max(vocab_size - rank * width, 0), width)
    return VocabShard(width=width, columns=columns, rank=rank, size=size, group=group if size > 1 else None)


class Stats(NamedTuple):
    """What the loss needs of a row of logits; of one slice before ``merge_stats``, of the vocabulary after it.

    S are the teacher's ids of the row. All fp32; an absent column counts as -inf.

    Attributes:
        buckets_TB: Logits at S and, last, the log-sum-exp over the columns outside S; B = K + 1.
        label_T: The label's logit.
        max_off_T: Largest logit outside S.
        lse_off_tempered_T: Log-sum-exp of the logits / temperature outside S, where an objective asks for it.
        mean_off_T: Mean of the logits outside S under their softmax, where the entropy is asked for; 0 without any.
    """

    buckets_TB: Tensor
    label_T: Tensor
    max_off_T: Tensor
    lse_off_tempered_T: Tensor | None = None
    mean_off_T: Tensor | None = None


def merge_stats(stats: Stats, teacher_ids_TK: Tensor, shard: VocabShard) -> Stats:
    """Merge the slices' statistics: one all-gather of ``[T, K + 2]`` fp32, then the same arithmetic on every rank.

    Every rank reduces the same numbers in the same order, so all get the same bits. A second temperature appends a
    number, the entropy another. ``max_off_T``, which only the top-1 metric needs, appends none: in the column of the
    teacher's first id, which one rank alone fills, the other ranks send their largest logit outside S; the owner sends,
    in the lowest bit of its log-sum-exp, whether its own exceeds that id's logit. Afterwards the owner's counts as +inf
    or -inf by that bit, and the metric is exact.

    Args:
        stats: This rank's statistics.
        teacher_ids_TK: Ids in the whole vocabulary, int64.
        shard: This rank's slice, one of several.
    """
    num_tokens, top_k = teacher_ids_TK.shape
    if num_tokens == 0:
        return stats
    sent = [stats.buckets_TB, stats.label_T[:, None]]
    sent += [extra_T[:, None] for extra_T in (stats.lse_off_tempered_T, stats.mean_off_T) if extra_T is not None]
    sent_TB = torch.cat(sent, dim=1)
    owned_RT = teacher_ids_TK[:, 0] // shard.width == _ranks(shard, sent_TB) if top_k else None
    if owned_RT is not None:
        mine_T = owned_RT[shard.rank]
        exceeds_T = mine_T & (stats.max_off_T > sent_TB[:, 0])
        # -inf keeps its bits: it has an even mantissa, and nothing outside S exceeds nothing.
        sent_TB[:, top_k] = ((sent_TB[:, top_k].view(torch.int32) & ~1) | exceeds_T.int()).view(torch.float32)
        sent_TB[:, 0] = torch.where(mine_T, sent_TB[:, 0], stats.max_off_T)
    gathered_RTB = sent_TB.new_empty(shard.size, *sent_TB.shape)
    dist.all_gather(list(gathered_RTB.unbind(0)), sent_TB, group=shard.group)

    max_off_T = stats.max_off_T
    if owned_RT is not None:
        first_RT, bits_RT = gathered_RTB[:, :, 0], gathered_RTB[:, :, top_k].contiguous().view(torch.int32)
        max_off_RT = torch.where(owned_RT, torch.where((bits_RT & 1).bool(), torch.inf, -torch.inf), first_RT)
        max_off_T = max_off_RT.amax(0)
        gathered_RTB[:, :, 0] = first_RT.masked_fill(~owned_RT, -torch.inf)
    lse_off_RT = gathered_RTB[:, :, top_k]
    lse_off_T = lse_off_RT.logsumexp(0)
    mean_off_T = None
    if stats.mean_off_T is not None:
        share_RT = torch.where(lse_off_RT > -torch.inf, (lse_off_RT - lse_off_T).exp(), 0.0)
        mean_off_T = (share_RT * gathered_RTB[:, :, -1]).sum(0)
    return Stats(
        buckets_TB=torch.cat([gathered_RTB[:, :, :top_k].amax(0), lse_off_T[:, None]], dim=1),
        label_T=gathered_RTB[:, :, top_k + 1].amax(0),
        max_off_T=max_off_T,
        lse_off_tempered_T=None if stats.lse_off_tempered_T is None else gathered_RTB[:, :, top_k + 2].logsumexp(0),
        mean_off_T=mean_off_T,
    )


def _ranks(shard: VocabShard, like: Tensor) -> Tensor:
    return torch.arange(shard.size, device=like.device)[:, None]
