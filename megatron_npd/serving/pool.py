"""The rollout servers as one resource: token ids in, token ids and log-probabilities out, over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from megatron_npd.config.settings import RolloutConfig
from megatron_npd.errors import UserError
from megatron_npd.limits import allow_connections
from megatron_npd.log import get_logger
from megatron_npd.manifest import is_sealed, read_manifest
from megatron_npd.serving.access import keep_token, make_token
from megatron_npd.serving.asking import CONTROL_TIMEOUT, Asking
from megatron_npd.serving.compared import Answer, known_answer
from megatron_npd.serving.control import Control
from megatron_npd.serving.protocol import (
    Failure,
    Request,
    Response,
    field,
    first_of,
    generate_body,
    is_defined,
    read_response,
)
from megatron_npd.serving.server import GENERATE, PROBE, ServerLost, VLLMServer, start_servers

Asked = TypeVar("Asked")
Read = TypeVar("Read")
UNUSABLE = "unusable"  # the version of a server whose weights were left half loaded
_HASH_DIGITS = 16
RESTARTS = 3  # of each server that was launched here: what dies more often is not worth the wait


class ServerPool(Control):
    """vLLM servers that serve the same policy.

    Args:
        urls: Their base URLs.
        cfg: Concurrency and timeouts.
        servers: Those of them that this process launched; their logs explain a failure, and ``close`` stops them.
        token: What their requests must carry; empty: what ``cfg.token_file`` holds, if it names one.

    Attributes:
        urls: Of the servers that are asked.
        lost: Those that died, hang or make no sense, and why; ``find`` brings one back.
        served: What all of them marked their answers with when they were last compared or refreshed.
        reference: What servers give for the tokens that they are compared by, or must give: known from the export, else
            the first one's.
        reload: Loads what the others serve into a server that was given by URL and lost; None: not known.
        changed: Called when a server was lost or found.
    """

    def __init__(
        self, urls: Sequence[str], cfg: RolloutConfig, servers: Sequence[VLLMServer] = (), *, token: str = ""
    ) -> None:
        if not urls:
            raise UserError("urls must name at least one vLLM server, got none; start one or leave urls out")
        super().__init__(cfg, servers, token)
        self.urls = [url.rstrip("/") for url in urls]
        self.lost: dict[str, UserError] = {}
        self.reload: Callable[[str], None] | None = None
        self.changed: Callable[[], None] = lambda: None
        self.served = ""
        self.reference: Answer | None = None
        self._restarts = dict.fromkeys(self.servers, RESTARTS)
        self._vocab_size = 0

    @classmethod
    def open(
        cls,
        model_dir: str | Path,
        cfg: RolloutConfig,
        *,
        version: str,
        log_dir: str | Path | None = None,
        token: str = "",
    ) -> ServerPool:
        """The servers of ``cfg.urls``, or ``cfg.num_servers`` launched with ``model_dir``, all at the same time.

        Args:
            model_dir: Hugging Face directory for launched servers; running ones keep what they serve.
            cfg: Rollout settings; launched servers keep their token in ``cfg.token_file``, if it names one.
            version: Policy version that launched servers are tagged with.
            log_dir: Directory of their logs; None: a private one among the temporary files.
            token: Of running ones; empty: what ``cfg.token_file`` holds, if it names one.

        Raises:
            UserError: ``model_dir`` is a damaged policy, or a server could not be started.
        """
        if cfg.urls:
            return cls(cfg.urls, cfg, token=token)
        if is_sealed(model_dir):  # a flipped bit loads silently
            read_manifest(model_dir)
        token = keep_token(cfg.token_file) if cfg.token_file else make_token()
        servers = [
            VLLMServer(model_dir, cfg, log_dir=log_dir, index=index, token=token) for index in range(cfg.num_servers)
        ]
        start_servers(servers, version=version)
        pool = cls([server.url for server in servers], cfg, servers, token=token)
        pool.reference = known_answer(model_dir)
        return pool

    def close(self) -> None:
        """Stop the servers that were launched for this pool."""
        for server in self.servers.values():
            server.stop()

    def __enter__(self) -> ServerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def vocab_size(self) -> int:
        """Size of the served model's vocabulary."""
        if not self._vocab_size:
            told = self.call_worker(self.urls[0], "npd_describe").get("vocab_size")
            if type(told) is not int or told < 1:
                raise UserError(f"the server {self.urls[0]} must tell its vocabulary, got {told!r}; restart it")
            self._vocab_size = told
        return self._vocab_size

    def check(self, *, version: str | None = None) -> str:
        """See that every server generates tokens, has the context of ``cfg.max_model_len`` and the policy ``version``.

        Returns:
            What all of them mark their answers with: the version and the hash of the same weights.

        Raises:
            UserError: One of them does not, they differ, or all are lost and cannot be brought back.
        """
        self._restarts = dict.fromkeys(self.servers, RESTARTS)
        tags: dict[str, str] = {}
        for url in list(self.urls):
            with self._losing(url):
                tags[url] = self._check_one(url, version)
        for url in tags:
            if tags[url] != (first := tags[self.urls[0]]):
                raise UserError(
                    f"all servers must hold the same weights, got {tags[url]} on {url} and {first} on {self.urls[0]}; "
                    "load one policy on all of them with npd refresh"
                )
        self.served = tags[self.urls[0]] if tags else self.served
        for url in tags:
            with self._losing(url):
                self._compare(url)
        self.find_all()
        return self.tag(self.urls[0])

    def _check_one(self, url: str, version: str | None) -> str:
        context = self.told(
            url, "/v1/models", lambda told: field(first_of(field(told, "data"), "data"), "max_model_len")
        )
        if type(context) is not int or context < self.cfg.max_model_len:
            raise UserError(
                f"the context of {url} must be at least max_model_len ({self.cfg.max_model_len}), got {context}; lower "
                "max_model_len or restart the server"
            )
        marks = self.tag(url)
        got, _, weights = marks.rpartition("-")
        if version is not None and (got or weights) != version:
            raise UserError(
                f"the server {url} must serve policy {version}, got {got or weights}; load it first: "
                f"npd refresh --urls {url} --policy DIR --version {version}"
            )
        if weights == UNUSABLE:
            raise UserError(
                f"the server {url} must hold whole weights, got a refresh that failed half-way; refresh it with a "
                "good policy or restart it"
            )
        if not got or len(weights) != _HASH_DIGITS:
            raise UserError(
                f"the server {url} must say which weights it holds, got {marks}; start it with npd serve, or load "
                f"them: npd refresh --urls {url} --policy DIR --version v0000"
            )
        self.check_defined(url)
        return marks

    @contextmanager
    def _losing(self, url: str) -> Iterator[None]:
        try:
            yield
        except ServerLost as error:
            self.lose(url, error)

    def _compare(self, url: str) -> None:
        """See that a server computes as the others do, or as its weights must be computed with.

        Raises:
            ServerLost: It does not, and is the one that is wrong.
            UserError: It does not, or its log-probabilities are undefined.
        """
        answer = Answer.of(self, url)
        if self.reference is None or not answer.is_like(self.reference):
            self.reference = answer
        try:
            answer.compare(self.reference)
        except UserError as error:
            if not self.reference.known:
                raise
            raise ServerLost(str(error)) from error

    def lose(self, url: str, error: UserError) -> None:
        """Ask a server for nothing more until it is found again."""
        get_logger().warning("%s", error)
        if url in self.urls:
            self.urls.remove(url)
        self.lost[url] = error
        self.changed()

    def follow(self, urls: Sequence[str]) -> None:
        """Take it that servers are at these URLs now: others are asked no more, new ones once they are found."""
        self.urls = [url for url in self.urls if url in urls]
        known = {url: self.lost[url] for url in self.lost if url in urls}
        new = [url for url in urls if url not in self.urls and url not in known]
        self.lost = known | {url: UserError(f"the server {url} must hold the others' policy; load it") for url in new}

    def find(self, url: str) -> bool:
        """Bring a lost server back, with what the others serve: one that was launched here is started again.

        Returns:
            Whether it is asked again.
        """
        server = self.servers.get(url)
        try:
            if server is None:
                if self.served and self.tag(url) != self.served and self.reload is not None:
                    self.reload(url)
                self.check_defined(url)
            elif not self._restarts[url]:
                return False
            else:
                self._restarts[url] -= 1
                get_logger().info("starting %s again", url)
                server.restart()
            marks = self.tag(url)
        except UserError as error:
            if server is not None:  # the other's first trouble says more
                self.lost[url] = error
            return False
        self.served = self.served or marks
        if marks != self.served:
            what = f"the server {url} must serve {self.served}, got {marks}; load that policy on it"
            self.lost[url] = UserError(what)
            return False
        try:
            self._compare(url)
        except UserError as error:
            self.lost[url] = error
            with suppress(UserError):
                self.mark_unusable(url)
            return False
        del self.lost[url]
        self.urls.append(url)
        get_logger().info("%s is asked again", url)
        self.changed()
        return True

    def find_all(self) -> None:
        """Bring lost servers back, those that can be.

        Raises:
            UserError: No server is left.
        """
        for url in list(self.lost):
            self.find(url)
        if not self.urls:
            raise next(iter(self.lost.values()))

    def check_defined(self, url: str) -> None:
        """See that a server gives a trivial request a token with a log-probability, if need be from a cleared cache.

        Raises:
            UserError: It does not: with these weights it never will, nor after a restart.
        """
        timeout = min(CONTROL_TIMEOUT, self.cfg.request_timeout)
        for cleared in (False, True):
            if cleared:
                self.clear(url)
            told = self.control(url, GENERATE, body=PROBE, timeout=timeout)
            if _defined(self.read(url, GENERATE, told, lambda told: first_of(field(told, "choices"), "choices"))):
                return
        raise UserError(
            f"the server {url} must give defined log-probabilities, got NaN with the weights {self.tag(url)} for one "
            "token from a cleared cache: they overflow in its number type; serve them with another dtype, or load "
            "another policy, then run the same again"
        )

    def run(self, requests: Iterable[Request], on_result: Callable[[Request, Response | Failure], None]) -> None:
        """Generate all answers, at most ``cfg.concurrency`` at a time on each server, the next where one is free.

        A server whose queue has requests waiting gets no more than it works on (``serving/load.py``).

        What comes back without sense is asked for again, a moment later. An undefined log-probability says that NaN
        lies in the server's cache or weights: once everything else that it works on is done, its cache is cleared, and
        the request is asked again; if it is undefined once more, it is a failure.

        A server that dies, hangs or makes no sense gets no more requests: the others are asked what it worked on, with
        the same seeds. One that was launched here is started again, one that was given is taken back once it answers
        with the same weights.

        Args:
            requests: In the order to start them; drawn from as servers become free.
            on_result: Called once for each request, in the order of arrival.

        Raises:
            UserError: No server was left for ``cfg.server_patience``, or one answers with undefined numbers alone;
                ``on_result`` has been called for everything that had arrived.
        """
        self.ask(requests, on_result, body=generate_body, read=read_response)

    def ask(
        self,
        requests: Iterable[Asked],
        on_result: Callable[[Asked, Read | Failure], None],
        *,
        body: Callable[[Asked], dict[str, Any]],
        read: Callable[[Asked, Any, int], Read | Failure],
    ) -> None:
        """``run`` for requests and answers of any form.

        Args:
            requests: What is asked for, in the order to start them.
            on_result: Called once for each, in the order of arrival.
            body: The JSON object that is sent for one.
            read: What is made of the JSON value that comes back for one, given the size of the vocabulary; it raises
                Malformed for what should be asked again.

        Raises:
            UserError: As for ``run``, or the system allows too few open files for that many requests in flight.
        """
        allow_connections(len([*self.urls, *self.lost]) * self.cfg.concurrency)
        Asking(self, on_result, body, read).run(requests)

    def clear(self, url: str) -> None:
        """Let a server forget everything that it computed of earlier tokens, between two requests."""
        self.control(url, "/pause", params={"mode": "wait"}, timeout=self.patience)
        try:
            self.call_worker(url, "npd_clear")
            self.forget_prefixes(url)
        finally:
            self.control(url, "/resume")

    def mark_unusable(self, url: str) -> None:
        """Let a server's answers carry no policy's name."""
        self.control(url, "/update_weight_version", body={"new_version": UNUSABLE})

    def forget_prefixes(self, url: str) -> None:
        """Drop the prefix cache of a paused server; raise UserError if it keeps it."""
        if self.control(url, "/reset_prefix_cache") != {"success": True}:
            raise UserError(f"the server {url} must drop its prefix cache of the old weights, got a refusal")


def _defined(choice: Any) -> bool:
    """Whether the first token of a choice has a log-probability."""
    content = field(field(choice, "logprobs"), "content")
    return is_defined(field(first_of(content, "content"), "logprob"))
