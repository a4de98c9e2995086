"""Run a function in several processes over gloo, for the tests of everything parallel.

The processes fork from a server that has imported torch and megatron-core once (each would spend ten seconds on that
otherwise) and never ran a kernel, so no thread is lost in the fork.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 500.0) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` in ``world_size`` processes joined by gloo.

    Args:
        fn: A function at the top level of its module.
        world_size: Number of processes.
        args: Further arguments; they are pickled, as are the results.
        timeout: Seconds until the processes are stopped and the call fails.

    Returns:
        The results by rank.

    Raises:
        AssertionError: A process failed, died or hung; the message holds the first failure's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _context.Process(target=_worker, args=(fn, rank, world_size, folder, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, Path(folder), time.monotonic() + timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [pickle.loads((Path(folder) / f"result{rank}").read_bytes()) for rank in range(world_size)]


def _wait(processes: list[Any], folder: Path, deadline: float) -> None:
    while any(process.exitcode != 0 for process in processes):
        codes = [process.exitcode for process in processes]
        if any(codes):
            # The first to fail is the cause; the others lose their connection to it.
            failures = sorted(folder.glob("failure*"), key=lambda path: path.stat().st_mtime_ns)
            text = failures[0].read_text() if failures else "no traceback"
            raise AssertionError(f"a process failed (exit codes {codes}): {text}")
        assert time.monotonic() < deadline, "the processes must end in time, got no answer"
        time.sleep(0.02)


def _worker(fn: Callable[..., Any], rank: int, world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    from tests import preload  # noqa: F401  (nothing left to do where the server could import it)

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        result = fn(rank, world_size, *args)
        (Path(folder) / f"result{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"failure{rank}").write_text(f"rank {rank}\n{traceback.format_exc()}")
        os._exit(1)
