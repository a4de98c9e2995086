"""The training run: checks, model, data, the loop over steps, metrics and checkpoints."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
from megatron_npd.models.build import ModelSpec, build_chunks, load_hf_weights, load_spec
from megatron_npd.models.checkpoint import load_checkpoint, together
from megatron_npd.models.flops import step_flops
from megatron_npd.models.layout import with_parts
from megatron_npd.ops.arguments import check_objective
from megatron_npd.ops.implementation import use_triton
from megatron_npd.paths import check_training
from megatron_npd.platform import get_platform
from megatron_npd.platform.base import Platform, local_rank
from megatron_npd.platform.deterministic import deterministic
from megatron_npd.platform.initialize import initialize_distributed
from megatron_npd.store.streams import STREAMS
from megatron_npd.training.batch_loader import BatchLoader
from megatron_npd.training.interrupt import Interrupt, Interrupted
from megatron_npd.training.metrics import MetricsWriter, metrics_file
from megatron_npd.training.objectives import OBJECTIVES
from megatron_npd.training.profiling import Profiling
from megatron_npd.training.refresh_schedule import RefreshSchedule
from megatron_npd.training.resuming import check_state, find_checkpoint
from megatron_npd.training.rounds import Rounds
from megatron_npd.training.saving import Saver
from megatron_npd.training.skipped import Skipped
from megatron_npd.training.step import TrainStep
from megatron_npd.training.stragglers import Stragglers


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where a call of ``train`` ended.

    Attributes:
        iteration: Steps done since the run's start.
        rows_consumed: Rows trained on since then, over all ranks.
        finished: Whether ``train_iters`` is reached.
        interrupted: What stopped the run before its goal, in words; empty: nothing.
        metrics_path: JSONL file of the metrics, if there is one.
    """

    iteration: int
    rows_consumed: int
    finished: bool
    interrupted: str
    metrics_path: Path | None


def train(cfg: TrainConfig) -> TrainResult:
    """Train to ``train_iters`` or ``exit_at_iteration``, from the newest checkpoint on where there is one.

    Runs in a single process or as one rank of torchrun, several times in one process if need be. A call whose goal an
    earlier one reached returns at once.

    Raises:
        UserError: Configuration, model, data or checkpoint do not fit together, the loss is not finite in several steps
            in a row, or another process trains into ``save``.
    """
    platform = get_platform(cfg.platform)
    check_training(cfg)
    check_objective(**cfg.kd_settings())
    use_triton(cfg.loss_impl, platform.device(local_rank()), name="loss_impl")
    if cfg.num_layers_per_virtual_pipeline_stage:
        cfg = with_parts(cfg, load_spec(cfg.hf_model))
    parts = cfg.virtual_pipeline_model_parallel_size
    with deterministic(cfg.deterministic_mode):
        initialize_distributed(seed=cfg.seed, virtual_pipeline_model_parallel_size=parts, **cfg.parallel_sizes)
        with Interrupt(cfg) as interrupt, _only_trainer(cfg):
            return _train(cfg, platform, interrupt)


