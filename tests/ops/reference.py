"""The formulas of METHOD section 2 as they are written, in fp64 with autograd, and cases to compare with."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_npd.choices import Impl
from megatron_npd.ops.distill_loss import DistillLoss, distill_loss

T = 12
MASKS = {
    "all": None,
    "alternating": torch.tensor([0, 1] * 6),
    "runs": torch.tensor([0.0] * 2 + [1.0] * 5 + [0.0] * 2 + [1.0] * 3),
    "one": torch.arange(T) == 7,
    "none": torch.zeros(T, dtype=torch.bool),
}
INTERPRETED = pytest.param(
    "triton", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="forked processes have no GPU")
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Case(NamedTuple):
    """Arguments of ``distill_loss`` for one comparison; logits cover the whole vocabulary."""

    logits_TV: Tensor
    labels_T: Tensor
    teacher: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        return self.logits_TV.shape[1]

    def to(self, device: str) -> Case:
        teacher = {name: tensor.to(device) for name, tensor in self.teacher.items()}
        return Case(self.logits_TV.to(device), self.labels_T.to(device), teacher)


class Collectives(TorchDispatchMode):
    """Names and shapes of what goes through the process group."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            sent = [value for value in tree_leaves(args) if isinstance(value, Tensor)][-1]
            assert sent.dtype == torch.float32
            self.seen.append((func.__name__.split(".")[0], tuple(sent.shape)))
        return func(*args, **(kwargs or {}))


def make_case(num_tokens: int, vocab_size: int, top_k: int, *, seed: int = 0, scale: float = 2.0) -> Case:
    """Random student and teacher; labels are in the teacher's top-k at even tokens and outside it at odd ones."""
    generator = torch.Generator().manual_seed(seed)
    student_TV = torch.randn(num_tokens, vocab_size, generator=generator) * scale
    teacher_TV = student_TV + torch.randn(num_tokens, vocab_size, generator=generator)
    log_p_TV = teacher_TV.double().log_softmax(1)
    order_TV = log_p_TV.argsort(1, descending=True)
    rank_T = torch.randint(0, top_k, (num_tokens,), generator=generator)
    if top_k < vocab_size:
        outside_T = torch.randint(top_k, vocab_size, (num_tokens,), generator=generator)
        rank_T = torch.where(torch.arange(num_tokens) % 2 == 0, rank_T, outside_T)
    teacher = {
        "teacher_ids_TK": order_TV[:, :top_k],
        "teacher_logprobs_TK": log_p_TV.gather(1, order_TV[:, :top_k]).float(),
    }
    if top_k < vocab_size:
        outside_TV = log_p_TV.gather(1, order_TV[:, top_k:])
        teacher["teacher_log_tail_T"] = outside_TV.logsumexp(1).float()
    return Case(student_TV, order_TV.gather(1, rank_T[:, None])[:, 0], teacher)


