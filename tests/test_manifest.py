"""Sealed directories: order of writing, one writer, verification, hostile names."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_npd import lock, manifest
from megatron_npd.errors import UserError
from megatron_npd.lock import LOCK, hold_lock
from megatron_npd.manifest import (
    MANIFEST,
    PART,
    file_inside,
    is_sealed,
    read_manifest,
    seal,
    unlisted,
    writing,
)
from megatron_npd.pipeline.runner import _run_lock
from megatron_npd.quarantine import in_words
from tests.helpers import failing

_fork = multiprocessing.get_context("forkserver")


def make(path: Path, **files: str) -> Path:
    with writing(path) as directory:
        for name, text in (files or {"a": "one", "b": "two"}).items():
            (directory / name).write_text(text)
        seal(directory, kind="things", provenance={"k": 10, "tau": 0.3}, counts={"in": 2, "kept": 2})
    return path


def age(path: Path) -> None:
    """Make files look as if they had not changed for a while, so that their hashes are kept."""
    for file in path.rglob("*"):
        os.utime(file, (1e9, 1e9))


def rewrite(path: Path, **changes: Any) -> None:
    """Change a manifest as an attacker would: consistent in itself."""
    fields = json.loads((path / MANIFEST).read_text())
    del fields["sha256"]
    (path / MANIFEST).write_text(manifest._render(manifest.Manifest(**(fields | changes))))


def test_what_was_set_aside_in_words() -> None:
    assert in_words({}) == "nothing quarantined"
    assert in_words({"duplicate": 1}) == "duplicates merged: 1"
    assert in_words({"timeout": 2, "duplicate": 1, "bad": 3}) == "quarantined: 3 bad, 2 timeout; duplicates merged: 1"


def test_files_are_written_hidden_and_appear_flushed_with_the_manifest_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def note(name: str, real: Any) -> Any:
        def call(*args: Any) -> Any:
            target = args[-1] if isinstance(args[-1], str | Path) else os.readlink(f"/proc/self/fd/{args[0]}")
            events.append(f"{name} {Path(target).relative_to(tmp_path)}")
            return real(*args)

        return call

    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, note(name, getattr(os, name)))
    out = make(tmp_path / "out")
    assert events == [
        "fsync out/.part/a",
        "fsync out/.part/b",
        "fsync out/.part",
        "rename out/a",
        "rename out/b",
        "fsync out",
        "fsync out/.manifest.json.tmp",
        "replace out/manifest.json",
        "fsync out",
        "fsync .",
    ]
    assert sorted(entry.name for entry in out.iterdir()) == [LOCK, "a", "b", MANIFEST]


def test_a_failed_attempt_leaves_nothing_behind_for_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), writing(out) as directory:
        (directory / "a").write_text("half")
        (directory / "old").write_text("half")
        raise RuntimeError
    (out / "renamed").write_text("by an attempt that died while renaming")
    assert not is_sealed(out)
    assert set(read_manifest(make(out)).files) == {"a", "b"}
    with pytest.raises(UserError, match="must not be sealed yet"), writing(out):
        pass


def test_what_is_sealed_is_read_and_what_is_not_listed_is_seen(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    read = read_manifest(out, kind="things")
    assert read.files["a"] == {"bytes": 3, "sha256": manifest.file_sha256(out / "a")}
    assert (read.counts["in"], read.provenance["tau"], unlisted(out, read)) == (2, 0.3, [])
    (out / "extra").write_text("")
    (out / "deep").mkdir()
    (out / "deep" / ".metadata").write_text("")
    assert unlisted(out, read) == ["deep/.metadata", "extra"]
    with pytest.raises(UserError, match="must hold stuff, got things"):
        read_manifest(out, kind="stuff")


def test_any_change_of_a_file_or_manifest_is_refused(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    for name in ("a", MANIFEST):
        whole = (out / name).read_bytes()
        for position in range(len(whole)):
            for bit in range(8):
                damaged = bytearray(whole)
                damaged[position] ^= 1 << bit
                (out / name).write_bytes(damaged)
                with pytest.raises(UserError, match=f"{name} must|schema version"):
                    read_manifest(out)
            (out / name).write_bytes(whole[:position])
            with pytest.raises(UserError, match=f"{name} must"):
                read_manifest(out)
        (out / name).write_bytes(whole)
        assert read_manifest(out)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{}", "[" * 100_000, "\xff", '{"kind": 1, "schema_version": 2}', '{"schema_version": 1}'],
)
def test_what_is_no_manifest_is_refused_in_words(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"must be a whole manifest|schema version"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("entry", [None, {}, {"bytes": 3}, {"bytes": "3", "sha256": ""}, {"bytes": True, "sha256": ""}])
def test_an_entry_of_another_form_is_refused(tmp_path: Path, entry: Any) -> None:
    out = make(tmp_path / "out")
    rewrite(out, files={"a": entry})
    with pytest.raises(UserError, match="must be a whole manifest, got no sha256 and bytes for a"):
        read_manifest(out)


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "link", "folder/secret", "a/../../secret", "", ".", "..", "a\0b", "x" * 300, "\ud800"],
)
@pytest.mark.parametrize("verify", [True, False])
def test_nothing_outside_the_directory_is_opened(
    tmp_path: Path, name: str, verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text("one")
    out = make(tmp_path / "out")
    (out / "link").symlink_to(tmp_path / "secret")
    (out / "folder").symlink_to(tmp_path)
    rewrite(out, files={name: {"bytes": 3, "sha256": manifest.file_sha256(tmp_path / "secret")}})
    monkeypatch.setattr(manifest, "file_sha256", lambda file: pytest.fail(f"{file} was opened"))
    with pytest.raises(UserError, match="must name files inside"):
        read_manifest(out, verify=verify)


def test_a_run_may_itself_be_reached_through_a_link(tmp_path: Path) -> None:
    out = make(tmp_path / "scratch" / "out")
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    assert read_manifest(tmp_path / "run" / "out") == read_manifest(out)
    assert file_inside(tmp_path / "run", "out/a").read_text() == "one"


def test_a_file_is_hashed_once_in_a_tree_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make(tmp_path / "out")
    age(out)
    hashed: list[str] = []
    real = manifest.file_sha256
    monkeypatch.setattr(manifest, "file_sha256", lambda file: hashed.append(Path(file).name) or real(file))
    for _ in range(2):
        read_manifest(out)
    assert hashed == ["a", "b"]
    manifest._known.clear()  # as in a process started by this one
    monkeypatch.setattr(manifest, "_known_read", 0)
    read_manifest(out)
    assert hashed == ["a", "b"]
    read_manifest(out, full=True)
    assert hashed == ["a", "b", "a", "b"]
    stat = (out / "a").stat()
    (out / "a").write_text("onf")
    os.utime(out / "a", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a change that keeps size and mtime
    with pytest.raises(UserError, match="a must have sha256"):
        read_manifest(out)


def test_hashes_stay_in_a_process_where_python_cannot_share_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.delenv(manifest._KNOWN_FILE, raising=False)
    out = make(tmp_path / "out")
    age(out)
    assert read_manifest(out) == read_manifest(out)
    assert manifest._KNOWN_FILE not in os.environ


def _child(out: Path, pipe: Any) -> None:
    manifest.file_sha256 = lambda file: pipe.send(f"{file} was hashed again")
    try:
        read_manifest(out)
        pipe.send("read")
    except Exception as error:
        pipe.send(repr(error))


def test_a_started_process_trusts_its_parents_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make(tmp_path / "out")
    age(out)
    read_manifest(out)
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(out, theirs))
    process.start()
    assert mine.recv() == "read"
    process.join()
    assert os.environ["MEGATRON_NPD_VERIFIED"].startswith("/proc/")  # nothing that a kill would leave on disk


def test_a_hash_is_never_written_into_a_file_that_took_the_place_of_the_shared_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make(tmp_path / "out")
    age(out)
    with open(tmp_path / "other", "w") as other:  # of a process that has the number of the one that ended
        monkeypatch.setenv("MEGATRON_NPD_VERIFIED", f"/proc/{os.getpid()}/fd/{other.fileno()}")
        read_manifest(out)
    assert not (tmp_path / "other").read_bytes()


def _hold(out: Path, pipe: Any) -> None:
    with writing(out) as directory:
        (directory / "half").write_text("half")
        pipe.send(os.getpid())
        pipe.recv()


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """A process that is writing ``out``."""
    mine, theirs = multiprocessing.Pipe()
    process = _fork.Process(target=_hold, args=(tmp_path / "out", theirs), daemon=True)
    process.start()
    assert mine.recv() == process.pid
    yield process
    process.kill()
    process.join()


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path, holder: Any) -> None:
    with pytest.raises(UserError, match=rf"one writer, got a second one beside process {holder.pid} on .*epoch 1"):
        make(tmp_path / "out")
    assert (tmp_path / "out" / PART / "half").exists()


def test_file_systems_without_locks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    words = rf"{tmp_path} must be on a file system with locks, got 'No locks"
    for take in (hold_lock, _run_lock):
        with pytest.raises(UserError, match=words), take(tmp_path):
            pass


def test_a_dead_writers_lock_is_taken_over(tmp_path: Path, holder: Any) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert json.loads((tmp_path / "out" / LOCK).read_text())["pid"] == holder.pid
    assert set(read_manifest(make(tmp_path / "out")).files) == {"a", "b"}
    assert json.loads((tmp_path / "out" / LOCK).read_text()) == {"epoch": 2}


def test_a_writer_on_another_machine_is_believed_until_its_lock_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    there = {"epoch": 4, "pid": 77, "host": "node7", "boot": "another"}
    (out / LOCK).write_text(json.dumps(there))
    with pytest.raises(UserError, match=rf"process 77 on node7 \(epoch 4\); if that one is gone, remove {out}/.lock"):
        make(out)
    (out / LOCK).write_text(json.dumps({"epoch": 4}))  # released
    make(out)
    for known in ("host", "boot"):  # the same machine after a reboot, or another container on it
        out = tmp_path / known
        out.mkdir()
        (out / LOCK).write_text(json.dumps(there | {known: lock._machine()[known]}))
        make(out)
    (out / LOCK).write_text(json.dumps(there))
    with lock.hold_lock(out, trust_remote_holder=False):  # as the trainer holds it
        assert json.loads((out / LOCK).read_text())["pid"] == os.getpid()


def test_a_requeued_job_takes_over_the_locks_of_its_earlier_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other nodes, without a hand; those of another job, or of its own present start, are believed."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with lock.hold_lock(tmp_path):
        first = json.loads((tmp_path / LOCK).read_text()) | {"host": "node7", "boot": "another"}
    assert (first["job"], first["start"]) == ("7", "0")
    for environment in ({}, {"SLURM_RESTART_COUNT": "1", "SLURM_JOB_ID": "8"}):
        (tmp_path / LOCK).write_text(json.dumps(first))
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            with pytest.raises(UserError, match=r"beside process \d+ on node7"), lock.hold_lock(tmp_path):
                pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with lock.hold_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["epoch"] == 2


@pytest.mark.parametrize("removed", [True, False])
def test_a_writer_that_was_declared_dead_does_not_seal(tmp_path: Path, removed: bool) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"must keep its writer .*got a lock of process 77 on node7"), writing(out) as d:
        (d / "a").write_text("one")
        if removed:
            (out / LOCK).unlink()
        (out / LOCK).write_text(json.dumps({"epoch": 1, "pid": 77, "host": "node7"}))
        seal(d, kind="things")
    assert not is_sealed(out) and not (out / "a").exists()
    assert "node7" in (out / LOCK).read_text()  # which is not ours to release


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[1]", b'{"epoch": "x"}', b"[" * 4096])
def test_a_torn_lock_file_is_no_holder(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).write_bytes(text)
    make(tmp_path / "out")


def test_only_what_may_still_change_unseen_is_hashed_again(tmp_path: Path) -> None:
    """A file changed twice within its clock's tick keeps size and mtime: a young file's hash is not kept."""
    out = make(tmp_path / "out")
    stamp = time.time_ns() + 60 * 10**9  # young for as long as the test takes
    for text in ("one", "onf"):
        (out / "a").write_text(text)
        os.utime(out / "a", ns=(stamp, stamp))
        if text == "one":
            read_manifest(out)
        assert str((out / "a").resolve()) not in manifest._known
