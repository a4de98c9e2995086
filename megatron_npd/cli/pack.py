"""Pack selected answers, or prompts with responses for supervised training, into training rows."""

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
    """Pack selected answers, or prompts with responses for supervised training, into training rows."""

    out: str
    """Directory to seal; for prompts the parent of store/ and packs/."""
    annotations: str = ""
    """Sealed annotations directory."""
    selection: str = ""
    """Sealed selection directory made from those annotations; empty: all their samples are packed."""
    prompts: str = ""
    """JSONL or Parquet with responses, or a sealed prompts directory, instead of annotations and selection."""
    hf_model: str = ""
    """Hugging Face directory of the model that will train on the prompts: tokenizer, chat template, vocabulary."""
    platform: PlatformName = "auto"
    """Device platform; auto: cuda, npu or cpu, the first that is there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {name for name in ("annotations", "selection", "prompts", "hf_model") if getattr(self, name)}
        if given not in ({"annotations"}, {"annotations", "selection"}, {"prompts", "hf_model"}):
            raise UserError(
                "the input must be --annotations, if need be with --selection, or --prompts with --hf-model, "
                f"got {', '.join(sorted(given)) or 'none'}; give one pair"
            )


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(PackCommand, argv)
    get_platform(config.platform)
    from megatron_npd.data.packing import pack_prompts, pack_selection

    if config.annotations:
        pack_selection(config.annotations, config.selection or None, config.out, config)
        wrote(config.out, f"npd train --data-path {config.out} --hf-model STUDENT --save CHECKPOINTS")
        return
    from megatron_npd.data.prompts import prepare_prompts
    from megatron_npd.data.tokenizer import load_model_tokens
    from megatron_npd.models.families import load_spec

    prompts = Path(config.prompts)
    if not is_sealed(prompts):
        prompts = Path(config.out) / "prompts"
        model = load_model_tokens(config.hf_model)
        prepare_prompts(config.prompts, prompts, model=model, max_prompt_len=config.seq_length - 1)
    pack_prompts(prompts, config.out, config, vocab_size=load_spec(config.hf_model).vocab_size)
    packs = Path(config.out) / "packs"
    wrote(packs, f"npd train --data-path {packs} --hf-model {config.hf_model} --objective sft --save CHECKPOINTS")
