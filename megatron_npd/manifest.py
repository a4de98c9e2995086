"""Sealed directories: how stages hand data to one another.

Files are written in a hidden directory, flushed, renamed into place, the directory flushed; ``manifest.json`` is
written last and atomically, and what has one is sealed. It holds the schema version, what made the directory, the books
(in = kept + quarantined + pending), sha256 and bytes of every file, and a sha256 of itself. One writer at a time holds
the directory's lock; readers check the manifest and every file before they use anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron_npd.durable import fsync_path, write_atomic
from megatron_npd.errors import Damaged, UserError
from megatron_npd.links import link_in_words, refuse_links_beside
from megatron_npd.lock import LOCK, check_lock, hold_lock

SCHEMA_VERSION = 4
MANIFEST = "manifest.json"
PART = ".part"  # where the files of a directory are written before it is sealed
_KNOWN_FILE = "MEGATRON_NPD_VERIFIED"  # environment: the process tree's file of hashes
_MEMFD = "megatron-npd-hashes"
_RACY_SECONDS = 0.1  # a file changed this shortly before it was hashed may change again within its mtime's tick
_FILE_TYPES = {"sha256": str, "bytes": int}
_known: dict[str, list[Any]] = {}  # file -> size, mtime_ns, ctime_ns, inode, sha256 at its last full hash
_known_read = 0  # bytes of the process tree's file that _known holds
_known_lock = threading.Lock()


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


def read_manifest(path: str | Path, *, kind: str | None = None, verify: bool = True, full: bool = False) -> Manifest:
    """Read and check the manifest of a sealed directory.

    Args:
        path: The sealed directory.
        kind: The kind it must be of, if the caller cares.
        verify: Check every file: a full hash once in this tree of processes, then size and times only.
        full: Hash every file whatever is known of it.

    Raises:
        UserError: It is not sealed, of another kind or schema version, or a file is missing, differs or lies elsewhere.
    """
    path = Path(path)
    if not is_sealed(path):
        raise UserError(f"{path} must be a sealed directory, got no {MANIFEST} in it; run the stage that writes it")
    manifest = _parse(path)
    if kind is not None and manifest.kind != kind:
        raise UserError(f"{path} must hold {kind}, got {manifest.kind}; check the path")
    files = {name: file_inside(path, name) for name in manifest.files}
    if verify:
        for name, file in files.items():
            _verify(path, file, manifest.files[name], full=full)
    return manifest


def verify_files(path: str | Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Check some files of a sealed directory, as ``read_manifest`` checks all; errors as of that."""
    for name in names:
        _verify(Path(path), file_inside(path, name), manifest.files[name], full=False)


def verified_file(path: str | Path, name: str, *, kind: str, verify: bool = True) -> Path:
    """One file of a sealed directory, checked (with ``verify``) without the others.

    Raises:
        UserError: As for ``read_manifest``.
    """
    manifest = read_manifest(path, kind=kind, verify=False)
    if name not in manifest.files:
        raise UserError(f"{path} must hold {name}, got none in its {MANIFEST}; remove it and rerun the stage")
    file = file_inside(path, name)
    if verify:
        _verify(Path(path), file, manifest.files[name], full=False)
    return file


def file_inside(root: str | Path, name: object) -> Path:
    """The path of ``name`` under ``root``, where it leads nowhere else: not up, not absolute, not through a link.

    Raises:
        UserError: It does.
    """
    root = Path(root)
    if isinstance(name, str):
        with suppress(ValueError, OSError, RuntimeError):  # a NUL byte, a name too long, a loop of links
            top = root.resolve()
            if (file := (top / name).resolve()) == top / name and file.is_relative_to(top) and file != top:
                file.is_file()  # raises where the name is too long for the file system
                return root / name
    raise UserError(f"{root} must name files inside itself, got {str(name)[:200]!r}; do not use it")


def unlisted(path: str | Path, manifest: Manifest) -> list[str]:
    """Files of a sealed directory that its manifest does not know, relative to it."""
    path = Path(path)
    return sorted({str(file.relative_to(path)) for file in _content(path, path)} - manifest.files.keys())


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


