"""A vocabulary cut into equal slices over a tensor-parallel group: ownership of ids, and the loss's one collective.

Legend: T tokens, V columns of this rank's slice, K teacher ids, R ranks of the group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_npd.log import UserError


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
        lse_off_T: Log-sum-exp over the columns outside S.
        max_off_T: Largest logit outside S.
        label_T: The label's logit.
        logits_TK: Logits at S.
        lse_off_tempered_T: Log-sum-exp of the logits / temperature outside S, where an objective asks for it.
    """

    lse_off_T: Tensor
    max_off_T: Tensor
    label_T: Tensor
    logits_TK: Tensor
    lse_off_tempered_T: Tensor | None = None


def merge_stats(stats: Stats, teacher_ids_TK: Tensor, shard: VocabShard) -> Stats:
    """Merge the slices' statistics: one all-gather of ``[T, K + 2]`` fp32, then local sums in rank order.

    Every rank reduces the same numbers in the same order, so all get the same bits. A second temperature appends a
    number. ``max_off_T``, which only the top-1 metric needs, appends none: in the column of the teacher's first id,
    which one rank alone fills, the other ranks send their largest logit outside S; the owner sends whether its own
    exceeds that id's logit, in the lowest bit of its ``lse_off_T`` (an error of one unit in the last place).
    Afterwards ``max_off_T`` is exact on every rank but the owner's share, which counts as +inf or -inf by that bit.

    Args:
        stats: This rank's statistics.
        teacher_ids_TK: Ids in the whole vocabulary, int64.
        shard: This rank's slice.
    """
    if shard.size == 1:
        return stats
    num_tokens, top_k = teacher_ids_TK.shape
    columns = [stats.lse_off_T, stats.label_T, *stats.logits_TK.unbind(1)]
    if stats.lse_off_tempered_T is not None:
        columns.append(stats.lse_off_tempered_T)
    owner_T = teacher_ids_TK[:, 0] // shard.width if top_k else None
    if owner_T is not None:
        mine_T = owner_T == shard.rank
        exceeds_T = mine_T & (stats.max_off_T > stats.logits_TK[:, 0])
        bits_T = stats.lse_off_T.view(torch.int32)
        # -inf keeps its bits: with nothing outside S nothing exceeds, and -inf has an even mantissa.
        columns[0] = ((bits_T & ~1) | exceeds_T.int()).view(torch.float32)
        columns[2] = torch.where(mine_T, stats.logits_TK[:, 0], stats.max_off_T)
    sent = torch.stack(columns, dim=1).contiguous()
    gathered = sent.new_empty(shard.size, *sent.shape)
    dist.all_gather(list(gathered.unbind(0)), sent, group=shard.group)

    max_off_T = gathered.new_full((num_tokens,), -torch.inf)
    if owner_T is not None:
        owned_RT = owner_T == torch.arange(shard.size, device=owner_T.device)[:, None]
        first_RT = gathered[:, :, 2]
        exceeds_RT = owned_RT & (gathered[:, :, 0].contiguous().view(torch.int32) & 1).bool()
        max_off_T = first_RT.masked_fill(owned_RT, -torch.inf).masked_fill(exceeds_RT, torch.inf).amax(0)
        first_T = first_RT.masked_fill(~owned_RT, -torch.inf).amax(0)
        logits_TK = torch.cat([first_T[:, None], gathered[:, :, 3 : 2 + top_k].amax(0)], dim=1)
    else:
        logits_TK = stats.logits_TK
    return Stats(
        lse_off_T=torch.logsumexp(gathered[:, :, 0], dim=0),
        max_off_T=max_off_T,
        label_T=gathered[:, :, 1].amax(0),
        logits_TK=logits_TK,
        lse_off_tempered_T=None if stats.lse_off_tempered_T is None else torch.logsumexp(gathered[:, :, -1], dim=0),
    )
