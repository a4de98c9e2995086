"""The distillation loss: (1 - alpha) * cross-entropy + alpha * divergence from the teacher's top-k (METHOD section 2).

One pass over the logits, gradient in their own storage, vocabulary parallel with one all-gather. Nothing here depends
on the rest of the package.

Legend: T tokens, V columns of this rank's vocabulary slice, K teacher ids a token, B = K + 1 with the tail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_npd.log import UserError
from megatron_npd.ops.buckets import DIVERGENCES, Losses, Objective, Rows
from megatron_npd.ops.distill_loss_torch import DistillLossFunction
from megatron_npd.ops.vocab_parallel import vocab_shard

Mode = Literal["tail", "truncated", "renorm_teacher", "renorm_both"]
MODES: tuple[str, ...] = get_args(Mode)
DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"]
MASS_TOLERANCE = 1e-3
"""How far rounding may lift a teacher's mass above 1."""


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
    """

    loss_T: Tensor
    ce_T: Tensor
    kd_T: Tensor
    teacher_mass_T: Tensor
    student_mass_T: Tensor
    top1_agreement_T: Tensor
    label_logprob_T: Tensor


def distill_loss(
    logits_TV: Tensor,
    labels_T: Tensor,
    *,
    teacher_ids_TK: Tensor | None = None,
    teacher_logprobs_TK: Tensor | None = None,
    teacher_log_tail_T: Tensor | None = None,
    mask_T: Tensor | None = None,
    weights_T: Tensor | None = None,
    alpha: float = 0.9,
    mode: Mode = "tail",
    divergence: DivergenceName = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    impl: Literal["auto", "torch"] = "auto",
    inplace: bool = True,
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
        alpha: Share of the divergence, in [0, 1].
        mode: See above.
        divergence: See above.
        beta: Teacher's share of the mixture in ``jsd``, in (0, 1).
        skew: Share of the first distribution in the second one of ``skew_kl`` and ``skew_reverse_kl``, in [0, 1).
        temperature: Divides both sets of logits of the divergence, which is multiplied by its square; other than 1
            for the renormalised modes only, as the stored top-k has the tail at 1.
        vocab_size: Size of the whole vocabulary; columns at and after it are padding, outside the softmax, and get
            gradient 0. Default: no padding.
        group: Tensor-parallel group whose ranks hold the slices in order, each with all other arguments whole.
        impl: The implementation; ``torch`` is the only one.
        inplace: Write the gradient into ``logits_TV``'s storage (in the forward for one slice, in the backward for
            several): no second tensor of that size, and the logits are gone. Nothing is written when no gradient is
            wanted. One backward a forward.

    Returns:
        Loss and parts of each token; the same bits on every rank of ``group``.

    Raises:
        UserError: An argument breaks a rule above; before anything is computed or written.
    """
    _check_shapes(logits_TV, labels_T, mask_T, weights_T)
    _check_numbers(alpha, mode, temperature, impl)
    _check_divergence(divergence, mode, beta, skew)
    shard = vocab_shard(logits_TV.shape[1], vocab_size, group)
    vocab_size = shard.size * shard.width if vocab_size is None else vocab_size
    _check_teacher(
        logits_TV,
        teacher_ids_TK,
        teacher_logprobs_TK,
        teacher_log_tail_T,
        alpha=alpha,
        mode=mode,
        vocab_size=vocab_size,
    )
    index_N = _counting_rows(mask_T)

    def pick(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.detach() if index_N is None else tensor.detach().index_select(0, index_N)
        return tensor.to(dtype)

    labels_N = pick(labels_T, torch.int64)
    assert labels_N is not None
    ids_NK = pick(teacher_ids_TK, torch.int64)
    logprobs_NK = pick(teacher_logprobs_TK, torch.float32)
    if ids_NK is None or logprobs_NK is None:
        ids_NK, logprobs_NK = labels_N.new_empty(len(labels_N), 0), logits_TV.new_empty(len(labels_N), 0).float()
    _check_content(labels_N, ids_NK, logprobs_NK, vocab_size)
    # k = V leaves no tail; a floor of -30 read there would be mass that no column can match.
    log_tail_N = pick(teacher_log_tail_T, torch.float32) if ids_NK.shape[1] < vocab_size else None
    log_target_NB = _log_target(logprobs_NK, log_tail_N, mode, temperature)
    rows = Rows(
        index_N=index_N,
        labels_N=labels_N,
        ids_NK=ids_NK,
        log_target_NB=log_target_NB,
        weights_N=pick(weights_T, torch.float32),
    )
    objective = Objective(
        ce_weight=1.0 - alpha,
        kd_weight=float(alpha),
        divergence=divergence,
        coefficient=beta if divergence == "jsd" else skew,
        student_on_ids=mode == "renorm_both",
        temperature=float(temperature),
    )
    needs_grad = torch.is_grad_enabled() and logits_TV.requires_grad
    losses = Losses(*DistillLossFunction.apply(logits_TV, rows, objective, shard, inplace, needs_grad))
    teacher_mass_N = logprobs_NK.exp().sum(1)

    def whole(values_N: Tensor) -> Tensor:
        return values_N if index_N is None else values_N.new_zeros(len(labels_T)).index_copy(0, index_N, values_N)

    return DistillLoss(
        loss_T=whole(losses.loss_N),
        ce_T=whole(losses.ce_N),
        kd_T=whole(losses.kd_N),
        teacher_mass_T=whole(teacher_mass_N),
        student_mass_T=whole(losses.student_mass_N),
        top1_agreement_T=whole(losses.top1_agreement_N),
        label_logprob_T=whole(losses.label_logprob_N),
    )


def _counting_rows(mask_T: Tensor | None) -> Tensor | None:
    """Indices of the tokens whose mask is not 0, ascending; None when that is all of them."""
    if mask_T is None:
        return None
    index_N = mask_T.detach().nonzero()[:, 0]
    return None if len(index_N) == len(mask_T) else index_N


def _log_target(logprobs_NK: Tensor, log_tail_N: Tensor | None, mode: str, temperature: float) -> Tensor:
    """Log of the mass that the divergence gives to each id and, last, to the tail."""
    if mode in ("renorm_teacher", "renorm_both") and logprobs_NK.shape[1]:
        logprobs_NK = torch.log_softmax(logprobs_NK / temperature, dim=1)
    if mode != "tail" or log_tail_N is None:
        log_tail_N = torch.full_like(logprobs_NK[:, :1].sum(1), -torch.inf)
    return torch.cat([logprobs_NK, log_tail_N[:, None]], dim=1)


def _refuse(name: str, rule: str, got: object, remedy: str) -> None:
    raise UserError(f"{name} must be {rule}, got {got}; {remedy}")


def _check_shapes(logits_TV: Tensor, labels_T: Tensor, mask_T: Tensor | None, weights_T: Tensor | None) -> None:
    if logits_TV.dim() != 2 or logits_TV.shape[1] == 0:
        _refuse("logits_TV", "of shape [T, V]", list(logits_TV.shape), "flatten batch and sequence into T")
    if logits_TV.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        _refuse("logits_TV", "float32, bfloat16 or float16", logits_TV.dtype, "convert it")
    num_tokens = logits_TV.shape[0]
    for name, tensor in (("labels_T", labels_T), ("mask_T", mask_T), ("weights_T", weights_T)):
        if tensor is not None and tensor.shape != (num_tokens,):
            _refuse(name, f"of shape [{num_tokens}], as logits_TV has rows", list(tensor.shape), "flatten it to [T]")
    if labels_T.is_floating_point() or labels_T.dtype == torch.bool:
        _refuse("labels_T", "of an integer dtype", labels_T.dtype, "give token ids")


def _check_numbers(alpha: float, mode: str, temperature: float, impl: str) -> None:
    if not 0 <= alpha <= 1:
        _refuse("alpha", "in [0, 1]", alpha, "0 is cross-entropy alone, 1 the divergence alone")
    if mode not in MODES:
        _refuse("mode", f"one of {', '.join(MODES)}", repr(mode), "choose one")
    if not (temperature > 0 and math.isfinite(temperature)):
        _refuse("temperature", "a finite number > 0", temperature, "1 leaves the logits as they are")
    if temperature != 1 and mode not in ("renorm_teacher", "renorm_both"):
        _refuse(
            "temperature",
            f"1 for mode {mode}: the teacher's tail is stored at temperature 1",
            temperature,
            "use renorm_teacher or renorm_both",
        )
    if impl not in ("auto", "torch"):
        _refuse("impl", "auto or torch", repr(impl), "leave it out")


def _check_divergence(divergence: str, mode: str, beta: float, skew: float) -> None:
    if divergence not in DIVERGENCES:
        _refuse("divergence", f"one of {', '.join(DIVERGENCES)}", repr(divergence), "choose one")
    if divergence != "forward_kl" and mode not in ("tail", "renorm_both"):
        rule = f"tail or renorm_both for divergence {divergence}: without either, leaving S would lower the loss"
        _refuse("mode", rule, repr(mode), "choose one of them")
    if not 0 < beta < 1:
        _refuse("beta", "in (0, 1)", beta, "forward_kl and reverse_kl are its ends")
    if not 0 <= skew < 1:
        _refuse("skew", "in [0, 1)", skew, "0 is the divergence without a mixture")


def _check_teacher(
    logits_TV: Tensor,
    ids_TK: Tensor | None,
    logprobs_TK: Tensor | None,
    log_tail_T: Tensor | None,
    *,
    alpha: float,
    mode: str,
    vocab_size: int,
) -> None:
    if ids_TK is None or logprobs_TK is None:
        if ids_TK is not None or logprobs_TK is not None:
            _refuse("teacher_ids_TK and teacher_logprobs_TK", "given together", "one of them", "give both or none")
        if alpha > 0:
            _refuse("alpha", "0 without teacher_ids_TK", alpha, "give the teacher's tensors, or alpha=0 for SFT")
        return
    num_tokens, top_k = len(logits_TV), ids_TK.shape[-1]
    if ids_TK.dim() != 2 or len(ids_TK) != num_tokens or top_k == 0:
        _refuse("teacher_ids_TK", f"of shape [{num_tokens}, K >= 1]", list(ids_TK.shape), "give one row a token")
    if top_k > vocab_size:
        _refuse("teacher_ids_TK", f"at most {vocab_size} (vocab_size) ids wide", top_k, "annotate with a smaller k")
    if ids_TK.is_floating_point() or ids_TK.dtype == torch.bool:
        _refuse("teacher_ids_TK", "of an integer dtype", ids_TK.dtype, "give token ids")
    if logprobs_TK.shape != ids_TK.shape or not logprobs_TK.is_floating_point():
        _refuse(
            "teacher_logprobs_TK",
            f"floating, of teacher_ids_TK's shape {list(ids_TK.shape)}",
            f"{logprobs_TK.dtype} {list(logprobs_TK.shape)}",
            "give one log-probability an id",
        )
    if log_tail_T is None:
        if mode == "tail" and top_k < vocab_size:
            _refuse("teacher_log_tail_T", "given for mode tail", "None", "give it, or use another mode")
    elif log_tail_T.shape != (num_tokens,) or not log_tail_T.is_floating_point():
        _refuse(
            "teacher_log_tail_T",
            f"floating, of shape [{num_tokens}]",
            f"{log_tail_T.dtype} {list(log_tail_T.shape)}",
            "give one number a token",
        )


def _check_content(labels_N: Tensor, ids_NK: Tensor, logprobs_NK: Tensor, vocab_size: int) -> None:
    """Check the numbers of the rows that count, with one answer from the device for all rules."""
    if not len(labels_N):
        return
    faults = [((labels_N < 0) | (labels_N >= vocab_size))[:, None]]
    if ids_NK.shape[1]:
        sorted_NK = ids_NK.sort(dim=1).values
        faults.append((sorted_NK < 0) | (sorted_NK >= vocab_size))
        faults.append(sorted_NK[:, 1:] == sorted_NK[:, :-1])
        faults.append(logprobs_NK[:, 1:] > logprobs_NK[:, :-1])
        faults.append(logprobs_NK.exp().sum(1, keepdim=True) > 1 + MASS_TOLERANCE)
    broken = torch.stack([fault.any() for fault in faults]).tolist()
    if not any(broken):
        return
    rule = broken.index(True)
    row = int(faults[rule].any(1).nonzero()[0])
    where = f"in row {row} of those that count"
    if rule == 0:
        _refuse("labels_T", f"in [0, {vocab_size})", f"{int(labels_N[row])} {where}", "mask tokens without a label")
    got = f"{ids_NK[row].tolist()} {where}"
    if rule == 1:
        _refuse("teacher_ids_TK", f"in [0, {vocab_size})", got, "annotate for this vocabulary, or mask the token")
    if rule == 2:
        _refuse("teacher_ids_TK", "distinct in a row", got, "annotate again, or mask the token")
    if rule == 3:
        got = f"{logprobs_NK[row].tolist()} {where}"
        _refuse("teacher_logprobs_TK", "descending in a row", got, "sort ids and log-probabilities together")
    got = f"a mass of {float(logprobs_NK[row].exp().sum()):.6g} {where}"
    _refuse("teacher_logprobs_TK", f"log-probabilities of mass <= 1 + {MASS_TOLERANCE}", got, "rescale them")
