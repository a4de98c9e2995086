"""Score a round of rollouts with the teacher, alone or under torchrun.

``torchrun --nproc-per-node 8 npd annotate --rollouts DIR --out DIR --teacher DIR --student DIR``
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_npd.choices import PlatformName
from megatron_npd.config.command_line import parse_config
from megatron_npd.config.settings import AnnotateConfig, AnnotateOrder
from megatron_npd.errors import UserError
from megatron_npd.log import wrote
from megatron_npd.paths import check_model_dir, check_out_dir, check_sealed
from megatron_npd.platform import get_platform


@dataclass(frozen=True, kw_only=True)
class AnnotateCommand(AnnotateConfig):
    """Score a round of rollouts with the teacher, alone or under torchrun."""

    rollouts: str = ""
    """Sealed directory of rollouts."""
    out: str = ""
    """Directory to seal: the annotation store."""
    teacher: str
    """Hugging Face directory of the teacher."""
    student: str = ""
    """Hugging Face directory of the student that generated the rollouts."""
    orders: bool = False
    """Annotate round after round with the same teacher, as npd run names them: each a line of JSON on the standard
    input, with rollouts, out, student and max_quarantined."""
    log_dir: str = ""
    """Directory of the log of a teacher's server that is launched here; empty: logs beside out, or with orders a
    private one among the temporary files."""
    platform: PlatformName = "auto"
    """Device platform; auto: cuda, npu or cpu, the first that is there."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the configuration and annotate."""
    command = parse_config(AnnotateCommand, argv)
    _check(command)
    get_platform(command.platform)
    from megatron_npd.teacher.annotate import Annotator  # after the platform is chosen
    from megatron_npd.teacher.orders import annotate_orders

    cfg = AnnotateConfig(**{field.name: getattr(command, field.name) for field in fields(AnnotateConfig)})
    with ExitStack() as stack:
        servers = None
        if cfg.backend == "vllm":
            from megatron_npd.teacher.vllm_scorer import ServerScorer

            beside = Path(command.out).parent / "logs" if command.out else None
            servers = stack.enter_context(ServerScorer(command.teacher, cfg, log_dir=command.log_dir or beside))
        annotator = Annotator(command.teacher, cfg, servers=servers)
        if command.orders:
            annotate_orders(annotator, sys.stdin)
            return
        names = ("rollouts", "out", "student", "max_quarantined")
        annotator.annotate(AnnotateOrder(**{name: getattr(command, name) for name in names}))
    wrote(command.out, f"npd select --annotations {command.out} --out SELECTION")


def _check(command: AnnotateCommand) -> None:
    """What can be refused before anything is imported that takes seconds."""
    check_model_dir("teacher", command.teacher)
    round_of = {name: getattr(command, name) for name in ("rollouts", "out", "student")}
    for name, value in round_of.items():
        if bool(value) == command.orders:
            rule = "empty with orders" if command.orders else "given"
            raise UserError(f"{name} must be {rule}, got {value!r}; {'orders name it' if value else f'add --{name}'}")
    if not command.orders:
        check_model_dir("student", command.student)
        if not command.follow_seconds:
            check_sealed("rollouts", command.rollouts)
        check_out_dir("out", command.out)
    if command.backend == "none":
        raise UserError(
            "backend must be megatron or vllm, got none; that is for a whole run, whose responses train unscored"
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if command.backend == "vllm":
        if not command.urls and world > 1:
            raise UserError("urls must name the teacher's servers under torchrun, got none; start npd serve")
        return
    from megatron_npd.platform.initialize import check_world_size

    check_world_size(world, **command.parallel_sizes)
