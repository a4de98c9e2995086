"""The distillation loss in plain torch: chunks of rows through one fp32 scratch buffer, for CPU, GPU and NPU alike.

Every objective sees the logits through K + 1 buckets: the K logits at the teacher's ids S and the log-sum-exp over all
other columns. A gradient with respect to the buckets spreads over the columns as ``G_k`` on S and
``G_off * exp(z - lse_off)`` off S, so one pass serves all of them and a tail is never formed as 1 - sum.

Legend: T tokens, N tokens that count (mask 1), V columns of this rank's slice, K teacher ids, B = K + 1 buckets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_npd.ops.vocab_parallel import Stats, VocabShard, merge_stats

CHUNK_ELEMENTS = 1 << 20
"""Elements of the fp32 scratch buffer: 4 MiB stay in a core's cache between the passes over a chunk."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The tokens that count, and what is known of each beside its logits.

    Attributes:
        index_N: Their rows in the logits, int64, ascending; None when all count.
        labels_N: int64, in the whole vocabulary.
        ids_NK: Teacher's ids, int64, in the whole vocabulary; K = 0 without a teacher.
        target_NB: Teacher's mass on each bucket, fp32.
        log_target_NB: Its logarithm, at the temperature of the loss.
        weights_N: fp32, or None for ones.
    """

    index_N: Tensor | None
    labels_N: Tensor
    ids_NK: Tensor
    target_NB: Tensor
    log_target_NB: Tensor
    weights_N: Tensor | None

    def part(self, lo: int, hi: int) -> Rows:
        """The tokens ``lo`` to ``hi`` of these."""
        return Rows(
            index_N=None,
            labels_N=self.labels_N[lo:hi],
            ids_NK=self.ids_NK[lo:hi],
            target_NB=self.target_NB[lo:hi],
            log_target_NB=self.log_target_NB[lo:hi],
            weights_N=None if self.weights_N is None else self.weights_N[lo:hi],
        )


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Weights and shape of the loss.

    Attributes:
        ce_weight: Weight of the cross-entropy.
        kd_weight: Weight of the divergence.
        student_on_ids: The student is renormalised over S too (``renorm_both``).
        temperature: Divides both sets of logits in the divergence, which is multiplied by its square.
    """

    ce_weight: float
    kd_weight: float
    student_on_ids: bool
    temperature: float

    @property
    def second_lse(self) -> bool:
        """Whether the divergence needs the columns off S at a second temperature."""
        return self.temperature != 1.0 and not self.student_on_ids


class Losses(NamedTuple):
    """The loss of each token (weights included) and its parts (without weights), fp32 ``[N]`` each."""

    loss_N: Tensor
    ce_N: Tensor
    kd_N: Tensor
    student_mass_N: Tensor
    top1_agreement_N: Tensor
    label_logprob_N: Tensor


class BucketGrad(NamedTuple):
    """Gradient of the weighted loss with respect to the buckets: on S, off S, and what the label adds off S."""

    ids_NK: Tensor
    off_N: Tensor
    off_tempered_N: Tensor | None
    label_N: Tensor

    def scaled(self, factor_N: Tensor) -> BucketGrad:
        """The gradient times a number for each token."""
        tempered_N = None if self.off_tempered_N is None else self.off_tempered_N * factor_N
        return BucketGrad(self.ids_NK * factor_N[:, None], self.off_N * factor_N, tempered_N, self.label_N * factor_N)

    def over(self, sum_N: Tensor, sum_tempered_N: Tensor | None) -> BucketGrad:
        """The gradient off S for one unit of the exponentials that add up to these sums; nothing off S, no gradient."""
        tempered_N = self.off_tempered_N
        if tempered_N is not None and sum_tempered_N is not None:
            tempered_N = torch.where(sum_tempered_N == 0, 0.0, tempered_N / sum_tempered_N)
        return self._replace(off_N=torch.where(sum_N == 0, 0.0, self.off_N / sum_N), off_tempered_N=tempered_N)

    def part(self, lo: int, hi: int) -> BucketGrad:
        """The gradient of the tokens ``lo`` to ``hi``."""
        tempered_N = None if self.off_tempered_N is None else self.off_tempered_N[lo:hi]
        return BucketGrad(self.ids_NK[lo:hi], self.off_N[lo:hi], tempered_N, self.label_N[lo:hi])


