"""Append a round's packs to a run's schedule.jsonl, before the first training step that reads them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_npd.config.command_line import parse_config
from megatron_npd.config.settings import PlatformName
from megatron_npd.log import run_main, wrote
from megatron_npd.manifest import read_manifest
from megatron_npd.platform import get_platform


@dataclass(frozen=True, kw_only=True)
class ScheduleToolConfig:
    """Append a round's packs to a run's schedule.jsonl, before the first training step that reads them."""

    schedule: str
    """The schedule.jsonl of the run; made where it is not there."""
    packs: str
    """Sealed packs directory of the round."""
    round: int
    """Number of the round, from 0."""
    from_row: int
    """Training rows consumed when the round begins: its first step x global batch size."""
    policy_version: str
    """Version of the policy that generated the round's answers."""
    platform: PlatformName = "auto"
    """Device platform; auto: cuda, npu or cpu, the first that is there."""


def main() -> None:
    """Check the packs and append their line; the same line a second time changes nothing."""
    cfg = parse_config(ScheduleToolConfig, description=__doc__ or "")
    get_platform(cfg.platform)
    from megatron_npd.data.row_schedule import ScheduleEntry
    from megatron_npd.pipeline.schedule import append_entry

    read_manifest(cfg.packs, kind="packs", verify=False)
    packs = os.path.relpath(cfg.packs, Path(cfg.schedule).parent)
    entry = ScheduleEntry(from_row=cfg.from_row, packs=packs, round=cfg.round, policy_version=cfg.policy_version)
    append_entry(cfg.schedule, entry)
    next_command = f"pretrain_npd.py --data-path {cfg.schedule} --hf-model STUDENT --save CHECKPOINTS"
    wrote(f"round {cfg.round} into {cfg.schedule}", next_command)


if __name__ == "__main__":
    run_main(main)
