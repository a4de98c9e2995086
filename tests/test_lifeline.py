"""Processes end with the one that started them: real kills, of real processes and a real torchrun."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_npd.config.cluster import ClusterConfig
from megatron_npd.pipeline.launch import command_line

STARTER = """
import subprocess, sys
from megatron_npd.lifeline import child_environment
subprocess.run(sys.argv[1:], env=child_environment())
"""
CONTROLLER = """
import sys
from megatron_npd.config.cluster import ClusterConfig
from megatron_npd.pipeline import launch

launch.command_line = lambda *_: [sys.executable, *sys.argv[1:]]
with launch.Launcher(ClusterConfig()) as launcher:
    launcher.start("train", {})
    launcher.start("annotate", {}).wait()
"""
COMMAND = """
import os, sys, time
from megatron_npd.log import run_main

def main():
    open(sys.argv[1], "w").write(f"{os.getpid()}\\n")
    time.sleep(600)

run_main(main)
"""
RANK = """
import os, sys, time
from megatron_npd.platform import get_platform
from megatron_npd.platform.initialize import initialize_distributed

get_platform("cpu")
initialize_distributed()
open(sys.argv[1], "w").write(f"{os.getpid()}\\n")
time.sleep(600)
"""
POOL = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from megatron_npd.store.preprocess import _begin_worker

def work(path):
    open(path, "w").write(f"{os.getpid()}\\n")
    time.sleep(600)

if __name__ == "__main__":
    with ProcessPoolExecutor(2, get_context("spawn"), _begin_worker, (os.getpid(),)) as pool:
        list(pool.map(work, sys.argv[1:] * 2))
"""
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a command; what is left of it when a test fails is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: object, **environment: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([str(part) for part in command], env=os.environ | environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Callable[[int], list[psutil.Process]]]:
    """Waits for the processes that write their number to ``tmp_path / "pids"``; none of them outlives the test."""
    fifo, seen = tmp_path / "pids", []
    os.mkfifo(fifo)

    with open(fifo, "rb+", buffering=0) as stream:

        def wait(count: int) -> list[psutil.Process]:
            new = [psutil.Process(int(stream.readline())) for _ in range(count)]
            seen.extend(new)
            return new

        yield wait
    for process in seen:
        if process.is_running():
            process.kill()


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def have_ended(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=60)[1]


def test_the_trainer_and_a_stage_end_with_the_runner(tmp_path: Path, start: Start, pids: Callable) -> None:
    command = script(tmp_path / "command.py", COMMAND)
    controller = start(sys.executable, "-c", CONTROLLER, command, tmp_path / "pids")
    children = pids(2)
    controller.kill()
    assert have_ended(children)


def test_the_processes_of_a_pool_end_with_its_owner(tmp_path: Path, start: Start, pids: Callable) -> None:
    owner = start(sys.executable, script(tmp_path / "pool.py", POOL), tmp_path / "pids")
    workers = pids(2)
    owner.kill()
    assert have_ended(workers)


@pytest.mark.parametrize("alive", [True, False])
def test_a_command_whose_starter_is_gone_does_not_begin(tmp_path: Path, start: Start, alive: bool) -> None:
    """Whether its number is free or another process's by now."""
    other = start("sleep", "600")
    if not alive:
        other.kill()
        other.wait()
    command = script(tmp_path / "command.py", COMMAND)
    orphan = start(sys.executable, command, tmp_path / "pids", MEGATRON_NPD_STARTER=str(other.pid))
    assert orphan.wait() == -signal.SIGTERM
    assert not (tmp_path / "pids").exists()


@pytest.mark.parametrize("killed", ["controller", "torchrun"])
def test_ranks_and_torchrun_end_together(tmp_path: Path, start: Start, pids: Callable, killed: str) -> None:
    """kill -9 of the runner or of torchrun alone leaves no rank, no torchrun and no file in /tmp."""
    (tmp_path / "tmp").mkdir()
    torchrun_alone = command_line(ClusterConfig(nproc_per_node=2), "train", {})[: -len(("-m", "megatron_npd", "train"))]
    command = [*torchrun_alone, script(tmp_path / "rank.py", RANK), tmp_path / "pids"]
    starter = start(sys.executable, "-c", STARTER, *command, TMPDIR=str(tmp_path / "tmp"), OMP_NUM_THREADS="1")
    ranks = pids(2)
    torchrun = ranks[0].parent()
    assert torchrun.ppid() == starter.pid
    (starter if killed == "controller" else torchrun).kill()
    assert have_ended([*ranks, torchrun])
    assert not list((tmp_path / "tmp").iterdir())


def test_a_rank_that_waits_for_its_peers_ends_with_its_agent(tmp_path: Path, start: Start) -> None:
    rank = script(tmp_path / "rank.py", RANK)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # in place of torchrun's store
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(silent.getsockname()[1])}
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        environment |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        run = "import subprocess, sys; subprocess.run(sys.argv[1:])"
        agent = start(sys.executable, "-c", run, sys.executable, rank, tmp_path / "pids", **environment)
        with silent.accept()[0]:
            ranks = psutil.Process(agent.pid).children()
            assert len(ranks) == 1
            agent.kill()
            assert have_ended(ranks)


def test_torchrun_that_waits_for_another_node_ends_with_its_starter(tmp_path: Path, start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # in place of the first node's store
        where = ("--master-addr", "127.0.0.1", "--master-port", silent.getsockname()[1])
        torchrun = (sys.executable, "-m", "megatron_npd.torchrun", "--nnodes", 2, "--node-rank", 1, *where)
        starter = start(sys.executable, "-c", STARTER, *torchrun, "rank.py")
        with silent.accept()[0]:
            children = psutil.Process(starter.pid).children()
            assert len(children) == 1
            starter.kill()
            assert have_ended(children)
