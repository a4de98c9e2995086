"""What the losses are given: checked, with the unmasked tokens picked out, as ``buckets.py`` wants it.

Legend: T tokens, N unmasked tokens, K teacher ids per token, B = K + 1 buckets.
"""

from __future__ import annotations

import math
from typing import NamedTuple, NoReturn, TypedDict, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_npd.choices import DivergenceName, Mode
from megatron_npd.errors import UserError
from megatron_npd.ops.divergences import DIVERGENCES, Objective, Rows
from megatron_npd.ops.vocab_parallel import VocabShard, vocab_shard

MODES: tuple[Mode, ...] = get_args(Mode)
MASS_TOLERANCE = 1e-3
"""How far rounding may lift a teacher's mass above 1."""


class LossOptions(TypedDict, total=False):
    """Arguments that ``distill_loss`` and ``distill_linear_loss`` share; ``distill_loss`` explains them."""

    teacher_ids_TK: Tensor | None
    teacher_logprobs_TK: Tensor | None
    teacher_log_tail_T: Tensor | None
    mask_T: Tensor | None
    weights_T: Tensor | None
    alpha: float
    mode: Mode
    divergence: DivergenceName
    beta: float
    skew: float
    temperature: float
    entropy: bool
    vocab_size: int | None
    group: dist.ProcessGroup | None


class Problem(NamedTuple):
    """A checked loss to compute."""

    rows: Rows
    objective: Objective
    shard: VocabShard
    teacher_mass_N: Tensor
    num_tokens: int

    def part(self, lo: int, hi: int) -> Problem:
        """The problem of the ``lo``-th to ``hi``-th unmasked tokens, as if there were no others."""
        rows = self.rows.part(lo, hi)
        return self._replace(rows=rows, teacher_mass_N=self.teacher_mass_N[lo:hi], num_tokens=len(rows.labels_N))

    def whole(self, values_N: Tensor) -> Tensor:
        """Values of the unmasked tokens among zeros for the others, ``[T]``."""
        if self.rows.index_N is None:
            return values_N
        return values_N.new_zeros(self.num_tokens).index_copy(0, self.rows.index_N, values_N)