def reference_parts(
    logits_TV: Tensor,
    labels_T: Tensor,
    teacher: dict[str, Any],
    *,
    mode: str = "tail",
    divergence: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """CE, KD and the metrics of each token from fp64 logits of the whole vocabulary, differentiable."""
    log_q_TV = logits_TV.log_softmax(1)
    ce_T = -log_q_TV.gather(1, labels_T[:, None])[:, 0]
    if not teacher:
        return {"ce_T": ce_T, "label_logprob_T": -ce_T}
    ids_TK = teacher["teacher_ids_TK"]
    log_p_TK = teacher["teacher_logprobs_TK"].double()
    outside_TV = torch.ones_like(logits_TV, dtype=torch.bool).scatter_(1, ids_TK, False)
    z_TK = logits_TV.gather(1, ids_TK)
    if mode in ("tail", "truncated"):
        log_s_TK = log_q_TV.gather(1, ids_TK)
        if mode == "tail" and "teacher_log_tail_T" in teacher:
            log_tq_T = log_q_TV.masked_fill(~outside_TV, -torch.inf).logsumexp(1)
            log_p_TK = torch.cat([log_p_TK, teacher["teacher_log_tail_T"].double()[:, None]], dim=1)
            log_s_TK = torch.cat([log_s_TK, log_tq_T[:, None]], dim=1)
    else:
        log_p_TK = (log_p_TK / temperature).log_softmax(1)
        log_s_TK = (z_TK / temperature).log_softmax(1)
        if mode == "renorm_teacher":
            log_s_TK = (logits_TV / temperature).log_softmax(1).gather(1, ids_TK)
    kd_T = _divergence(log_p_TK, log_s_TK, divergence, beta, skew) * temperature**2
    return {
        "ce_T": ce_T,
        "kd_T": kd_T,
        "teacher_mass_T": teacher["teacher_logprobs_TK"].double().exp().sum(1),
        "student_mass_T": log_q_TV.gather(1, ids_TK).exp().sum(1),
        "top1_agreement_T": (z_TK[:, 0] >= logits_TV.amax(1)).double(),
        "label_logprob_T": -ce_T,
    }


def _kl(log_p_TK: Tensor, log_q_TK: Tensor) -> Tensor:
    """sum p log(p/q), with 0 log 0 = 0."""
    finite_TK = log_p_TK > -torch.inf
    return (log_p_TK.exp() * torch.where(finite_TK, log_p_TK - log_q_TK, 0.0)).sum(1)


def _divergence(log_p_TK: Tensor, log_q_TK: Tensor, name: str, beta: float, skew: float) -> Tensor:
    """As GKD and DistiLLM write them, the mixtures as sums of probabilities."""
    p_TK, q_TK = log_p_TK.exp(), log_q_TK.exp()
    if name == "reverse_kl":
        return _kl(log_q_TK, log_p_TK)
    if name == "jsd":
        log_m_TK = (beta * p_TK + (1 - beta) * q_TK).log()
        return beta * _kl(log_p_TK, log_m_TK) + (1 - beta) * _kl(log_q_TK, log_m_TK)
    if name == "skew_kl":
        return _kl(log_p_TK, (skew * p_TK + (1 - skew) * q_TK).log())
    if name == "skew_reverse_kl":
        return _kl(log_q_TK, ((1 - skew) * p_TK + skew * q_TK).log())
    return _kl(log_p_TK, log_q_TK)


def reference(
    logits_TV: Tensor,
    labels_T: Tensor,
    teacher: dict[str, Any],
    *,
    mask_T: Tensor | None = None,
    weights_T: Tensor | None = None,
    alpha: float = 0.9,
    grad_T: Tensor | None = None,
    entropy: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Loss, parts and the gradient of ``(loss_T * grad_T).sum()`` with respect to the logits, all fp64."""
    logits_TV = logits_TV.detach().double().requires_grad_()
    parts = reference_parts(logits_TV, labels_T, teacher, **options)
    parts["entropy_T"] = torch.special.entr(logits_TV.softmax(1)).sum(1) if entropy else torch.zeros_like(parts["ce_T"])
    loss_T = (1 - alpha) * parts["ce_T"]
    if alpha:
        loss_T = loss_T + alpha * parts["kd_T"]
    if weights_T is not None:
        loss_T = loss_T * weights_T
    counts_T = torch.ones(len(labels_T), dtype=torch.bool) if mask_T is None else mask_T != 0
    result = {name: torch.where(counts_T, part, 0.0).detach() for name, part in parts.items()}
    loss_T = torch.where(counts_T, loss_T, 0.0)
    (loss_T if grad_T is None else loss_T * grad_T).sum().backward()
    return result | {"loss_T": loss_T.detach(), "grad_TV": logits_TV.grad}


def compare(result: Any, grad_TV: Tensor, expected: dict[str, Any]) -> None:
    """Assert that values are within 1e-5 of fp64, and the gradient too, or within its own type's rounding."""
    for name, tensor in vars(result).items():
        if name in expected:
            torch.testing.assert_close(
                tensor.detach().double(),
                expected[name],
                atol=1e-5,
                rtol=1e-5,
                equal_nan=True,
                msg=lambda words, name=name: f"{name}: {words}",
            )
    rounding = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[grad_TV.dtype]
    torch.testing.assert_close(grad_TV.double(), expected["grad_TV"], atol=1e-6, rtol=rounding)


def run(
    case: Case, logits_TV: Tensor, *, impl: Impl = "torch", grad_T: Tensor | None = None, **options: Any
) -> tuple[DistillLoss, Tensor]:
    """Loss and logits' gradient of a non-leaf tensor that holds ``logits_TV``, where ``impl`` can run."""
    device = device_of(impl)
    case = case.to(device)
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    leaf_TV = logits_TV.to(device, copy=True).requires_grad_()
    result = distill_loss(leaf_TV * 1.0, case.labels_T, impl=impl, **case.teacher, **options)
    (result.loss_T if grad_T is None else result.loss_T * grad_T.to(device)).sum().backward()
    assert leaf_TV.grad is not None and leaf_TV.grad.dtype == logits_TV.dtype
    return DistillLoss(**{name: tensor.cpu() for name, tensor in vars(result).items()}), leaf_TV.grad.cpu()


def device_of(impl: Impl) -> str:
    """Where tests run an implementation: Triton on a GPU if there is one, else interpreted."""
    return "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"


def outside(case: Case) -> Tensor:
    """Which columns are not in S."""
    return torch.ones_like(case.logits_TV, dtype=torch.bool).scatter_(1, case.teacher["teacher_ids_TK"], False)


def small_tails(exponent: int, ratio: float) -> Case:
    """A student whose mass off S is 10^-exponent, a teacher whose is ``ratio`` times that."""
    case = make_case(T, 1003, 10)
    ids_TK = case.teacher["teacher_ids_TK"]
    outside_TV = outside(case)
    q_off_T = case.logits_TV.double().masked_fill(~outside_TV, -torch.inf).logsumexp(1)
    q_on_T = case.logits_TV.double().gather(1, ids_TK).logsumexp(1)
    shift_T1 = (-exponent * math.log(10.0) - q_off_T + q_on_T)[:, None]
    logits_TV = torch.where(outside_TV, case.logits_TV + shift_T1, case.logits_TV.double()).float()
    tail = min(0.5, ratio * 10.0**-exponent)
    log_p_TK = case.teacher["teacher_logprobs_TK"].double().log_softmax(1) + math.log1p(-tail)
    teacher = {"teacher_ids_TK": ids_TK, "teacher_logprobs_TK": log_p_TK.float()}
    teacher["teacher_log_tail_T"] = torch.full((T,), math.log(tail))
    return Case(logits_TV, case.labels_T, teacher)
