"""The whole loop in one command: rollouts, annotation, selection, packing, training, sparse update, report.

``python tools/run_npd.py --config examples/recipes/pretrained.yaml --teacher DIR --student DIR --prompts FILE``
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_npd.config.command_line import parse_config
from megatron_npd.config.settings import NPDConfig
from megatron_npd.log import run_main
from megatron_npd.pipeline.preflight import check_paths
from megatron_npd.platform import get_platform


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the configuration, run the loop, print the report's table and where the results are."""
    cfg = parse_config(NPDConfig, argv)
    check_paths(cfg)  # before anything heavy is imported
    get_platform(cfg.platform)
    from megatron_npd.pipeline.runner import results, run_npd  # after the platform is chosen

    print(run_npd(cfg))
    print(f"\n{results(cfg)}")


if __name__ == "__main__":
    run_main(main)