def head(stats: Stats, rows: Rows, objective: Objective) -> tuple[Losses, BucketGrad]:
    """Loss, parts and gradient from the statistics of whole rows: a few ``[N, B]`` tensors, no vocabulary."""
    top_k = rows.ids_NK.shape[1]
    temperature = objective.temperature
    z_NB = torch.cat([stats.logits_TK, stats.lse_off_T[:, None]], dim=1)
    lse_N1 = torch.logsumexp(z_NB, dim=1, keepdim=True)
    log_q_NB = z_NB - lse_N1
    q_NB = log_q_NB.exp()
    label_logprob_N = stats.label_T - lse_N1[:, 0]

    kd_N = top1_N = torch.zeros_like(label_logprob_N)
    loss_N = label_logprob_N * -objective.ce_weight if objective.ce_weight else kd_N
    grad_NB = q_NB * objective.ce_weight
    grad_label_N = torch.full_like(kd_N, -objective.ce_weight)
    off_tempered_N = None
    if top_k:
        log_s_NB, s_NB = log_q_NB, q_NB  # the student as the divergence sees it
        if objective.student_on_ids or temperature != 1.0:
            off_N = stats.lse_off_tempered_T
            off_N = torch.full_like(kd_N, -torch.inf) if off_N is None else off_N
            log_s_NB = torch.cat([stats.logits_TK / temperature, off_N[:, None]], dim=1).log_softmax(dim=1)
            s_NB = log_s_NB.exp()
        target_NB = rows.target_NB
        kd_N = torch.where(target_NB > 0, target_NB * (rows.log_target_NB - log_s_NB), 0.0).sum(1) * temperature**2
        if objective.kd_weight:
            loss_N = loss_N + kd_N * objective.kd_weight
            grad_kd_NB = (s_NB * target_NB.sum(1, keepdim=True) - target_NB) * (objective.kd_weight * temperature)
            if objective.second_lse:
                off_tempered_N = grad_kd_NB[:, top_k].clone()
                grad_kd_NB[:, top_k] = 0.0
            grad_NB = grad_NB + grad_kd_NB
        # The label's share joins its bucket where the label is in S, and its own column elsewhere: merged here, so
        # that no column is stored twice.
        hit_NK = rows.ids_NK == rows.labels_N[:, None]
        grad_NB[:, :top_k] -= hit_NK * objective.ce_weight
        grad_label_N = grad_label_N.masked_fill(hit_NK.any(1), 0.0)
        largest_N = torch.maximum(stats.logits_TK.amax(1), stats.max_off_T)
        top1_N = (stats.logits_TK[:, 0] >= largest_N).float()
    grad = BucketGrad(grad_NB[:, :top_k], grad_NB[:, top_k], off_tempered_N, grad_label_N)
    if rows.weights_N is not None:
        loss_N = loss_N * rows.weights_N
        grad = grad.scaled(rows.weights_N)
    student_mass_N = q_NB[:, :top_k].sum(1)
    return Losses(loss_N, -label_logprob_N, kd_N, student_mass_N, top1_N, label_logprob_N), grad


def _exp(z: Tensor, shift_N: Tensor) -> Tensor:
    """Turn ``z`` into exp(z - shift) in place; a row of -inf, whose shift is -inf too, gives zeros."""
    return z.sub_(shift_N.clamp(min=torch.finfo(z.dtype).min)[:, None]).exp_()


def _cat(stats: list[Stats]) -> Stats:
    columns = zip(*stats, strict=True)
    return Stats(*(torch.cat(tensors) if tensors[0] is not None else None for tensors in columns))  # pyright: ignore


