"""The token before the servers: one file that its owner alone may read, and who proves to know it."""

from __future__ import annotations

import asyncio
import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_npd.config.settings import RolloutConfig
from megatron_npd.errors import UserError
from megatron_npd.serving import access
from megatron_npd.serving.access import (
    SECRET_VARIABLE,
    TOKEN_VARIABLE,
    TokenMiddleware,
    keep_token,
    proves_secret,
    read_token,
)
from megatron_npd.serving.pool import ServerPool
from tests.helpers import failing
from tests.serving.fake import FakeServer


def test_all_who_start_at_once_keep_the_same_token(tmp_path: Path) -> None:
    path = tmp_path / "servers" / "token"
    with ThreadPoolExecutor(8) as threads:
        tokens = set(threads.map(lambda _: keep_token(path), range(32)))
    assert tokens == {read_token(path)} and len(tokens.pop()) == 43
    assert path.stat().st_mode & 0o777 == 0o600 and [file.name for file in path.parent.iterdir()] == ["token"]
    assert ServerPool(["http://127.0.0.1:1"], RolloutConfig(token_file=str(path))).token == read_token(path)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_without_hard_links_they_keep_the_same_token_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "link", failing(number))
    test_all_who_start_at_once_keep_the_same_token(tmp_path)
    monkeypatch.setattr(access, "_OTHERS_SECONDS", 0.1)
    (tmp_path / "killed").touch(0o600)  # by one that was killed before it wrote
    with pytest.raises(UserError, match="killed must hold a token, got another text; remove it"):
        keep_token(tmp_path / "killed")
    monkeypatch.setattr(os, "open", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        keep_token(tmp_path / "full")


def test_files_that_keep_no_secret_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with pytest.raises(UserError, match=r"must be the file that npd serve made, got .*No such file"):
        read_token(path)
    path.write_text("secret")
    path.chmod(0o640)
    with pytest.raises(UserError, match=r"readable by its owner alone, got mode 640; .* keeps permissions"):
        keep_token(path)
    path.chmod(0o600)
    for text in ("", "\n", "a\nb", "\u00e9"):
        path.write_text(text)
        with pytest.raises(UserError, match="must hold a token"):
            read_token(path)


def test_a_server_that_does_not_ask_for_the_token_proves_nothing() -> None:
    with FakeServer() as server:
        assert not proves_secret(server.url, "secret")


def door(monkeypatch: pytest.MonkeyPatch, secret: str = "secret") -> TokenMiddleware:
    """The door of a server; behind it everything is answered with 200."""
    monkeypatch.setenv(TOKEN_VARIABLE, "token")
    monkeypatch.setenv(SECRET_VARIABLE, secret)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    return TokenMiddleware(app)


def first_message(middleware: TokenMiddleware, path: str, kind: str = "http", **headers: str) -> dict[str, Any]:
    """What comes back first; the path goes as it is, which clients would not let it."""
    sent: list[Any] = []
    scope: dict[str, Any] = {"type": kind, "path": path, "method": "POST"}
    scope["headers"] = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(middleware(scope, receive, send))
    return sent[0]


def test_paths_are_closed_however_they_are_spelt(monkeypatch: pytest.MonkeyPatch) -> None:
    middleware, token = door(monkeypatch), {"authorization": "Bearer token"}
    assert first_message(middleware, "/v1/models", **token)["status"] == 200
    for path in (
        "//collective_rpc",
        "/collective_rpc/",
        "/x/../collective_rpc",
        "/v1",
        "//v1/models",
        "/Sleep",
        "",
        "*",
    ):
        assert first_message(middleware, path, **token)["status"] == 403, path
    for path in ("/v1/models", "/v1/../collective_rpc", "//collective_rpc", "/health", "*"):
        assert first_message(middleware, path)["status"] == 401, path
        assert first_message(middleware, path, "websocket") == first_message(middleware, "/v1/x", "websocket")
    assert first_message(middleware, "/v1/realtime", "websocket", **token)["type"] == "websocket.close"


def test_a_server_is_not_taken_for_another_one_with_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sits on the port of a server that is to start could pass the question on to a server beside it."""
    proofs = [
        dict(first_message(door(monkeypatch, secret), "/health", x_npd_nonce="nonce")["headers"])[b"x-npd-proof"]
        for secret in ("one", "one", "two")
    ]
    assert proofs[0] == proofs[1] != proofs[2]
