"""The distillation loss fused with the language model's head: hidden states in, the logits never whole.

Chunks of tokens go through the head, the loss and, where a gradient is wanted, straight back: the logits' gradient
replaces the chunk's logits and is multiplied with the head and the hidden states while it is there. The backward only
scales what the forward found, and only it adds to the weight's gradient, so that an evaluation or a recomputation
leaves no trace.

Legend: T tokens, N unmasked tokens, C tokens of a chunk, V columns of this rank's vocabulary slice, H hidden.
"""

from __future__ import annotations

from types import ModuleType
from typing import Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_npd.ops.arguments import LossOptions, Problem, make_problem, refuse
from megatron_npd.ops.distill_loss import DistillLoss, as_distill_loss, implementation
from megatron_npd.ops.divergences import Losses, gradient_rule, losses_of
from megatron_npd.ops.implementation import Impl
from megatron_npd.ops.vocab_parallel import VocabShard, merge_stats

CHUNK_ELEMENTS = 1 << 29
"""Logits of a chunk on a device, 1 GiB in bf16: each chunk reads the head and adds to its fp32 gradient, whole, however
few its rows."""
CPU_CHUNK_ELEMENTS = 1 << 25
"""The same on a CPU, 128 MiB in fp32."""
WEIGHT_BLOCK = 1 << 14
"""Columns whose weight gradient is formed at once, before it is added up in fp32."""


def distill_linear_loss(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    *,
    sequence_parallel: bool = False,
    impl: Impl = "auto",
    **options: Unpack[LossOptions],
) -> tuple[Tensor, DistillLoss]:
    """The sum of ``distill_loss`` over the tokens of ``hidden_TH @ weight_VH.T``, without these logits.

    Args:
        hidden_TH: ``[T, H]`` fp32, bf16 or fp16 hidden states. With several slices of the vocabulary they are the same
            on every rank and their gradient is summed over the ranks, as a column-parallel layer does.
        weight_VH: ``[V, H]`` of the same dtype: this rank's slice of the head, its own or the embedding's. Where it
            has a ``main_grad``, its gradient is added there in fp32 as Megatron's fused accumulation does.
        labels_T: ``[T]`` integer ids of the next tokens, in the whole vocabulary.
        sequence_parallel: ``hidden_TH`` is this rank's ``T / R`` tokens: gathered over ``group`` before, its gradient
            reduced and scattered after. All other tensors are whole.
        impl: As of ``distill_loss``.
        options: As of ``distill_loss``.

    Returns:
        The sum of the losses, a scalar with a gradient, and the losses and parts of each token without one.

    Raises:
        UserError: An argument breaks a rule; before anything is computed.
    """
    kernels = implementation(impl, hidden_TH.device)
    problem = _make_problem(hidden_TH, weight_VH, labels_T, sequence_parallel, options)
    grad_mode = torch.is_grad_enabled()
    needs = (grad_mode and hidden_TH.requires_grad, grad_mode and weight_VH.requires_grad)
    loss, *losses = _DistillLinear.apply(hidden_TH, weight_VH, problem, kernels, sequence_parallel, *needs)
    return loss, as_distill_loss(problem, Losses(*losses))


def _make_problem(
    hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, sequence_parallel: bool, options: LossOptions
) -> Problem:
    if hidden_TH.dim() != 2 or hidden_TH.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        got = f"{hidden_TH.dtype} {list(hidden_TH.shape)}"
        refuse("hidden_TH", "float32, bfloat16 or float16 of shape [T, H]", got, "flatten batch and sequence into T")
    if weight_VH.dim() != 2 or weight_VH.shape[1] != hidden_TH.shape[1] or weight_VH.dtype != hidden_TH.dtype:
        got = f"{weight_VH.dtype} {list(weight_VH.shape)}"
        rule = f"{hidden_TH.dtype} of shape [V, {hidden_TH.shape[1]}], as hidden_TH is"
        refuse("weight_VH", rule, got, "give the head's weight as the linear layer has it")
    group = options.get("group")
    parts = dist.get_world_size(group) if sequence_parallel and group is not None else 1
    if labels_T.shape != (len(hidden_TH) * parts,):
        rule = f"of shape [{len(hidden_TH) * parts}], as hidden_TH has rows on all ranks"
        refuse("labels_T", rule, list(labels_T.shape), "flatten it to [T]")
    return make_problem(len(weight_VH), labels_T, **options)


