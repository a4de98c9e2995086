"""What a training step minimises: one function an objective, and the table that names them.

An objective takes this rank's logits and a batch and returns ``ops.distill_loss.DistillLoss``: a differentiable loss
for each token, 0 where masked, and detached parts for the metrics. To add one, write a function of the same signature
and name it in ``OBJECTIVES``.

Legend: T tokens of a micro-batch, V this rank's slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state
from torch import Tensor

from megatron_npd.config import TrainConfig
from megatron_npd.data.batch import PackedBatch
from megatron_npd.ops.distill_loss import DistillLoss, distill_loss

Objective = Callable[[Tensor, PackedBatch, TrainConfig, int], DistillLoss]


def sft(logits_TV: Tensor, batch: PackedBatch, cfg: TrainConfig, vocab_size: int) -> DistillLoss:
    """Cross-entropy of the response's own tokens.

    Args:
        logits_TV: This rank's vocabulary slice; destroyed, the gradient takes its place.
        batch: The micro-batch, on the logits' device.
        cfg: Unused.
        vocab_size: V*, without the padded columns.
    """
    assert batch.labels is not None and batch.loss_mask is not None
    return distill_loss(
        logits_TV,
        batch.labels[0],
        mask_T=batch.loss_mask[0],
        alpha=0.0,
        vocab_size=vocab_size,
        group=_tensor_parallel_group(),
    )


def distill(logits_TV: Tensor, batch: PackedBatch, cfg: TrainConfig, vocab_size: int) -> DistillLoss:
    """The composite of METHOD section 2: (1 - kd_alpha) * CE + kd_alpha * KD over the teacher's top-k.

    Args: as of ``sft``; ``cfg`` gives kd_alpha and kd_mode.
    """
    assert batch.labels is not None and batch.loss_mask is not None
    return distill_loss(
        logits_TV,
        batch.labels[0],
        teacher_ids_TK=batch.teacher_ids,
        teacher_logprobs_TK=batch.teacher_logprobs,
        teacher_log_tail_T=batch.teacher_log_tail,
        mask_T=batch.loss_mask[0],
        alpha=cfg.kd_alpha,
        mode=cfg.kd_mode,
        vocab_size=vocab_size,
        group=_tensor_parallel_group(),
    )


def _tensor_parallel_group() -> Any:
    return parallel_state.get_tensor_model_parallel_group()


OBJECTIVES: dict[str, Objective] = {"sft": sft, "distill": distill}


def objective_name(cfg: TrainConfig) -> str:
    """The objective that the configuration asks for: ``sft`` where kd_alpha is 0, else ``distill``."""
    return "distill" if cfg.kd_alpha > 0 else "sft"