def _train(cfg: TrainConfig, platform: Platform, interrupt: Interrupt) -> TrainResult:
    stop = min(cfg.exit_at_iteration or cfg.train_iters, cfg.train_iters)
    checkpoint, found = find_checkpoint(cfg)
    state: dict[str, Any] = {"iteration": 0, "rows_consumed": 0} | found
    if state["iteration"] >= stop:
        get_logger().info("step %d is in %s already; nothing to do", stop, checkpoint)
        return _result(cfg, state)
    spec = load_spec(cfg.hf_model)
    own = state if checkpoint is not None and checkpoint.parent == Path(cfg.save) else {}  # not another run's rounds
    rounds, refresh = Rounds(cfg, interrupt), RefreshSchedule(cfg, own.get("refresh"))
    try:
        rounds.begin(own.get("schedule", []))
    except Interrupted:
        return _result(cfg, state, interrupt)
    with together():
        data = _open_data(cfg, rounds.schedule, spec)
    check_experts(cfg, spec)
    dp_size = parallel_state.get_data_parallel_world_size()
    rows_per_step = check_batch(cfg, data.seq_length, dp_size)
    if checkpoint is not None:
        check_state(cfg, state, checkpoint, rows_per_step)
    chunks = build_chunks(spec, bf16=cfg.bf16, sequence_parallel=cfg.sequence_parallel, **cfg.transformer_options)
    if checkpoint is None:
        for chunk in chunks:
            load_hf_weights(chunk, spec)
    step = TrainStep(
        cfg,
        chunks,
        vocab_size=spec.vocab_size,
        micro_batch_tokens=cfg.micro_batch_size * data.seq_length,
        num_micro_batches=rows_per_step // (cfg.micro_batch_size * dp_size),
    )
    if checkpoint is not None:
        load_checkpoint(checkpoint, model=chunks, optimizer=step.optimizer, scheduler=step.scheduler)
        step.reapply_optimizer_config()
        get_logger().info("resumed from %s after %d rows", checkpoint, state["rows_consumed"])
    _log_start(cfg, stop, rows_per_step, data.seq_length)
    iteration, writer = state["iteration"], None
    with (
        ExitStack() as stack,
        BatchLoader(data, cfg, rows_per_step, platform, state["rows_consumed"]) as feed,
    ):
        if dist.get_rank() == 0:
            ranks = dist.get_world_size()
            writer = stack.enter_context(MetricsWriter(cfg, iteration=iteration, stop=stop, ranks=ranks))
        stack.enter_context(_little_garbage())
        loop = _Loop(cfg, spec, stop, interrupt, rounds, refresh, step, feed, writer, rows_per_step)
        profiling = stack.enter_context(Profiling(cfg))
        return _result(cfg, *loop.run(iteration, rows_per_step * data.seq_length, profiling))


class _Loop:
    """The steps of one call of ``train``."""

    def __init__(
        self,
        cfg: TrainConfig,
        spec: ModelSpec,
        stop: int,
        interrupt: Interrupt,
        rounds: Rounds,
        refresh: RefreshSchedule,
        step: TrainStep,
        feed: BatchLoader,
        writer: MetricsWriter | None,
        rows_per_step: int,
    ) -> None:
        self._spec, self._rows_per_step = spec, rows_per_step
        self._cfg, self._stop, self._interrupt, self._rounds, self._refresh = cfg, stop, interrupt, rounds, refresh
        self._step, self._feed, self._writer = step, feed, writer
        self._saver, self._stragglers = Saver(cfg, stop), Stragglers(cfg, step.clock, stop)
        rounds.before_waiting = self._saver.finish  # a wait may be long

    def run(self, iteration: int, tokens: int, profiling: Profiling) -> tuple[dict[str, Any], Interrupt | None]:
        """The position where the steps end, and what stopped them before the goal; ``tokens``: of a step."""
        self._skipped = Skipped(self._cfg, iteration)
        saved, interrupted = iteration, False
        while iteration < self._stop and not interrupted:
            looked = time.perf_counter()
            try:
                self._take_round(iteration)
            except UserError:  # on all ranks
                self._saver.finish()
                raise
            except Interrupted:
                interrupted = True
                if saved != iteration:
                    self._save(iteration, marked=False)
                break
            start, entry = time.perf_counter(), self._feed.entry()
            profiling.before(iteration + 1)
            values, votes = self._step.run(self._feed, iteration + 1, self._votes)
            iteration += 1
            profiling.after(iteration)
            whole = self._feed.whole
            try:
                self._skipped.after(iteration, values, whole and whole.samples)
            except UserError:  # on all ranks
                self._saver.finish()
                raise
            seconds, waited = time.perf_counter() - start, self._feed.take_wait()
            compared = self._stragglers.after(iteration, waited)
            if self._writer is not None and whole is not None:
                self._writer.write(
                    {
                        "iteration": iteration,
                        "rows_consumed": self._feed.rows_consumed,
                        "round": entry.round,
                        "policy_version": entry.policy_version,
                        **values,
                        "samples_sha256": whole.sha256,
                        "tokens": tokens,
                        "model_tflops": step_flops(self._spec, tokens, whole.attention_cost) / 1e12,
                        "tokens_per_second": tokens / seconds,
                        "step_seconds": seconds,
                        "data_wait_seconds": waited,
                        "round_wait_seconds": start - looked,
                        **compared,
                    }
                )
            lag = None if values["skipped"] else values.get("lag_k3")
            marked = self._refresh.after(iteration, entry.round, lag)
            interrupted = votes["interrupt"] > 0 and iteration < self._stop
            if votes["written"] == dist.get_world_size():
                self._saver.finish()
            if self._saver.due(iteration, marked=marked, late=interrupted or votes["late"] > 0):
                self._save(iteration, marked=marked)
                saved = iteration
            if marked and self._cfg.exit_at_refresh:
                break
        self._saver.finish()
        position = {"iteration": iteration, "rows_consumed": self._feed.rows_consumed}
        return position, self._interrupt if interrupted else None

    def _take_round(self, iteration: int) -> None:
        following = self._rounds.following(self._refresh.progress, iteration, self._feed.rows_consumed)
        if following is not None:
            with together():  # some ranks alone look at all of it
                self._feed.extend(following)

    def _votes(self) -> dict[str, float]:
        """What the ranks agree on in each step, by the sum over them."""
        late = dist.get_rank() == 0 and self._saver.late()
        return {"interrupt": self._interrupt.asked(), "late": late, "written": self._saver.written()}

    def _save(self, iteration: int, *, marked: bool) -> None:
        if self._writer is not None:
            self._writer.sync()
        state = {"iteration": iteration, "rows_consumed": self._feed.rows_consumed}
        state |= {"seed": self._cfg.seed, "replay": self._cfg.replay, "global_batch_size": self._rows_per_step}
        state |= {"refresh": self._refresh.state(), "schedule": self._rounds.state(self._feed.rows_consumed)}
        self._saver.save(self._step, state | ({"policy": self._refresh.progress.policies} if marked else {}))


