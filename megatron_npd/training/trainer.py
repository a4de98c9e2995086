"""The training run: checks, model, data, the loop over steps, metrics and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_npd.config.training import TrainConfig
from megatron_npd.data.packed_dataset import PackedDataset, Streams
from megatron_npd.data.row_schedule import microbatch_positions
from megatron_npd.errors import UserError
from megatron_npd.lock import hold_lock
from megatron_npd.log import get_logger
from megatron_npd.models.attention import context_share
from megatron_npd.models.build import ModelSpec, build_model, load_hf_weights, load_spec
from megatron_npd.models.checkpoint import (
    load_checkpoint,
    saved_state,
    together,
)
from megatron_npd.ops.arguments import check_objective
from megatron_npd.ops.implementation import use_triton
from megatron_npd.paths import check_training, first_checkpoint
from megatron_npd.platform import get_platform
from megatron_npd.platform.base import Platform, local_rank
from megatron_npd.platform.initialize import initialize_distributed
from megatron_npd.store.streams import STREAMS
from megatron_npd.training.batch_loader import BatchLoader
from megatron_npd.training.metrics import MetricsWriter, metrics_file
from megatron_npd.training.objectives import OBJECTIVES
from megatron_npd.training.refresh_schedule import RefreshSchedule
from megatron_npd.training.rounds import Rounds
from megatron_npd.training.saving import Saver
from megatron_npd.training.step import TrainStep


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where a call of ``train`` ended.

    Attributes:
        iteration: Steps done since the run's start.
        rows_consumed: Rows trained on since then, over all ranks.
        finished: Whether ``train_iters`` is reached.
        metrics_path: JSONL file of the metrics, if there is one.
    """

    iteration: int
    rows_consumed: int
    finished: bool
    metrics_path: Path | None


def train(cfg: TrainConfig) -> TrainResult:
    """Train to ``train_iters`` or ``exit_at_iteration``, from the newest checkpoint on where there is one.

    Runs in a single process or as one rank of torchrun, several times in one process if need be. A call whose goal an
    earlier one reached returns at once.

    Raises:
        UserError: Configuration, model, data or checkpoint do not fit together, the loss is not finite, or another
            process trains into ``save``.
    """
    platform = get_platform(cfg.platform)
    check_training(cfg)
    check_objective(**cfg.kd_settings())
    use_triton(cfg.loss_impl, platform.device(local_rank()), name="loss_impl")
    initialize_distributed(seed=cfg.seed, **cfg.parallel_sizes)
    with _only_trainer(cfg):
        return _train(cfg, platform)


def _train(cfg: TrainConfig, platform: Platform) -> TrainResult:
    stop = min(cfg.exit_at_iteration or cfg.train_iters, cfg.train_iters)
    checkpoint = first_checkpoint(cfg)
    state: dict[str, Any] = {"iteration": 0, "rows_consumed": 0} | (
        {} if checkpoint is None else saved_state(checkpoint)
    )
    if state["iteration"] >= stop:
        get_logger().info("step %d is in %s already; nothing to do", stop, checkpoint)
        return _result(cfg, state)
    _check_order(cfg, state, checkpoint)
    spec = load_spec(cfg.hf_model)
    own = state if checkpoint is not None and checkpoint.parent == Path(cfg.save) else {}  # not another run's rounds
    rounds, refresh = Rounds(cfg), RefreshSchedule(cfg, own.get("refresh"))
    rounds.begin(own.get("schedule", []))
    with together():
        data = _open_data(cfg, rounds.schedule, spec)
    dp_size = parallel_state.get_data_parallel_world_size()
    rows_per_step = check_batch(cfg, data.seq_length, dp_size)
    model = build_model(spec, bf16=cfg.bf16, sequence_parallel=cfg.sequence_parallel)
    if checkpoint is None:
        load_hf_weights(model, spec)
    step = TrainStep(
        cfg,
        model,
        vocab_size=spec.vocab_size,
        micro_batch_tokens=cfg.micro_batch_size * data.seq_length,
        num_micro_batches=rows_per_step // (cfg.micro_batch_size * dp_size),
    )
    if checkpoint is not None:
        load_checkpoint(checkpoint, model=model, optimizer=step.optimizer, scheduler=step.scheduler)
        step.reapply_optimizer_config()
        get_logger().info("resumed from %s after %d rows", checkpoint, state["rows_consumed"])
    _log_start(cfg, stop, rows_per_step, data.seq_length)
    iteration, saver = state["iteration"], Saver(cfg, stop)
    with (
        BatchLoader(data, cfg, rows_per_step, platform, state["rows_consumed"]) as feed,
        MetricsWriter(cfg, iteration=iteration, stop=stop) if dist.get_rank() == 0 else nullcontext() as writer,
    ):
        while iteration < stop:
            looked = time.perf_counter()
            if (following := rounds.following(refresh.progress, iteration, feed.rows_consumed)) is not None:
                with together():  # some ranks alone look at all of it
                    feed.extend(following)
            start, entry = time.perf_counter(), feed.entry()
            values = step.run(feed, iteration + 1)
            iteration += 1
            seconds = time.perf_counter() - start
            tokens = rows_per_step * data.seq_length
            if writer is not None:
                writer.write(
                    {
                        "iteration": iteration,
                        "rows_consumed": feed.rows_consumed,
                        "round": entry.round,
                        "policy_version": entry.policy_version,
                        **values,
                        "tokens": tokens,
                        "tokens_per_second": tokens / seconds,
                        "step_seconds": seconds,
                        "data_wait_seconds": feed.take_wait(),
                        "round_wait_seconds": start - looked,
                    }
                )
            marked = refresh.after(iteration, entry.round, values.get("lag_k3"))
            if saver.due(iteration, marked):
                if writer is not None:
                    writer.sync()
                state = {"iteration": iteration, "rows_consumed": feed.rows_consumed}
                state |= {"seed": cfg.seed, "replay": cfg.replay}
                state |= {"refresh": refresh.state(), "schedule": rounds.state(feed.rows_consumed)}
                saver.save(step, state | ({"policy": refresh.progress.policies} if marked else {}))
            if marked and cfg.exit_at_refresh:
                break
    return _result(cfg, {"iteration": iteration, "rows_consumed": feed.rows_consumed})


