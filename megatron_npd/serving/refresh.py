"""The sparse update: new weights into running servers (METHOD section 1, step 6)."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.manifest import is_sealed, read_manifest
from megatron_npd.serving.pool import UNUSABLE, ServerPool
from megatron_npd.serving.server import ServerLost, tag
from megatron_npd.weights import read_weights


def refresh(pool: ServerPool, policy_dir: str | Path, version: str) -> None:
    """Let every server of the pool serve the weights of ``policy_dir``, tagged with ``version``: all of them or none.

    The directory is checked before anything is loaded: hashes where it is sealed, whole files, finite numbers, and the
    names, shapes and types of the tensors and the configuration that each server was started with. Answers that are
    being generated are finished with the old weights; none of the servers goes on before all have loaded the new ones.
    Every worker hashes what it loads; the tag names that hash. A server that is lost meanwhile is brought back, at
    once or later, with the new policy.

    Args:
        pool: The servers.
        policy_dir: Hugging Face directory with safetensors, on a path that the servers see too.
        version: Policy version that answers carry from now on.

    Raises:
        UserError: The directory is bad, or a server cannot load it: all serve what they did before. One that cannot
            load that back is tagged as unusable, and lost to the pool. Or no server is left.
    """
    directory = Path(policy_dir).resolve()
    if not version or version == UNUSABLE:
        raise UserError(f"version must be a name other than {UNUSABLE!r}, got {version!r}; use v0001, v0002, ...")
    if is_sealed(directory):
        read_manifest(directory)
    weights = read_weights(directory)
    policy, start = _Policy(directory, version, weights.content_hash()), time.monotonic()
    old: dict[str, _Policy | None] = {}

    def look(url: str) -> None:
        served = pool.call_worker(url, "npd_describe")
        for described in (served, pool.call_worker(url, "npd_describe", str(directory))):
            _check_same_model(directory, weights.describe(), described, url)
        old[url] = _Policy.served(pool.tag(url), served.get("directory"))

    if refused := _on_all(pool, pool.urls, look):
        raise refused[0]

    urls, loading = list(pool.urls), False
    errors: list[UserError] = []
    try:
        errors += _on_all(pool, urls, lambda url: _pause(pool, url))
        if loading := not errors:
            errors += _on_all(pool, pool.urls, lambda url: policy.load_on(pool, url))
            loading = bool(errors)
    finally:  # however it ends: all hold the old policy, or all the new one; none stays paused, nor a lost one
        if loading:
            errors += _on_all(pool, pool.urls, lambda url: _load_back(pool, url, old[url]))
        errors += _on_all(pool, urls, lambda url: pool.control(url, "/resume"))
    if errors:
        raise UserError("; ".join(map(str, errors))) from errors[0]
    for server in pool.servers.values():
        server.model_dir, server.version = directory, version
    pool.reload = lambda url: _reload(pool, url, policy)
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
        pool.control(url, "/update_weight_version", body={"new_version": UNUSABLE})
        patience = max(600.0, pool.cfg.request_timeout)
        loaded = pool.call_worker(url, "npd_load", str(self.directory), timeout=patience).get("weights")
        if loaded != self.content:
            raise UserError(
                f"{self.directory} must stay as it is while servers load it, got weights {loaded} on {url} for "
                f"{self.content}; restore it and refresh again"
            )
        pool.forget_prefixes(url)
        pool.control(url, "/update_weight_version", body={"new_version": tag(self.version, self.content)})


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
    pool.control(url, "/pause", params={"mode": "wait"}, timeout=max(600.0, pool.cfg.request_timeout))


def _load_back(pool: ServerPool, url: str, old: _Policy | None) -> None:
    """Load what a paused server served before; where it refuses that, it is left tagged as unusable, and lost."""
    try:
        if old is None:
            raise UserError(f"the server {url} must say what it served before, got nothing")
        old.load_on(pool, url)
    except ServerLost:
        raise
    except UserError as error:
        words = f"{url} may hold mixed weights ({error}) and is tagged {UNUSABLE!r}"
        lost = UserError(f"{words}; refresh it with a good policy or restart it")
        pool.lose(url, lost)
        raise lost from error


def _reload(pool: ServerPool, url: str, policy: _Policy) -> None:
    """Load what the others serve into a server that was lost and answers again; errors as for ``refresh``."""
    _check_same_model(
        policy.directory, read_weights(policy.directory).describe(), pool.call_worker(url, "npd_describe"), url
    )
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
