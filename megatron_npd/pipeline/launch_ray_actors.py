"""What a run keeps on the nodes of a Ray cluster: actors for the ranks of a node, for a vLLM server, and the runner.

Ray starts an actor again where it died, maybe on another node. What it had started then ends with it, and is waited for
here: two trainers must not write one checkpoint.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import ray
from ray.util import get_node_ip_address

from megatron_npd.config.run import NPDConfig
from megatron_npd.errors import UserError
from megatron_npd.lifeline import child_environment
from megatron_npd.log import get_logger
from megatron_npd.pipeline.nodes import free_port
from megatron_npd.pipeline.servers import newest_policy, policy_dir
from megatron_npd.run_dir import RunDir, version
from megatron_npd.serving.server import VLLMServer, start_servers

LOST = -9  # in the place of an exit code: the actor that held the process has died
_ACTOR, _PART = "MEGATRON_NPD_RAY_ACTOR", "MEGATRON_NPD_RAY_PART"  # environment: who started a process, and for what
_DEVICES = ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")
_LOOK_SECONDS = 0.5
_END_SECONDS = 20.0  # a server's guard takes some 10 s to end it


def _begin(directory: str) -> bool:
    """Go where the run was started, and mark what this actor starts; whether Ray started the actor again."""
    os.chdir(directory)
    context = ray.get_runtime_context()
    os.environ[_ACTOR] = str(context.get_actor_id())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own use of what it has deprecated
        again = bool(context.was_current_actor_reconstructed)
    if again:
        _end_marked(_ACTOR, os.environ[_ACTOR])
    return again


def _end_marked(name: str, value: str) -> None:
    """Wait until the processes with a mark in their environment have ended; those that do not are killed."""
    until = time.monotonic() + _END_SECONDS
    while marked := [process for process in psutil.process_iter() if _has_mark(process, name, value)]:
        if time.monotonic() > until:
            for process in marked:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        time.sleep(_LOOK_SECONDS / 5)


def _has_mark(process: psutil.Process, name: str, value: str) -> bool:
    try:
        marked = process.environ().get(name) == value
        return marked and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


class Ranks:
    """A node's ranks: its part of each command, as a process of its own.

    Args:
        directory: Where the run was started.
    """

    def __init__(self, directory: str) -> None:
        _begin(directory)
        self._parts: dict[int, subprocess.Popen[str]] = {}

    def devices(self) -> dict[str, str]:
        """The environment by which Ray says which devices are this actor's."""
        return {name: os.environ[name] for name in _DEVICES if name in os.environ}

    def meeting_point(self, port: int) -> tuple[str, int]:
        """This node's address, and the first free port of it from ``port`` on; errors as for ``free_port``."""
        return get_node_ip_address(), free_port(port)

    def start(self, number: int, line: list[str], told: bool) -> None:
        """Start this node's part of a command.

        Args:
            number: By which the part is known from now on.
            line: How it is started, after the interpreter.
            told: Whether it reads what ``tell`` says.
        """
        environment = child_environment() | {_PART: self._mark(number)}
        stdin = subprocess.PIPE if told else subprocess.DEVNULL
        self._parts[number] = subprocess.Popen([sys.executable, *line], env=environment, stdin=stdin, text=True)

    def poll(self, number: int) -> int | None:
        """Exit code of a part; None: it runs."""
        return self._parts[number].poll() if number in self._parts else LOST

    def tell(self, number: int, line: str) -> None:
        """Give a part a line on its standard input; what became of one that is not there, ``poll`` says."""
        if (part := self._parts.get(number)) is not None and part.stdin is not None:
            with suppress(BrokenPipeError):
                part.stdin.write(line + "\n")
                part.stdin.flush()

    def tell_end(self, number: int) -> None:
        """Close a part's standard input."""
        if (part := self._parts.get(number)) is not None and part.stdin is not None:
            with suppress(BrokenPipeError):
                part.stdin.close()

    def stop(self, number: int | None = None) -> None:
        """End a part, or all; at the return no process of it is left."""
        numbers = list(self._parts) if number is None else [number] if number in self._parts else []
        for part in (self._parts[one] for one in numbers):
            if part.poll() is None:
                part.terminate()
        for one in numbers:
            self._parts[one].wait()
            _end_marked(_PART, self._mark(one))  # ranks outlive a torchrun that was killed by some tenths of a second
            del self._parts[one]

    def _mark(self, number: int) -> str:
        return f"{os.environ[_ACTOR]}-{number}"


class Server:
    """One vLLM server with the run's newest policy; where it dies the actor ends, and Ray starts both again.

    Args:
        cfg: The run.
        index: Number of the server.
        token: What every request must carry.
        directory: Where the run was started.
    """

    def __init__(self, cfg: NPDConfig, index: int, token: str, directory: str) -> None:
        again, run = _begin(directory), RunDir(Path(cfg.run_dir))
        self._token, self._stopping = token, threading.Event()
        self._url, self._error = "", ""
        self._server: VLLMServer | None = None

        def serve() -> None:
            newest = newest_policy(run, cfg)
            with VLLMServer(
                policy_dir(run, cfg, newest),
                replace(cfg.rollout, num_servers=1),  # Ray shows it its own devices alone
                host=get_node_ip_address(),
                port=cfg.server_port + index,
                log_dir=run.logs,
                index=index,
                token=token,
            ) as self._server:
                start_servers([self._server], version=version(newest))
                self._url = self._server.url
                while not self._stopping.wait(_LOOK_SECONDS):
                    self._server.check_alive()

        self._thread = threading.Thread(target=self._guarded, args=(serve, again), daemon=True)
        self._thread.start()

    def url(self) -> str:
        """Where it answers; empty: not yet.

        Raises:
            UserError: It could not be started the first time.
        """
        if self._error:
            raise UserError(self._error)
        return self._url

    def token(self) -> str:
        """What every request must carry."""
        return self._token

    def stop(self) -> None:
        """End the server."""
        self._stopping.set()
        if self._server is not None:
            self._server.stop()
        self._thread.join()

    def _guarded(self, serve: Callable[[], None], again: bool) -> None:
        """Serve; where that fails keep the error for the runner, at the first start, or end, for Ray to try again."""
        try:
            serve()
        except Exception as error:  # whatever it is: the runner waits for a word
            if self._stopping.is_set():
                return
            if not again and not self._url:
                self._error = str(error)
                return
            get_logger().warning("%s", error)
            os._exit(1)  # Ray starts again what ended without being asked to


class Runner:
    """The runner of a run. One that Ray starts again goes on where the run was, as running again does."""

    def run(self, cfg: NPDConfig, run: Callable[[NPDConfig], str], devices: dict[str, str], directory: str) -> str:
        """Run it to its end.

        Args:
            cfg: The run.
            run: What does it, once this process has the environment of a node that trains.
            devices: Of that node.
            directory: Where the run was started.
        """
        _begin(directory)
        os.environ |= devices
        return run(cfg)
