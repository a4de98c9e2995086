"""Train a model: SFT or near-policy distillation on packed rows. In one process, or under torchrun."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_npd.config.command_line import parse_config
from megatron_npd.config.training import TrainConfig
from megatron_npd.log import get_logger, wrote
from megatron_npd.paths import check_training
from megatron_npd.platform import get_platform


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says; ``argv`` without the program's name, default: the process's."""
    cfg = parse_config(TrainConfig, argv)
    check_training(cfg)  # before anything is imported that takes seconds
    from megatron_npd.ops.arguments import check_objective
    from megatron_npd.platform.initialize import check_world_size

    check_objective(**cfg.kd_settings())
    world = int(os.environ.get("WORLD_SIZE", "1"))
    check_world_size(world, **cfg.parallel_sizes)
    get_platform(cfg.platform)  # before megatron.core is imported
    from megatron_npd.training.trainer import train

    result = train(cfg)
    if result.interrupted:
        where = f"{cfg.save} holds it" if result.iteration else "nothing was trained yet"
        get_logger().info(
            "stopped by %s after step %d of %d: %s, and the same command goes on from there",
            *(result.interrupted, result.iteration, cfg.train_iters, where),
        )
    elif cfg.save:
        checkpoint = f"{cfg.save}/iter_{result.iteration:07d}"
        convert = "npd convert --direction megatron-to-hf"
        wrote(checkpoint, f"{convert} --checkpoint {checkpoint} --hf-model {cfg.hf_model} --out POLICY")
