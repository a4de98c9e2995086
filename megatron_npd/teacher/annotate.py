"""The annotation stage: a round of rollouts in, the annotation store out (``store/annotation_store.py``).

A sample has four losses from three forwards: student without the prompt, then teacher with and without it; the
student's loss with the prompt is the mean of the generator's own log-probabilities. Where nothing selects by IFD, the
teacher's forward with the prompt is enough (``AnnotateConfig.unconditional``). The student is first, in a layout of its
own: a 72B teacher runs on 8 tensor-parallel ranks, by which the 28 heads of a 7B student cannot be divided. Only its
losses, one number per sample, are carried over, in memory. Both models stay loaded from one wave, and one round, to the
next; without ``keep_loaded`` one is resident at a time.

A round that is still being generated is annotated in waves, each of the shards that were sealed since the last one.
What a shard holds depends on the rollout shard and the models alone, never on the wave.
"""

from __future__ import annotations

import gc
import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_npd.config.settings import AnnotateConfig, AnnotateOrder
from megatron_npd.data.tokenizer import check_vocabularies, document_start, generation_prompt, load_tokenizer
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger, progress
from megatron_npd.manifest import Manifest, read_manifest, seal, writing
from megatron_npd.models.families.config import load_sizes, load_spec
from megatron_npd.platform import get_platform
from megatron_npd.platform.initialize import initialize_distributed
from megatron_npd.quarantine import QUARANTINE_FILE, check_quarantined, in_words
from megatron_npd.store.annotation_store import STORE_KIND
from megatron_npd.store.scores import TokenScorer
from megatron_npd.store.teacher_records import warn_of_few_in_top_k
from megatron_npd.teacher.megatron_scorer import Scorer, copy_of_those_that_share_experts
from megatron_npd.teacher.samples import ScoringContext, read_samples
from megatron_npd.teacher.shard import write_shard
from megatron_npd.teacher.shard_follower import ShardFollower, Wave
from megatron_npd.teacher.vllm_scorer import ServerScorer
from megatron_npd.weights import model_fingerprint


