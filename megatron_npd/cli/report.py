"""Write a run's report from the files that its stages left, whoever started them, and print its table; or serve it.

``npd report RUN`` ; ``npd report RUN --serve`` (a page that follows the run)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_npd.config.command_line import parse_config
from megatron_npd.errors import UserError
from megatron_npd.log import wrote
from megatron_npd.platform import get_platform


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Write a run's report from the files that its stages left, whoever started them, and print its table."""

    POSITIONAL: ClassVar[str] = "run_dir"
    run_dir: str
    """Directory of the run, finished or not; the flag's name may be left out."""
    serve: bool = False
    """Serve the report as a page that follows the run, with its stages, until Ctrl-C; nothing is written."""
    host: str = "127.0.0.1"
    """With serve: name or address of the interface to listen on; whoever reaches it can read the report."""
    port: int = 8090
    """With serve: port to listen on; 0: a free one. The page's URL is printed."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise UserError(f"--port must be from 0 to 65535, got {self.port}; 0 takes a free one")
        if not self.serve and (self.host, self.port) != ("127.0.0.1", 8090):
            raise UserError("--host and --port must come with --serve, got them alone; add it or leave them out")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the configuration, and write the report and say where it is, or serve it."""
    cfg = parse_config(ReportCommand, argv)
    run = Path(cfg.run_dir)
    if cfg.serve:
        get_platform("cpu")
        from megatron_npd.audit.live import serve  # after the platform is chosen

        serve(run, cfg.host, cfg.port, lambda url: print(url, flush=True))
        return
    if not (run / "rounds").is_dir():
        raise UserError(f"--run-dir must be the directory of a run, got {run} without rounds; check the path")
    from megatron_npd.audit.report import write_report

    print(write_report(run))
    wrote(run / "report" / "report.html")
