"""Convert weights between a Hugging Face directory and a megatron-core dist checkpoint, in one process, without a GPU.

    npd convert --direction hf-to-megatron --hf-model DIR --out DIR
    npd convert --direction megatron-to-hf --checkpoint DIR --hf-model DIR --out DIR

A dist checkpoint is independent of the parallel layout: any TP x PP size loads it, and one of any layout converts back,
also one that Megatron-LM wrote (torch_dist). Memory holds a few hundred MB, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_npd.config.command_line import parse_config
from megatron_npd.errors import UserError
from megatron_npd.log import wrote
from megatron_npd.paths import check_checkpoint, check_model_dir, check_out_dir
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
    out: str = ""
    """Directory to make: a root of checkpoints with iter_0000000, or a Hugging Face directory."""
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """Type of all tensors; empty: those of hf_model, and in a checkpoint bfloat16 where all are, else float32."""
    workers: int = 0
    """Threads that read and convert; 0: as many as there are cores, up to four."""
    verify: bool = False
    """Read what was written back before it is sealed, and compare it with the source."""
    dry_run: bool = False
    """Print the table of tensors (names, rows in the parameter, shapes, types) and write nothing."""

    def __post_init__(self) -> None:
        if bool(self.out) == self.dry_run:
            raise UserError(f"out must be given, or dry_run, got {self.out!r} and {self.dry_run}; give one of them")
        if self.workers < 0:
            raise UserError(f"workers must be at least 0, got {self.workers}; leave it out to have up to four")
        if (self.direction == "megatron-to-hf") != bool(self.checkpoint):
            raise UserError(
                f"checkpoint must be given for megatron-to-hf and only there, got {self.checkpoint!r} for "
                f"{self.direction}; hf-to-megatron reads hf_model"
            )


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(ConvertCommand, argv)
    check_model_dir("hf_model", config.hf_model)
    if config.checkpoint:
        check_checkpoint("checkpoint", config.checkpoint)
    check_out_dir("out", config.out)
    get_platform("cpu")  # host memory is what a conversion needs
    from megatron_npd.models.convert import hf_to_megatron, megatron_to_hf

    how: Any = {"dtype": config.dtype, "workers": config.workers, "verify": config.verify}
    if config.dry_run:
        from megatron_npd.models.convert_plan import in_columns, plan_to_hf, plan_to_megatron

        to_hf = config.direction == "megatron-to-hf"
        model = config.hf_model
        plan = plan_to_hf(config.checkpoint, model, config.dtype) if to_hf else plan_to_megatron(model, config.dtype)
        print(in_columns(plan))
    elif config.direction == "hf-to-megatron":
        path = hf_to_megatron(config.hf_model, config.out, **how)
        wrote(path, f"npd train --load {config.out} --hf-model {config.hf_model} --data-path PACKS --save NEW")
    else:
        megatron_to_hf(config.checkpoint, config.hf_model, config.out, **how)
        wrote(config.out, f"npd evaluate --model {config.out} --prompts PROBLEMS")
