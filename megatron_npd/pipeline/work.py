"""What the stages of a run do: each function calls the stage's own room with this run's paths and settings."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron_npd.config.run import NPDConfig
from megatron_npd.config.settings import AnnotateOrder
from megatron_npd.data.packing import pack_rollouts, pack_selection
from megatron_npd.data.prompts import prepare_prompts
from megatron_npd.data.tokenizer import check_vocabularies, load_model_tokens, load_tokenizer
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.manifest import is_sealed
from megatron_npd.pipeline.annotating import RunAnnotator
from megatron_npd.pipeline.evaluation import (
    Accuracies,
    measure_line,
    measure_settings,
    nothing_measured,
    prepare_measure,
    read_measures,
)
from megatron_npd.pipeline.launch import Job, Launcher
from megatron_npd.pipeline.preflight import check_prompts
from megatron_npd.pipeline.servers import TEACHER, Servers, policy_dir
from megatron_npd.rollout.generate import generate_round
from megatron_npd.run_dir import RunDir, version
from megatron_npd.selection.select import frozen_taus, select_round


@dataclass(kw_only=True)
class Context:
    """A run in progress.

    Attributes:
        run: Its paths.
        cfg: Its configuration.
        servers: Its rollout servers.
        launcher: Starts commands on the training nodes.
        annotator: Its annotator, which lives through the rounds.
        trainer: The trainer, once it was started; it does too.
        generating: The round that is being generated; None: none is.
    """

    run: RunDir
    cfg: NPDConfig
    servers: Servers
    launcher: Launcher
    annotator: RunAnnotator = field(init=False)
    trainer: Job | None = None
    generating: int | None = None

    def __post_init__(self) -> None:
        self.annotator = RunAnnotator(self.run, self.cfg, self.launcher)

    @property
    def overlaps(self) -> bool:
        """Whether stages run beside one another: models are then used in commands of their own alone."""
        return self.cfg.max_lead > 0


def check_teacher_servers(ctx: Context) -> None:
    """Ask the teacher's servers that are given, before the first stage: a later one would be refused by them.

    Raises:
        UserError: One does not answer, or does not serve the teacher.
    """
    if ctx.cfg.annotate.backend == "vllm" and ctx.cfg.annotate.urls:
        from megatron_npd.teacher.vllm_scorer import ServerScorer  # after the platform is chosen

        with ServerScorer(ctx.cfg.teacher, ctx.cfg.annotate) as servers:
            servers.check()


# -- once in a run -------------------------------------------------------------------------------------------------


def prompts(ctx: Context, _: int) -> None:
    """Turn prompts, problems and held-out prompts into token ids."""
    run, cfg = ctx.run, ctx.cfg
    student, teacher = load_model_tokens(cfg.student), load_tokenizer(cfg.teacher)
    check_vocabularies(student.tokenizer, teacher)
    for source, out in ((cfg.eval.prompts, run.eval_prompts), (cfg.prompts, run.prompts)):
        if source:  # where they are sealed, this insists on the same file
            prepare_prompts(
                source,
                out,
                model=student,
                teacher_tokenizer=teacher,
                max_prompt_len=cfg.rollout.max_model_len - 1,
                max_quarantined=cfg.rollout.max_quarantined,
                special_tokens_in_text=cfg.special_tokens_in_text,
                held_out=0 if cfg.eval.prompts or cfg.annotate.backend == "none" else cfg.eval.held_out,
            )
    check_prompts(run, cfg)
    if cfg.annotate.backend != "none":
        prepare_measure(run, cfg)


def evaluate_teacher(ctx: Context, _: int) -> None:
    """Measure the teacher's accuracy, before the student's servers take the devices."""
    Accuracies(ctx.run, ctx.cfg).add_teacher()


def teacher_is_evaluated(ctx: Context, _: int) -> bool:
    return not Accuracies(ctx.run, ctx.cfg).lack(None)


# -- for each policy -----------------------------------------------------------------------------------------------


def evaluate(ctx: Context, index: int) -> None:
    """Measure a policy's accuracy."""
    Accuracies(ctx.run, ctx.cfg).add(index, ctx.servers.serve(index))


