"""Starts the commands that need ranks of a model: as one process, under torchrun here, or on several nodes together."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from megatron_npd.config.cluster import ClusterConfig
from megatron_npd.config.command_line import command_flags
from megatron_npd.errors import UserError
from megatron_npd.lifeline import child_environment
from megatron_npd.pipeline.nodes import Nodes


def command_line(cfg: ClusterConfig, command: str, fields: Mapping[str, Any], port: int = 0) -> list[str]:
    """What this node starts for one of our commands; every training node starts its own part.

    Args:
        cfg: The nodes.
        command: Of ``python -m megatron_npd``.
        fields: Its configuration, flat.
        port: Of the first node, where the nodes meet for this command; 0: its ``master_port``.
    """
    program = ["-m", "megatron_npd", command, *command_flags(fields)]
    if cfg.world_size == 1:
        return [sys.executable, *program]
    if cfg.training_nodes == 1:
        where = ["--standalone"]
    else:
        where = ["--nnodes", str(cfg.training_nodes), "--node-rank", str(cfg.node_rank)]
        where += ["--master-addr", cfg.master_addr, "--master-port", str(port or cfg.master_port)]
    torchrun = [sys.executable, "-m", "megatron_npd.torchrun", *where, "--nproc-per-node", str(cfg.nproc_per_node)]
    return [*torchrun, *program]


class Job:
    """This node's processes of one command."""

    def __init__(self, command: str, line: list[str]) -> None:
        self.command = command
        self._process = subprocess.Popen(line, env=child_environment())

    def running(self) -> bool:
        """Whether it has still to end.

        Raises:
            UserError: It has failed.
        """
        code = self._process.poll()
        if code:
            raise UserError(f"{self.command} must exit with 0, got {code}; see its messages above, then run again")
        return code is None

    def wait(self) -> None:
        """Wait for its end.

        Raises:
            UserError: It failed.
        """
        self._process.wait()
        self.running()

    def stop(self) -> None:
        """End it, if it has not ended."""
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()


class Launcher:
    """Starts commands on all training nodes of a run; a context, which ends those that still run.

    Args:
        cfg: The nodes.
        nodes: The way to the other nodes, where there are any.
    """

    def __init__(self, cfg: ClusterConfig, nodes: Nodes | None = None) -> None:
        self.cfg, self.nodes = cfg, nodes
        self._jobs: list[Job] = []

    @property
    def alone(self) -> bool:
        """Whether a stage may compute in this process."""
        return self.cfg.world_size == 1

    def start(self, command: str, fields: Mapping[str, Any]) -> Job:
        """Start a command on all training nodes; the other nodes follow (``follow``)."""
        port = self.nodes.call(command, fields) if self.nodes else 0
        self._jobs.append(job := Job(command, command_line(self.cfg, command, fields, port)))
        return job

    def follow(self) -> None:
        """Start this node's part of whatever the first node starts, until that has finished the run.

        Raises:
            UserError: A command failed, here or on another node.
        """
        assert self.nodes is not None
        for call in self.nodes.calls():
            if call is not None:
                port, command, fields = call
                self._jobs.append(Job(command, command_line(self.cfg, command, fields, port)))
            self._jobs = [job for job in self._jobs if job.running()]
        for job in self._jobs:
            job.wait()

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        for job in self._jobs:
            job.stop()
