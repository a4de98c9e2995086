"""How commands end: user errors and disks in words, our own mistakes with their traceback."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_npd.errors import UserError
from megatron_npd.log import get_logger, run_main, wrote

ROOT = Path(__file__).resolve().parents[1]


def failing(error: BaseException):
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("k must be 1, got 2; give 1"), 2, "error: k must be 1, got 2; give 1\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 2, "No space left on device' for /data/x; mend"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/data/x"), 2, "got 'Is a directory' for /data/x; mend"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/data/x"), 2, "got 'Not a directory' for /data/x; mend"),
        (OSError(errno.EFBIG, "File too large"), 2, "got 'File too large'; mend"),
        (PermissionError(errno.EACCES, "Permission denied", "/data"), 2, "Permission denied"),
        (OSError(errno.ENOTSUP, "Operation not supported", "/data"), 2, "for /data; mend that, or use another file s"),
        (OSError(errno.ESTALE, "Stale file handle"), 2, "Stale file handle"),
        (KeyboardInterrupt(), 130, "run the same command again"),
    ],
)
def test_the_user_gets_words(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, words: str) -> None:
    with pytest.raises(SystemExit) as end:
        run_main(failing(error))
    printed = capsys.readouterr().err
    assert end.value.code == code and words in printed and "Traceback" not in printed


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, os.strerror(errno.ENOENT)), KeyError("x"), AssertionError()])
def test_our_own_mistakes_keep_their_traceback(error: BaseException) -> None:
    with pytest.raises(type(error)):
        run_main(failing(error))


def test_a_command_says_what_it_wrote_and_to_a_user_what_comes_next(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEGATRON_NPD_STARTER", raising=False)
    get_logger().addHandler(caplog.handler)
    try:
        wrote("out", "npd pack --annotations out")
        monkeypatch.setenv("MEGATRON_NPD_STARTER", "1")  # of a run, which goes on by itself
        wrote("out", "npd pack --annotations out")
    finally:
        get_logger().removeHandler(caplog.handler)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["wrote out; next: npd pack --annotations out", "wrote out"]


@pytest.mark.parametrize("tool", sorted(ROOT.glob("megatron_npd/cli/[a-z]*.py")), ids=lambda path: path.name)
def test_every_command_that_writes_says_so(tool: Path) -> None:
    """serve.py prints its URLs, verify.py, status.py and plan.py their tables, run.py where policy and report are."""
    source = tool.read_text()
    ends = {"serve.py": "print(urls", "verify.py": "print(result.table())", "run.py": "results(cfg)"}
    ends |= {"status.py": "print(status(", "plan.py": "print(json.dumps(as_dict(plan)"}
    assert ends.get(tool.name, "wrote(") in source


@pytest.mark.parametrize("code", [None, 0, 1])
def test_the_exit_code_is_mains(code: int | None) -> None:
    with pytest.raises(SystemExit) as end:
        run_main(lambda: code)
    assert end.value.code == (code or 0)
