"""One optimizer step on megatron-core: DDP, optimizer, schedules, and the forward-backward over a global batch.

Legend: T tokens of a micro-batch, M parts of the objective, A numbers that the ranks add up beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice, tee
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

from megatron_npd.config.training import TrainConfig
from megatron_npd.data.batch import PackedBatch
from megatron_npd.errors import UserError
from megatron_npd.models.build import head_weight, packed_params, without_output_layer
from megatron_npd.training.objectives import OBJECTIVES, ModelOutput
from megatron_npd.training.stragglers import ComputeClock


class TrainStep:
    """The model under DDP with its optimizer and learning-rate schedule.

    Every response token of a global batch has the same weight, 1 / (their number over all micro-batches and
    data-parallel ranks), however they are packed: the loss is a sum, and ``finalize_model_grads`` divides the summed
    gradient once.

    Args:
        cfg: Optimizer, schedule and objective.
        chunks: This rank's parts of the model, in their order, with their starting weights (the optimizer copies them
            as its main weights).
        vocab_size: V*, without the padded columns.
        micro_batch_tokens: Tokens T of a micro-batch.
        num_micro_batches: Micro-batches of a step on each data-parallel rank.

    Attributes:
        chunks: ``chunks`` under DDP.
        optimizer: megatron-core's optimizer.
        scheduler: Learning-rate and weight-decay schedule, counted in steps.
        clock: The time of this rank's forwards and backwards.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        chunks: Sequence[GPTModel],
        *,
        vocab_size: int,
        micro_batch_tokens: int,
        num_micro_batches: int,
    ) -> None:
        self._cfg, self._vocab_size = cfg, vocab_size
        self._micro_batch_tokens, self._num_micro_batches = micro_batch_tokens, num_micro_batches
        self._objective = OBJECTIVES[cfg.objective].make(cfg)
        self._told = False
        self._names: list[str] | None = None  # of the parts, once the last stage has made some
        self._device = next(chunks[0].parameters()).device
        config: Any = chunks[0].config  # of all of them
        config.calculate_per_token_loss = True
        config.finalize_model_grads_func = finalize_model_grads
        self.clock = config.timers = ComputeClock()
        reduction = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=cfg.use_distributed_optimizer,
            overlap_grad_reduce=cfg.overlap_grad_reduce,
            overlap_param_gather=cfg.overlap_param_gather,
        )
        self.chunks = [
            DistributedDataParallel(config, reduction, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        ]
        if cfg.overlap_grad_reduce:  # but for a step's last micro-batch, gradients are added up alone
            waits = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = waits if len(waits) > 1 else waits[0]
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
                overlap_param_gather=cfg.overlap_param_gather,
                clip_grad=cfg.clip_grad,
            ),
            [*self.chunks],
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
        _skip_not_finite(self.optimizer)
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

    def run(
        self, batches: Iterator[PackedBatch], iteration: int, ask: Callable[[], Mapping[str, float]]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """One step over the next global batch; a loss or gradient norm that is not finite changes nothing.

        Args:
            batches: This rank's micro-batches on its device; ``num_micro_batches`` of them are taken.
            iteration: Number of the step, from 1, for messages.
            ask: Called before the ranks meet for the loss: numbers that they add up on the way.

        Returns:
            On every rank: the objective's parts (means over response tokens, None where undefined; sums of those that
            end in ``_tokens``), ``response_tokens``, ``grad_norm`` before clipping, the ``lr`` of this step, and
            ``skipped``, 1 where nothing was changed: then the loss, or the norm, is as it is; and the sums of what
            ``ask`` gave.

        Raises:
            UserError: No response token in the batch.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        feeds = tee(islice(batches, self._num_micro_batches), len(self.chunks))  # every chunk takes all of them
        interleaved = len(self.chunks) > 1
        sums = self._forward_backward(
            forward_step_func=self._forward_step,
            data_iterator=list(feeds) if interleaved else feeds[0],
            model=[*self.chunks] if interleaved else self.chunks[0],
            num_microbatches=self._num_micro_batches,
            seq_length=self._micro_batch_tokens,
            micro_batch_size=1,  # rows lie end to end: to the model a micro-batch is one long row
        )
        means, asked = self._reduce(sums, ask())
        if not means["response_tokens"]:
            raise UserError(f"the batch of step {iteration} must have response tokens, got none; check the packs")
        means["lr"] = get_canonical_lr_for_logging(self.optimizer.param_groups)
        updated, means["grad_norm"] = False, None
        if math.isfinite(means["loss"]):
            updated, norm, _ = cast(tuple[bool, Any, None], self.optimizer.step())
            means["grad_norm"] = float(norm)  # a tensor, from newer megatron-cores on Transformer Engine
        means["skipped"] = int(not updated)
        self.scheduler.step(int(updated))
        return means, asked

    def gather_parameters(self) -> None:
        """Bring together the parameters that an overlapped gather has not yet; all ranks, before they are read."""
        if self._cfg.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def _forward_step(self, batches: Iterator[PackedBatch], model: Any) -> tuple[Tensor, Any]:
        batch = next(batches)
        self.clock.start()  # anew: waiting for the batch is not computing
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
        total, parts = self._objective(last, batch)
        mask_T = batch.loss_mask[0]
        self._names = self._names or list(parts)
        return total, mask_T.sum().int(), _sums_and_counts(list(parts.values()), mask_T)

    def _reduce(self, sums: list[Tensor], asked: Mapping[str, float]) -> tuple[dict[str, Any], dict[str, float]]:
        """What is shown of a global batch, and the sums of what each rank was asked, on every rank."""
        names = self._part_names()
        total_2M = torch.stack(sums).sum(0) if self._reports else torch.zeros(2, len(names) + 1, device=self._device)
        answers_2A = torch.tensor([list(asked.values())] * 2, device=self._device)
        both = torch.cat([total_2M, answers_2A], dim=1)
        if dist.get_world_size() > 1:
            dist.all_reduce(both)
        totals, counts = both.tolist()
        means: dict[str, Any] = {}
        for name, total, count in zip([*names, "response_tokens"], totals, counts, strict=False):
            if name.endswith("_tokens"):
                means[name] = int(total)
            elif name == "loss":  # of every response token: what is NaN is no matter of definition here
                means[name] = total / count if count == counts[len(names)] > 0 else math.nan
            else:
                means[name] = total / count if count else None
        return means, dict(zip(asked, totals[len(names) + 1 :], strict=True))

    def _part_names(self) -> list[str]:
        """The names of the objective's parts, which the last stage alone knows until it has told the others, once."""
        if dist.get_world_size() > 1 and not self._told:
            known: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(known, self._names)
            self._names, self._told = next(filter(None, known)), True
        assert self._names is not None
        return self._names


def _sums_and_counts(parts: list[Tensor], mask_T: Tensor) -> Tensor:
    """Sums of the parts over the response tokens, and for how many each is defined, fp32 [2, M + 1].

    The last column is that of the response tokens themselves. Without a synchronisation.
    """
    values_MT = torch.stack([*parts, torch.ones_like(mask_T)])
    defined_MT = ~values_MT.isnan()
    return torch.stack([values_MT.where(defined_MT, 0.0) @ mask_T, defined_MT.float() @ mask_T])


def _skip_not_finite(optimizer: Any) -> None:
    """Have the optimizer's ``step`` change nothing, and say so, where the norm of the gradient is not finite."""
    norm_of, update, norm = optimizer.get_grad_norm, optimizer.step_with_ready_grads, 0.0

    def get_grad_norm() -> float:
        nonlocal norm
        norm = norm_of()
        return norm

    optimizer.get_grad_norm = get_grad_norm
    optimizer.step_with_ready_grads = lambda: math.isfinite(norm) and update()
