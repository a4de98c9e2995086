"""The sparse update: new weights into running servers (METHOD section 1, step 6)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.manifest import is_sealed, read_manifest
from megatron_npd.serving.pool import UNUSABLE, ServerPool
from megatron_npd.serving.protocol import Malformed, field, is_defined
from megatron_npd.serving.server import GENERATE, ServerLost, tag
from megatron_npd.weights import read_weights

_PROBED = 16  # tokens of the request that servers are compared by
# Nats that the median token may differ by between kernels and tensor-parallel layouts. With SmolLM2-135M in 1, 2, 4
# and 8 parts and 16 prompts of random tokens it was at most 0.17 in bfloat16 (where single tokens differed by 5) and
# 0.00001 in float32; a layer of zeros made 0.3 to 1.4 of it, a head shifted by a token 1.0 to 3.9.
_TOLERANCES = {"torch.float32": 0.01}
_TOLERANCE = 0.5  # of other types, and of a server that does not say its type


def refresh(pool: ServerPool, policy_dir: str | Path, version: str) -> None:
    """Let every server of the pool serve the weights of ``policy_dir``, tagged with ``version``: all of them or none.

    The directory is checked before anything is loaded: hashes where it is sealed, whole files, finite numbers, and the
    names, shapes and types of the tensors and the configuration that each server was started with. Answers that are
    being generated are finished with the old weights; none of the servers goes on before all have loaded the new ones.
    Every worker hashes what it loads; the tag names that hash. Then all are asked the log-probabilities of the same few
    tokens, which must be alike: what was read whole may still be computed with wrongly. A server that is lost meanwhile
    is brought back, at once or later, with the new policy.

    Args:
        pool: The servers.
        policy_dir: Hugging Face directory with safetensors, on a path that the servers see too.
        version: Policy version that answers carry from now on.

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
    errors, reference = _exchange(pool, policy, before)
    if errors:
        raise UserError("; ".join(map(str, errors))) from errors[0]
    for server in pool.servers.values():
        server.model_dir, server.version = directory, version
    pool.reload = lambda url: _reload(pool, url, policy, reference)
    pool.served = tag(version, policy.content)
    pool.find_all()
    get_logger().info("%d server(s) serve %s after %.2f s", len(pool.urls), version, time.monotonic() - start)


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

    def load_on(self, pool: ServerPool, url: str) -> None:
        """Load into a paused server, and tag its answers, until then as unusable: whatever happens, none lies.

        Raises:
            UserError: It refuses, or loaded other weights.
        """
        _mark_unusable(pool, url)
        loaded = pool.call_worker(url, "npd_load", str(self.directory), timeout=_patience(pool)).get("weights")
        if loaded != self.content:
            raise UserError(
                f"{self.directory} must stay as it is while servers load it, got weights {loaded} on {url} for "
                f"{self.content}; restore it and refresh again"
            )
        pool.forget_prefixes(url)
        pool.control(url, "/update_weight_version", body={"new_version": tag(self.version, self.content)})


