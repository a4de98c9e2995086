"""The rollout servers as one resource: token ids in, token ids and log-probabilities out, over HTTP."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx

from megatron_npd.config import RolloutConfig
from megatron_npd.limits import allow_connections
from megatron_npd.log import UserError
from megatron_npd.manifest import is_sealed, read_manifest
from megatron_npd.records import NO_LOGPROB
from megatron_npd.rollout.server import GENERATE, PROBE, VLLMServer

Asked = TypeVar("Asked")
Read = TypeVar("Read")
UNUSABLE = "unusable"  # the version of a server whose weights were left half loaded
_RETRY_DELAYS = (0.2, 1.0)  # seconds, after a connection broke or the server answered 5xx
_CONTROL_TIMEOUT = 60.0  # seconds, of requests that generate at most one token


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one answer is asked for with.

    Attributes:
        key: The caller's own mark; it is not sent.
        token_ids: The prompt.
        max_tokens: Longest answer, in tokens.
        stop_ids: Ids that end it, beside the server's own.
        temperature: 0 is greedy.
        top_p: Nucleus probability.
        seed: Seed of the sampling.
    """

    key: int
    token_ids: Sequence[int]
    max_tokens: int
    stop_ids: Sequence[int]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One finished answer.

    Attributes:
        token_ids: n ids; the stop token is the last one exactly when ``finish_reason`` is ``stop``.
        logprobs: n log-probabilities of the raw, full-vocabulary distribution at temperature 1; empty where not asked.
        finish_reason: ``stop`` or ``length``.
        versions: The policy versions that generated it, in order: one, unless weights changed half-way.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    versions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a request has no answer: a reason to count by, and what was seen."""

    reason: str
    detail: str


class ServerPool:
    """vLLM servers that serve the same policy.

    Args:
        urls: Their base URLs.
        cfg: Concurrency and timeouts.
        servers: Those of them that this process launched; their logs explain a failure, and ``close`` stops them.
    """

    def __init__(self, urls: Sequence[str], cfg: RolloutConfig, servers: Sequence[VLLMServer] = ()) -> None:
        if not urls:
            raise UserError("urls must name at least one vLLM server, got none; start one or leave urls out")
        self.urls = [url.rstrip("/") for url in urls]
        self.cfg = cfg
        self.servers = {server.url: server for server in servers}
        self._tls = ssl.create_default_context()  # made once: it reads all certificates

    @classmethod
    def open(
        cls, model_dir: str | Path, cfg: RolloutConfig, *, version: str = "", log_dir: str | Path | None = None
    ) -> ServerPool:
        """The servers of ``cfg.urls``, or ``cfg.num_servers`` launched with ``model_dir``, all at the same time.

        Args:
            model_dir: Hugging Face directory for launched servers; running ones keep what they serve.
            cfg: Rollout settings.
            version: Policy version that launched servers are tagged with.
            log_dir: Directory of their logs.

        Raises:
            UserError: ``model_dir`` is a damaged policy, or a server could not be started.
        """
        if cfg.urls:
            return cls(cfg.urls, cfg)
        if is_sealed(model_dir):  # a flipped bit loads silently
            read_manifest(model_dir)
        with ExitStack() as stack:
            servers = [VLLMServer(model_dir, cfg, log_dir=log_dir, index=index) for index in range(cfg.num_servers)]
            for server in servers:
                stack.callback(server.stop)
                server.start()
            for server in servers:
                server.wait_ready(version=version)
            stack.pop_all()
        return cls([server.url for server in servers], cfg, servers)

    def close(self) -> None:
        """Stop the servers that were launched for this pool."""
        for server in self.servers.values():
            server.stop()

    def __enter__(self) -> ServerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def control(
        self,
        url: str,
        path: str,
        *,
        body: Any = None,
        params: dict[str, str] | None = None,
        method: str = "POST",
        timeout: float = _CONTROL_TIMEOUT,
    ) -> dict[str, Any]:
        """Call one server's endpoint and return its JSON object.

        Raises:
            UserError: No answer within ``timeout`` seconds, or an answer that is not 2xx.
        """
        try:
            with httpx.Client(timeout=timeout, verify=self._tls, trust_env=False) as client:  # no proxy in between
                response = client.request(method, url + path, json=body, params=params)
        except httpx.TransportError as error:
            raise self._dead(url, f"must answer {path}, got {_words(error)}") from error
        if response.status_code == 404:
            raise UserError(
                f"the server {url} must have {path}, got 404; start it with tools/serve.py, or with "
                "VLLM_SERVER_DEV_MODE=1 and the arguments that rollout/server.py gives it"
            )
        if response.is_error:
            raise UserError(f"the server {url} must accept {path}, got {response.status_code}: {_detail(response)}")
        return response.json() if response.content else {}

    def version(self, url: str) -> str:
        """The policy version that a server tags its answers with."""
        return self.control(url, "/weight_info", method="GET")["weight_version"]

    def check(self, *, version: str | None = None) -> None:
        """See that every server generates tokens, has the context of ``cfg.max_model_len`` and the policy ``version``.

        Raises:
            UserError: One of them does not.
        """
        for url in self.urls:
            served = self.control(url, "/v1/models", method="GET")["data"][0]
            if served["max_model_len"] < self.cfg.max_model_len:
                raise UserError(
                    f"the context of {url} must be at least max_model_len ({self.cfg.max_model_len}), got "
                    f"{served['max_model_len']}; lower max_model_len or restart the server"
                )
            got = self.version(url)
            if version is not None and got != version:
                raise UserError(
                    f"the server {url} must serve policy {version}, got {got}; load it first: "
                    f"tools/refresh.py --urls {url} --policy DIR --version {version}"
                )
            if got == UNUSABLE:
                raise UserError(
                    f"the server {url} must hold whole weights, got a refresh that failed half-way; refresh it with a "
                    "good policy or restart it"
                )
            self.control(url, GENERATE, body=PROBE)

    def run(
        self,
        requests: Iterable[Request],
        on_result: Callable[[Request, Answer | Failure], None],
        *,
        logprobs: bool = True,
    ) -> None:
        """Generate all answers, ``cfg.concurrency`` at a time on each server, whichever is free taking the next.

        Args:
            requests: In the order to start them; drawn from as servers become free.
            on_result: Called once for each request, in the order of arrival.
            logprobs: Whether to ask for the log-probabilities of the sampled tokens.

        Raises:
            UserError: A server died or hangs; ``on_result`` has been called for everything that had arrived.
        """
        self.ask(requests, on_result, body=partial(_generate_body, logprobs), read=partial(_read_answer, logprobs))

    def ask(
        self,
        requests: Iterable[Asked],
        on_result: Callable[[Asked, Read | Failure], None],
        *,
        body: Callable[[Asked], dict[str, Any]],
        read: Callable[[dict[str, Any]], Read | Failure],
    ) -> None:
        """``run`` for requests and answers of any form.

        Args:
            requests: What is asked for, in the order to start them.
            on_result: Called once for each, in the order of arrival.
            body: The JSON object that is sent for one.
            read: What is made of the JSON object that comes back.

        Raises:
            UserError: As for ``run``, or the system allows too few open files for that many requests in flight.
        """
        allow_connections(len(self.urls) * self.cfg.concurrency)
        asyncio.run(self._run(iter(requests), on_result, body, read))

    async def _run(
        self,
        requests: Iterator[Asked],
        on_result: Callable[[Asked, Read | Failure], None],
        body: Callable[[Asked], dict[str, Any]],
        read: Callable[[dict[str, Any]], Read | Failure],
    ) -> None:
        async def worker(url: str) -> None:
            # A client of its own: httpx's shared connection pool looks at every connection for every request.
            async with httpx.AsyncClient(timeout=timeout, verify=self._tls, trust_env=False) as client:
                for request in requests:
                    answer = await self._generate(client, url, body(request))
                    on_result(request, answer if isinstance(answer, Failure) else read(answer))

        timeout = httpx.Timeout(self.cfg.request_timeout, connect=_CONTROL_TIMEOUT)
        tasks = [asyncio.create_task(worker(url)) for _ in range(self.cfg.concurrency) for url in self.urls]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _generate(self, client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> dict[str, Any] | Failure:
        trouble = ""
        for delay in (*_RETRY_DELAYS, None):
            try:
                response = await client.post(url + GENERATE, json=body)
            except httpx.TimeoutException as error:
                await self._probe(client, url, f"got {_words(error)}")
                return Failure(reason="timeout", detail=f"no answer in {self.cfg.request_timeout:.0f} s")
            except httpx.TransportError as error:
                trouble = _words(error)
            else:
                if response.status_code == 200:
                    return response.json()
                if response.status_code < 500:
                    return Failure(reason="request_failed", detail=f"{response.status_code}: {_detail(response)}")
                trouble = f"{response.status_code}: {_detail(response)}"
            if delay is not None:
                await asyncio.sleep(delay)
        await self._probe(client, url, f"got {trouble}")
        return Failure(reason="request_failed", detail=trouble)

    async def _probe(self, client: httpx.AsyncClient, url: str, trouble: str) -> None:
        """Raise UserError unless the server still generates a token: then the request was at fault."""
        timeout = min(_CONTROL_TIMEOUT, self.cfg.request_timeout)
        try:
            (await client.post(url + GENERATE, json=PROBE, timeout=timeout)).raise_for_status()
        except httpx.TimeoutException as error:
            raise self._dead(url, f"must generate, got no token in {timeout:.0f} s: it hangs ({trouble})") from error
        except httpx.HTTPError as error:
            raise self._dead(url, f"must generate, {trouble}, then {_words(error)}") from error

    def _dead(self, url: str, what: str) -> UserError:
        if url in self.servers:
            return self.servers[url].failure(what)
        return UserError(f"the vLLM server {url} {what}; look at its log and restart it, then run the same again")


def _generate_body(logprobs: bool, request: Request) -> dict[str, Any]:
    sampling: dict[str, Any] = {
        "max_tokens": request.max_tokens,
        "stop_token_ids": list(request.stop_ids),
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "detokenize": False,
    }
    if logprobs:
        sampling["logprobs"] = 0  # of the sampled token alone
    return {"token_ids": request.token_ids, "sampling_params": sampling}


def _read_answer(logprobs: bool, answer: dict[str, Any]) -> Answer | Failure:
    choice = answer["choices"][0]
    values = [entry["logprob"] for entry in choice["logprobs"]["content"]] if logprobs else []
    if choice["finish_reason"] not in ("stop", "length"):
        return Failure(reason="request_failed", detail=f"finish reason {choice['finish_reason']}")
    if logprobs and (len(values) != len(choice["token_ids"]) or min(values, default=0.0) <= NO_LOGPROB):
        return Failure(reason="undefined_logprob", detail=f"log-probabilities {values[:8]}")
    return Answer(
        token_ids=choice["token_ids"],
        logprobs=values,
        finish_reason=choice["finish_reason"],
        versions=tuple(span["version"] for span in choice["weight_versions"] or ()),
    )


def _words(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()


def _detail(response: httpx.Response) -> str:
    return " ".join(response.text.split())[:300]