def _render(manifest: Manifest) -> str:
    """The text of a manifest; its hash covers all the rest."""
    fields = asdict(manifest)
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return json.dumps(fields | {"sha256": digest}, indent=1, sort_keys=True) + "\n"


def _parse(path: Path) -> Manifest:
    file = file_inside(path, MANIFEST)
    try:
        text = file.read_bytes().decode()
        value = json.loads(text)
        if not isinstance(value, dict):
            raise TypeError(f"{type(value).__name__} in place of an object")
        if (version := value.get("schema_version")) != SCHEMA_VERSION:
            raise UserError(
                f"{path} must have schema version {SCHEMA_VERSION}, got {str(version)[:50]}; use the release that "
                "wrote it, or remove it and rerun"
            )
        value.pop("sha256", None)
        manifest = Manifest(**value)
        if _render(manifest) != text:
            raise ValueError("another text than its own sha256 says")
        parts = (manifest.provenance, manifest.counts, manifest.files)
        if not isinstance(manifest.kind, str) or not all(isinstance(part, dict) for part in parts):
            raise TypeError("fields of other types")
        for name, entry in manifest.files.items():
            if not isinstance(entry, dict) or {key: type(item) for key, item in entry.items()} != _FILE_TYPES:
                raise TypeError(f"no sha256 and bytes for {name}")
    except UserError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise Damaged(
            f"{file} must be a whole manifest, got {str(error)[:300]}; remove {path} and rerun the stage"
        ) from error
    return manifest


def _verify(path: Path, file: Path, expected: Mapping[str, Any], *, full: bool) -> None:
    if not file.is_file():
        raise Damaged(f"{file} must exist as {path / MANIFEST} lists it, got nothing; remove {path} and rerun")
    if (size := file.stat().st_size) != expected["bytes"]:
        raise Damaged(
            f"{file} must have {expected['bytes']} bytes, got {size}; it was cut or changed: "
            f"remove {path} and rerun the stage"
        )
    digest = None if full else _known_sha256(file)
    if digest is None:
        before = _state(file)
        _remember(file, before, digest := file_sha256(file))
    if digest != expected["sha256"]:
        raise Damaged(
            f"{file} must have sha256 {expected['sha256'][:12]}..., got {digest[:12]}...; it was damaged or "
            f"changed: remove {path} and rerun the stage"
        )


