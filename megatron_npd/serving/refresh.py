"""The sparse update: new weights into running servers (METHOD section 1, step 6)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.manifest import is_sealed, read_manifest
from megatron_npd.serving.compared import Answer, known_answer
from megatron_npd.serving.pool import UNUSABLE, ServerPool
from megatron_npd.serving.server import ServerLost, tag
from megatron_npd.weights import read_weights

_FIRST_LOOK = 0.02  # seconds after which a server is asked whether it has read the weights


@dataclass(frozen=True, kw_only=True)
class Refreshed:
    """What a refresh took.

    Attributes:
        bytes: Of the weights, as each worker read them.
        pauses: Server -> seconds from the call that pauses it until it takes requests again.
        loads: Server -> seconds that its workers took to read, hash and take the weights over; the reading that finds
            room in memory is done before the pause.
    """

    bytes: int
    pauses: dict[str, float]
    loads: dict[str, float]

    def as_record(self) -> dict[str, float]:
        """``pause_s``, the longest, and ``gb_per_s``, of the slowest load; empty where no server was there."""
        if not self.pauses or not self.loads:
            return {}
        rate = self.bytes / max(self.loads.values()) / 1e9
        return {"pause_s": round(max(self.pauses.values()), 3), "gb_per_s": round(rate, 3)}

    def words(self) -> str:
        """The same for each server, in one line."""
        each = [
            f"{url} paused {self.pauses[url]:.2f} s, loaded {self.bytes / seconds / 1e9:.2f} GB/s"
            for url, seconds in self.loads.items()
            if url in self.pauses
        ]
        return "; ".join(each) or "all of them were started again"


def refresh(pool: ServerPool, policy_dir: str | Path, version: str) -> Refreshed:
    """Let every server of the pool serve the weights of ``policy_dir``, tagged with ``version``: all of them or none.

    The directory is checked before anything is loaded: hashes where it is sealed, whole files, finite numbers, and the
    names, shapes and types of the tensors and the configuration that each server was started with. Answers that are
    being generated are finished with the old weights; none of the servers goes on before all have loaded the new ones.
    Every worker hashes what it loads; the tag names that hash. Then all are asked the log-probabilities of the same few
    tokens, which must be those that the export computed with the weights, or, where it did not, alike: what was read
    whole may still be computed with wrongly. A server that is lost meanwhile is brought back, at once or later, with
    the new policy.

    Args:
        pool: The servers.
        policy_dir: Hugging Face directory with safetensors, on a path that the servers see too.
        version: Policy version that answers carry from now on.

    Returns:
        How long each server was paused and took to load.

    Raises:
        UserError: The directory is bad, a server cannot load it, or its log-probabilities are undefined or another's:
            all serve what they did before. One that cannot load that back, or answers otherwise with it than before, is
            tagged as unusable, and lost to the pool. Or no server is left.
    """
    directory = Path(policy_dir).resolve()
    if not version or version == UNUSABLE:
        raise UserError(f"version must be a name other than {UNUSABLE!r}, got {version!r}; use v0001, v0002, ...")
    if is_sealed(directory):
        read_manifest(directory)
    weights = read_weights(directory)
    policy, start = _Policy(directory, version, weights.content_hash()), time.monotonic()
    before: dict[str, _Before] = {}

    def look(url: str) -> None:
        served = pool.call_worker(url, "npd_describe")
        for described in (served, pool.call_worker(url, "npd_describe", str(directory))):
            _check_same_model(directory, weights.describe(), described, url)
        before[url] = _Before.of(pool, url, served)

    if refused := _on_all(pool, pool.urls, look):
        raise refused[0]
    exchange = _Exchange(pool, policy, before)
    if errors := exchange.run():
        raise UserError("; ".join(map(str, errors))) from errors[0]
    for server in pool.servers.values():
        server.model_dir, server.version = directory, version
    pool.reload = lambda url: _reload(pool, url, policy)
    pool.served, pool.reference = tag(version, policy.content), exchange.reference()
    pool.find_all()
    done = Refreshed(bytes=weights.nbytes, pauses=exchange.pauses, loads=exchange.loads)
    took = time.monotonic() - start
    get_logger().info("%d server(s) serve %s after %.2f s; %s", len(pool.urls), version, took, done.words())
    return done


@dataclass(frozen=True)
class _Policy:
    """What a server can load: a directory, its policy version and the hash of its weights."""

    directory: Path
    version: str
    content: str

    @classmethod
    def served(cls, marks: str, directory: Any) -> _Policy | None:
        """What a server holds, by what it marks its answers with and whence it loaded that; None: it does not say."""
        version, _, content = marks.rpartition("-")
        return cls(Path(directory), version, content) if directory and version else None

    def load_on(self, pool: ServerPool, url: str) -> float:
        """Load into a paused server, and tag its answers, until then as unusable: whatever happens, none lies.

        Returns:
            Seconds that the workers took.

        Raises:
            UserError: It refuses, or loaded other weights.
        """
        pool.mark_unusable(url)
        start = time.monotonic()
        loaded = pool.call_worker(url, "npd_load", str(self.directory), timeout=pool.patience).get("weights")
        seconds = time.monotonic() - start
        if loaded != self.content:
            raise UserError(
                f"{self.directory} must stay as it is while servers load it, got weights {loaded} on {url} for "
                f"{self.content}; restore it and refresh again"
            )
        pool.forget_prefixes(url)
        pool.control(url, "/update_weight_version", body={"new_version": tag(self.version, self.content)})
        return seconds


@dataclass(frozen=True)
class _Before:
    """A server as it was before a refresh.

    Attributes:
        served: What it describes.
        policy: What it held; None: it does not say.
        answer: What it answered with that; None: nothing of use.
    """

    served: dict[str, Any]
    policy: _Policy | None
    answer: Answer | None

    @classmethod
    def of(cls, pool: ServerPool, url: str, served: dict[str, Any]) -> _Before:
        """Ask a server; new weights may mend one that answers nothing of use."""
        policy, answer = _Policy.served(pool.tag(url), served.get("directory")), None
        try:
            answer = Answer.of(pool, url, served) if policy is not None else None
        except ServerLost:
            raise
        except UserError:
            pass
        return cls(served, policy, answer)


class _Exchange:
    """A policy put in the place of what the servers hold.

    Attributes:
        answers: Server -> what it answers with the new policy.
        pauses, loads: As of ``Refreshed``.
    """

    def __init__(self, pool: ServerPool, policy: _Policy, before: dict[str, _Before]) -> None:
        self.pool, self.policy, self.before, self.urls = pool, policy, before, list(pool.urls)
        self.answers: dict[str, Answer] = {}
        self.pauses: dict[str, float] = {}
        self.loads: dict[str, float] = {}
        self._known = known_answer(policy.directory)
        self._staged: set[str] = set()  # servers with weights in memory that they have not loaded
        self._paused: dict[str, float] = {}  # since when

    def run(self) -> list[UserError]:
        """Exchange, or put back what was there; however it ends, none stays paused.

        Returns:
            Why the servers hold what they held before; empty: they hold the new policy.
        """
        pool, urls, loading, paused = self.pool, self.urls, False, False
        errors: list[UserError] = []
        try:
            errors += _on_all(pool, urls, self._stage)
            if not errors:
                paused, urls = True, list(pool.urls)
                errors += _on_all(pool, urls, self._pause)
            if not errors:
                loading = True
                errors += _on_all(pool, pool.urls, self._load)
                errors += _on_all(pool, urls, self._resume) if not errors else []
                errors += _on_all(pool, pool.urls, self._ask) if not errors else []
                errors += _on_all(pool, [url for url in urls if url in self.answers], self._compare)
                loading = paused = bool(errors)
        finally:
            if loading:
                errors += _on_all(pool, pool.urls, lambda url: _load_back(pool, url, self.before[url].policy))
            if paused:
                errors += _on_all(pool, urls, self._resume)
            if loading:
                errors += _on_all(pool, pool.urls, lambda url: _check_back(pool, url, self.before[url]))
            if self._staged:
                with ThreadPoolExecutor(len(self._staged)) as threads:
                    list(threads.map(self._unstage, list(self._staged)))
        return errors

    def reference(self) -> Answer | None:
        """What a server must answer with the new policy; None: nobody knows."""
        return next(iter(self._references()), None)

    def _references(self) -> list[Answer]:
        """What the export knows first, then what was answered before with the same weights, then what is now."""
        older = [self._known, *(self.before[url].answer for url in self.urls)]
        of_these = [answer for answer in older if answer is not None and answer.weights == self.policy.content]
        return [*of_these, *(self.answers[url] for url in self.urls if url in self.answers)]

    def _stage(self, url: str) -> None:
        """Have the workers of a server read the weights into memory: what a file system takes is no part of a pause."""
        start, wait = time.monotonic(), _FIRST_LOOK
        self._staged.add(url)
        self.pool.call_worker(url, "npd_stage", str(self.policy.directory))
        while not all(answer.get("ready") for answer in self.pool.call_workers(url, "npd_staged")):
            if (waited := time.monotonic() - start) > self.pool.patience:
                what = f"the server {url} must read {self.policy.directory}, got no end of it in {waited:.0f} s"
                raise UserError(f"{what}; look at its file system, and refresh again")
            time.sleep(wait)
            wait = min(2 * wait, 0.2)  # seconds: each look is a message to the engine between two of its steps
        self.loads[url] = time.monotonic() - start

    def _unstage(self, url: str) -> None:
        with suppress(UserError):  # it is lost, or has none
            self.pool.call_worker(url, "npd_stage", "")

    def _pause(self, url: str) -> None:
        self._paused[url] = time.monotonic()
        _pause(self.pool, url)

    def _load(self, url: str) -> None:
        self._staged.discard(url)  # whatever becomes of it
        self.loads[url] += self.policy.load_on(self.pool, url)

    def _resume(self, url: str) -> None:
        self.pool.control(url, "/resume")
        self.pauses[url] = time.monotonic() - self._paused[url]

    def _ask(self, url: str) -> None:
        self.answers[url] = Answer.of(self.pool, url, self.before[url].served)

    def _compare(self, url: str) -> None:
        answer = self.answers[url]
        answer.compare(next(other for other in self._references() if answer.is_like(other)))


def _on_all(pool: ServerPool, urls: list[str], step: Callable[[str], Any]) -> list[UserError]:
    """Take a step on servers at the same time; the errors of those that refuse it. Lost ones leave the pool."""
    if not urls:
        return []

    def attempt(url: str) -> UserError | None:
        try:
            step(url)
        except UserError as error:
            return error
        return None

    urls = list(urls)  # steps change the pool's
    with ThreadPoolExecutor(len(urls)) as threads:
        errors = list(zip(urls, threads.map(attempt, urls), strict=True))
    for url, error in errors:
        if isinstance(error, ServerLost) and url in pool.urls:
            pool.lose(url, error)
    return [error for _, error in errors if error is not None and not isinstance(error, ServerLost)]


def _pause(pool: ServerPool, url: str) -> None:
    pool.control(url, "/pause", params={"mode": "wait"}, timeout=pool.patience)


def _load_back(pool: ServerPool, url: str, old: _Policy | None) -> None:
    """Load what a server served before; where it refuses that, it is left tagged as unusable, and lost."""
    with _lost_if_refused(pool, url, "may hold mixed weights"):
        if old is None:
            raise UserError(f"the server {url} must say what it served before, got nothing")
        _pause(pool, url)  # not paused any more where the answers differ
        old.load_on(pool, url)


def _check_back(pool: ServerPool, url: str, before: _Before) -> None:
    """See that a server answers with what it loaded back as it did before; else it is tagged as unusable, and lost."""
    if before.answer is not None:
        with _lost_if_refused(pool, url, "computes otherwise than before"):
            Answer.of(pool, url, before.served).compare(before.answer)


@contextmanager
def _lost_if_refused(pool: ServerPool, url: str, trouble: str) -> Iterator[None]:
    try:
        yield
    except ServerLost:
        raise
    except UserError as error:
        words = f"{url} {trouble} ({error}) and is tagged {UNUSABLE!r}"
        lost = UserError(f"{words}; refresh it with a good policy or restart it")
        pool.lose(url, lost)
        pool.mark_unusable(url)
        raise lost from error


def _reload(pool: ServerPool, url: str, policy: _Policy) -> None:
    """Load what the others serve into a server that was lost and answers again; errors as for ``refresh``."""
    served = pool.call_worker(url, "npd_describe")
    _check_same_model(policy.directory, read_weights(policy.directory).describe(), served, url)
    try:
        _pause(pool, url)
        policy.load_on(pool, url)
    finally:
        pool.control(url, "/resume")


def _check_same_model(directory: Path, policy: dict[str, Any], served: dict[str, Any], url: str) -> None:
    """Raise UserError, naming what differs first, unless a policy has the served checkpoint's tensors and settings."""
    for part, what in (("tensors", "tensor"), ("config", "config key")):
        ours, theirs = policy[part], served.get(part)
        if not isinstance(theirs, dict):
            raise UserError(f"the server {url} must describe its {part}, got {str(theirs)[:100]}; restart it")
        for name in sorted(ours.keys() | theirs.keys()):
            if name not in ours or name not in theirs or ours[name] != theirs[name]:
                raise UserError(
                    f"{directory} must match what {url} serves, got {what} {name} = {ours.get(name, 'nothing')} for "
                    f"{theirs.get(name, 'nothing')}; nothing was loaded: export it again"
                )
