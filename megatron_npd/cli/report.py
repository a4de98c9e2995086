"""Write a run's report from the files that its stages left, whoever started them, and print its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_npd.config.command_line import parse_config
from megatron_npd.errors import UserError
from megatron_npd.log import wrote


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Write a run's report from the files that its stages left, whoever started them, and print its table."""

    POSITIONAL: ClassVar[str] = "run_dir"
    run_dir: str
    """Directory of the run, finished or not; the flag's name may be left out."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the configuration, write the report and say where it is."""
    run = Path(parse_config(ReportCommand, argv).run_dir)
    if not (run / "rounds").is_dir():
        raise UserError(f"--run-dir must be the directory of a run, got {run} without rounds; check the path")
    from megatron_npd.audit.report import write_report

    print(write_report(run))
    wrote(run / "report" / "report.html")