class Annotator:
    """A teacher, and the student whose responses it scores, for one round after another; every rank has one.

    Args:
        teacher_dir: Hugging Face directory of the teacher.
        cfg: Settings.
        servers: What scores in the teacher's place with ``cfg.backend`` vllm (``teacher/vllm_scorer.py``).
    """

    def __init__(self, teacher_dir: str | Path, cfg: AnnotateConfig, *, servers: ServerScorer | None = None) -> None:
        assert (servers is not None) == (cfg.backend == "vllm")
        self.teacher_dir, self.cfg, self._servers = teacher_dir, cfg, servers
        self._teacher: TokenScorer | None = servers
        self._student: Scorer | None = None
        self._student_dir = ""

    def join(self) -> None:
        """Meet the other ranks, in the teacher's layout."""
        initialize_distributed(**_layout(self.cfg))

    def annotate(self, order: AnnotateOrder) -> Manifest | None:
        """Annotate every rollout shard of a round and seal its annotation store; every rank calls it.

        The shards of a wave are dealt to the data-parallel ranks, the same to those that share experts. Sealed shards
        are kept: a killed stage goes on at the first unsealed one, and a store sealed from the same input is left as
        it is. With ``follow_seconds`` the rollouts may be unsealed yet.

        Returns:
            The manifest on rank 0 (counts: ``in`` = ``kept`` + sum of ``quarantined``, and ``response_tokens``), None
            on the other ranks, or where nothing was kept that had to be.

        Raises:
            UserError: Input, models or layout are refused, no sample could be scored, or a round that was followed got
                no response for ``follow_seconds``.
        """
        rollouts_dir, out_dir = Path(order.rollouts), Path(order.out)
        self.join()
        rank = dist.get_rank()
        setting = check_setting(self.teacher_dir, order.student, self.cfg)
        cfg = replace(self.cfg, max_quarantined=order.max_quarantined)
        waves = ShardFollower(rollouts_dir, out_dir, cfg, _models(self.teacher_dir, setting))
        if (manifest := from_rank_0(waves.finished)) is not None:
            return manifest if rank == 0 else None
        with writing(out_dir, resume=True) if rank == 0 else nullcontext():
            while (wave := from_rank_0(waves.next)) is not None:
                if wave.shards:
                    self._annotate_wave(order, wave, setting)
                if not self.cfg.keep_loaded:
                    self._drop()
            return _seal_round(waves, order) if rank == 0 else None

    def _drop(self) -> None:
        """Forget the models, and have their memory free for other processes; called where nothing else holds them."""
        self._student, self._teacher = None, self._servers
        if self._servers is not None:
            self._servers.close()
        gc.collect()  # modules refer to one another
        get_platform().release_memory()

    def _load_student(self, setting: ScoringContext) -> Scorer:
        """The student, in the widest layout within the teacher's that its heads allow; the rest is data-parallel."""
        width = math.gcd(self.cfg.tensor_model_parallel_size, setting.student.num_kv_heads)
        initialize_distributed(tensor_model_parallel_size=width)
        if self._student is None or self._student_dir != setting.student.path:
            self._student = None  # before the next one takes memory
            self._student = Scorer(setting.student.path, **_scorer_settings(self.cfg))
            self._student_dir = setting.student.path
        return self._student

    def _load_teacher(self, setting: ScoringContext) -> TokenScorer:
        self.join()
        if not self.cfg.keep_loaded:
            self._drop()
        if self._teacher is None:
            vocab_size = setting.student.vocab_size
            settings = _scorer_settings(self.cfg) | self.cfg.transformer_options
            self._teacher = Scorer(self.teacher_dir, vocab_size=vocab_size, **settings)
        return self._teacher

    def _annotate_wave(self, order: AnnotateOrder, wave: Wave, setting: ScoringContext) -> None:
        """Score the shards of a wave on all ranks and seal each."""
        rollouts_dir, out_dir, unconditional = Path(order.rollouts), Path(order.out), setting.cfg.unconditional
        student_losses = self._student_losses(rollouts_dir, wave, setting) if unconditional else {}
        teacher = self._load_teacher(setting)
        own, reasons = _own(wave), Counter[str]()
        meter = _Meter("teacher", (1 + unconditional) * _response_tokens(rollouts_dir, own))
        with meter.bar:
            for name in own:
                started = time.monotonic()
                samples = read_samples(rollouts_dir / name, setting)
                prompted = teacher.score(
                    samples.teacher_prompts, samples.responses, top_k=setting.cfg.top_k, on_forward=meter
                )
                alone = None
                if unconditional:
                    alone = teacher.score(samples.teacher_openings, samples.responses, on_forward=meter)
                if not _writes():
                    continue
                assert prompted is not None
                counts = write_shard(
                    out_dir / name,
                    samples,
                    teacher=prompted,
                    teacher_alone=alone,
                    student_loss_unconditional=student_losses.get(name),
                    vocab_size=setting.student.vocab_size,
                    provenance=wave.shards[name],
                ).counts
                rate = counts["response_tokens"] / max(time.monotonic() - started, 1e-9)
                message = "%s: %d samples, %.0f response tokens/s, rows %s, shard %d of %d in this wave"
                place = own.index(name) + 1
                get_logger().info(message, out_dir / name, counts["kept"], rate, meter.fill, place, len(own))
                if wave.round_size is not None:
                    reasons.update(counts["quarantined"])
                    check_quarantined(reasons, wave.round_size, order.max_quarantined, rollouts_dir)
        dist.barrier()

    def _student_losses(
        self, rollouts_dir: Path, wave: Wave, setting: ScoringContext
    ) -> dict[str, npt.NDArray[np.float32]]:
        """L(y) of the student for each scorable sample of each shard, on every rank."""
        student, own = self._load_student(setting), _own(wave)
        meter = _Meter("student", _response_tokens(rollouts_dir, own))
        losses = {}
        with meter.bar:
            for name in own:
                samples = read_samples(rollouts_dir / name, setting)
                scores = student.score(samples.student_openings, samples.responses, on_forward=meter)
                if scores is not None and _writes():
                    losses[name] = scores.losses()
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, losses)
        return {name: values for part in gathered for name, values in part.items()}


def annotate_round(
    rollouts_dir: str | Path,
    out_dir: str | Path,
    *,
    teacher_dir: str | Path,
    student_dir: str | Path,
    cfg: AnnotateConfig,
    servers: ServerScorer | None = None,
) -> Manifest | None:
    """Annotate one round; arguments, result and errors as for ``Annotator`` and its ``annotate``."""
    order = AnnotateOrder(
        rollouts=str(rollouts_dir), out=str(out_dir), student=str(student_dir), max_quarantined=cfg.max_quarantined
    )
    return Annotator(teacher_dir, cfg, servers=servers).annotate(order)