def is_evaluated(ctx: Context, index: int) -> bool:
    return not Accuracies(ctx.run, ctx.cfg).lack(index)


def answer_held_out(ctx: Context, index: int) -> None:
    """Have a policy answer the prompts that it is measured on."""
    held_out = ctx.run.held_out
    try:
        generate_round(
            held_out.prompts,
            held_out.rollouts(index),
            pool=ctx.servers.serve(index),
            cfg=measure_settings(ctx.cfg.rollout),
            round_index=index,
            policy_version=version(index),
            rounds=held_out.rollouts,
        )
    except UserError:  # where all of these few are quarantined, that is a policy's result; it must not stop a run
        if nothing_measured(held_out.round(index)) is None:
            raise
        _log_measure(ctx, index)


def held_out_is_answered(ctx: Context, index: int) -> bool:
    return is_sealed(ctx.run.held_out.rollouts(index)) or is_measured(ctx, index)


def measure(ctx: Context, index: int) -> None:
    """Measure a policy's distance from the teacher: annotate its responses to held-out prompts."""
    order = dataclasses.replace(_order(ctx, index, ctx.run.held_out), max_quarantined=1.0, may_keep_nothing=True)
    ctx.annotator.annotate(order, lambda: is_measured(ctx, index))
    _log_measure(ctx, index)


def _log_measure(ctx: Context, index: int) -> None:
    entry = next(entry for entry in read_measures(ctx.run) if entry["policy"] == index)
    get_logger().log(logging.INFO if entry["reason"] is None else logging.WARNING, "%s", measure_line(entry))


def is_measured(ctx: Context, index: int) -> bool:
    held_out = ctx.run.held_out
    prompts_known = is_sealed(ctx.run.prompts)
    if ctx.cfg.annotate.backend == "none":
        return True
    if is_sealed(held_out.annotations(index)) or nothing_measured(held_out.round(index)) is not None:
        return True
    return prompts_known and not is_sealed(held_out.prompts)


def own_policy(_: Context, index: int) -> int:
    """What is asked about a policy is asked of that policy."""
    return index


def policy_is_there(ctx: Context, index: int) -> bool:
    return is_sealed(ctx.run.prompts) and (index == 0 or is_sealed(ctx.run.policy(index)))


# -- for each round ------------------------------------------------------------------------------------------------


def generating_policy(ctx: Context, index: int) -> int:
    """The policy that answers in a round: the newest one, or with ``max_lead`` one that is so many rounds older."""
    return max(0, index - ctx.cfg.max_lead)


def serving_policy(ctx: Context, index: int) -> int | None:
    """What the rollout servers must have before a round; a teacher has servers of its own."""
    return None if ctx.cfg.responses == "teacher" else generating_policy(ctx, index)


def policy_is_due(ctx: Context, index: int) -> bool:
    return policy_is_there(ctx, generating_policy(ctx, index))


def rollout(ctx: Context, index: int) -> None:
    """Generate a round of responses; with ``annotate.follow_seconds`` another command annotates them meanwhile."""
    alone = ctx.cfg.take_turns and ctx.servers.launches
    if ctx.cfg.annotate.follow_seconds and not ctx.overlaps and not alone:
        ctx.annotator.begin(_order(ctx, index, ctx.run))
    ctx.generating = index
    try:
        _generate(ctx, index)
    finally:
        ctx.generating = None


def _generate(ctx: Context, index: int) -> None:
    generate = partial(
        generate_round,
        ctx.run.prompts,
        ctx.run.rollouts(index),
        cfg=ctx.cfg.rollout,
        round_index=index,
        rounds=ctx.run.rollouts,
    )
    if ctx.cfg.responses == "teacher":
        with ctx.servers.of_teacher() as pool:
            generate(pool=pool, policy_version=TEACHER, source="teacher")
        return
    policy = generating_policy(ctx, index)
    generate(pool=ctx.servers.serve(policy), policy_version=version(policy))


def rollouts_can_be_read(ctx: Context, index: int) -> bool:
    """They are there, or on their way to an annotator that follows them."""
    follows = ctx.overlaps and ctx.cfg.annotate.follow_seconds and ctx.generating == index
    return bool(follows) or is_sealed(ctx.run.rollouts(index))


