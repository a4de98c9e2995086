"""One optimizer step on megatron-core: DDP, optimizer, schedules, and the forward-backward over a global batch.

Legend: T tokens of a micro-batch, M metrics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_npd.config.settings import TrainConfig
from megatron_npd.data.batch import PackedBatch
from megatron_npd.errors import UserError
from megatron_npd.models.build import head_weight, packed_params, without_output_layer
from megatron_npd.ops.distill_loss import DistillLoss
from megatron_npd.training.lag import lag_sums
from megatron_npd.training.objectives import OBJECTIVES, ModelOutput, objective_name

# What a step reports, in the order of the vector that is reduced: sums over the global batch's response tokens.
SUMS = (
    "loss",
    "ce",
    "entropy",
    "kd",
    "teacher_mass",
    "student_mass",
    "top1_agreement",
    "lag_k1",
    "lag_k3",
    "lag_tokens",
    "response_tokens",
)
DISTILL_ONLY = ("kd", "teacher_mass", "student_mass", "top1_agreement")


class TrainStep:
    """The model under DDP with its optimizer and learning-rate schedule.

    Every response token of a global batch has the same weight, 1 / (their number over all micro-batches and
    data-parallel ranks), however they are packed: the loss is a sum, and ``finalize_model_grads`` divides the summed
    gradient once.

    Args:
        cfg: Optimizer, schedule and objective.
        model: This rank's GPTModel with its starting weights (the optimizer copies them as its main weights).
        vocab_size: V*, without the padded columns.
        micro_batch_tokens: Tokens T of a micro-batch.
        num_micro_batches: Micro-batches of a step on each data-parallel rank.

    Attributes:
        model: ``model`` under DDP.
        optimizer: megatron-core's optimizer.
        scheduler: Learning-rate and weight-decay schedule, counted in steps.
    """

    def __init__(
        self, cfg: TrainConfig, model: GPTModel, *, vocab_size: int, micro_batch_tokens: int, num_micro_batches: int
    ) -> None:
        self._cfg, self._vocab_size = cfg, vocab_size
        self._micro_batch_tokens, self._num_micro_batches = micro_batch_tokens, num_micro_batches
        self._objective = OBJECTIVES[objective_name(cfg)]
        self._distills = self._objective is not OBJECTIVES["sft"]
        self._device = next(model.parameters()).device
        config: Any = model.config
        config.calculate_per_token_loss = True
        config.finalize_model_grads_func = finalize_model_grads
        self.model = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=cfg.use_distributed_optimizer
            ),
            model,
        )
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                lr=cfg.lr,
                min_lr=cfg.min_lr,
                weight_decay=cfg.weight_decay,
                bf16=cfg.bf16,
                params_dtype=torch.bfloat16 if cfg.bf16 else torch.float32,
                adam_beta1=cfg.adam_beta1,
                adam_beta2=cfg.adam_beta2,
                adam_eps=cfg.adam_eps,
                use_distributed_optimizer=cfg.use_distributed_optimizer,
                clip_grad=cfg.clip_grad,
            ),
            [self.model],
            use_gloo_process_groups=False,
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=cfg.lr / (cfg.lr_warmup_iters + 1),  # of the first step, which would train nothing at 0
            max_lr=cfg.lr,
            min_lr=cfg.min_lr,
            lr_warmup_steps=cfg.lr_warmup_iters,
            lr_decay_steps=cfg.train_iters,
            lr_decay_style=cfg.lr_decay_style,
            start_wd=cfg.weight_decay,
            end_wd=cfg.weight_decay,
            wd_incr_steps=cfg.train_iters,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,  # the configuration holds, not what a checkpoint says
        )
        self._forward_backward = get_forward_backward_func()
        # Every tensor-parallel rank of the last stage has the same sums: one of them speaks.
        self._reports = (
            parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )

    def reapply_optimizer_config(self) -> None:
        """Put the configuration's Adam settings and rates in force again after a checkpoint was loaded over them."""
        cfg = self._cfg
        for group in self.optimizer.param_groups:
            group.update(betas=(cfg.adam_beta1, cfg.adam_beta2), eps=cfg.adam_eps)
        self.scheduler.step(0)

    def run(self, batches: Iterator[PackedBatch], iteration: int) -> dict[str, Any]:
        """One step over the next global batch.

        Args:
            batches: This rank's micro-batches on its device; ``num_micro_batches`` of them are taken.
            iteration: Number of the step, from 1, for messages.

        Returns:
            On every rank: the means over response tokens (None where undefined), ``lag_tokens``,
            ``response_tokens``, ``grad_norm`` before clipping, and the ``lr`` of this step.

        Raises:
            UserError: No response token in the batch, or a loss or gradient norm that is not finite.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums_M = self._forward_backward(
            forward_step_func=self._forward_step,
            data_iterator=batches,
            model=self.model,
            num_microbatches=self._num_micro_batches,
            seq_length=self._micro_batch_tokens,
            micro_batch_size=1,  # rows lie end to end: to the model a micro-batch is one long row
        )
        means = self._reduce(sums_M)
        if means["loss"] is None:
            raise UserError(f"the batch of step {iteration} must have response tokens, got none; check the packs")
        _check_finite("loss", means["loss"], iteration)
        means["lr"] = get_canonical_lr_for_logging(self.optimizer.param_groups)
        _, grad_norm, _ = cast(tuple[bool, float, None], self.optimizer.step())
        _check_finite("gradient norm", grad_norm, iteration)
        means["grad_norm"] = grad_norm
        self.scheduler.step(1)
        return means

    def _forward_step(self, batches: Iterator[PackedBatch], model: Any) -> tuple[Tensor, Any]:
        batch = next(batches)
        with without_output_layer(model.module) if self._cfg.fused_linear_loss else nullcontext():
            output = model(
                input_ids=batch.tokens,
                position_ids=batch.position_ids,
                attention_mask=None,
                packed_seq_params=packed_params(batch.cu_seqlens),
            )
        return output, partial(self._loss, batch, model.module)

    def _loss(self, batch: PackedBatch, model: GPTModel, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """megatron-core's triple for a loss by token: sum to differentiate, int token count, what to report."""
        assert batch.loss_mask is not None
        if self._cfg.fused_linear_loss:
            last = ModelOutput(
                tensor=output.squeeze(1),
                vocab_size=self._vocab_size,
                head_weight_VH=head_weight(model),
                sequence_parallel=model.config.sequence_parallel,
            )
        else:
            last = ModelOutput(tensor=output.squeeze(0), vocab_size=self._vocab_size)
        total, loss = self._objective(last, batch, self._cfg)
        mask_T = batch.loss_mask[0]
        return total, mask_T.sum().int(), self._sums(batch, loss, mask_T)

    def _sums(self, batch: PackedBatch, loss: DistillLoss, mask_T: Tensor) -> Tensor:
        """``SUMS`` of one micro-batch, fp32 [M], without a synchronisation."""
        parts = [loss.loss_T.detach(), loss.ce_T, loss.entropy_T]
        if self._distills:
            parts += [loss.kd_T, loss.teacher_mass_T, loss.student_mass_T, loss.top1_agreement_T]
        sums = torch.stack(parts) @ mask_T
        if not self._distills:
            sums = torch.cat([sums, sums.new_zeros(len(DISTILL_ONLY))])
        if batch.generator_logprobs is None:
            lag = sums.new_zeros(3)
        else:
            lag = lag_sums(loss.label_logprob_T, batch.generator_logprobs, mask_T)
        return torch.cat([sums, lag, mask_T.sum().reshape(1)])

    def _reduce(self, sums_M: list[Tensor]) -> dict[str, Any]:
        """Means over the global batch, on every rank."""
        total_M = torch.stack(sums_M).sum(0) if self._reports else torch.zeros(len(SUMS), device=self._device)
        if dist.get_world_size() > 1:
            dist.all_reduce(total_M)
        *totals, lag_tokens, response_tokens = total_M.tolist()
        means: dict[str, Any] = {"lag_tokens": int(lag_tokens), "response_tokens": int(response_tokens)}
        for name, total in zip(SUMS[:-2], totals, strict=True):
            count = lag_tokens if name.startswith("lag") else response_tokens
            defined = count > 0 and (self._distills or name not in DISTILL_ONLY)
            defined &= self._cfg.log_entropy or name != "entropy"
            means[name] = total / count if defined else None
        return means


def _check_finite(what: str, value: float, iteration: int) -> None:
    if not math.isfinite(value):
        raise UserError(
            f"the {what} of step {iteration} must be finite, got {value}; nothing was saved since the last checkpoint: "
            "lower lr, or start from it with other settings"
        )
