"""The losses as functions of K + 1 buckets: the logits at the teacher's ids S, and the log-sum-exp over all others.

Every divergence here sees the student through these numbers alone, so its value and gradient are a few operations on
``[N, B]`` tensors, and its tail comes from a log-sum-exp, never from 1 - sum. To add one, write its terms and its
pull and name it in ``DIVERGENCES``.

Legend: N unmasked tokens, K teacher ids, B = K + 1 buckets, the last of them the tail.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_npd.choices import DivergenceName
from megatron_npd.ops.vocab_parallel import Stats


def _times(log_weight: Tensor, factor: Tensor) -> Tensor:
    """exp(log_weight) * factor, and 0 where the weight is 0, whatever the factor."""
    weight = log_weight.exp()
    return torch.where(weight > 0, weight * factor, 0.0)


def _mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share * p + (1 - share) * q), for 0 <= share < 1."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share)) if share else log_q


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    log_m = _mixture(log_p, log_q, beta)
    return beta * _times(log_p, log_p - log_m) + (1 - beta) * _times(log_q, log_q - log_m)


def _skew_kl_pull(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    return (skew - 1) * (log_p + (log_q - _mixture(log_p, log_q, skew))).exp()


def _skew_reverse_kl_pull(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    log_ratio = log_q - _mixture(log_q, log_p, skew)
    pull = log_q.exp() * log_ratio
    return pull - (math.log(skew) + log_ratio + log_q).exp() if skew else pull


class Divergence(NamedTuple):
    """A divergence of student q and teacher p, from their logarithms on the buckets and a coefficient.

    Attributes:
        terms: Its terms, to be summed over the buckets.
        pull: Each q times the derivative by it, with q taken as free, up to a number common to all derivatives. A
            product of its own because a tiny q may stand beside a derivative that no float holds.
        coefficient: Name of its coefficient among the losses' arguments; empty: it has none.
    """

    terms: Callable[[Tensor, Tensor, float], Tensor]
    pull: Callable[[Tensor, Tensor, float], Tensor]
    coefficient: Literal["", "beta", "skew"] = ""


# jsd: generalised Jensen-Shannon of GKD, beta KL(p | m) + (1 - beta) KL(q | m) with m = beta p + (1 - beta) q.
# skew_kl, skew_reverse_kl: of DistiLLM, KL(p | s p + (1 - s) q) and KL(q | (1 - s) p + s q).
DIVERGENCES: dict[DivergenceName, Divergence] = {
    "forward_kl": Divergence(
        terms=lambda log_p, log_q, _: _times(log_p, log_p - log_q),
        pull=lambda log_p, log_q, _: -log_p.exp(),
    ),
    "reverse_kl": Divergence(
        terms=lambda log_p, log_q, _: _times(log_q, log_q - log_p),
        pull=lambda log_p, log_q, _: log_q.exp() * (log_q - log_p),
    ),
    "jsd": Divergence(
        terms=_jsd,
        pull=lambda log_p, log_q, beta: (1 - beta) * log_q.exp() * (log_q - _mixture(log_p, log_q, beta)),
        coefficient="beta",
    ),
    "skew_kl": Divergence(
        terms=lambda log_p, log_q, skew: _times(log_p, log_p - _mixture(log_p, log_q, skew)),
        pull=_skew_kl_pull,
        coefficient="skew",
    ),
    "skew_reverse_kl": Divergence(
        terms=lambda log_p, log_q, skew: _times(log_q, log_q - _mixture(log_q, log_p, skew)),
        pull=_skew_reverse_kl_pull,
        coefficient="skew",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Weights and shape of the loss.

    Attributes:
        ce_weight: Weight of the cross-entropy.
        kd_weight: Weight of the divergence.
        divergence: A name in ``DIVERGENCES``.
        coefficient: The value of what the divergence names as its coefficient; 0 where it has none.
        student_on_ids: The student is renormalised over S too (``renorm_both``).
        temperature: Divides both sets of logits in the divergence, which is multiplied by its square.
        entropy: The student's entropy is wanted among the parts.
    """

    ce_weight: float
    kd_weight: float
    divergence: DivergenceName
    coefficient: float
    student_on_ids: bool
    temperature: float
    entropy: bool = False

    @property
    def second_lse(self) -> bool:
        """Whether the divergence needs the columns off S at a second temperature."""
        return self.temperature != 1.0 and not self.student_on_ids

    @property
    def linear(self) -> bool:
        """Whether the gradient is linear in the student's probabilities, as the forward KL's is."""
        return self.divergence == "forward_kl"

    def log_student(self, stats: Stats, log_q_NB: Tensor) -> Tensor:
        """Log-probabilities of the buckets as the divergence sees them, given those at temperature 1."""
        if self.temperature == 1.0 and not self.student_on_ids:
            return log_q_NB
        off_T = stats.lse_off_tempered_T
        buckets_NB = stats.buckets_TB / self.temperature
        buckets_NB[:, -1] = -torch.inf if off_T is None else off_T
        return log_softmax(buckets_NB)[0]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The unmasked tokens, and what is known of each beside its logits.

    Attributes:
        index_N: Their rows in the logits, int64, ascending; None when all count.
        labels_N: int64, in the whole vocabulary.
        ids_NK: Teacher's ids, int64, in the whole vocabulary; K = 0 without a teacher.
        log_target_NB: Log of the mass that the divergence gives to each bucket, fp32.
        weights_N: fp32, or None for ones.
    """

    index_N: Tensor | None
    labels_N: Tensor
    ids_NK: Tensor
    log_target_NB: Tensor
    weights_N: Tensor | None

    def part(self, lo: int, hi: int) -> Rows:
        """The ``lo``-th to ``hi``-th of these, in rows of their own."""
        return Rows(
            index_N=None,
            labels_N=self.labels_N[lo:hi],
            ids_NK=self.ids_NK[lo:hi],
            log_target_NB=self.log_target_NB[lo:hi],
            weights_N=None if self.weights_N is None else self.weights_N[lo:hi],
        )


class Losses(NamedTuple):
    """The loss of each token (weights included) and its parts (without weights), fp32 ``[N]`` each."""

    loss_N: Tensor
    ce_N: Tensor
    kd_N: Tensor
    student_mass_N: Tensor
    top1_agreement_N: Tensor
    label_logprob_N: Tensor
    entropy_N: Tensor


def log_softmax(buckets_NB: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the buckets, and their log-sum-exp: several times torch's speed on rows this narrow."""
    lse_N1 = buckets_NB.logsumexp(1, keepdim=True)
    return buckets_NB - lse_N1, lse_N1[:, 0]


