"""The door of a server: a token before every path, behind it only what the stages ask for; loaded by vLLM too.

vLLM's own ``--api-key`` leaves ``/collective_rpc``, ``/pause``, ``/update_weights`` and others open. The token is in
the environment of a server and in a file that its owner alone may read, never on a command line.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import tempfile
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import httpx

from megatron_npd.errors import UserError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
TOKEN_VARIABLE = "MEGATRON_NPD_SERVER_TOKEN"
SECRET_VARIABLE = "MEGATRON_NPD_SERVER_SECRET"  # of one process and its starter alone: several servers share a token
METHODS = ("npd_describe", "npd_stage", "npd_staged", "npd_load", "npd_clear")  # of the worker extension
_PATHS = {"/health", "/metrics", "/weight_info", "/pause", "/resume", "/reset_prefix_cache", "/update_weight_version"}
_PREFIXES = ("/v1/", "/inference/v1/")
_RPC = "/collective_rpc"
_NONCE, _PROOF = "x-npd-nonce", "x-npd-proof"
_MAX_RPC_BYTES = 2**16
_OTHERS_SECONDS = 10.0  # for a node that has made the token's file and has yet to write into it


class TokenMiddleware:
    """ASGI middleware, the outermost one of a server: vLLM's ``--middleware``."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self.app = app
        self.token = os.environ[TOKEN_VARIABLE]  # without one the server does not start
        self.secret = os.environ[SECRET_VARIABLE]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Hand a request on, or refuse it: 401 without the token, 403 for what no stage uses."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        path = scope["path"]
        if not _equal(headers.get("authorization", ""), f"Bearer {self.token}"):
            proof = _prove(self.secret, headers[_NONCE]) if _NONCE in headers else ""
            await _refuse(scope, send, 401, "the request must carry the server's token", proof)
        elif scope["type"] != "http" or not (path in _PATHS or path.startswith(_PREFIXES) or path == _RPC):
            await _refuse(scope, send, 403, f"{path} is closed: no stage uses it")
        elif path != _RPC:
            await self.app(scope, receive, send)
        elif (body := await _checked_rpc(receive)) is None:
            await _refuse(scope, send, 403, f"{_RPC} calls {', '.join(METHODS)} only, with strings as args")
        else:
            await self.app(scope, _once(body, receive), send)


def make_token() -> str:
    """A new token."""
    return secrets.token_urlsafe(32)


def keep_token(path: str | Path) -> str:
    """The token of a file, which is made with a new one, for its owner's eyes only, where there is none yet.

    Raises:
        UserError: As for ``read_token``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    token = make_token().encode() + b"\n"
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        os.write(fd, token)
        os.close(fd)
        os.link(temporary, path)  # whole or not at all, and only one of several nodes
    except FileExistsError:
        pass
    except OSError:  # no hard links here, as on many FUSE mounts; a full disk fails again below
        _make_in_place(path, token)
    finally:
        os.unlink(temporary)
    return read_token(path)


def _make_in_place(path: Path, token: bytes) -> None:
    """Make the token's file by its name; who comes second waits for the first one's token."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        deadline = time.monotonic() + _OTHERS_SECONDS
        while not path.read_bytes().endswith(b"\n") and time.monotonic() < deadline:
            time.sleep(0.05)
        return
    try:
        os.write(fd, token)
    finally:
        os.close(fd)


def read_token(path: str | Path) -> str:
    """The token of a file that nobody but its owner may read.

    Raises:
        UserError: It is missing, empty, or open to others.
    """
    try:
        with open(path) as stream:
            mode = os.fstat(stream.fileno()).st_mode & 0o777
            token = stream.read(1000).strip()
    except (OSError, ValueError) as error:
        raise UserError(
            f"token_file must be the file that npd serve made, got {error}; start the servers, or check the path"
        ) from error
    if mode & 0o077:
        raise UserError(
            f"{path} must be readable by its owner alone, got mode {mode:o}; remove it and serve "
            "anew, on a file system that keeps permissions"
        )
    if not token or not token.isprintable() or not token.isascii():
        raise UserError(f"{path} must hold a token, got another text; remove it and serve anew")
    return token


def bearer(token: str) -> dict[str, str]:
    """The header that a request carries."""
    return {"Authorization": f"Bearer {token}"} if token else {}


def proves_secret(url: str, secret: str) -> bool:
    """Whether the server behind a URL is the process that was started with a secret, which is not sent to it.

    Raises:
        httpx.TransportError: Nothing answers.
    """
    nonce = secrets.token_hex(16)
    # Certificates, which a plain connection has no use for, would be read anew at each call.
    answer = httpx.get(f"{url}/health", headers={_NONCE: nonce}, timeout=10.0, trust_env=False, verify=False)
    return answer.status_code == 401 and _equal(answer.headers.get(_PROOF, ""), _prove(secret, nonce))


def _prove(secret: str, nonce: str) -> str:
    return hmac.digest(secret.encode(), nonce.encode(), "sha256").hex()


def _equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


async def _checked_rpc(receive: Receive) -> bytes | None:
    """The body of a call of one of ``METHODS``; None: it is anything else."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > _MAX_RPC_BYTES:
            return None
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or call.keys() != {"method", "args"} or call["method"] not in METHODS:
        return None
    args = call["args"]
    return body if isinstance(args, list) and all(isinstance(item, str) for item in args) else None


def _once(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives a body which has been read already, then whatever else comes."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


async def _refuse(scope: Message, send: Send, status: int, why: str, proof: str = "") -> None:
    if scope["type"] != "http":
        await send({"type": "websocket.close", "code": 1008, "reason": why})
        return
    body = json.dumps({"error": why}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if proof:
        headers.append((_PROOF.encode(), proof.encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
