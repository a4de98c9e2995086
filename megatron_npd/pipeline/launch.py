"""Starts the commands that need ranks of a model: as one process, under torchrun here, or on several nodes together."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import ModuleType
from typing import Any

from megatron_npd.choices import LauncherName
from megatron_npd.config.cluster import ClusterConfig
from megatron_npd.config.command_line import command_flags
from megatron_npd.errors import UserError
from megatron_npd.lifeline import child_environment
from megatron_npd.pipeline.nodes import END, Call, Nodes
from megatron_npd.serving.access import read_token
from megatron_npd.stoppable import Stopped, check_stop

_POLL_SECONDS = 0.05
SERVE = "serve"  # the command that is one process per node, whatever ranks there are
_LOOKS = 10  # of ``nodes.POLL_SECONDS`` each
STOP_SECONDS = {"train": 600.0}  # it saves before it ends
_STOP_SECONDS = 60.0  # of others


def command_line(cfg: ClusterConfig, command: str, fields: Mapping[str, Any], port: int = 0) -> list[str]:
    """What this node starts for one of our commands; every training node starts its own part.

    Args:
        cfg: The nodes.
        command: Of ``python -m megatron_npd``.
        fields: Its configuration, flat.
        port: Of the first node, where the nodes meet for this command; 0: its ``master_port``.
    """
    if cfg.world_size == 1 or command == SERVE:
        return _one_process(command, fields)
    if cfg.training_nodes == 1:
        where = ["--standalone"]
    else:
        where = ["--nnodes", str(cfg.training_nodes), "--node-rank", str(cfg.node_rank)]
        where += ["--master-addr", cfg.master_addr, "--master-port", str(port or cfg.master_port)]
    torchrun = [sys.executable, "-m", "megatron_npd.torchrun", *where, "--nproc-per-node", str(cfg.nproc_per_node)]
    return [*torchrun, *_one_process(command, fields)[1:]]


def _one_process(command: str, fields: Mapping[str, Any]) -> list[str]:
    return [sys.executable, "-m", "megatron_npd", command, *command_flags(fields)]


class Job:
    """This node's processes of one command.

    Args:
        command: Of ``python -m megatron_npd``.
        line: How it is started here.
        call: What the other nodes start their parts for, if there are any.
        nodes: The way to them, from the first node.
        told: Whether it reads what ``tell`` says, rather than this process's standard input.
    """

    def __init__(
        self,
        command: str,
        line: list[str],
        call: Call | None = None,
        nodes: Nodes | None = None,
        *,
        told: bool = False,
    ) -> None:
        self.command, self.call, self._nodes = command, call, nodes
        self.looks = 0  # at its failure
        stdin = subprocess.PIPE if told else None
        self._process = subprocess.Popen(line, env=child_environment(), stdin=stdin, text=True)

    def running(self) -> bool:
        """Whether it has still to end.

        Raises:
            UserError: It has failed.
        """
        code = self._process.poll()
        if code:
            raise UserError(f"{self.command} must exit with 0, got {code}; see its messages above, then run again")
        return code is None

    def tell(self, line: str) -> None:
        """Give it a line on its standard input, at whose end an annotator ends."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # ``running`` says what became of it
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def tell_end(self) -> None:
        """Say that there is nothing more to tell."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def wait(self, done: Callable[[], bool] = lambda: False) -> None:
        """Wait for its end, or until something is done; in a thread that is asked to stop, it is ended, on all nodes.

        Raises:
            UserError: It failed.
        """
        try:
            while self.running() and not done():
                check_stop()
                time.sleep(_POLL_SECONDS)
        except Stopped:
            self.end()
            raise

    def end(self) -> None:
        """End it, on all nodes."""
        if self._nodes is not None and self.call is not None:
            self._nodes.end(self.call)  # before this part: without it the others would fail
        self.stop()

    def ask_to_stop(self) -> None:
        """Send it SIGTERM, if it has not ended; a trainer saves first."""
        if self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        """End this node's part, if it has not ended."""
        self.ask_to_stop()
        try:
            self._process.wait(STOP_SECONDS.get(self.command, _STOP_SECONDS))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Launcher:
    """Starts commands of a run, from any thread; a context, which ends those that still run.

    Args:
        cfg: The nodes.
        nodes: The way to the other nodes, where there are any.
    """

    def __init__(self, cfg: ClusterConfig, nodes: Nodes | None = None) -> None:
        self.cfg, self.nodes = cfg, nodes
        self._jobs: list[Job] = []

    def given(self) -> tuple[tuple[str, ...], str] | None:
        """URLs and token of the rollout servers that other nodes run; None: there are no such nodes."""
        if self.nodes is None or self.cfg.training_nodes == self.cfg.nnodes:
            return None
        return self.nodes.urls(), read_token(self.nodes.token_file)

    def start(self, command: str, fields: Mapping[str, Any], *, told: bool = False) -> Job:
        """Start a command on all training nodes; the other nodes follow (``follow``); ``told``: as ``Job`` has it."""
        call = self.nodes.call(command, fields) if self.nodes else None
        self._jobs.append(job := self._job(command, fields, call, told=told))
        return job

    def serve(self, fields: Mapping[str, Any]) -> tuple[Job, tuple[str, ...]]:
        """Start rollout servers on all training nodes (``npd serve``); their job, and their URLs once all answer.

        Raises:
            UserError: They did not start, on this node.
        """
        assert self.nodes is not None
        job = self.start(SERVE, dict(fields) | {"token_file": str(self.nodes.token_file)})
        assert job.call is not None
        while (urls := self.nodes.urls_of(job.call)) is None:
            if not job.running():
                raise UserError(f"{SERVE} must run until it is ended, got its end; see its messages above")
            check_stop()
            time.sleep(_POLL_SECONDS)
        return job, urls

    def _job(self, command: str, fields: Mapping[str, Any], call: Call | None, *, told: bool = False) -> Job:
        if command == SERVE:
            assert self.nodes is not None and call is not None
            rank, cfg = self.cfg.node_rank, self.cfg
            own = {"host": cfg.host_name(), "port": cfg.server_port, "urls_file": self.nodes.urls_file(rank, call)}
            fields = dict(fields) | own | {"log_dir": f"{fields['log_dir']}/node-{rank}"}
        line = command_line(self.cfg, command, fields, call.port if call else 0)
        return Job(command, line, call, self.nodes, told=told)

    def follow(self) -> None:
        """Start this node's part of whatever the first node starts, until that has finished the run.

        Raises:
            UserError: A command failed, here or on another node.
        """
        assert self.nodes is not None
        for call in self.nodes.calls():
            if call is not None and call.command == END:
                for job in [job for job in self._jobs if job.call and job.call.number == call.fields["number"]]:
                    job.stop()
                    self._jobs.remove(job)
                self.nodes.ended(call)
            elif call is not None:
                self._jobs.append(self._job(call.command, call.fields, call))
            self._jobs = [job for job in self._jobs if self._still_running(job)]
        for job in self._jobs:
            job.wait()

    def _still_running(self, job: Job) -> bool:
        """``job.running``; a failure counts once no word has come that the command is to end, as it has elsewhere."""
        try:
            return job.running()
        except UserError:
            job.looks += 1
            if job.looks > _LOOKS:
                raise
            return True

    def ask_to_stop(self) -> None:
        """Ask what was started on this node to end; whoever leaves the context waits for it."""
        for job in self._jobs:
            job.ask_to_stop()

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.ask_to_stop()
        for job in self._jobs:
            job.stop()


def ray_launcher() -> ModuleType:
    """The module that launches on Ray, which nothing but this imports.

    Raises:
        UserError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            "launcher ray must go with the package ray, got none installed; pip install 'megatron-npd[ray]'"
        )
    from megatron_npd.pipeline import launch_ray

    return launch_ray


LAUNCHERS: dict[LauncherName, Callable[[ClusterConfig, Nodes | None], Launcher]] = {
    "torchrun": Launcher,
    "ray": lambda cfg, _: ray_launcher().RayLauncher(cfg),
}
