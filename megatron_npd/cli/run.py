"""The whole loop in one command: rollouts, annotation, selection, packing, training, sparse update, report.

``npd run --config examples/recipes/pretrained.yaml --teacher DIR --student DIR --prompts FILE``; on several nodes the
same command on each, with its ``--node-rank``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_npd.config.command_line import parse_config
from megatron_npd.config.run import NPDConfig
from megatron_npd.pipeline.preflight import check_paths
from megatron_npd.platform import get_platform


@dataclass(frozen=True, kw_only=True)
class RunCommand(NPDConfig):
    """A whole near-policy distillation run (METHOD section 1)."""

    dry_run: bool = False
    """Print what this node would do, and start nothing."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the configuration, run the loop, print the report's table and where the results are."""
    command = parse_config(RunCommand, argv)
    cfg = NPDConfig(**{field.name: getattr(command, field.name) for field in fields(NPDConfig)})
    if command.dry_run:
        from megatron_npd.pipeline.runner import plan

        print(plan(cfg))
        return
    if cfg.nnodes == 1:  # before anything heavy is imported; with several nodes the others must hear of it
        check_paths(cfg)
    get_platform(cfg.platform)
    from megatron_npd.audit.report import write_report  # after the platform is chosen
    from megatron_npd.pipeline.runner import results, run_npd

    table = run_npd(cfg, write_report)
    if cfg.node_rank == 0:
        print(f"{table}\n\n{results(cfg)}")