def losses_of(stats: Stats, rows: Rows, objective: Objective) -> Losses:
    """Loss and parts of each token from the statistics of whole rows."""
    log_q_NB, lse_N = log_softmax(stats.buckets_TB)
    label_logprob_N = stats.label_T - lse_N
    kd_N = top1_N = student_mass_N = entropy_N = torch.zeros_like(lse_N)
    if rows.ids_NK.shape[1]:
        student_mass_N = -torch.expm1(log_q_NB[:, -1])
        largest_N = torch.maximum(stats.buckets_TB[:, :-1].amax(1), stats.max_off_T)
        top1_N = (stats.buckets_TB[:, 0] >= largest_N).float()
        divergence = DIVERGENCES[objective.divergence]
        log_s_NB = objective.log_student(stats, log_q_NB)
        kd_N = divergence.terms(rows.log_target_NB, log_s_NB, objective.coefficient).sum(1) * objective.temperature**2
    loss_N = torch.zeros_like(lse_N)
    if objective.ce_weight:  # a weight of 0 leaves an infinite part out
        loss_N = loss_N - label_logprob_N * objective.ce_weight
    if objective.kd_weight:
        loss_N = loss_N + kd_N * objective.kd_weight
    if rows.weights_N is not None:
        loss_N = loss_N * rows.weights_N
    if stats.mean_off_T is not None:
        mean_NB = torch.cat([stats.buckets_TB[:, :-1], stats.mean_off_T[:, None]], dim=1)
        entropy_N = lse_N - _times(log_q_NB, mean_NB).sum(1)
    return Losses(loss_N, -label_logprob_N, kd_N, student_mass_N, top1_N, label_logprob_N, entropy_N)


