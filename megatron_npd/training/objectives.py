"""What a training step minimises: one function an objective, and the table that names them.

An objective takes what the last stage gives and a batch and returns the loss's sum over the micro-batch's response
tokens, to differentiate, and each token's loss and parts (``ops.distill_loss.DistillLoss``) for the metrics. To add
one, write a function of the same signature and name it in ``OBJECTIVES``.

Legend: T tokens of a micro-batch, V this rank's slice of the vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

from megatron.core import parallel_state
from torch import Tensor

from megatron_npd.config.settings import TrainConfig
from megatron_npd.data.batch import PackedBatch
from megatron_npd.ops.arguments import LossOptions
from megatron_npd.ops.distill_loss import DistillLoss, distill_loss
from megatron_npd.ops.fused_linear import distill_linear_loss


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """What the last pipeline stage gives: logits, or hidden states with the weight that makes logits of them.

    Attributes:
        tensor: Logits ``[T, V]``, destroyed by the loss (their gradient takes their place); or, with
            ``head_weight_VH``, hidden states ``[T, H]`` (``[T / TP, H]`` where sequence-parallel).
        vocab_size: V*, without the padded columns.
        head_weight_VH: This rank's slice of the output layer, or None.
        sequence_parallel: Whether the hidden states are split over the tensor-parallel ranks.
    """

    tensor: Tensor
    vocab_size: int
    head_weight_VH: Tensor | None = None
    sequence_parallel: bool = False


Objective = Callable[[ModelOutput, PackedBatch, TrainConfig], tuple[Tensor, DistillLoss]]


def sft(output: ModelOutput, batch: PackedBatch, cfg: TrainConfig) -> tuple[Tensor, DistillLoss]:
    """Cross-entropy of the response's own tokens.

    Args:
        output: Of the last stage.
        batch: The micro-batch, on the output's device.
        cfg: Gives loss_impl and log_entropy.
    """
    return _loss(output, batch, cfg, alpha=0.0)


def distill(output: ModelOutput, batch: PackedBatch, cfg: TrainConfig) -> tuple[Tensor, DistillLoss]:
    """The composite of METHOD section 2: (1 - kd_alpha) * CE + kd_alpha * divergence from the teacher's top-k.

    Args: as of ``sft``; ``cfg`` gives the kd_ settings.
    """
    return _loss(
        output,
        batch,
        cfg,
        teacher_ids_TK=batch.teacher_ids,
        teacher_logprobs_TK=batch.teacher_logprobs,
        teacher_log_tail_T=batch.teacher_log_tail,
        **cfg.kd_settings(),
    )


def _loss(
    output: ModelOutput, batch: PackedBatch, cfg: TrainConfig, **options: Unpack[LossOptions]
) -> tuple[Tensor, DistillLoss]:
    assert batch.labels is not None and batch.loss_mask is not None
    labels_T, group = batch.labels[0], _tensor_parallel_group()
    options["entropy"] = cfg.log_entropy
    options |= {
        "mask_T": batch.loss_mask[0],
        "weights_T": batch.weights,
        "vocab_size": output.vocab_size,
        "group": group,
    }
    if output.head_weight_VH is None:
        loss = distill_loss(output.tensor, labels_T, impl=cfg.loss_impl, **options)
        return loss.loss_T.sum(), loss
    return distill_linear_loss(
        output.tensor,
        output.head_weight_VH,
        labels_T,
        sequence_parallel=output.sequence_parallel,
        impl=cfg.loss_impl,
        **options,
    )


def _tensor_parallel_group() -> Any:
    return parallel_state.get_tensor_model_parallel_group()


OBJECTIVES: dict[str, Objective] = {"sft": sft, "distill": distill}


def objective_name(cfg: TrainConfig) -> str:
    """The objective that the configuration asks for: ``sft`` where kd_alpha is 0, else ``distill``."""
    return "distill" if cfg.kd_alpha > 0 else "sft"
