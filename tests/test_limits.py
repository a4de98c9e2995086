"""More connections than the soft limit of open files allows, and memory of a job that may not use the machine's."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_npd.config.settings import RolloutConfig
from megatron_npd.limits import free_memory
from megatron_npd.serving.pool import Request, ServerPool
from tests.serving.fake import FakeServer

COUNT = 60


def test_the_soft_limit_is_raised_for_the_requests_of_a_pool() -> None:
    """All of them are in flight at once, and none is answered before."""
    together = threading.Barrier(COUNT, timeout=60)

    def trouble(body: dict[str, Any]) -> None:
        if body["sampling_params"]["max_tokens"] > 1:
            together.wait()

    requests = [Request(key=key, token_ids=[3, 4], max_tokens=8, stop_ids=[2], seed=key) for key in range(COUNT)]
    keys: list[int] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with FakeServer() as server:
        server.trouble = trouble
        pool = ServerPool([server.url], RolloutConfig(concurrency=COUNT))
        opened = len(list(Path("/proc/self/fd").iterdir()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + COUNT, hard))  # too few for both ends
        try:
            pool.run(requests, lambda request, answer: keys.append(request.key))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sorted(keys) == list(range(COUNT))


def test_a_hard_limit_that_is_too_low_is_named() -> None:
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))\n"
        "from megatron_npd.limits import allow_connections; allow_connections(2048)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "for 2048 requests in flight, got 200 (ulimit -Hn); lower concurrency" in done.stderr.splitlines()[-1]


def test_the_limit_is_raised_no_further_than_needed() -> None:
    program = (
        "import resource; hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))\n"
        "from megatron_npd.limits import allow_connections; allow_connections(100)\n"
        "first = resource.getrlimit(resource.RLIMIT_NOFILE); allow_connections(1)\n"
        "print(*first, hard, *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    soft, hard, before, again, _ = map(int, done.stdout.split())
    assert 164 <= soft <= 600
    assert hard == before
    assert again == soft


GIB = 2**30


def write_group(group: Path, limit: str, stat: str, *, version: int) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / ("memory.max" if version == 2 else "memory.limit_in_bytes")).write_text(f"{limit}\n")
    (group / "memory.stat").write_text(stat)


@pytest.mark.parametrize("version", [1, 2])
def test_a_job_may_not_use_the_memory_of_its_machine(tmp_path: Path, version: int) -> None:
    """The limit is set above this process's own group, as Slurm does it; what the page cache holds is free."""
    groups, root = tmp_path / "cgroup", tmp_path / "root"
    groups.write_text("0::/job/step\n" if version == 2 else "5:cpu:/other\n4:hugetlb,memory:/job/step\n1:name=x:/\n")
    mount = root if version == 2 else root / "memory"
    used = ("anon {}\nfile 9\nshmem {}\n", "total_cache 9\ntotal_rss {}\ntotal_shmem {}\n")[version == 1]
    write_group(
        mount / "job" / "step", "max" if version == 2 else str(2**63 - 4096), used.format(5, 6), version=version
    )
    write_group(mount / "job", str(GIB), used.format(GIB // 2, GIB // 8), version=version)
    assert free_memory(groups, root) == GIB * 3 // 4 - GIB // 2 - GIB // 8


def test_without_control_groups_it_is_the_machine_s(tmp_path: Path) -> None:
    memory = psutil.virtual_memory()
    (tmp_path / "cgroup").write_text("0::/somewhere\n")
    for groups in ("none", "cgroup"):  # other processes take and give memory meanwhile
        assert free_memory(tmp_path / groups, tmp_path) == pytest.approx(memory.available - memory.total // 4, abs=GIB)