class _DistillLinear(torch.autograd.Function):
    """The summed loss and, without gradient, the fields of ``Losses`` of the unmasked tokens."""

    @staticmethod
    def forward(
        ctx,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        problem: Problem,
        kernels: ModuleType,
        sequence_parallel: bool,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> tuple[Tensor, ...]:
        shard, rows = problem.shard, problem.rows
        if sequence_parallel and shard.size > 1:
            hidden_TH = _gather(hidden_TH, shard)
        hidden_NH = hidden_TH if rows.index_N is None else hidden_TH.index_select(0, rows.index_N)
        grad_hidden_NH = torch.empty_like(hidden_NH) if needs_hidden else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        elements = CPU_CHUNK_ELEMENTS if weight_VH.is_cpu else CHUNK_ELEMENTS
        height = max(1, elements // len(weight_VH))
        parts: list[Losses] = []
        for lo in range(0, max(len(hidden_NH), 1), height):
            hidden_CH = hidden_NH[lo : lo + height]
            logits_CV = hidden_CH @ weight_VH.t()
            parts.append(_chunk(logits_CV, problem.part(lo, lo + height), kernels, needs_hidden or needs_weight))
            if grad_hidden_NH is not None:
                torch.mm(logits_CV, weight_VH, out=grad_hidden_NH[lo : lo + height])
            if grad_weight_VH is not None:
                _accumulate(grad_weight_VH, logits_CV, hidden_CH)
        ctx.save_for_backward(grad_hidden_NH, grad_weight_VH)
        # The weight itself, not saved: what a checkpointed region gives back has no main_grad.
        ctx.weight_VH, ctx.problem, ctx.sequence_parallel = weight_VH, problem, sequence_parallel
        losses = Losses(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        ctx.mark_non_differentiable(*losses)
        ctx.set_materialize_grads(False)
        return losses.loss_N.sum(), *losses

    @staticmethod
    @once_differentiable  # whose type makes ctx positional, unlike its base's
    def backward(ctx, *grads: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden_NH, grad_weight_VH = ctx.saved_tensors
        problem, scale = ctx.problem, grads[0]
        if scale is None:
            return (None,) * 7
        grad_hidden_TH = None
        if grad_hidden_NH is not None:
            grad_hidden_TH = _reduce(grad_hidden_NH * scale.to(grad_hidden_NH.dtype), problem, ctx.sequence_parallel)
        grad_weight = None if grad_weight_VH is None else _weight_gradient(ctx.weight_VH, grad_weight_VH, scale)
        return grad_hidden_TH, grad_weight, None, None, None, None, None


def _chunk(logits_CV: Tensor, problem: Problem, kernels: ModuleType, needs_grad: bool) -> Losses:
    """Losses of a chunk, whose logits become their gradient if that is wanted."""
    rows, objective, shard = problem.rows, problem.objective, problem.shard
    rule = gradient_rule(rows, objective) if needs_grad else None
    if shard.size == 1:
        stats = kernels.statistics(logits_CV, problem, rule, logits_CV if needs_grad else None)
    else:
        stats = merge_stats(kernels.statistics(logits_CV, problem), rows.ids_NK, shard)
        if rule is not None:
            kernels.gradient(logits_CV, problem, stats, rule, logits_CV)
    return losses_of(stats, rows, objective)


def _accumulate(grad_weight_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor) -> None:
    """Add the chunk's share of the weight's gradient in fp32."""
    if grad_CV.dtype == torch.float32:
        grad_weight_VH.addmm_(grad_CV.t(), hidden_CH)
        return
    for block_VH, block_CV in zip(grad_weight_VH.split(WEIGHT_BLOCK), grad_CV.split(WEIGHT_BLOCK, dim=1), strict=True):
        block_VH.add_(block_CV.t() @ hidden_CH)


def _gather(hidden_TH: Tensor, shard: VocabShard) -> Tensor:
    """All ranks' tokens in rank order."""
    gathered = hidden_TH.new_empty(shard.size, *hidden_TH.shape)
    dist.all_gather(list(gathered.unbind(0)), hidden_TH.contiguous(), group=shard.group)
    return gathered.flatten(0, 1)


def _reduce(grad_NH: Tensor, problem: Problem, sequence_parallel: bool) -> Tensor:
    """The hidden states' gradient, summed over the slices of the vocabulary and spread over all tokens."""
    index_N, shard = problem.rows.index_N, problem.shard
    if index_N is None:
        grad_TH = grad_NH
    else:
        grad_TH = grad_NH.new_zeros(problem.num_tokens, grad_NH.shape[1]).index_copy_(0, index_N, grad_NH)
    if shard.size == 1:
        return grad_TH
    if not sequence_parallel:
        dist.all_reduce(grad_TH, group=shard.group)
        return grad_TH
    mine_TH = torch.empty_like(grad_TH[: len(grad_TH) // shard.size])
    dist.reduce_scatter(mine_TH, list(grad_TH.chunk(shard.size)), group=shard.group)
    return mine_TH


def _weight_gradient(weight_VH: Tensor, grad_VH: Tensor, scale: Tensor) -> Tensor | None:
    """Add the gradient to the weight's ``main_grad`` if it has one, else return it.

    Megatron's data-parallel hook wants a gradient to arrive where it set ``grad_added_to_main_grad``; of an embedding
    that is the head too (``zero_out_wgrad``) it adds what arrives, so zeros have to.
    """
    main_grad_VH = getattr(weight_VH, "main_grad", None)
    if main_grad_VH is None:
        return (grad_VH * scale).to(weight_VH.dtype)
    main_grad_VH.addcmul_(grad_VH, scale.to(grad_VH.dtype))
    if not hasattr(weight_VH, "grad_added_to_main_grad"):
        return None
    weight_VH.grad_added_to_main_grad = True  # pyright: ignore[reportAttributeAccessIssue]
    return torch.zeros_like(weight_VH) if getattr(weight_VH, "zero_out_wgrad", False) else torch.empty_like(weight_VH)
