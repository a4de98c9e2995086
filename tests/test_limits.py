"""More connections than the soft limit of open files allows."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from megatron_npd.config.settings import RolloutConfig
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
