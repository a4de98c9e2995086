"""Sealed directories: how stages hand data to one another.

A directory is sealed when its ``manifest.json`` exists. The manifest is written last and atomically; it holds the
schema version, what made the directory, the books (in = kept + quarantined + pending) and sha256 and bytes of every
file. One writer at a time holds the directory's lock; readers check the manifest before they use anything.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_npd.log import UserError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
LOCK = ".lock"
_verified: dict[str, tuple[int, int]] = {}  # file -> (bytes, mtime_ns) at its last full hash in this process


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a sealed directory says of itself.

    Attributes:
        kind: The stage that made it: ``prompts``, ``rollouts``, ``rollouts-shard``, ``annotations``, ...
        provenance: Configuration hash, tokenizer hash, vocabulary, k, temperature, teacher, policy version.
        counts: The books and other counts; ``in`` = ``kept`` + sum of ``quarantined`` + ``pending`` where present.
        files: Relative path -> ``{"sha256": hex, "bytes": int}``.
        schema_version: Version of the formats inside.
    """

    kind: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


def is_sealed(path: str | Path) -> bool:
    """Whether ``path`` holds a finished stage or shard."""
    return (Path(path) / MANIFEST).is_file()


def config_hash(config: Any) -> str:
    """16 hex digits of sha256 over the canonical JSON of a dataclass, mapping or list."""
    plain = asdict(config) if hasattr(config, "__dataclass_fields__") else config
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_sha256(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync_path(path: str | Path) -> None:
    """Flush a file or a directory entry to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Write a small file so that a reader sees the old content or the new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as stream:
        stream.write(data.encode() if isinstance(data, str) else data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    fsync_path(path.parent)


def read_manifest(path: str | Path, *, kind: str | None = None, verify: bool = True) -> Manifest:
    """Read and check the manifest of a sealed directory.

    Args:
        path: The sealed directory.
        kind: The kind it must be of, if the caller cares.
        verify: Check every file: a full hash once per process, then size and mtime only.

    Raises:
        UserError: It is not sealed, of another kind or schema version, or a file is missing or differs.
    """
    path = Path(path)
    if not is_sealed(path):
        raise UserError(f"{path} must be a sealed directory, got no {MANIFEST} in it; run the stage that writes it")
    try:
        manifest = Manifest(**json.loads((path / MANIFEST).read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path / MANIFEST} must be a manifest, got {error}; remove the directory and rerun") from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise UserError(
            f"{path} must have schema version {SCHEMA_VERSION}, got {manifest.schema_version}; "
            "use the release that wrote it"
        )
    if kind is not None and manifest.kind != kind:
        raise UserError(f"{path} must hold {kind}, got {manifest.kind}; check the path")
    if verify:
        _verify_files(path, manifest)
    return manifest


def sealed_from(path: str | Path, *, kind: str, provenance: Mapping[str, Any]) -> Manifest | None:
    """The manifest of a directory that is sealed already from the same input, or None where it is not sealed.

    Raises:
        UserError: It is sealed, but its kind or provenance differs.
    """
    if not is_sealed(path):
        return None
    manifest = read_manifest(path, kind=kind)
    if config_hash(dict(manifest.provenance)) != config_hash(dict(provenance)):
        then, now = dict(manifest.provenance), dict(provenance)
        changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
        raise UserError(
            f"{path} must come from the same input as before, got other {', '.join(changed)}; "
            "remove it to make it anew, or give another directory"
        )
    return manifest


def _verify_files(path: Path, manifest: Manifest) -> None:
    for name, expected in manifest.files.items():
        file = path / name
        if Path(name).is_absolute() or ".." in Path(name).parts or file.is_symlink():
            raise UserError(f"{path / MANIFEST} must name files inside its directory, got {name!r}; do not use it")
        if not file.is_file():
            raise UserError(f"{file} must exist as {path / MANIFEST} lists it, got nothing; remove {path} and rerun")
        stat = file.stat()
        if stat.st_size != expected["bytes"]:
            raise UserError(
                f"{file} must have {expected['bytes']} bytes, got {stat.st_size}; it was cut or changed: "
                f"remove {path} and rerun the stage"
            )
        key, state = str(file.resolve()), (stat.st_size, stat.st_mtime_ns)
        if _verified.get(key) == state:
            continue
        digest = file_sha256(file)
        if digest != expected["sha256"]:
            raise UserError(
                f"{file} must have sha256 {expected['sha256'][:12]}..., got {digest[:12]}...; it was damaged or "
                f"changed: remove {path} and rerun the stage"
            )
        _verified[key] = state


def seal(
    path: str | Path,
    *,
    kind: str,
    provenance: Mapping[str, Any] | None = None,
    counts: Mapping[str, Any] | None = None,
) -> Manifest:
    """Hash and flush every file below ``path`` and write its manifest last.

    Sealed sub-directories (shards) are represented by their own manifests. Hidden files (locks, temporaries) and
    journals (``*.journal``) are not part of the sealed content.
    """
    path = Path(path)
    files: dict[str, dict[str, Any]] = {}
    for file in sorted(_content(path, path)):
        fsync_path(file)
        files[str(file.relative_to(path))] = {"sha256": file_sha256(file), "bytes": file.stat().st_size}
    for directory in {(path / name).parent for name in files} | {path}:
        fsync_path(directory)
    manifest = Manifest(kind=kind, provenance=dict(provenance or {}), counts=dict(counts or {}), files=files)
    write_atomic(path / MANIFEST, json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n")
    fsync_path(path.parent)
    return manifest


def _content(root: Path, directory: Path) -> Iterator[Path]:
    for entry in directory.iterdir():
        hidden = entry.name.startswith(".") and entry.name != ".metadata"  # that one is a dist checkpoint's index
        if hidden or entry.suffix == ".journal" or (directory == root and entry.name == MANIFEST):
            continue
        if entry.is_dir():
            if is_sealed(entry):
                yield entry / MANIFEST
            else:
                yield from _content(root, entry)
        else:
            yield entry


@contextmanager
def writing(path: str | Path, *, resume: bool = False) -> Iterator[Path]:
    """Hold the writer's lock of an unsealed directory; the caller calls ``seal`` inside.

    Args:
        path: Directory to write. Content without a manifest is a killed attempt's: it is removed unless ``resume``.
        resume: Keep what an earlier attempt left (the stage knows how to go on from it).

    Raises:
        UserError: Another process is writing it, or it is sealed already.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with open(path / LOCK, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise UserError(
                f"{path} must have one writer, got a second one beside {lock.read().strip()}; wait for it or stop it"
            ) from None
        if is_sealed(path):
            raise UserError(f"{path} must not be sealed yet, got a finished stage; remove it to make it anew")
        if not resume:
            for entry in path.iterdir():
                if entry.name != LOCK:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield path
