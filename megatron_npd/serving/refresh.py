"""The sparse update: new weights into running servers (METHOD section 1, step 6)."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.manifest import is_sealed, read_manifest
from megatron_npd.serving.pool import UNUSABLE, ServerPool
from megatron_npd.serving.server import tag
from megatron_npd.weights import read_weights


def refresh(pool: ServerPool, policy_dir: str | Path, version: str) -> None:
    """Let every server of the pool serve the weights of ``policy_dir``, tagged with ``version``.

    The directory is checked before anything is loaded: hashes where it is sealed, whole files, finite numbers, and the
    names, shapes and types of the tensors and the configuration that each server was started with. Answers that are
    being generated are finished with the old weights. Every worker hashes what it loads; the tag names that hash.

    Args:
        pool: The servers.
        policy_dir: Hugging Face directory with safetensors, on a path that the servers see too.
        version: Policy version that answers carry from now on.

    Raises:
        UserError: The directory is bad: nothing was loaded, the old version serves on. Or a server failed on the way:
            it is named, and tagged as unusable if its weights may be half loaded; the others serve ``version``.
    """
    directory = Path(policy_dir).resolve()
    if not version or version == UNUSABLE:
        raise UserError(f"version must be a name other than {UNUSABLE!r}, got {version!r}; use v0001, v0002, ...")
    if is_sealed(directory):
        read_manifest(directory)
    weights = read_weights(directory)
    policy = weights.describe()
    for url in pool.urls:
        for served in (pool.call_worker(url, "npd_describe"), pool.call_worker(url, "npd_describe", str(directory))):
            _check_same_model(directory, policy, served, url)
    content = weights.content_hash()
    start = time.monotonic()
    with ThreadPoolExecutor(len(pool.urls)) as threads:
        errors = list(threads.map(lambda url: _refresh_one(pool, url, directory, version, content), pool.urls))
    if failed := [error for error in errors if error is not None]:
        raise UserError("; ".join(map(str, failed))) from failed[0]
    get_logger().info("%d server(s) serve %s after %.2f s", len(pool.urls), version, time.monotonic() - start)


def _refresh_one(pool: ServerPool, url: str, directory: Path, version: str, content: str) -> UserError | None:
    """Pause, load, compare, tag and resume one server; what went wrong, if anything did."""
    patience = max(600.0, pool.cfg.request_timeout)
    loading = False
    try:
        pool.control(url, "/pause", params={"mode": "wait"}, timeout=patience)
        loading = True
        loaded = pool.call_worker(url, "npd_load", str(directory), timeout=patience).get("weights")
        if loaded != content:
            raise UserError(
                f"{directory} must stay as it is while servers load it, got weights {loaded} on {url} for {content}; "
                "restore it and refresh again"
            )
        pool.forget_prefixes(url)
        pool.control(url, "/update_weight_version", body={"new_version": tag(version, content)})
    except UserError as error:
        return UserError(f"{error}\n{_mark_unusable(pool, url) if loading else 'the old version serves on'}")
    finally:
        resume_error = _try_resume(pool, url)
    return resume_error


def _mark_unusable(pool: ServerPool, url: str) -> str:
    try:
        pool.control(url, "/update_weight_version", body={"new_version": UNUSABLE})
    except UserError:
        return f"{url} may hold mixed weights and cannot be told so; restart it"
    return f"{url} may hold mixed weights and is tagged {UNUSABLE!r}; refresh it with a good policy or restart it"


def _try_resume(pool: ServerPool, url: str) -> UserError | None:
    try:
        pool.control(url, "/resume")
    except UserError as error:
        get_logger().error("%s", error)
        return error
    return None


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
