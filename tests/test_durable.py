"""Files that outlive a power cut, on file systems that do not have every operation."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_npd.durable import fsync_path, write_atomic
from tests.helpers import failing


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_directories_that_cannot_be_synced_are_as_the_file_system_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", failing(number))
    fsync_path(tmp_path)
    with pytest.raises(OSError, match="fsync") as error:
        fsync_path(tmp_path / "file")
    assert error.value.errno == number and error.value.filename == str(tmp_path / "file")
    with pytest.raises(OSError, match=str(tmp_path / "new")):
        write_atomic(tmp_path / "new", "text")
    assert not (tmp_path / "new").exists()


def test_directories_of_a_broken_disk_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match=str(tmp_path)):
        fsync_path(tmp_path)
