"""The distillation loss in plain torch: chunks of rows that stay in the cache, for CPU, GPU and NPU alike.

Every objective sees the logits through B = K + 1 buckets: the K logits at the teacher's ids S and the log-sum-exp over
all other columns. A gradient with respect to the buckets spreads over the columns as ``G_k`` on S and
``G_off * exp(z - lse_off)`` off S, so one pass serves all of them and a tail is never formed as 1 - sum.

Legend: T tokens, N unmasked tokens (mask 1), C tokens of a chunk, V columns of this rank's slice, K teacher ids,
B = K + 1 buckets.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_npd.ops.arguments import Problem
from megatron_npd.ops.divergences import GradientRule
from megatron_npd.ops.vocab_parallel import Stats

CHUNK_ELEMENTS = 3 << 18
"""Logits of a chunk: 3 MiB of fp32 stay in two cores' cache between the passes over them."""


def _exp(z_CV: Tensor, shift_C1: Tensor) -> Tensor:
    """Turn ``z_CV`` into exp(z - shift) in place; a row of -inf, whose shift is -inf too, gives zeros."""
    return z_CV.sub_(shift_C1.clamp(min=torch.finfo(torch.float32).min)).exp_()


class _Chunks:
    """The logits by chunks of the rows that count, each in fp32: in a buffer, or in the gradient's place.

    With several slices the buffer has a spare column of -inf, which ids owned elsewhere meet (``VocabShard.local``).
    """

    def __init__(self, logits_TV: Tensor, out_TV: Tensor | None, problem: Problem):
        rows, objective, shard = problem.rows, problem.objective, problem.shard
        self.logits_TV, self.out_TV = logits_TV, out_TV
        self.columns, self.spare = shard.columns, int(shard.size > 1)
        self.ids_NK, self.labels_N1 = shard.local(rows.ids_NK), shard.local(rows.labels_N)[:, None]
        self.picked_NB = torch.cat([self.ids_NK, self.labels_N1], dim=1)
        self.index_N = rows.index_N
        self.index = None if rows.index_N is None else rows.index_N.tolist()
        self.ce_weight, self.scale = objective.ce_weight, 1 / objective.temperature
        self.num_rows = len(rows.labels_N)
        self.height = max(1, min(self.num_rows, CHUNK_ELEMENTS // (self.columns + 1)))
        shape = (self.height, self.columns + self.spare)
        self.buffer = torch.empty(shape, dtype=torch.float32, device=logits_TV.device)
        self.tempered = torch.empty_like(self.buffer) if objective.second_lse else None
        self.entropy = objective.entropy

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for lo in range(0, max(self.num_rows, 1), self.height):  # one empty chunk where no row counts
            yield lo, min(lo + self.height, self.num_rows)

    def _where(self, lo: int, hi: int) -> slice | Tensor:
        """Rows of the logits: a slice, which needs no gather, where they follow one another."""
        if self.index is None or self.index_N is None or lo == hi:
            return slice(lo, hi)
        first, last = self.index[lo], self.index[hi - 1]
        return slice(first, last + 1) if last - first == hi - lo - 1 else self.index_N[lo:hi]

    def load(self, lo: int, hi: int) -> Tensor:
        """The chunk's logits, ``[C, V]`` fp32, to be overwritten."""
        where = self._where(lo, hi)
        out_TV = self.out_TV
        if isinstance(where, slice) and out_TV is not None and out_TV.dtype == torch.float32 and not self.spare:
            z_CV = out_TV[where, : self.columns]
            return z_CV if out_TV is self.logits_TV else z_CV.copy_(self.logits_TV[where, : self.columns])
        z_CV = self.buffer[: hi - lo]
        z_CV[:, : self.columns].copy_(self.logits_TV[where][:, : self.columns])
        if self.spare:
            z_CV[:, self.columns] = -torch.inf
        return z_CV

    def statistics(self, z_CV: Tensor, lo: int, hi: int) -> tuple[Stats, Tensor, Tensor | None]:
        """Statistics of a loaded chunk, and the sums over columns of what is left in it and in ``tempered``.

        That is exp(z - largest off S), with 0 on S.
        """
        buckets_CB = z_CV.gather(1, self.picked_NB[lo:hi])
        label_C = buckets_CB[:, -1].clone()
        z_CV.scatter_(1, self.ids_NK[lo:hi], -torch.inf)
        max_off_C1 = z_CV.amax(1, keepdim=True)
        lse_tempered_C = sum_tempered_C1 = None
        if self.tempered is not None:
            tempered_CV = torch.mul(z_CV, self.scale, out=self.tempered[: hi - lo])
            sum_tempered_C1 = _exp(tempered_CV, max_off_C1 * self.scale).sum(1, keepdim=True)
            lse_tempered_C = (max_off_C1 * self.scale + sum_tempered_C1.log())[:, 0]
        sum_C1 = _exp(z_CV, max_off_C1).sum(1, keepdim=True)
        torch.add(max_off_C1, sum_C1.log(), out=buckets_CB[:, -1:])
        mean_off_C = None
        if self.entropy:  # z - largest is the logarithm of what the chunk holds now
            mean_C1 = max_off_C1 - torch.special.entr(z_CV).sum(1, keepdim=True) / sum_C1.clamp(min=1.0)
            mean_off_C = torch.where(sum_C1 > 0, mean_C1, 0.0)[:, 0]
        return Stats(buckets_CB, label_C, max_off_C1[:, 0], lse_tempered_C, mean_off_C), sum_C1, sum_tempered_C1

    def exponentials(self, z_CV: Tensor, lo: int, hi: int, merged: Stats) -> None:
        """Leave in a loaded chunk, and in ``tempered``, exp(z - log-sum-exp off S of the whole vocabulary)."""
        if self.tempered is not None and merged.lse_off_tempered_T is not None:
            tempered_CV = torch.mul(z_CV, self.scale, out=self.tempered[: hi - lo])
            _exp(tempered_CV, merged.lse_off_tempered_T[lo:hi, None])
        _exp(z_CV, merged.buckets_TB[lo:hi, -1:])

    def store(
        self,
        z_CV: Tensor,
        lo: int,
        hi: int,
        grad_CK: Tensor,
        off_C1: Tensor,
        tempered_C1: Tensor | None,
        label_C1: Tensor,
    ) -> None:
        """Write a chunk's gradient: ``off_C1`` times what the chunk holds, on S ``grad_CK``, at the label more."""
        assert self.out_TV is not None
        z_CV.mul_(off_C1)
        if self.tempered is not None and tempered_C1 is not None:
            z_CV.add_(self.tempered[: hi - lo].mul_(tempered_C1))
        z_CV.scatter_(1, self.ids_NK[lo:hi], grad_CK)
        if self.ce_weight:
            z_CV.scatter_add_(1, self.labels_N1[lo:hi], label_C1)
        if z_CV.data_ptr() != self.buffer.data_ptr():
            return
        where = self._where(lo, hi)
        if isinstance(where, slice):
            self.out_TV[where, : self.columns].copy_(z_CV[:, : self.columns])
        else:
            self.out_TV[:, : self.columns].index_copy_(0, where, z_CV[:, : self.columns].to(self.out_TV.dtype))

    def finish(self) -> None:
        """Zero the gradient of padded columns and of rows that do not count."""
        assert self.out_TV is not None
        self.out_TV[:, self.columns :].zero_()
        if self.index_N is not None:
            masked_T = torch.ones(len(self.out_TV), dtype=torch.bool, device=self.out_TV.device)
            masked_T[self.index_N] = False
            self.out_TV.index_fill_(0, masked_T.nonzero()[:, 0], 0.0)


def statistics(
    logits_TV: Tensor, problem: Problem, rule: GradientRule | None = None, out_TV: Tensor | None = None
) -> Stats:
    """This slice's statistics of the rows that count, in one pass.

    Args:
        logits_TV: Read only, unless it is ``out_TV``.
        problem: What to compute.
        rule: With the only slice of a vocabulary, the rule of the gradient to be written while a chunk is in the cache.
        out_TV: Where to, of the logits' shape and dtype: the logits themselves or another tensor.
    """
    chunks = _Chunks(logits_TV, out_TV, problem)
    parts: list[Stats] = []
    for lo, hi in chunks:
        z_CV = chunks.load(lo, hi)
        stats, sum_C1, sum_tempered_C1 = chunks.statistics(z_CV, lo, hi)
        parts.append(stats)
        if rule is None:
            continue
        part = rule.part(lo, hi)
        grad_CB, tempered_C1 = part.apply(stats, problem.objective)
        if tempered_C1 is not None and sum_tempered_C1 is not None:
            tempered_C1 = tempered_C1 / sum_tempered_C1.clamp(min=1.0)
        # A sum is at least 1, the largest column's share, or 0 where no column is off S: nothing is left to scale.
        off_C1 = grad_CB[:, -1:] / sum_C1.clamp_(min=1.0)
        chunks.store(z_CV, lo, hi, grad_CB[:, :-1], off_C1, tempered_C1, part.label_N1)
    if rule is not None:
        chunks.finish()
    if len(parts) == 1:
        return parts[0]
    whole = (None if tensors[0] is None else torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Stats(*whole)  # pyright: ignore[reportArgumentType]


def gradient(logits_TV: Tensor, problem: Problem, merged: Stats, rule: GradientRule, out_TV: Tensor) -> None:
    """Write this slice's gradient, by the statistics of the whole vocabulary, in a pass of its own.

    Args:
        logits_TV: Read only, unless it shares its storage with ``out_TV``.
        problem: What to compute.
        merged: Statistics after ``merge_stats``.
        rule: Rule of the gradient.
        out_TV: Where to, of the logits' shape and dtype.
    """
    grad_NB, tempered_N1 = rule.apply(merged, problem.objective)
    chunks = _Chunks(logits_TV, out_TV, problem)
    for lo, hi in chunks:
        z_CV = chunks.load(lo, hi)
        chunks.exponentials(z_CV, lo, hi, merged)
        tempered_C1 = None if tempered_N1 is None else tempered_N1[lo:hi]
        grad_CB = grad_NB[lo:hi]
        chunks.store(z_CV, lo, hi, grad_CB[:, :-1], grad_CB[:, -1:], tempered_C1, rule.label_N1[lo:hi])
    chunks.finish()
