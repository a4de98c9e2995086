"""What a run can be refused for, asked before its first stage: the stages' own checks, called early."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_npd.config.run import NPDConfig
from megatron_npd.errors import UserError
from megatron_npd.links import refuse_links
from megatron_npd.log import get_logger
from megatron_npd.paths import check_model_dir, check_out_dir
from megatron_npd.run_dir import RunDir

if TYPE_CHECKING:
    from megatron_npd.models.families import ModelSpec

# GPT-3's models were trained from random weights at 0.3 to 0.7 / width (Brown et al. 2020, table 2.1: 6e-4 at 768,
# 1.2e-4 at 4096), and the rate that suits goes with 1 / width (Yang et al. 2022, muP). Models that are trained already
# lose what they know at such rates: SmolLM2-135M, 576 wide, got worse at 2e-3 and better at 3e-4.
HIGH_LR_TIMES_WIDTH = 0.3


def check_paths(cfg: NPDConfig) -> None:
    """Check what a run is given by path; nothing heavy is imported.

    Raises:
        UserError: A model directory or a file of prompts is not there, or the run's directory cannot be made
            or holds a link.
    """
    for name in ("teacher", "student"):
        check_model_dir(f"--{name}", getattr(cfg, name))
    for name, given in (("prompts", cfg.prompts), ("eval.prompts", cfg.eval.prompts)):
        if (given or name == "prompts") and (
            not Path(given).is_file() or Path(given).suffix not in (".jsonl", ".parquet")
        ):
            raise UserError(f"--{name} must be a JSONL or Parquet file, got {given!r}; check the path")
    check_out_dir("--run-dir", cfg.run_dir)
    refuse_links(cfg.run_dir)


def check_run(cfg: NPDConfig) -> None:
    """Check models, tokenizers, weights, layout, lengths and settings against each other, in seconds.

    Call it once the platform is chosen.

    Raises:
        UserError: A later stage would refuse the run.
    """
    from megatron_npd.data.tokenizer import load_model_tokens
    from megatron_npd.models.convert import open_checkpoint
    from megatron_npd.models.families import load_spec
    from megatron_npd.rollout.evaluate import compile_regex
    from megatron_npd.serving.server import check_servable
    from megatron_npd.teacher.annotate import check_setting

    check_paths(cfg)
    if cfg.eval.prompts and cfg.eval.answer_regex:
        compile_regex(cfg.eval.answer_regex)
    for name, package in (("tensorboard_dir", "tensorboard"), ("wandb_project", "wandb")):
        if getattr(cfg.train, name) and importlib.util.find_spec(package) is None:
            raise UserError(f"train.{name} must go with the package {package}, got none installed; install it")
    setting = check_setting(cfg.teacher, cfg.student, cfg.annotate)
    load_model_tokens(cfg.student)
    if cfg.eval.teacher:
        load_model_tokens(cfg.teacher)
    specs = [setting.student]
    if cfg.annotate.backend == "megatron":
        specs.append(load_spec(cfg.teacher))
    _check_training(cfg, specs)
    for spec in specs:
        open_checkpoint(spec)
    if not cfg.rollout.urls:
        check_servable(cfg.student)
    _check_lengths(cfg, setting.student.max_position_embeddings, setting.longest)
    if 0 < cfg.updates <= cfg.max_lead:
        get_logger().warning(
            "max_lead %d with updates %d has the trainer wait for the first round alone: later ones train only where "
            "they are packed before its last step; give more updates than max_lead to have it wait for more",
            cfg.max_lead,
            cfg.updates,
        )
    if cfg.train.lr * setting.student.hidden_size > HIGH_LR_TIMES_WIDTH:
        get_logger().warning(
            "train.lr %g is high for a trained model %d wide: above %.1g such models tend to get worse; see "
            "examples/recipes/pretrained.yaml",
            cfg.train.lr,
            setting.student.hidden_size,
            HIGH_LR_TIMES_WIDTH / setting.student.hidden_size,
        )


def check_prompts(run: RunDir, cfg: NPDConfig) -> None:
    """Check the sealed prompts against settings that only a later stage reads.

    Raises:
        UserError: A held-out problem has no answer, or a prompt no domain.
    """
    from megatron_npd.rollout.evaluate import read_problems
    from megatron_npd.selection.select import check_domains

    if cfg.eval.prompts and cfg.eval.answer_regex:
        read_problems(run.eval_prompts, cfg.eval.answer_regex)
    if cfg.select.domain_column:
        check_domains(run.prompts, cfg.select.domain_column)


def _check_training(cfg: NPDConfig, specs: list[ModelSpec]) -> None:
    """Check the objective and both layouts; ``specs``: the student's, then the teacher's where it runs here."""
    from megatron_npd.models.layout import check_layout
    from megatron_npd.ops.arguments import check_objective
    from megatron_npd.ops.implementation import use_triton
    from megatron_npd.platform import get_platform
    from megatron_npd.platform.initialize import check_devices, check_world_size
    from megatron_npd.training.trainer import check_batch

    check_objective(**cfg.train.kd_settings())
    use_triton(cfg.train.loss_impl, get_platform().device(0), name="train.loss_impl")
    check_devices(cfg.nproc_per_node)
    layouts = [(cfg.train.tensor_model_parallel_size, cfg.train.pipeline_model_parallel_size)]
    layouts += [(cfg.annotate.tensor_model_parallel_size, cfg.annotate.pipeline_model_parallel_size)]
    for spec, (tensor_size, pipeline_size) in zip(specs, layouts, strict=False):
        check_world_size(cfg.world_size, tensor_size, pipeline_size)
        check_layout(spec, tensor_size, pipeline_size)
    tensor_size, pipeline_size = layouts[0]
    check_batch(cfg.train, cfg.pack.seq_length, cfg.world_size // (tensor_size * pipeline_size))


def _check_lengths(cfg: NPDConfig, context: int, longest: int) -> None:
    """Refuse a context that no server can have; say which samples will be quarantined for their length."""
    longest_sample = cfg.rollout.max_model_len
    if longest_sample > context and not cfg.rollout.urls:
        raise UserError(
            f"rollout.max_model_len must be at most the student's context ({context} by its config.json), got "
            f"{longest_sample}; lower it"
        )
    if longest < longest_sample:
        get_logger().warning(
            "samples of more than %d tokens, the smaller one of annotate.seq_length and the teacher's context, are set "
            "aside, and rollout.max_model_len allows %d",
            longest,
            longest_sample,
        )
    if cfg.pack.seq_length < min(longest, longest_sample) and cfg.pack.too_long == "drop":
        get_logger().warning(
            "samples of more than %d tokens (pack.seq_length) do not train, and rollout.max_model_len allows %d",
            cfg.pack.seq_length,
            longest_sample,
        )
