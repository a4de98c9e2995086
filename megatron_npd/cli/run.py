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
    if cfg.nnodes == 1 or cfg.launcher == "ray":
        check_paths(cfg)  # before anything heavy is imported; other nodes would have to hear of it
    if cfg.launcher == "ray":
        from megatron_npd.pipeline.launch import ray_launcher

        print(ray_launcher().run_on_ray(cfg, run_here))
        return
    if table := run_here(cfg):
        print(table)


def run_here(cfg: NPDConfig) -> str:
    """Run this node's part in this process; the report's table and where the results are, on the first node."""
    get_platform(cfg.platform)
    from megatron_npd.audit.report import write_report  # after the platform is chosen
    from megatron_npd.pipeline.runner import results, run_npd

    table = run_npd(cfg, write_report)
    return f"{table}\n\n{results(cfg)}" if cfg.node_rank == 0 else ""
