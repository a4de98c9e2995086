"""The losses that ``loss.py`` measures ours against, each as its users have it, and the exact one that decides.

A rival that is not installed, or that needs a GPU, is named with the reason in the place of its figures.

Legend: T tokens, V vocabulary, H hidden, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

ALPHA = 0.9
Teacher = tuple[Tensor, Tensor, Tensor]  # ids [T, K], log-probabilities [T, K], log of the mass outside them [T]
Loss = Callable[[Tensor, Tensor, Teacher], Tensor]  # logits [T, V], labels [T], teacher -> loss of each token [T]
LinearLoss = Callable[[Tensor, Tensor, Tensor, Teacher], Tensor]  # hidden, weight, labels, teacher -> summed loss


def naive(logits_TV: Tensor, labels_T: Tensor, teacher: Teacher) -> Tensor:
    """Composite loss from one log-softmax under autograd, its tail as 1 - sum (which is not exact)."""
    ids_TK, log_p_TK, log_tail_T = teacher
    log_q_TV = logits_TV.float().log_softmax(-1)
    ce_T = -log_q_TV.gather(1, labels_T[:, None])[:, 0]
    log_q_TK = log_q_TV.gather(1, ids_TK)
    log_tail_q_T = torch.log((1 - log_q_TK.exp().sum(1)).clamp(min=1e-7))
    kd_T = (log_p_TK.exp() * (log_p_TK - log_q_TK)).sum(1) + log_tail_T.exp() * (log_tail_T - log_tail_q_T)
    return (1 - ALPHA) * ce_T + ALPHA * kd_T


def exact(logits_TV: Tensor, labels_T: Tensor, teacher: Teacher) -> Tensor:
    """The same with the tail as METHOD section 2 has it, for fp64."""
    ids_TK, log_p_TK, log_tail_T = (tensor.double() if tensor.is_floating_point() else tensor for tensor in teacher)
    log_q_TV = logits_TV.log_softmax(-1)
    ce_T = -log_q_TV.gather(1, labels_T[:, None])[:, 0]
    log_tail_q_T = log_q_TV.scatter(1, ids_TK, -torch.inf).logsumexp(1)
    kd_T = (log_p_TK.exp() * (log_p_TK - log_q_TV.gather(1, ids_TK))).sum(1)
    return (1 - ALPHA) * ce_T + ALPHA * (kd_T + log_tail_T.exp() * (log_tail_T - log_tail_q_T))


def _megatron_ce(logits_TV: Tensor, labels_T: Tensor, teacher: Teacher) -> Tensor:
    """megatron-core's cross-entropy alone; it overwrites fp32 logits, so that a second loss would need a copy."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(logits_TV[:, None] * 1, labels_T[:, None])[:, 0]


def _megatron_ce_and_topk_kl(logits_TV: Tensor, labels_T: Tensor, teacher: Teacher) -> Tensor:
    """megatron-core's cross-entropy and a top-k KL from a log-softmax beside it."""
    ids_TK, log_p_TK, _ = teacher
    log_q_TK = logits_TV.float().log_softmax(-1).gather(1, ids_TK)
    kd_T = (log_p_TK.exp() * (log_p_TK - log_q_TK)).sum(1)
    return (1 - ALPHA) * _megatron_ce(logits_TV, labels_T, teacher) + ALPHA * kd_T


def _liger_ce(logits_TV: Tensor, labels_T: Tensor, teacher: Teacher) -> Tensor:
    """Liger-Kernel's vocabulary-parallel cross-entropy alone."""
    from liger_kernel.transformers import LigerVocabParallelCrossEntropy  # pyright: ignore[reportMissingImports]

    return LigerVocabParallelCrossEntropy()(logits_TV, labels_T)


def losses(device: str, compiled: bool) -> dict[str, Loss | str]:
    """Rivals on logits by name; a string says why one is not there. The first is what the others are compared with."""
    ways: dict[str, Loss | str] = {"naive torch": naive}
    ways["torch.compile of it"] = torch.compile(naive) if compiled else "not run: give --compile"
    if find_spec("megatron"):
        from megatron_npd.platform.initialize import initialize_distributed

        initialize_distributed()
        ways["Megatron CE, top-k KL from log-softmax"] = _megatron_ce_and_topk_kl
        ways["Megatron CE alone"] = _megatron_ce
    else:
        ways["Megatron CE alone"] = "not installed: megatron-core"
    ways["Liger-Kernel vocabulary-parallel CE alone"] = _needs_liger(device) or _liger_ce
    return ways


def _needs_liger(device: str) -> str:
    if not find_spec("liger_kernel"):
        return "not installed: liger-kernel"
    return "not run: needs a GPU" if device == "cpu" else ""


def naive_linear(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, teacher: Teacher) -> Tensor:
    """The head, then the naive loss on whole logits."""
    return naive(hidden_TH @ weight_VH.t(), labels_T, teacher).sum()


def _liger_jsd(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, teacher: Teacher) -> Tensor:
    """Liger-Kernel's Triton JSD; its teacher is a head too, with whole logits, so it does one matmul more."""
    from liger_kernel.transformers import LigerFusedLinearJSD  # pyright: ignore[reportMissingImports]

    jsd = LigerFusedLinearJSD(jsd_beta=0.5)
    return jsd(hidden_TH, weight_VH, hidden_TH.detach(), weight_VH.detach(), labels_T)


def _liger_chunked_jsd(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, teacher: Teacher) -> Tensor:
    """Liger-Kernel's JSD + CE in chunks of plain torch; its teacher is a head too."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    jsd = LigerFusedLinearJSDLoss(weight_hard_loss=1 - ALPHA, weight_soft_loss=ALPHA, beta=0.5, compiled=False)
    return jsd(hidden_TH, weight_VH, hidden_TH.detach(), weight_VH.detach(), labels_T)


def linear_losses(device: str) -> dict[str, LinearLoss | str]:
    """Rivals on hidden states by name; a string says why one is not there."""
    chunked = _liger_chunked_jsd if find_spec("liger_kernel") else "not installed: liger-kernel"
    return {
        "head, then naive torch": naive_linear,
        "Liger-Kernel fused-linear JSD, chunked torch": chunked,
        "Liger-Kernel fused-linear JSD, Triton": _needs_liger(device) or _liger_jsd,
    }


def matmuls(hidden_TH: Tensor, weight_VH: Tensor, grad_CV: Tensor) -> None:
    """The three matmuls of a head's forward and backward, bare, in chunks of as many rows as ``grad_CV`` has.

    The limit of a fused linear loss.
    """
    grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
    logits_CV = torch.empty_like(grad_CV)
    for hidden_CH in hidden_TH.split(len(grad_CV)):
        rows = len(hidden_CH)
        torch.mm(hidden_CH, weight_VH.t(), out=logits_CV[:rows])
        torch.mm(grad_CV[:rows], weight_VH)
        if hidden_TH.dtype == torch.float32:
            grad_VH.addmm_(grad_CV[:rows].t(), hidden_CH)
        else:
            torch.mm(grad_CV[:rows].t(), hidden_CH)
