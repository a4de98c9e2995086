"""Pack selected responses, or those of rollouts or a data set as they are, into training rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_npd.choices import PlatformName
from megatron_npd.config.command_line import parse_config
from megatron_npd.config.settings import PackConfig
from megatron_npd.errors import UserError
from megatron_npd.log import wrote
from megatron_npd.manifest import is_sealed
from megatron_npd.platform import get_platform


@dataclass(frozen=True, kw_only=True)
class PackCommand(PackConfig):
    """Pack selected responses, or those of rollouts or a data set as they are, into training rows."""

    out: str
    """Directory to seal; for rollouts and prompts the parent of store/ and packs/."""
    annotations: str = ""
    """Sealed annotations directory."""
    selection: str = ""
    """Sealed selection directory made from those annotations; empty: all their samples are packed."""
    rollouts: str = ""
    """Sealed rollouts whose responses train as they are (SFT, SeqKD), instead of annotations and selection."""
    prompts: str = ""
    """JSONL or Parquet with responses, or a sealed prompts directory, instead of annotations and selection."""
    hf_model: str = ""
    """Hugging Face directory of the model that trains on rollouts or prompts: tokenizer, chat template, vocabulary."""
    platform: PlatformName = "auto"
    """Device platform; auto: cuda, npu or cpu, the first that is there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("annotations", "selection", "rollouts", "prompts", "hf_model")
        given = {name for name in names if getattr(self, name)}
        pairs = {"annotations", "selection"}, {"rollouts", "hf_model"}, {"prompts", "hf_model"}
        if given not in ({"annotations"}, *pairs):
            raise UserError(
                "the input must be --annotations, if need be with --selection, or --rollouts or --prompts with "
                f"--hf-model, got {', '.join(sorted(given)) or 'none'}; give one pair"
            )


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(PackCommand, argv)
    get_platform(config.platform)
    from megatron_npd.data.packing import pack_prompts, pack_rollouts, pack_selection

    if config.annotations:
        pack_selection(config.annotations, config.selection or None, config.out, config)
        wrote(config.out, f"npd train --data-path {config.out} --hf-model STUDENT --save CHECKPOINTS")
        return
    from megatron_npd.models.families import load_spec

    vocab_size = load_spec(config.hf_model).vocab_size
    if config.rollouts:
        pack_rollouts(config.rollouts, config.out, config, vocab_size=vocab_size)
    else:
        pack_prompts(_prepared(config), config.out, config, vocab_size=vocab_size)
    packs = Path(config.out) / "packs"
    wrote(packs, f"npd train --data-path {packs} --hf-model {config.hf_model} --objective sft --save CHECKPOINTS")


def _prepared(config: PackCommand) -> Path:
    """The sealed directory of the prompts, made from their file where they are none."""
    from megatron_npd.data.prompts import prepare_prompts
    from megatron_npd.data.tokenizer import load_model_tokens

    if is_sealed(prompts := Path(config.prompts)):
        return prompts
    out, model = Path(config.out) / "prompts", load_model_tokens(config.hf_model)
    prepare_prompts(config.prompts, out, model=model, max_prompt_len=config.seq_length - 1)
    return out