def check_experts(cfg: TrainConfig, spec: ModelSpec) -> None:
    """Refuse what megatron-core does otherwise where a model has experts.

    Raises:
        UserError: The sequence is not split over tensor-parallel ranks, which would then send every token to the
            experts several times, or experts' MLPs are to be computed again alone.
    """
    if spec.experts and cfg.recompute_granularity == "selective" and "mlp" in cfg.recompute_modules:
        raise UserError(
            f"recompute_modules must be without mlp for {spec.path}, a model with experts, computed again by "
            f"whole layers alone, got {' '.join(cfg.recompute_modules)}; take recompute_granularity full"
        )
    if spec.experts and cfg.tensor_model_parallel_size > 1 and not cfg.sequence_parallel:
        raise UserError(
            f"sequence_parallel must be true where {spec.path}, a model with experts, trains with "
            f"tensor_model_parallel_size {cfg.tensor_model_parallel_size}, got false; switch it on"
        )


def _log_start(cfg: TrainConfig, stop: int, rows_per_step: int, seq_length: int) -> None:
    get_logger().info(
        "training %s to step %d of %d: %d rows of %d tokens per step, TP %d, PP %d, CP %d, EP %d, DP %d",
        "bf16" if cfg.bf16 else "fp32",
        stop,
        cfg.train_iters,
        rows_per_step,
        seq_length,
        *cfg.parallel_sizes.values(),
        parallel_state.get_data_parallel_world_size(),
    )


def _result(cfg: TrainConfig, state: Mapping[str, Any], interrupt: Interrupt | None = None) -> TrainResult:
    return TrainResult(
        iteration=state["iteration"],
        rows_consumed=state["rows_consumed"],
        finished=state["iteration"] >= cfg.train_iters,
        interrupted="" if interrupt is None else interrupt.reason or "a signal to another rank",
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


@contextmanager
def _little_garbage() -> Iterator[None]:
    """Within it, what is there already is not looked through for garbage.

    Modules and models are half a million objects: a look at them takes 0.2 s, and megatron-core has one at each save.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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
    micro_batches = rows // (cfg.micro_batch_size * dp_size)
    if cfg.virtual_pipeline_model_parallel_size > 1 and micro_batches % cfg.pipeline_model_parallel_size:
        raise UserError(
            f"micro-batches of a step on each data-parallel rank must be a multiple of pipeline_model_parallel_size "
            f"({cfg.pipeline_model_parallel_size}) with virtual_pipeline_model_parallel_size, got {micro_batches}; "
            "change global_batch_size or micro_batch_size"
        )
    split = cfg.tensor_model_parallel_size * cfg.context_parallel_size
    if cfg.sequence_parallel and cfg.micro_batch_size * seq_length % split:
        raise UserError(
            f"seq_length x micro_batch_size must be a multiple of tensor_model_parallel_size x context_parallel_size "
            f"({split}) with sequence_parallel, got {seq_length} x {cfg.micro_batch_size}; pack rows of another length"
        )
    return rows