@dataclass(frozen=True)
class _Answer:
    """What a server makes of a fixed request.

    Attributes:
        whose: The server and its policy, in words.
        logprobs: Of given tokens: unlike those of generated ones, rounding cannot make them another text's.
        tolerance: What their median may differ by from another server's, in nats.
    """

    whose: str
    logprobs: list[float]
    tolerance: float

    @classmethod
    def of(cls, pool: ServerPool, url: str, served: dict[str, Any]) -> _Answer:
        """Ask a server for it; ``served`` is what it describes.

        Raises:
            UserError: A log-probability is undefined, or the server makes no sense.
        """
        size, whose = served.get("vocab_size"), f"{url} with the weights {pool.tag(url)}"
        try:
            if type(size) is not int or size < 1:
                raise Malformed(f"a vocabulary of {size!r}")
            ids = [index * size // _PROBED for index in range(_PROBED)]  # of all ranks that share the vocabulary
            sampling = {"max_tokens": 1, "temperature": 0.0, "detokenize": False, "prompt_logprobs": 0}
            told = pool.control(
                url, GENERATE, body={"token_ids": ids, "sampling_params": sampling}, timeout=_patience(pool)
            )
            positions = field(told, "prompt_logprobs")
            if not isinstance(positions, list) or len(positions) != _PROBED:
                raise Malformed(f"prompt_logprobs for other than {_PROBED} tokens")
            pairs = zip(ids[1:], positions[1:], strict=True)
            logprobs = [field(field(position, str(token)), "logprob") for token, position in pairs]
            if not all(map(is_defined, logprobs)):
                raise Malformed(f"NaN or infinity among {logprobs}")
        except ServerLost:
            raise
        except (Malformed, UserError) as error:  # vLLM answers 400 where one is NaN, which is no JSON
            what = f"{whose} must give the log-probabilities of {_PROBED} given tokens, got {error}"
            raise UserError(f"{what}; load another policy, or restart the server") from error
        return cls(whose, logprobs, _TOLERANCES.get(str(served.get("dtype")), _TOLERANCE))

    def compare(self, other: _Answer) -> None:
        """Raise UserError unless the other's log-probabilities are the same but for rounding."""
        apart = median(abs(one - two) for one, two in zip(self.logprobs, other.logprobs, strict=True))
        if apart > (tolerance := max(self.tolerance, other.tolerance)):
            raise UserError(
                f"{self.whose} must give the log-probabilities of {other.whose}, got {apart:.2g} nats apart, over "
                f"{tolerance}, in the median of {len(self.logprobs)} tokens; one of them computes wrongly: restart it "
                "and refresh again"
            )


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
    answer: _Answer | None

    @classmethod
    def of(cls, pool: ServerPool, url: str, served: dict[str, Any]) -> _Before:
        """Ask a server; new weights may mend one that answers nothing of use."""
        policy, answer = _Policy.served(pool.tag(url), served.get("directory")), None
        try:
            answer = _Answer.of(pool, url, served) if policy is not None else None
        except ServerLost:
            raise
        except UserError:
            pass
        return cls(served, policy, answer)


def _exchange(pool: ServerPool, policy: _Policy, before: dict[str, _Before]) -> tuple[list[UserError], _Answer | None]:
    """Put a policy in the place of what the servers hold, or that back; however it ends, none stays paused.

    Returns:
        Why they hold what they held before, and else what one of them answers with the new policy.
    """
    urls, loading, paused = list(pool.urls), False, True
    errors: list[UserError] = []
    same = [old.answer for old in before.values() if old.policy is not None and old.policy.content == policy.content]
    reference = next(filter(None, same), None)
    answers: dict[str, _Answer] = {}

    def resume(url: str) -> None:
        pool.control(url, "/resume")

    def ask(url: str) -> None:
        answers[url] = _Answer.of(pool, url, before[url].served)

    try:
        errors += _on_all(pool, urls, lambda url: _pause(pool, url))
        if not errors:
            loading = True
            errors += _on_all(pool, pool.urls, lambda url: policy.load_on(pool, url))
            errors += _on_all(pool, urls, resume) if not errors else []
            errors += _on_all(pool, pool.urls, ask) if not errors else []
            answered = [url for url in urls if url in answers]
            reference = reference or (answers[answered[0]] if answered else None)
            errors += _on_all(pool, answered, lambda url: answers[url].compare(reference or answers[url]))
            loading = paused = bool(errors)
    finally:
        if loading:
            errors += _on_all(pool, pool.urls, lambda url: _load_back(pool, url, before[url].policy))
        if paused:
            errors += _on_all(pool, urls, resume)
        if loading:
            errors += _on_all(pool, pool.urls, lambda url: _check_back(pool, url, before[url]))
    return errors, reference


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


def _patience(pool: ServerPool) -> float:
    """Seconds that a server may take for what waits for other requests, or for the reading of weights."""
    return max(600.0, pool.cfg.request_timeout)


def _pause(pool: ServerPool, url: str) -> None:
    pool.control(url, "/pause", params={"mode": "wait"}, timeout=_patience(pool))


def _mark_unusable(pool: ServerPool, url: str) -> None:
    pool.control(url, "/update_weight_version", body={"new_version": UNUSABLE})


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
            _Answer.of(pool, url, before.served).compare(before.answer)


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
        _mark_unusable(pool, url)
        raise lost from error


def _reload(pool: ServerPool, url: str, policy: _Policy, reference: _Answer | None) -> None:
    """Load what the others serve into a server that was lost and answers again; errors as for ``refresh``."""
    served = pool.call_worker(url, "npd_describe")
    _check_same_model(policy.directory, read_weights(policy.directory).describe(), served, url)
    try:
        _pause(pool, url)
        policy.load_on(pool, url)
    finally:
        pool.control(url, "/resume")
    try:
        answer = _Answer.of(pool, url, served)
        answer.compare(reference or answer)
    except UserError:
        _mark_unusable(pool, url)
        raise


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
