"""The token before the servers: one file that its owner alone may read, and who proves to know it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_npd.config import RolloutConfig
from megatron_npd.log import UserError
from megatron_npd.rollout.access import keep_token, proves_token, read_token
from megatron_npd.rollout.pool import ServerPool
from tests.rollout.fake import FakeServer


def test_all_who_start_at_once_keep_the_same_token(tmp_path: Path) -> None:
    path = tmp_path / "servers" / "token"
    with ThreadPoolExecutor(8) as threads:
        tokens = set(threads.map(lambda _: keep_token(path), range(32)))
    assert tokens == {read_token(path)} and len(tokens.pop()) == 43
    assert path.stat().st_mode & 0o777 == 0o600 and [file.name for file in path.parent.iterdir()] == ["token"]
    assert ServerPool(["http://127.0.0.1:1"], RolloutConfig(token_file=str(path))).token == read_token(path)


def test_files_that_keep_no_secret_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with pytest.raises(UserError, match=r"must be the file that tools/serve\.py made, got .*No such file"):
        read_token(path)
    path.write_text("secret")
    path.chmod(0o640)
    with pytest.raises(UserError, match="readable by its owner alone, got mode 640"):
        keep_token(path)
    path.chmod(0o600)
    for text in ("", "\n", "a\nb", "\u00e9"):
        path.write_text(text)
        with pytest.raises(UserError, match="must hold a token"):
            read_token(path)


def test_a_server_that_does_not_ask_for_the_token_proves_nothing() -> None:
    with FakeServer() as server:
        assert not proves_token(server.url, "token")
