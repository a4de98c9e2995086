"""Generate one round of responses, with vLLM servers started here or running already.

``npd rollout --prompts DIR --model DIR --out DIR --round 0 --policy-version v0000``
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_npd.config.command_line import parse_config
from megatron_npd.config.settings import RolloutConfig
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger, wrote


@dataclass(frozen=True, kw_only=True)
class RolloutCommand(RolloutConfig):
    """Generate one round of responses, with vLLM servers started here or running already."""

    prompts: str
    """Sealed directory of prompts."""
    out: str
    """Directory to seal: the rollouts."""
    model: str = ""
    """Hugging Face directory of the policy, for servers started here; with urls they serve it already."""
    round: int = 0
    """Round of the run; part of the responses' ids and seeds."""
    policy_version: str = "v0000"
    """Version of the policy; servers that serve another one are refused."""
    log_dir: str = ""
    """Directory of the logs of servers started here; empty: logs/ beside the rollouts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.model) == bool(self.urls):
            raise UserError(
                "the policy must come from --model or from running servers (--urls), got "
                f"{'both' if self.model else 'neither'}; give one"
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the configuration and generate."""
    cfg = parse_config(RolloutCommand, argv)
    from megatron_npd.manifest import read_manifest
    from megatron_npd.rollout.generate import finished_round, generate_round
    from megatron_npd.serving.pool import ServerPool

    this_round = {"cfg": cfg, "round_index": cfg.round, "policy_version": cfg.policy_version}
    if finished_round(cfg.prompts, cfg.out, **this_round) is not None:
        get_logger().info("%s is finished already", cfg.out)  # without starting a server
        return
    read_manifest(cfg.prompts, kind="prompts")  # refused before a server is started
    log_dir = cfg.log_dir or Path(cfg.out).parent / "logs"
    with ServerPool.open(cfg.model, cfg, version=cfg.policy_version, log_dir=log_dir) as pool:
        generate_round(cfg.prompts, cfg.out, pool=pool, **this_round)
    student = cfg.model or "STUDENT"
    wrote(cfg.out, f"npd annotate --rollouts {cfg.out} --student {student} --teacher TEACHER --out ANNOTATIONS")