def from_rank_0(question: Callable[[], Any]) -> Any:
    """Rank 0's answer, on every rank: ranks must not read the file system at different moments."""
    answer = [question() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def _layout(cfg: AnnotateConfig) -> dict[str, int]:
    """Of the teacher; ranks that only talk to its servers are all data-parallel."""
    return {} if cfg.backend == "vllm" else cfg.parallel_sizes


def check_setting(teacher_dir: str | Path, student_dir: str | Path, cfg: AnnotateConfig) -> ScoringContext:
    """What two models and a configuration have in common, checked; arguments and errors as for ``annotate_round``."""
    student = load_spec(student_dir)
    if cfg.backend == "megatron":
        load_spec(teacher_dir)  # refuses what no family covers
    teacher_vocab_size, context = load_sizes(teacher_dir)
    longest = min(cfg.seq_length, context - (cfg.backend == "vllm"))  # a server insists on generating a token
    vocab_size = min(teacher_vocab_size, student.vocab_size)
    if cfg.top_k > vocab_size:
        raise UserError(f"top_k must be at most the vocabulary ({vocab_size}), got {cfg.top_k}; lower it")
    student_tokenizer, teacher_tokenizer = load_tokenizer(student_dir), load_tokenizer(teacher_dir)
    check_vocabularies(student_tokenizer, teacher_tokenizer)
    return ScoringContext(
        cfg=cfg,
        student=student,
        longest=longest,
        shared_vocab_size=vocab_size,
        teacher_generation_prompt=np.array(generation_prompt(teacher_tokenizer)),
        teacher_start=np.array([document_start(teacher_tokenizer)]),
        student_start=np.array([document_start(student_tokenizer)]),
    )


def _models(teacher_dir: str | Path, setting: ScoringContext) -> dict[str, Any]:
    """What the scores depend on beside the rollouts."""
    return {
        "teacher": model_fingerprint(teacher_dir),
        "student": model_fingerprint(setting.student.path),
        "backend": setting.cfg.backend,
        "top_k": setting.cfg.top_k,
        "vocab_size": setting.student.vocab_size,
        "bf16": setting.cfg.bf16,
        "seq_length": setting.cfg.seq_length,
    } | ({} if setting.cfg.unconditional else {"unconditional": False})


class _Meter:
    """Progress of one model over the shards of a wave: response tokens per second, time left, and how full rows are."""

    def __init__(self, title: str, response_tokens: int) -> None:
        self.tokens = self.row_tokens = 0
        self.bar = progress(response_tokens, title, "tok")

    def __call__(self, response_tokens: int, tokens: int, row_tokens: int) -> None:
        self.tokens += tokens
        self.row_tokens += row_tokens
        self.bar.set_postfix_str(f"rows {self.fill}", refresh=False)
        self.bar.update(response_tokens)

    @property
    def fill(self) -> str:
        return f"{100 * self.tokens / max(self.row_tokens, 1):.1f} % full"


def _scorer_settings(cfg: AnnotateConfig) -> dict[str, Any]:
    return {"seq_length": cfg.seq_length, "micro_batch_size": cfg.micro_batch_size, "bf16": cfg.bf16}


def _own(wave: Wave) -> list[str]:
    """The shards of this data-parallel rank, and of those with which it shares experts."""
    _, copies = copy_of_those_that_share_experts()
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return list(wave.shards)[rank // copies :: size // copies]


def _response_tokens(rollouts_dir: Path, shards: list[str]) -> int:
    return sum(read_manifest(rollouts_dir / name, verify=False).counts.get("tokens", 0) for name in shards)


def _writes() -> bool:
    """Whether this rank is the one, of all that have the same shards, that holds the scores and hands them on."""
    ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank()
    return parallel_state.is_pipeline_last_stage() and not any((*ranks, copy_of_those_that_share_experts()[0]))


def _seal_round(waves: ShardFollower, order: AnnotateOrder) -> Manifest | None:
    out_dir, books, reasons = waves.out_dir, waves.books(), waves.reasons()
    counts = {name: sum(book[name] for book in books) for name in ("in", "kept", "response_tokens", "in_top_k")}
    if reasons:
        get_logger().warning(
            "%d of %d samples kept in %s; %s", counts["kept"], counts["in"], out_dir, in_words(reasons)
        )
    if not counts["kept"]:
        if order.may_keep_nothing:
            return None
        raise UserError(f"{out_dir} must hold a scored sample, got none; see {QUARANTINE_FILE} in its shards")
    warn_of_few_in_top_k(counts, out_dir)
    counts |= {"quarantined": dict(sorted(reasons.items())), "pending": 0}
    return seal(out_dir, kind=STORE_KIND, provenance=waves.provenance(waves.path), counts=counts)
