"""Count a run's books again from its files, check every hash, and print one table; the exit code is 1 on any gap.

``python tools/verify.py RUN [--full]``
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_npd.config.command_line import CommandParser
from megatron_npd.log import run_main
from megatron_npd.platform import get_platform


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("run", help="directory of a run, or of a part of it")
    parser.add_argument(
        "--full", action="store_true", help="hash again what is known, and check every number of answers and records"
    )
    parser.add_argument("--platform", default="auto", choices=("auto", "cpu", "cuda", "npu"), help="device platform")
    arguments = parser.parse_args(argv)
    get_platform(arguments.platform)
    from megatron_npd.audit.verify import verify_run  # after the platform is chosen

    result = verify_run(arguments.run, full=arguments.full)
    print(result.table())
    return 1 if result.problems else 0


if __name__ == "__main__":
    run_main(main)