def annotate(ctx: Context, index: int) -> None:
    """Have the teacher score a round of responses, or what of it a following annotator has left."""
    ctx.annotator.annotate(_order(ctx, index, ctx.run), lambda: is_annotated(ctx, index))


def is_annotated(ctx: Context, index: int) -> bool:
    return ctx.cfg.annotate.backend == "none" or is_sealed(ctx.run.annotations(index))


def select(ctx: Context, index: int) -> None:
    """Choose which of a round's responses train; the first round's taus stay (METHOD section 3)."""
    run, cfg = ctx.run, ctx.cfg.select
    taus = frozen_taus(run.selection(0)) if index and cfg.tau is None else None
    select_round(run.annotations(index), run.selection(index), cfg, taus, prompts_dir=run.prompts)


def is_selected(ctx: Context, index: int) -> bool:
    """What nobody scores trains as it is."""
    unscored = ctx.cfg.annotate.backend == "none"
    return is_sealed(ctx.run.rollouts(index) if unscored else ctx.run.selection(index))


def pack(ctx: Context, index: int) -> None:
    """Pack the selected responses, or all that nobody scores, into training rows."""
    if ctx.cfg.annotate.backend == "none":
        from megatron_npd.models.families import load_spec

        vocab_size = load_spec(ctx.cfg.student).vocab_size
        pack_rollouts(
            ctx.run.rollouts(index),
            ctx.run.round(index),
            ctx.cfg.pack,
            vocab_size=vocab_size,
            max_quarantined=ctx.cfg.annotate.max_quarantined,
        )
        return
    pack_selection(ctx.run.annotations(index), ctx.run.selection(index), ctx.run.packs(index), ctx.cfg.pack)


def packs_are_there(ctx: Context, index: int) -> bool:
    """Those without which the trainer makes no step towards policy ``index + 1`` (``training/rounds.py``)."""
    return is_sealed(ctx.run.packs(max(0, index - ctx.cfg.max_lead)))


def train(ctx: Context, _: int) -> None:
    """See to it that the trainer runs; it takes each round's packs itself, once they are sealed."""
    if ctx.trainer is not None and ctx.cfg.take_turns:
        ctx.trainer.wait()  # it ends at each refresh
        ctx.trainer = None
    if ctx.trainer is None:
        ctx.trainer = ctx.launcher.start("train", trainer_settings(ctx.run, ctx.cfg))
    ctx.trainer.running()


def trainer_settings(run: RunDir, cfg: NPDConfig) -> dict[str, Any]:
    """The configuration of a run's trainer."""
    return dataclasses.asdict(
        dataclasses.replace(
            cfg.train,
            hf_model=cfg.student,
            data_path=str(run.root),
            save=str(run.checkpoints),
            load=str(run.checkpoints),
            metrics_path=str(run.metrics),
            updates=cfg.updates,
            max_lead=cfg.max_lead,
            exit_at_refresh=cfg.take_turns,
            platform=cfg.platform,
        )
    )


def checkpoint_is_there(ctx: Context, index: int) -> bool:
    return ctx.run.checkpoint(index + 1) is not None


def export(ctx: Context, index: int) -> None:
    """Convert a marked checkpoint into the next policy."""
    checkpoint = ctx.run.checkpoint(index + 1)
    assert checkpoint is not None, "ready, as checkpoint_is_there says"
    from megatron_npd.models.convert import megatron_to_hf  # after the platform is chosen

    megatron_to_hf(checkpoint, ctx.cfg.student, ctx.run.policy(index + 1))


# -- helpers -------------------------------------------------------------------------------------------------------


def _order(ctx: Context, index: int, run: RunDir) -> AnnotateOrder:
    """To annotate a round; ``run``: the run, or its held-out prompts as one, which the newest policy answered."""
    policy = generating_policy(ctx, index) if run == ctx.run else index
    return AnnotateOrder(
        rollouts=str(run.rollouts(index)),
        out=str(run.annotations(index)),
        student=str(policy_dir(ctx.run, ctx.cfg, policy)),
        max_quarantined=ctx.cfg.annotate.max_quarantined,
    )
