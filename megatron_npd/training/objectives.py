"""What a training step minimises: an entry of ``OBJECTIVES`` for each objective.

An objective names the per-token streams that it reads. Made from the configuration once, it takes what the last stage
gives and a batch, and returns the loss's sum over the micro-batch's response tokens, to differentiate, and named parts:
a number per token, NaN where it is not defined. The step, the metrics and the report show whatever parts come: the mean
over the response tokens for which a part is defined, or the sum where its name ends in ``_tokens``.

Legend: T tokens of a micro-batch, V this rank's slice of the vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state
from torch import Tensor

from megatron_npd.choices import Impl, ObjectiveName
from megatron_npd.config.training import TrainConfig
from megatron_npd.data.batch import PackedBatch
from megatron_npd.ops.arguments import LossOptions
from megatron_npd.ops.distill_loss import DistillLoss, distill_loss
from megatron_npd.ops.fused_linear import distill_linear_loss
from megatron_npd.training.lag import lag_parts


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


Parts = dict[str, Tensor]
Compute = Callable[[ModelOutput, PackedBatch], tuple[Tensor, Parts]]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One way to train.

    Attributes:
        streams: What it reads of the packed data set beside tokens, labels and mask.
        make: The function of a micro-batch, from the configuration.
    """

    streams: frozenset[str]
    make: Callable[[TrainConfig], Compute]


def _sft(cfg: TrainConfig) -> Compute:
    """Cross-entropy of the response's own tokens."""
    options: LossOptions = {"alpha": 0.0, "entropy": cfg.log_entropy}

    def compute(output: ModelOutput, batch: PackedBatch) -> tuple[Tensor, Parts]:
        total, loss = _loss(output, batch, cfg.loss_impl, options)
        return total, _common_parts(batch, loss, cfg)

    return compute


def _distill(cfg: TrainConfig) -> Compute:
    """The composite of METHOD section 2: (1 - kd_alpha) * CE + kd_alpha * divergence from the teacher's top-k."""
    options = LossOptions(**cfg.kd_settings(), entropy=cfg.log_entropy)

    def compute(output: ModelOutput, batch: PackedBatch) -> tuple[Tensor, Parts]:
        teacher: LossOptions = {
            "teacher_ids_TK": batch.teacher_ids,
            "teacher_logprobs_TK": batch.teacher_logprobs,
            "teacher_log_tail_T": batch.teacher_log_tail,
        }
        total, loss = _loss(output, batch, cfg.loss_impl, options | teacher)
        return total, {
            **_common_parts(batch, loss, cfg),
            "kd": loss.kd_T,
            "teacher_mass": loss.teacher_mass_T,
            "student_mass": loss.student_mass_T,
            "top1_agreement": loss.top1_agreement_T,
        }

    return compute


OBJECTIVES: dict[ObjectiveName, Objective] = {
    "sft": Objective(streams=frozenset({"generator"}), make=_sft),
    "distill": Objective(streams=frozenset({"teacher", "generator"}), make=_distill),
}


def _loss(output: ModelOutput, batch: PackedBatch, impl: Impl, options: LossOptions) -> tuple[Tensor, DistillLoss]:
    assert batch.labels is not None and batch.loss_mask is not None
    labels_T = batch.labels[0]
    options = options | {
        "mask_T": batch.loss_mask[0],
        "weights_T": batch.weights,
        "vocab_size": output.vocab_size,
        "group": _tensor_parallel_group(),
    }
    if output.head_weight_VH is None:
        loss = distill_loss(output.tensor, labels_T, impl=impl, **options)
        return loss.loss_T.sum(), loss
    return distill_linear_loss(
        output.tensor,
        output.head_weight_VH,
        labels_T,
        sequence_parallel=output.sequence_parallel,
        impl=impl,
        **options,
    )


def _common_parts(batch: PackedBatch, loss: DistillLoss, cfg: TrainConfig) -> Parts:
    """The loss and what any objective tells of it; the policy lag where the batch has the generator's log-probs."""
    parts = {"loss": loss.loss_T.detach(), "ce": loss.ce_T}
    if cfg.log_entropy:
        parts["entropy"] = loss.entropy_T
    if batch.generator_logprobs is not None:
        parts |= lag_parts(loss.label_logprob_T, batch.generator_logprobs)
    return parts


def _tensor_parallel_group() -> Any:
    return parallel_state.get_tensor_model_parallel_group()