def _state(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _known_sha256(file: Path) -> str | None:
    """The hash of a file that a process of this tree has read since it last changed."""
    global _known_read
    key, state = str(file.resolve()), _state(file)
    if _known.get(key, [])[:4] != state and _KNOWN_FILE in os.environ:
        with _known_lock, suppress(OSError), _shared("rb") as stream:
            stream.seek(_known_read)
            for line in stream:
                if not line.endswith(b"\n"):
                    break  # being written
                _known_read += len(line)
                with suppress(ValueError):
                    name, *values = json.loads(line)
                    _known[name] = values
    entry = _known.get(key, [])
    return entry[4] if entry[:4] == state else None


def _remember(file: Path, state: list[int], digest: str) -> None:
    """Keep a hash for this process and those that it starts, in a file in memory that the environment names.

    It ends with the process that made it: nothing is left on disk, and a hash is not trusted by a later tree.
    """
    if time.time_ns() - state[1] < _RACY_SECONDS * 1e9:
        return
    key = str(file.resolve())
    _known[key] = [*state, digest]
    with _known_lock, suppress(OSError):
        if _KNOWN_FILE not in os.environ:
            if not hasattr(os, "memfd_create"):  # Python as some distributors ship it: each process hashes for itself
                return
            os.environ[_KNOWN_FILE] = f"/proc/{os.getpid()}/fd/{os.memfd_create(_MEMFD)}"
        with _shared("ab") as stream:
            stream.write(json.dumps([key, *state, digest]).encode() + b"\n")


@contextmanager
def _shared(mode: str) -> Iterator[IO[bytes]]:
    """The process tree's file; FileNotFoundError once its maker has ended, even if its number is another's by now."""
    with open(os.environ[_KNOWN_FILE], mode) as stream:
        if _MEMFD not in os.readlink(f"/proc/self/fd/{stream.fileno()}"):
            raise FileNotFoundError(os.environ[_KNOWN_FILE])
        yield stream


def seal(
    path: str | Path,
    *,
    kind: str,
    provenance: Mapping[str, Any] | None = None,
    counts: Mapping[str, Any] | None = None,
    hashes: Mapping[str, str] | None = None,
) -> Manifest:
    """Hash and flush every file below ``path``, put them in place and write the manifest last.

    Sealed sub-directories (shards) are represented by their own manifests. Hidden files (locks, temporaries) and
    journals (``*.journal``) are not part of the sealed content.

    Args:
        path: What ``writing`` gave: the files move up into the directory that it was asked for. Or that directory,
            for what its shards and other writers have put in place already.
        kind: The stage.
        provenance: What made it.
        counts: The books.
        hashes: sha256 of files that were hashed as they were written.

    Raises:
        UserError: Another process has taken the directory over, a file of it is a link, or one that was hashed is not
            there.
    """
    path = Path(path)
    out = path.parent if path.name == PART else path
    files: dict[str, dict[str, Any]] = {}
    given = dict(hashes or {})
    for file in sorted(_content(path, path)):
        if file.is_symlink():
            raise UserError(link_in_words(file))
        fsync_path(file)
        name = str(file.relative_to(path))
        digest = given.pop(name, "") or file_sha256(file)
        files[name] = {"sha256": digest, "bytes": file.stat().st_size}
    if given:
        raise UserError(
            f"{out} must be on a file system that all processes share, got no {min(given)} here, which one wrote; give "
            "another directory"
        )
    for directory in {(path / name).parent for name in files} | {path}:
        fsync_path(directory)
    check_lock(out)
    if path != out:
        for entry in sorted(path.iterdir()):
            os.rename(entry, out / entry.name)
        path.rmdir()
        fsync_path(out)
    for name, entry in files.items():
        _remember(out / name, _state(out / name), entry["sha256"])
    manifest = Manifest(kind=kind, provenance=dict(provenance or {}), counts=dict(counts or {}), files=files)
    write_atomic(out / MANIFEST, _render(manifest))
    fsync_path(out.parent)
    return _parse(out)


def _content(root: Path, directory: Path) -> Iterator[Path]:
    for entry in directory.iterdir():
        hidden = entry.name.startswith(".") and entry.name != ".metadata"  # that one is a dist checkpoint's index
        if hidden or entry.suffix == ".journal" or (directory == root and entry.name == MANIFEST):
            continue
        if entry.is_dir() and not entry.is_symlink():
            if is_sealed(entry):
                yield entry / MANIFEST
            else:
                yield from _content(root, entry)
        else:
            yield entry


@contextmanager
def writing(path: str | Path, *, resume: bool = False) -> Iterator[Path]:
    """Hold the writer's lock of an unsealed directory; the caller calls ``seal`` inside, with what this gives.

    Args:
        path: Directory to write. Content without a manifest is a killed attempt's: it is removed unless ``resume``.
        resume: Keep what an earlier attempt left (the stage knows how to go on from it).

    Returns:
        Where to write: a hidden directory, whose content ``seal`` puts in place; with ``resume`` the directory itself.

    Raises:
        UserError: Another process is writing it, it is sealed already, or a part of its run is a link.
    """
    path = Path(path)
    refuse_links_beside(path)
    path.mkdir(parents=True, exist_ok=True)
    with hold_lock(path):
        if is_sealed(path):
            raise UserError(f"{path} must not be sealed yet, got a finished stage; remove it to make it anew")
        if resume:
            yield path
            return
        for entry in path.iterdir():
            if entry.name != LOCK:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        part = path / PART
        part.mkdir()
        yield part
        with suppress(OSError):
            part.rmdir()  # of a caller that wrote into the directory itself
