"""How commands end: user errors and disks in words, our own mistakes with their traceback."""

from __future__ import annotations

import errno
import os

import pytest

from megatron_npd.log import UserError, run_main


def failing(error: BaseException):
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("k must be 1, got 2; give 1"), 2, "error: k must be 1, got 2; give 1\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 2, "No space left on device' for /data/x; mend"),
        (OSError(errno.EFBIG, "File too large"), 2, "got 'File too large'; mend"),
        (PermissionError(errno.EACCES, "Permission denied", "/data"), 2, "Permission denied"),
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


@pytest.mark.parametrize("code", [None, 0, 1])
def test_the_exit_code_is_mains(code: int | None) -> None:
    with pytest.raises(SystemExit) as end:
        run_main(lambda: code)
    assert end.value.code == (code or 0)
