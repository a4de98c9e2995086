"""Convert weights between a Hugging Face directory and a megatron-core dist checkpoint, in one process, without a GPU.

    npd convert --direction hf-to-megatron --hf-model DIR --out DIR
    npd convert --direction megatron-to-hf --checkpoint DIR --hf-model DIR --out DIR

A dist checkpoint is independent of the parallel layout: any TP x PP size loads it, and one of any layout converts back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_npd.config.command_line import parse_config
from megatron_npd.errors import UserError
from megatron_npd.log import wrote
from megatron_npd.paths import check_model_dir, check_out_dir, check_sealed, latest_checkpoint
from megatron_npd.platform import get_platform


@dataclass(frozen=True, kw_only=True)
class ConvertCommand:
    """Convert weights between a Hugging Face directory and a megatron-core dist checkpoint, without a GPU."""

    direction: Literal["hf-to-megatron", "megatron-to-hf"]
    """Which way."""
    hf_model: str
    """Hugging Face directory: the weights to convert, or (megatron-to-hf) the one that the checkpoint started from,
    whose configuration, tokenizer and tensor types are kept."""
    checkpoint: str = ""
    """megatron-to-hf: the checkpoint (iter_0000100), or the directory above it for its newest whole one."""
    out: str
    """Directory to make: a root of checkpoints with iter_0000000, or a Hugging Face directory."""

    def __post_init__(self) -> None:
        if (self.direction == "megatron-to-hf") != bool(self.checkpoint):
            raise UserError(
                f"checkpoint must be given for megatron-to-hf and only there, got {self.checkpoint!r} for "
                f"{self.direction}; hf-to-megatron reads hf_model"
            )


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(ConvertCommand, argv)
    check_model_dir("hf_model", config.hf_model)
    if config.checkpoint and latest_checkpoint(config.checkpoint) is None:
        check_sealed("checkpoint", config.checkpoint)
    check_out_dir("out", config.out)
    get_platform("cpu")  # host memory is what a conversion needs
    from megatron_npd.models.convert import hf_to_megatron, megatron_to_hf

    if config.direction == "hf-to-megatron":
        path = hf_to_megatron(config.hf_model, config.out)
        wrote(path, f"npd train --load {config.out} --hf-model {config.hf_model} --data-path PACKS --save NEW")
    else:
        megatron_to_hf(config.checkpoint, config.hf_model, config.out)
        wrote(config.out, f"npd evaluate --model {config.out} --prompts PROBLEMS")
