"""The operating system's limits: on open files, raised where a process needs more, and on memory, for users' data."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from megatron_npd.errors import UserError


def allow_connections(count: int) -> None:
    """Make room for ``count`` connections beside the files that are open: the usual soft limit is 1024.

    Raises:
        UserError: The hard limit is too low for them.
    """
    wanted = count + len(os.listdir("/proc/self/fd")) + 64  # libraries and logs open a few more
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted or soft == resource.RLIM_INFINITY:
        return
    if hard < wanted and hard != resource.RLIM_INFINITY:
        raise UserError(
            f"the limit of open files must be at least {wanted} for {count} requests in flight, got {hard} (ulimit "
            "-Hn); lower concurrency, or have the limit raised (limits.conf, or LimitNOFILE of Slurm's daemon)"
        )
    # Not to the hard limit: it is 1e9 in some containers, and children that close all files below it take minutes.
    enough = 2 * wanted if hard == resource.RLIM_INFINITY else min(2 * wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


@contextmanager
def memory_growth(num_bytes: int) -> Iterator[None]:
    """Within it, the process grows by so many bytes at most: what asks for more gets a ``MemoryError``."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    ours = min(limit for limit in (used + num_bytes, soft, hard) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (ours, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def free_memory(groups: str | Path = "/proc/self/cgroup", root: str | Path = "/sys/fs/cgroup") -> int:
    """Bytes that can be used while a quarter of the memory stays free: the machine's, or a control group's.

    Args:
        groups: The control groups of this process, as the kernel lists them, of either version.
        root: Where they are mounted. A limit of any group above counts: Slurm sets a job's and a step's.
    """
    memory = psutil.virtual_memory()
    free = memory.available - memory.total // 4
    for limit, used in _limits(Path(groups), Path(root)):
        free = min(free, limit * 3 // 4 - used)
    return free


def _limits(groups: Path, root: Path) -> Iterator[tuple[int, int]]:
    """Limits of this process's control groups and what their processes use, without the page cache."""
    lines = groups.read_text().splitlines() if groups.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers:
            mount, limit, used = root, "memory.max", ("anon", "shmem")
        elif "memory" in controllers.split(","):
            mount, limit, used = root / "memory", "memory.limit_in_bytes", ("total_rss", "total_shmem")
        else:
            continue
        group = mount / path.lstrip("/")
        while mount in (group, *group.parents):
            with suppress(OSError, ValueError, KeyError):  # not of this mount, or without a limit ("max")
                most = int((group / limit).read_text())
                numbers = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield most, sum(int(numbers[name]) for name in used)
            group = group.parent