class GradientRule(NamedTuple):
    """What gives the gradient of the weighted loss with respect to the buckets once their logits are known.

    With q the softmax of the buckets and s the student as the divergence sees it, it is ``q_N1 * q + constant_NB``
    plus ``s_N1`` times either s or, where ``log_target_NB`` is there, the divergence's own gradient. The label adds
    ``label_N1`` to its own column where that is outside S. Most of it depends on no logit and is made once.
    """

    q_N1: Tensor
    s_N1: Tensor | None
    constant_NB: Tensor
    label_N1: Tensor
    log_target_NB: Tensor | None

    def scaled(self, factor_N: Tensor) -> GradientRule:
        """The rule of the loss times a factor for each token."""
        factor_N1 = factor_N[:, None]
        return self._replace(
            q_N1=self.q_N1 * factor_N1,
            s_N1=None if self.s_N1 is None else self.s_N1 * factor_N1,
            constant_NB=self.constant_NB * factor_N1,
            label_N1=self.label_N1 * factor_N1,
        )

    def part(self, lo: int, hi: int) -> GradientRule:
        """The rule of the tokens ``lo`` to ``hi``."""
        return GradientRule(
            self.q_N1[lo:hi],
            None if self.s_N1 is None else self.s_N1[lo:hi],
            self.constant_NB[lo:hi],
            self.label_N1[lo:hi],
            None if self.log_target_NB is None else self.log_target_NB[lo:hi],
        )

    def apply(self, stats: Stats, objective: Objective) -> tuple[Tensor, Tensor | None]:
        """The gradient with respect to the buckets and, apart, to a second temperature's log-sum-exp off S."""
        if self.s_N1 is None:  # for the few rows of a chunk torch's own softmax is quicker than log_softmax above
            return torch.addcmul(self.constant_NB, torch.softmax(stats.buckets_TB, dim=1), self.q_N1), None
        log_q_NB = log_softmax(stats.buckets_TB)[0]
        log_s_NB = objective.log_student(stats, log_q_NB)
        grad_NB = torch.addcmul(self.constant_NB, log_q_NB.exp(), self.q_N1)
        s_NB = log_s_NB.exp()
        if self.log_target_NB is not None:
            pull_NB = DIVERGENCES[objective.divergence].pull(self.log_target_NB, log_s_NB, objective.coefficient)
            pull_NB = torch.where(log_s_NB > -torch.inf, pull_NB, 0.0)
            s_NB = pull_NB - s_NB * pull_NB.sum(1, keepdim=True)
        s_NB.mul_(self.s_N1)
        if not objective.second_lse:
            return grad_NB.add_(s_NB), None
        tempered_N1 = s_NB[:, -1:].clone()
        s_NB[:, -1] = 0.0
        return grad_NB.add_(s_NB), tempered_N1


def gradient_rule(rows: Rows, objective: Objective) -> GradientRule:
    """The rule of each token's gradient."""
    ce, kd = objective.ce_weight, objective.kd_weight * objective.temperature  # T^2 times 1 / T
    hit_NK = rows.ids_NK == rows.labels_N[:, None]
    target_NB = rows.log_target_NB.exp()
    # The label's share joins its bucket where the label is in S: merged here, so that no column is stored twice.
    label_N1 = hit_NK.any(1, keepdim=True) * ce - ce
    q_N1, s_N1, log_target_NB = torch.full_like(label_N1, ce), None, None
    if objective.linear:
        constant_NB = target_NB * -kd
        mass_N1 = target_NB.sum(1, keepdim=True) * kd
        if objective.student_on_ids or objective.temperature != 1.0:
            s_N1 = mass_N1
        else:
            q_N1 += mass_N1
    else:
        constant_NB = torch.zeros_like(target_NB)
        s_N1, log_target_NB = torch.full_like(label_N1, kd), rows.log_target_NB
    constant_NB[:, :-1] -= hit_NK * ce
    rule = GradientRule(q_N1, s_N1, constant_NB, label_N1, log_target_NB)
    return rule if rows.weights_N is None else rule.scaled(rows.weights_N)
