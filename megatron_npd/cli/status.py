"""Show how far a run is: each stage with its state and time, responses, steps and policy lag; from its files alone.

``npd status RUN``
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from megatron_npd.config.command_line import parse_config
from megatron_npd.platform import get_platform


@dataclass(frozen=True, kw_only=True)
class StatusCommand:
    """Show how far a run is: each stage with its state and time, responses, steps and policy lag."""

    POSITIONAL: ClassVar[str] = "run"
    run: str
    """Directory of a run; the flag's name may be left out."""


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    cfg = parse_config(StatusCommand, argv)
    get_platform("cpu")
    from megatron_npd.audit.status import status  # after the platform is chosen

    print(status(cfg.run))
