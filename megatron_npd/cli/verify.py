"""Count a run's books again from its files, check every hash, and print one table; the exit code is 1 on any gap.

``npd verify RUN [--full]``
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_npd.choices import PlatformName
from megatron_npd.config.command_line import parse_config
from megatron_npd.errors import UserError
from megatron_npd.platform import get_platform


@dataclass(frozen=True, kw_only=True)
class VerifyCommand:
    """Count a run's books again from its files, check every hash, and print one table; exit code 1 on any gap."""

    POSITIONAL: ClassVar[str] = "run"
    run: str
    """Directory of a run, or of a part of it; the flag's name may be left out."""
    full: bool = False
    """Hash again what is known, and check every number of responses and records."""
    platform: PlatformName = "auto"
    """Device platform; auto: cuda, npu or cpu, the first that is there."""


def main(argv: Sequence[str] | None = None) -> int:
    """Verify, and print the table."""
    cfg = parse_config(VerifyCommand, argv)
    if not Path(cfg.run).is_dir():  # before anything heavy is imported
        raise UserError(f"--run must be the directory of a run, got no directory at {cfg.run!r}; check the path")
    get_platform(cfg.platform)
    from megatron_npd.audit.verify import verify_run  # after the platform is chosen

    result = verify_run(cfg.run, full=cfg.full)
    print(result.table())
    return 1 if result.problems else 0
