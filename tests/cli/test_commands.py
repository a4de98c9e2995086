"""The command npd: its list, its help, and what a mistyped word is told."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_npd.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
# What takes long to import, and no help text needs: a command imports it when it runs.
HEAVY = ("torch", "megatron.core", "transformers", "pyarrow", "numpy", "httpx", "asyncio", "matplotlib", "msgspec")


def npd(*arguments: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """``npd`` in a process of its own, where importing any of ``without`` fails."""
    code = f"import sys; sys.modules.update(dict.fromkeys({without!r})); from megatron_npd.__main__ import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )


def test_each_file_of_cli_is_a_command() -> None:
    assert set(COMMANDS) == {path.stem for path in (ROOT / "megatron_npd" / "cli").glob("[!_]*.py")}


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_the_list_of_commands(arguments: tuple[str, ...]) -> None:
    done = npd(*arguments, without=(*HEAVY, "jsonargparse"))
    assert done.returncode == 0 and done.stderr == ""
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert tuple(listed) == COMMANDS
    assert all(len(line.split()) > 3 for line in done.stdout.splitlines() if line.startswith("  "))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_next_command_that_a_command_names_is_there(command: str) -> None:
    """Each ``npd WORD --flag`` that a command ends with, and no script of an older name."""
    source = (ROOT / "megatron_npd" / "cli" / f"{command}.py").read_text()
    assert "tools/" not in source
    for word, flags in re.findall(r'"npd (\w+)( --[^"]*)"', source):
        help_text = npd(word, "--help").stdout
        assert all(f"--{flag.replace('-', '_')} " in help_text for flag in re.findall(r"--([\w-]+)", flags)), flags


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command: str) -> None:
    done = npd(command, "--help", without=HEAVY)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith("usage: npd") and "--config" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rollouts",), "the first word must be a command, got rollouts; did you mean npd rollout? ("),
        (("xyzzy",), "the first word must be a command, got xyzzy (npd --help lists all)"),
        (("--version1",), "the first word must be a command, got --version1"),
        (("verify", "/nowhere"), "--run must be the directory of a run, got no directory at '/nowhere'; "),
        (("show", "/nowhere", "--sample=a"), "--run must be the directory of a run, got no directory at '/nowhere'; "),
        (("select", "--tau_off", "a"), "unknown option --tau_off; did you mean --tau_of? (npd select --help"),
    ],
)
def test_a_mistyped_word_gets_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = npd(*arguments, without=HEAVY)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