def make_problem(
    width: int,
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
    entropy: bool = False,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Problem:
    """Check the arguments of a loss over ``width`` local columns.

    Raises:
        UserError: An argument breaks its rule.
    """
    _check_shapes(labels_T, mask_T, weights_T)
    check_objective(alpha=alpha, mode=mode, divergence=divergence, beta=beta, skew=skew, temperature=temperature)
    shard = vocab_shard(width, vocab_size, group)
    vocab_size = shard.size * shard.width if vocab_size is None else vocab_size
    _check_teacher(
        len(labels_T),
        teacher_ids_TK,
        teacher_logprobs_TK,
        teacher_log_tail_T,
        alpha=alpha,
        mode=mode,
        vocab_size=vocab_size,
    )
    index_N = _counting_rows(mask_T)

    def pick(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        tensor = tensor.detach() if index_N is None else tensor.detach().index_select(0, index_N)
        return tensor.to(dtype)

    labels_N = pick(labels_T, torch.int64)
    if teacher_ids_TK is None or teacher_logprobs_TK is None:
        ids_NK = labels_N.new_empty(len(labels_N), 0)
        logprobs_NK = ids_NK.float()
    else:
        ids_NK, logprobs_NK = pick(teacher_ids_TK, torch.int64), pick(teacher_logprobs_TK, torch.float32)
    _check_content(labels_N, ids_NK, logprobs_NK, vocab_size)
    log_tail_N = None
    # k = V leaves no tail: a floor of -30 read there would be mass that no column can match.
    if mode == "tail" and teacher_log_tail_T is not None and ids_NK.shape[1] < vocab_size:
        log_tail_N = pick(teacher_log_tail_T, torch.float32)
    rows = Rows(
        index_N=index_N,
        labels_N=labels_N,
        ids_NK=ids_NK,
        log_target_NB=_log_target(logprobs_NK, log_tail_N, mode, temperature),
        weights_N=None if weights_T is None else pick(weights_T, torch.float32),
    )
    objective = Objective(
        ce_weight=1.0 - alpha,
        kd_weight=float(alpha),
        divergence=divergence,
        coefficient={"beta": beta, "skew": skew}.get(DIVERGENCES[divergence].coefficient, 0.0),
        student_on_ids=mode == "renorm_both",
        temperature=float(temperature),
        entropy=entropy,
    )
    return Problem(rows, objective, shard, logprobs_NK.exp().sum(1), len(labels_T))


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
    if log_tail_N is None:
        log_tail_N = logprobs_NK.new_full((len(logprobs_NK),), -torch.inf)
    return torch.cat([logprobs_NK, log_tail_N[:, None]], dim=1)


def refuse(name: str, rule: str, got: object, remedy: str) -> NoReturn:
    """Raise the error of an argument that breaks its rule."""
    raise UserError(f"{name} must be {rule}, got {got}; {remedy}")


def _check_shapes(labels_T: Tensor, mask_T: Tensor | None, weights_T: Tensor | None) -> None:
    for name, tensor in (("mask_T", mask_T), ("weights_T", weights_T)):
        if tensor is not None and tensor.shape != labels_T.shape:
            refuse(name, f"of shape {list(labels_T.shape)}, as labels_T is", list(tensor.shape), "flatten it to [T]")
    if labels_T.is_floating_point() or labels_T.dtype == torch.bool:
        refuse("labels_T", "of an integer dtype", labels_T.dtype, "give token ids")


def check_objective(*, alpha: float, mode: str, divergence: str, beta: float, skew: float, temperature: float) -> None:
    """Check the numbers and names of a loss, whose meaning ``distill_loss`` explains.

    Raises:
        UserError: One breaks its rule, or they do not go together.
    """
    if not 0 <= alpha <= 1:
        refuse("alpha", "in [0, 1]", alpha, "0 is cross-entropy alone, 1 the divergence alone")
    if mode not in MODES:
        refuse("mode", f"one of {', '.join(MODES)}", repr(mode), "choose one")
    if not (temperature > 0 and math.isfinite(temperature)):
        refuse("temperature", "a finite number > 0", temperature, "1 leaves the logits as they are")
    if temperature != 1 and mode not in ("renorm_teacher", "renorm_both"):
        refuse(
            "temperature",
            f"1 for mode {mode}: the teacher's tail is stored at temperature 1",
            temperature,
            "use renorm_teacher or renorm_both",
        )
    if divergence not in DIVERGENCES:
        refuse("divergence", f"one of {', '.join(DIVERGENCES)}", repr(divergence), "choose one")
    if divergence != "forward_kl" and mode not in ("tail", "renorm_both"):
        rule = f"tail or renorm_both for divergence {divergence}: without either, leaving S would lower the loss"
        refuse("mode", rule, repr(mode), "choose one of them")
    if not 0 < beta < 1:
        refuse("beta", "in (0, 1)", beta, "forward_kl and reverse_kl are its ends")
    if not 0 <= skew < 1:
        refuse("skew", "in [0, 1)", skew, "0 is the divergence without a mixture")


def _check_teacher(
    num_tokens: int,
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
            refuse("teacher_ids_TK and teacher_logprobs_TK", "given together", "one of them", "give both or none")
        if alpha > 0:
            refuse("alpha", "0 without teacher_ids_TK", alpha, "give the teacher's tensors, or alpha=0 for SFT")
        return
    top_k = ids_TK.shape[-1]
    if ids_TK.dim() != 2 or len(ids_TK) != num_tokens or top_k == 0:
        refuse("teacher_ids_TK", f"of shape [{num_tokens}, K >= 1]", list(ids_TK.shape), "give one row a token")
    if top_k > vocab_size:
        refuse("teacher_ids_TK", f"at most {vocab_size} (vocab_size) ids wide", top_k, "annotate with a smaller k")
    if ids_TK.is_floating_point() or ids_TK.dtype == torch.bool:
        refuse("teacher_ids_TK", "of an integer dtype", ids_TK.dtype, "give token ids")
    if logprobs_TK.shape != ids_TK.shape or not logprobs_TK.is_floating_point():
        refuse(
            "teacher_logprobs_TK",
            f"floating, of teacher_ids_TK's shape {list(ids_TK.shape)}",
            f"{logprobs_TK.dtype} {list(logprobs_TK.shape)}",
            "give one log-probability an id",
        )
    if log_tail_T is None:
        if mode == "tail" and top_k < vocab_size:
            refuse("teacher_log_tail_T", "given for mode tail", "None", "give it, or use another mode")
    elif log_tail_T.shape != (num_tokens,) or not log_tail_T.is_floating_point():
        refuse(
            "teacher_log_tail_T",
            f"floating, of shape [{num_tokens}]",
            f"{log_tail_T.dtype} {list(log_tail_T.shape)}",
            "give one number per token",
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
        refuse("labels_T", f"in [0, {vocab_size})", f"{int(labels_N[row])} {where}", "mask tokens without a label")
    got = f"{ids_NK[row].tolist()} {where}"
    if rule == 1:
        refuse("teacher_ids_TK", f"in [0, {vocab_size})", got, "annotate for this vocabulary, or mask the token")
    if rule == 2:
        refuse("teacher_ids_TK", "distinct in a row", got, "annotate again, or mask the token")
    if rule == 3:
        got = f"{logprobs_NK[row].tolist()} {where}"
        refuse("teacher_logprobs_TK", "descending in a row", got, "sort ids and log-probabilities together")
    got = f"a mass of {float(logprobs_NK[row].exp().sum()):.6g} {where}"
    refuse("teacher_logprobs_TK", f"log-probabilities of mass <= 1 + {MASS_TOLERANCE}", got, "rescale them")