class _Chunks:
    """The logits by chunks of the rows that count, each loaded into one fp32 buffer.

    The buffer is one spare column wider than the slice: ids owned elsewhere meet -inf there (``VocabShard.local``).
    """

    def __init__(self, logits_TV: Tensor, rows: Rows, objective: Objective, shard: VocabShard):
        self.logits_TV, self.columns = logits_TV, shard.columns
        self.labels_N1, self.ids_NK = shard.local(rows.labels_N)[:, None], shard.local(rows.ids_NK)
        self.picked_NB = torch.cat([self.labels_N1, self.ids_NK], dim=1)
        self.num_rows = rows.labels_N.shape[0]
        self.index_N = rows.index_N
        self.index = None if rows.index_N is None else rows.index_N.tolist()
        self.scale = 1 / objective.temperature
        self.height = max(1, min(self.num_rows, CHUNK_ELEMENTS // (self.columns + 1)))
        shape = (self.height, self.columns + 1)
        self.buffer = torch.empty(shape, dtype=torch.float32, device=logits_TV.device)
        self.tempered = torch.empty_like(self.buffer) if objective.second_lse else None

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for lo in range(0, max(self.num_rows, 1), self.height):  # one empty chunk where no row counts
            yield lo, min(lo + self.height, self.num_rows)

    def _where(self, lo: int, hi: int) -> slice | Tensor:
        """Rows of the logits: a slice, which needs no gather, where they follow one another."""
        if self.index is None or self.index_N is None or lo == hi:
            return slice(lo, hi)
        first, last = self.index[lo], self.index[hi - 1]
        return slice(first, last + 1) if last - first == hi - lo - 1 else self.index_N[lo:hi]

    def load(self, lo: int, hi: int) -> tuple[Tensor, Tensor | None]:
        """The chunk's logits in fp32, and the room for them at the second temperature."""
        z = self.buffer[: hi - lo]
        z[:, : self.columns].copy_(self.logits_TV[self._where(lo, hi)][:, : self.columns])
        z[:, self.columns] = -torch.inf
        return z, None if self.tempered is None else self.tempered[: hi - lo]

    def statistics(self, lo: int, hi: int) -> tuple[Stats, Tensor, Tensor | None]:
        """Statistics of a chunk and the sums over columns of what the buffers hold afterwards.

        That is exp(z - largest), with 0 on S.
        """
        z, tempered = self.load(lo, hi)
        picked = z.gather(1, self.picked_NB[lo:hi])
        z.scatter_(1, self.ids_NK[lo:hi], -torch.inf)
        max_off_N = z.amax(1)
        sum_tempered_N = lse_tempered_N = None
        if tempered is not None:
            torch.mul(z, self.scale, out=tempered)
            sum_tempered_N = _exp(tempered, max_off_N * self.scale).sum(1)
            lse_tempered_N = max_off_N * self.scale + sum_tempered_N.log()
        sum_N = _exp(z, max_off_N).sum(1)
        stats = Stats(max_off_N + sum_N.log(), max_off_N, picked[:, 0], picked[:, 1:], lse_tempered_N)
        return stats, sum_N, sum_tempered_N

    def exponentials(self, lo: int, hi: int, merged: Stats) -> None:
        """Fill the buffers with the student's share of each column in the columns off S, from merged statistics."""
        z, tempered = self.load(lo, hi)
        if tempered is not None and merged.lse_off_tempered_T is not None:
            torch.mul(z, self.scale, out=tempered)
            _exp(tempered, merged.lse_off_tempered_T[lo:hi])
        _exp(z, merged.lse_off_T[lo:hi])

    def store(self, out_TV: Tensor, lo: int, hi: int, grad: BucketGrad) -> None:
        """Write a chunk's gradient: ``grad.off_N`` times the buffer's columns off S, on S ``grad.ids_NK``."""
        z = self.buffer[: hi - lo]
        z.mul_(grad.off_N[:, None])
        if self.tempered is not None and grad.off_tempered_N is not None:
            z.add_(self.tempered[: hi - lo].mul_(grad.off_tempered_N[:, None]))
        z.scatter_(1, self.ids_NK[lo:hi], grad.ids_NK)
        z.scatter_add_(1, self.labels_N1[lo:hi], grad.label_N[:, None])
        where = self._where(lo, hi)
        if isinstance(where, slice):
            out_TV[where, : self.columns].copy_(z[:, : self.columns])
        else:
            out_TV[:, : self.columns].index_copy_(0, where, z[:, : self.columns].to(out_TV.dtype))

    def store_zeros(self, out_TV: Tensor) -> None:
        """Zero the gradient of padded columns and of rows that do not count."""
        out_TV[:, self.columns :].zero_()
        if self.index_N is not None:
            counts_T = torch.zeros(len(out_TV), dtype=torch.bool, device=out_TV.device)
            counts_T[self.index_N] = True
            out_TV.index_fill_(0, (~counts_T).nonzero()[:, 0], 0.0)


class DistillLossFunction(torch.autograd.Function):
    """Loss and parts of the rows that count, in the order of ``Losses``.

    With one slice the gradient is computed in the forward, chunk by chunk while the chunk is in the cache; with
    several it waits for the exchange, so the backward reads the logits a second time. Either way it is written into
    the logits' own storage if ``inplace``. The storage's version counter moves with it, so autograd refuses, rather
    than computes, a gradient that would need the logits' old values.
    """

    @staticmethod
    def forward(
        ctx, logits_TV: Tensor, rows: Rows, objective: Objective, shard: VocabShard, inplace: bool, needs_grad: bool
    ) -> tuple[Tensor, ...]:
        chunks = _Chunks(logits_TV, rows, objective, shard)
        if shard.size == 1:
            out_TV = (logits_TV if inplace else torch.empty_like(logits_TV)) if needs_grad else None
            parts: list[Losses] = []
            for lo, hi in chunks:
                stats, sum_N, sum_tempered_N = chunks.statistics(lo, hi)
                losses, grad = head(stats, rows.part(lo, hi), objective)
                parts.append(losses)
                if out_TV is not None:
                    grad = grad.over(sum_N, sum_tempered_N)
                    chunks.store(out_TV, lo, hi, grad)
            losses = Losses(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
            if out_TV is not None:
                chunks.store_zeros(out_TV)
                ctx.save_for_backward(out_TV)
        else:
            stats = _cat([chunks.statistics(lo, hi)[0] for lo, hi in chunks])
            stats = merge_stats(stats, rows.ids_NK, shard)
            losses, grad = head(stats, rows, objective)
            ctx.save_for_backward(logits_TV)
            ctx.deferred = stats, grad
        ctx.rows, ctx.objective, ctx.shard, ctx.inplace = rows, objective, shard, inplace
        ctx.mark_non_differentiable(*losses[1:])
        ctx.set_materialize_grads(False)
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None):
        rows, (saved_TV,) = ctx.rows, ctx.saved_tensors
        grad_N = grads[0]
        if grad_N is None:
            return (None,) * 6
        if ctx.shard.size == 1:
            out_TV = saved_TV.detach()
            # A summed loss has a gradient of ones: no pass over the logits then.
            if not bool((grad_N == 1).all()):
                if rows.index_N is not None:
                    grad_N = torch.ones_like(out_TV[:, 0], dtype=torch.float32).index_copy_(0, rows.index_N, grad_N)
                out_TV.mul_(grad_N[:, None])
        else:
            out_TV = saved_TV.detach() if ctx.inplace else torch.empty_like(saved_TV)
            chunks = _Chunks(saved_TV, rows, ctx.objective, ctx.shard)
            stats, grad = ctx.deferred
            grad = grad.scaled(grad_N)
            for lo, hi in chunks:
                chunks.exponentials(lo, hi, stats)
                chunks.store(out_TV, lo, hi, grad.part(lo, hi))
            chunks.store_zeros(out_TV)
        return out_TV, None, None, None, None, None
