"""One server spoken to: its control endpoints, what they answer, and each trouble in words."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from megatron_npd.config.settings import RolloutConfig
from megatron_npd.errors import UserError
from megatron_npd.serving.access import bearer, read_token
from megatron_npd.serving.asking import CONTROL_TIMEOUT, detail, words
from megatron_npd.serving.protocol import Malformed, field, first_of, json_of
from megatron_npd.serving.server import ServerLost, VLLMServer


class Control:
    """What a pool says to its servers one by one.

    Args:
        cfg: Timeouts, and the file with the servers' token.
        servers: Those that this process launched; their logs explain a failure.
        token: What their requests must carry; empty: what ``cfg.token_file`` holds, if it names one.
    """

    def __init__(self, cfg: RolloutConfig, servers: Sequence[VLLMServer], token: str) -> None:
        self.cfg = cfg
        self.servers = {server.url: server for server in servers}
        self.token = token or (read_token(cfg.token_file) if cfg.token_file else "")
        self._tls = ssl.create_default_context()  # made once: it reads all certificates

    @property
    def patience(self) -> float:
        """Seconds that a server may take for what waits for other requests, or for the reading of weights."""
        return max(600.0, self.cfg.request_timeout)

    def control(
        self,
        url: str,
        path: str,
        *,
        body: Any = None,
        params: dict[str, str] | None = None,
        method: str = "POST",
        timeout: float = CONTROL_TIMEOUT,
    ) -> Any:
        """Call one server's endpoint and return its JSON value.

        Raises:
            UserError: No answer within ``timeout`` seconds, or one that is not 2xx or no JSON.
        """
        try:
            with httpx.Client(timeout=timeout, **self.client_options()) as client:
                response = client.request(method, url + path, json=body, params=params)
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise self.dead(url, f"must answer {path}, got {words(error)}") from error
        if response.status_code == 404:
            raise UserError(
                f"the server {url} must have {path}, got 404; start it with npd serve, or with "
                "VLLM_SERVER_DEV_MODE=1 and the arguments that serving/server.py gives it"
            )
        if response.status_code == 401:
            raise self.unauthorised(url)
        if response.status_code == 403 and path == "/collective_rpc":
            raise UserError(
                f"the server {url} must do {body['method']}, got 403; restart it with this release's npd serve"
            )
        if not response.is_success:
            got = f"{response.status_code}: {detail(response.content)}"
            raise UserError(f"the server {url} must accept {path}, got {got}")
        try:
            return json_of(response.content or b"{}")
        except Malformed as error:
            raise UserError(f"the server {url} must answer {path} in JSON, got {error}; restart it") from error

    def call_worker(self, url: str, method: str, *args: str, timeout: float = CONTROL_TIMEOUT) -> dict[str, Any]:
        """What the first worker of a server answers to ``call_workers``."""
        return self.call_workers(url, method, *args, timeout=timeout)[0]

    def call_workers(self, url: str, method: str, *args: str, timeout: float = CONTROL_TIMEOUT) -> list[dict[str, Any]]:
        """Call a method of the worker extension in every worker of a server; what each of them answers.

        Raises:
            UserError: A worker reports an error, the workers hold different weights, or there is no such method.
        """
        call = {"method": method, "args": args}
        try:
            answers = field(self.control(url, "/collective_rpc", body=call, timeout=timeout), "results")
            first = first_of(answers, "results")
            for answer in answers:
                if not isinstance(answer, dict):
                    raise Malformed(f"{str(answer)[:100]} in place of an object")
                if "error" in answer:
                    raise UserError(f"the server {url} must do {method}, got: {answer['error']}")
                if answer.get("weights") != first.get("weights"):
                    raise UserError(f"the workers of {url} must hold the same weights, got several; refresh it again")
        except Malformed as error:
            raise UserError(f"the server {url} must do {method}, got {error}; restart it") from error
        return answers

    def tag(self, url: str) -> str:
        """What a server marks its answers with: policy version, a hyphen, and the hash of the weights."""
        return str(self.told(url, "/weight_info", lambda told: field(told, "weight_version")))

    def version(self, url: str) -> str:
        """The policy version that a server marks its answers with."""
        return self.tag(url).rpartition("-")[0] or self.tag(url)

    def client_options(self) -> dict[str, Any]:
        """What every client of these servers is made with; no proxy comes in between."""
        return {"verify": self._tls, "trust_env": False, "headers": bearer(self.token)}

    def told(self, url: str, path: str, read: Callable[[Any], Any]) -> Any:
        """A part of what a server tells of itself; errors as for ``control`` and ``read``."""
        return self.read(url, path, self.control(url, path, method="GET"), read)

    def read(self, url: str, path: str, told: Any, read: Callable[[Any], Any]) -> Any:
        """A part of an answer.

        Raises:
            UserError: There is no such part.
        """
        try:
            return read(told)
        except Malformed as error:
            raise UserError(f"the server {url} must answer {path}, got {error}; restart it") from error

    def unauthorised(self, url: str) -> UserError:
        """The error for a server that does not take our token."""
        what = "another one" if self.token else "none"
        return UserError(
            f"requests to {url} must carry its token, got {what}; give --token-file, the file that npd serve names"
        )

    def dead(self, url: str, what: str) -> ServerLost:
        """The error for a server in trouble."""
        if url in self.servers:
            return self.servers[url].failure(what)
        return ServerLost(f"the vLLM server {url} {what}; look at its log and restart it, then run the same again")
