"""The distillation loss: (1 - alpha) * cross-entropy + alpha * divergence from the teacher's top-k (METHOD section 2).

One pass over the logits, gradient in their own storage, vocabulary parallel with one all-gather. Nothing here depends
on the rest of the package but its error class.

Legend: T tokens, V columns of this rank's vocabulary slice, K teacher ids per token, N unmasked tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_npd.ops import distill_loss_torch
from megatron_npd.ops.arguments import LossOptions, Problem, make_problem, refuse
from megatron_npd.ops.divergences import Losses, gradient_rule, losses_of
from megatron_npd.ops.implementation import Impl, use_triton
from megatron_npd.ops.vocab_parallel import merge_stats


@dataclass(frozen=True, kw_only=True)
class DistillLoss:
    """The loss of each token and its parts, all fp32 ``[T]`` and 0 where masked; only ``loss_T`` has a gradient.

    Attributes:
        loss_T: Weighted loss, unreduced, in nats.
        ce_T: Cross-entropy at the label, in nats.
        kd_T: The divergence, in nats, times the temperature's square; 0 without a teacher.
        teacher_mass_T: Teacher's probability of its own top-k.
        student_mass_T: Student's probability of the teacher's top-k.
        top1_agreement_T: 1 where the teacher's first id has the student's largest logit, else 0.
        label_logprob_T: Student's log-probability of the label.
        entropy_T: Student's entropy over the whole vocabulary, in nats; 0 unless it is asked for.
    """

    loss_T: Tensor
    ce_T: Tensor
    kd_T: Tensor
    teacher_mass_T: Tensor
    student_mass_T: Tensor
    top1_agreement_T: Tensor
    label_logprob_T: Tensor
    entropy_T: Tensor


def as_distill_loss(problem: Problem, losses: Losses) -> DistillLoss:
    """The unmasked tokens among zeros for the masked ones."""
    return DistillLoss(
        loss_T=problem.whole(losses.loss_N),
        ce_T=problem.whole(losses.ce_N),
        kd_T=problem.whole(losses.kd_N),
        teacher_mass_T=problem.whole(problem.teacher_mass_N),
        student_mass_T=problem.whole(losses.student_mass_N),
        top1_agreement_T=problem.whole(losses.top1_agreement_N),
        label_logprob_T=problem.whole(losses.label_logprob_N),
        entropy_T=problem.whole(losses.entropy_N),
    )


def distill_loss(
    logits_TV: Tensor,
    labels_T: Tensor,
    *,
    impl: Impl = "auto",
    inplace: bool = True,
    **options: Unpack[LossOptions],
) -> DistillLoss:
    """Cross-entropy and top-k distillation of each token in one pass over the logits.

    With p the teacher's and q the student's probabilities, S the teacher's top-k ids, t_p and t_q the masses outside
    S and ~ a renormalisation over S, the forward KL is by ``mode``:

    - ``tail``: sum_S p log(p/q) + t_p log(t_p/t_q)
    - ``truncated``: sum_S p log(p/q)
    - ``renorm_teacher``: sum_S p~ log(p~/q)
    - ``renorm_both``: sum_S p~ log(p~/q~)

    The other divergences compare the same distributions, over S and the tail (``tail``) or over S (``renorm_both``):

    - ``reverse_kl``: KL(q | p)
    - ``jsd``: beta KL(p | m) + (1 - beta) KL(q | m) with m = beta p + (1 - beta) q (GKD)
    - ``skew_kl``: KL(p | skew p + (1 - skew) q); ``skew_reverse_kl``: KL(q | (1 - skew) p + skew q) (DistiLLM)

    Args:
        logits_TV: ``[T, V]`` fp32, bf16 or fp16: this rank's slice of the vocabulary's columns.
        labels_T: ``[T]`` integer ids of the next tokens, in the whole vocabulary.
        teacher_ids_TK: ``[T, K]`` distinct integer ids, most probable first. Without the teacher's three tensors
            ``alpha`` must be 0 and the loss is plain cross-entropy.
        teacher_logprobs_TK: ``[T, K]`` their log-probabilities under the teacher's full vocabulary, descending.
        teacher_log_tail_T: ``[T]`` log of the teacher's mass outside the top-k; needed by ``tail`` unless K is the
            whole vocabulary.
        mask_T: ``[T]`` bool or number: tokens that are 0 have loss 0 and gradient 0, and nothing of them is read, be
            it NaN or an id out of range. Default: all count.
        weights_T: ``[T]`` weights of the tokens' losses.
        alpha: Share of the divergence, in [0, 1]; 0.9 by default.
        mode: See above; ``tail`` by default.
        divergence: See above; ``forward_kl`` by default.
        beta: Teacher's share of the mixture in ``jsd``, in (0, 1); 0.5 by default.
        skew: Share of the first distribution in the second one of ``skew_kl`` and ``skew_reverse_kl``, in [0, 1);
            0.1 by default.
        temperature: Divides both sets of logits of the divergence, which is multiplied by its square; other than 1
            for the renormalised modes only, as the stored top-k has the tail at 1.
        entropy: Give the student's entropy too, from the same pass.
        vocab_size: Size of the whole vocabulary; columns at and after it are padding, outside the softmax, and get
            gradient 0. Default: no padding.
        group: Tensor-parallel group whose ranks hold the slices in order, each with all other arguments whole.
        impl: ``torch``, ``triton`` (CUDA) or ``auto``: Triton where it can run.
        inplace: Write the gradient into ``logits_TV``'s storage (in the forward or in the backward): no second tensor
            of that size, and the logits are gone. Nothing is written when no gradient is wanted. One backward a
            forward.

    Returns:
        Loss and parts of each token; the same bits on every rank of ``group``.

    Raises:
        UserError: An argument breaks a rule above; before anything is computed or written.
    """
    _check_logits(logits_TV, labels_T)
    kernels = implementation(impl, logits_TV.device)
    problem = make_problem(logits_TV.shape[1], labels_T, **options)
    needs_grad = torch.is_grad_enabled() and logits_TV.requires_grad
    return as_distill_loss(problem, Losses(*_DistillLoss.apply(logits_TV, problem, kernels, inplace, needs_grad)))


def implementation(impl: Impl, device: torch.device) -> ModuleType:
    """The module whose ``statistics`` and ``gradient`` read and write logits on ``device``."""
    if not use_triton(impl, device):
        return distill_loss_torch
    from megatron_npd.ops import distill_loss_triton

    return distill_loss_triton


def _check_logits(logits_TV: Tensor, labels_T: Tensor) -> None:
    if logits_TV.dim() != 2 or logits_TV.shape[1] == 0:
        refuse("logits_TV", "of shape [T, V]", list(logits_TV.shape), "flatten batch and sequence into T")
    if logits_TV.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        refuse("logits_TV", "float32, bfloat16 or float16", logits_TV.dtype, "convert it")
    if labels_T.shape != (len(logits_TV),):
        rule = f"of shape [{len(logits_TV)}], as logits_TV has rows"
        refuse("labels_T", rule, list(labels_T.shape), "flatten it to [T]")


class _DistillLoss(torch.autograd.Function):
    """Losses of the rows that count, in the order of ``Losses``.

    In torch, with one slice, the gradient is computed in the forward, while a chunk of rows is in the cache. Several
    slices wait for the exchange, and Triton's rows have left the cache anyway: the backward reads the logits per second
    time, and needs no further pass for the factor of each token. Either way the gradient is written into the logits'
    own storage if ``inplace``. The storage's version counter moves with it, so autograd refuses, rather than computes,
    a gradient that would need the logits' old values.
    """

    @staticmethod
    def forward(
        ctx, logits_TV: Tensor, problem: Problem, kernels: ModuleType, inplace: bool, needs_grad: bool
    ) -> tuple[Tensor, ...]:
        rows, objective, shard = problem.rows, problem.objective, problem.shard
        rule = gradient_rule(rows, objective) if needs_grad else None
        ctx.at_once = kernels is distill_loss_torch and shard.size == 1
        if ctx.at_once:
            out_TV = (logits_TV if inplace else torch.empty_like(logits_TV)) if needs_grad else None
            stats = kernels.statistics(logits_TV, problem, rule, out_TV)
            if out_TV is not None:
                ctx.save_for_backward(out_TV)
        else:
            stats = kernels.statistics(logits_TV, problem)
            if shard.size > 1:
                stats = merge_stats(stats, rows.ids_NK, shard)
            ctx.save_for_backward(logits_TV)
            ctx.stats, ctx.rule = stats, rule
        ctx.problem, ctx.kernels, ctx.inplace = problem, kernels, inplace
        losses = losses_of(stats, rows, objective)
        ctx.mark_non_differentiable(*losses[1:])
        ctx.set_materialize_grads(False)
        return tuple(losses)

    @staticmethod
    @once_differentiable  # whose type makes ctx positional, unlike its base's
    def backward(ctx, *grads: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        problem: Problem = ctx.problem
        (saved_TV,), grad_N = ctx.saved_tensors, grads[0]
        if grad_N is None:
            return (None,) * 5
        if not ctx.at_once:
            out_TV = saved_TV.detach() if ctx.inplace else torch.empty_like(saved_TV)
            ctx.kernels.gradient(saved_TV, problem, ctx.stats, ctx.rule.scaled(grad_N), out_TV)
            return out_TV, None, None, None, None
        out_TV = saved_TV.detach()
        # A summed loss has a gradient of ones: no pass over the logits then.
        if not bool((grad_N == 1).all()):
            out_TV.mul_(problem.whole(grad_N)[:, None])
        return out_TV, None, None, None, None