def _log_start(cfg: TrainConfig, stop: int, rows_per_step: int, seq_length: int) -> None:
    get_logger().info(
        "training %s to step %d of %d: %d rows of %d tokens per step, TP %d, PP %d, CP %d, DP %d",
        "bf16" if cfg.bf16 else "fp32",
        stop,
        cfg.train_iters,
        rows_per_step,
        seq_length,
        *cfg.parallel_sizes.values(),
        parallel_state.get_data_parallel_world_size(),
    )


def _check_order(cfg: TrainConfig, state: Mapping[str, Any], checkpoint: Path | None) -> None:
    if "seed" not in state:  # converted weights
        return
    for name, given in (("seed", cfg.seed), ("replay", cfg.replay)):
        if (trained := state.get(name, 0.0)) != given:
            raise UserError(
                f"{name} must be {trained}, with which {checkpoint} was trained, got {given}: another one would repeat "
                f"some rows and leave others out; give the old {name}"
            )


def _result(cfg: TrainConfig, state: Mapping[str, Any]) -> TrainResult:
    return TrainResult(
        iteration=state["iteration"],
        rows_consumed=state["rows_consumed"],
        finished=state["iteration"] >= cfg.train_iters,
        metrics_path=metrics_file(cfg),
    )


@contextmanager
def _only_trainer(cfg: TrainConfig) -> Iterator[None]:
    """Keep a second trainer out of ``save``: the two would append to one metrics file and drop each other's lines."""
    with ExitStack() as stack:
        if cfg.save:
            with together():
                if dist.get_rank() == 0:
                    Path(cfg.save).mkdir(parents=True, exist_ok=True)
                    stack.enter_context(hold_lock(cfg.save, trust_remote_holder=False))
        yield


def _open_data(cfg: TrainConfig, schedule: Path, spec: ModelSpec) -> PackedDataset:
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    streams = Streams(
        tokens=parallel_state.is_pipeline_first_stage(ignore_virtual=True),
        targets=last,
        **{name: last and name in OBJECTIVES[cfg.objective].streams for name in STREAMS},
    )
    # One process of a machine hashes the files.
    data = PackedDataset(
        schedule,
        seed=cfg.seed,
        streams=streams,
        replay=cfg.replay,
        share=context_share(),
        verify=local_rank() == 0,
    )
    if data.vocab_size != spec.vocab_size:
        raise UserError(
            f"{cfg.data_path} must be made for the model's vocabulary of {spec.vocab_size} tokens, got "
            f"{data.vocab_size}; annotate and pack for {cfg.hf_model}"
        )
    if "teacher" in OBJECTIVES[cfg.objective].streams and not data.top_k:
        raise UserError(f"{cfg.data_path} must hold teacher records for {cfg.objective}, got none; --objective sft")
    return data


def check_batch(cfg: TrainConfig, seq_length: int, dp_size: int) -> int:
    """Check a global batch against row length and layout.

    Args:
        cfg: Batch and layout.
        seq_length: Tokens of a packed row.
        dp_size: Data-parallel ranks.

    Returns:
        Rows of a global batch.

    Raises:
        UserError: They do not go together.
    """
    rows = cfg.global_batch_size
    if cfg.global_batch_tokens:
        rows, rest = divmod(cfg.global_batch_tokens, seq_length)
        if rest:
            raise UserError(
                f"global_batch_tokens must be a multiple of the packs' row length {seq_length}, got "
                f"{cfg.global_batch_tokens}; give {max(rows, 1) * seq_length}"
            )
    microbatch_positions(0, global_batch_size=rows, micro_batch_size=cfg.micro_batch_size, dp_rank=0, dp_size=dp_size)
    split = cfg.tensor_model_parallel_size * cfg.context_parallel_size
    if cfg.sequence_parallel and cfg.micro_batch_size * seq_length % split:
        raise UserError(
            f"seq_length x micro_batch_size must be a multiple of tensor_model_parallel_size x context_parallel_size "
            f"({split}) with sequence_parallel, got {seq_length} x {cfg.micro_batch_size}; pack rows of another length"
        )
    return rows
