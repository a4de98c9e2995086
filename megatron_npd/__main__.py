"""The command ``npd``, or ``python -m megatron_npd``: one word for what is to be done, then its flags."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from megatron_npd.errors import UserError
from megatron_npd.log import run_main

# In the order of a run; each is a file of ``cli/``.
COMMANDS = (
    *("plan", "run", "prompts", "serve", "rollout", "annotate", "select", "pack", "train", "convert", "refresh"),
    *("evaluate", "status", "report", "verify", "show", "preprocess"),
)


def main(command: str = "", argv: Sequence[str] | None = None) -> None:
    """Run a command and exit.

    Args:
        command: Its name; empty: the first argument.
        argv: Its flags; default: the process's arguments.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _run(command, arguments))


def _run(command: str, arguments: list[str]) -> int | None:
    command = command or (arguments.pop(0) if arguments else "--help")
    if command in ("--help", "-h", "help"):
        print(_help())
        return None
    if command not in COMMANDS:
        near = get_close_matches(command, COMMANDS, 1)
        guess = f"; did you mean npd {near[0]}?" if near else ""
        raise UserError(f"the first word must be a command, got {command}{guess} (npd --help lists all)")
    sys.argv[0] = f"npd {command}"  # what messages call it
    try:
        return import_module(f"megatron_npd.cli.{command}").main(arguments)
    finally:
        if sys.modules.get("megatron.core") is not None:
            from megatron_npd.platform.initialize import shutdown

            shutdown()  # else the groups' threads meet the interpreter's end, which may abort the process


def _help() -> str:
    """The commands, each with the first line of its file; nothing is imported for it."""
    lines = ["usage: npd COMMAND [flags]   (npd COMMAND --help lists the flags)", ""]
    for name in COMMANDS:
        docstring = ast.get_docstring(ast.parse((Path(__file__).parent / "cli" / f"{name}.py").read_text())) or ""
        lines.append(f"  {name:<11} {docstring.splitlines()[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
