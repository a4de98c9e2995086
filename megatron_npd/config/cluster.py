"""On which nodes a run computes."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

from megatron_npd.choices import LauncherName
from megatron_npd.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The nodes of a run. Each starts the same command with the same recipe, and its own ``node_rank``; with launcher
    ray the command is started once."""

    nnodes: int = 1
    """Nodes: the first train_nodes annotate and train, the others run the rollout servers; with take_turns all nodes
    may do all of it, one after another; 1 does all of it here."""
    node_rank: int = 0
    """Number of this node, from 0."""
    train_nodes: int = 0
    """Nodes that annotate and train; 0: all of them, with take_turns, or running servers given by rollout.urls."""
    nproc_per_node: int = 1
    """Processes of the teacher's and trainer's stages on each of these nodes, usually one per device."""
    master_addr: str = "localhost"
    """First node's name or address, as the others reach it."""
    master_port: int = 29500
    """Port of the first torchrun on the first node; each later one, and one that is taken, goes to the next."""
    server_host: str = ""
    """Name or address on which this node's servers listen; empty: the node's own name."""
    server_port: int = 8100
    """Port of the first server of a node; the others follow."""
    attempt: str = ""
    """Name of this start, the same on every node and new at each start; needed with several nodes."""
    launcher: LauncherName = "torchrun"
    """What starts processes on the nodes: npd run on each and torchrun there, or a Ray cluster that runs already: it
    places them, finds master_addr and the servers' hosts, and needs no node_rank and no attempt."""

    def __post_init__(self) -> None:
        for name in ("nnodes", "nproc_per_node", "master_port", "server_port"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}; give a positive number")
        if not 0 <= self.node_rank < self.nnodes:
            raise UserError(
                f"node_rank must be from 0 to nnodes - 1 ({self.nnodes - 1}), got {self.node_rank}; give each its own"
            )
        if not 0 <= self.train_nodes <= self.nnodes:
            raise UserError(
                f"train_nodes must be from 0 to nnodes ({self.nnodes}), got {self.train_nodes}; the rest serves"
            )
        if self.launcher == "ray":
            if self.nnodes == 1:
                raise UserError("nnodes must be at least 2 with launcher ray, got 1; one node needs no Ray")
            return
        if self.nnodes > 1 and not self.attempt:
            raise UserError("attempt must be the same on every node and new at each start, got none; give one")
        if "/" in self.attempt or self.attempt.startswith("."):
            raise UserError(f"attempt must be a plain name, got {self.attempt}; a number will do")
        if self.training_nodes > 1 and self.master_addr in ("localhost", "127.0.0.1", "::1"):
            raise UserError(
                f"master_addr must be the first node's name or address as the others reach it, got {self.master_addr}"
                "; give it"
            )

    def host_name(self) -> str:
        """Name or address on which this node's servers listen.

        Raises:
            UserError: It is this node's own name, and here alone it means this node.
        """
        if self.server_host:
            return self.server_host
        name = socket.gethostname()
        if ipaddress.ip_address(socket.gethostbyname(name)).is_loopback:
            raise UserError(
                f"server_host must be this node's name or address as the others reach it, got {name}, here its "
                "loopback; give it"
            )
        return name

    @property
    def serves(self) -> bool:
        """Whether this node runs rollout servers for the others."""
        return self.node_rank >= self.training_nodes

    @property
    def training_nodes(self) -> int:
        """Nodes that annotate and train."""
        return self.train_nodes or self.nnodes

    @property
    def world_size(self) -> int:
        """Processes of the teacher's and trainer's stages, over all nodes."""
        return self.training_nodes * self.nproc_per_node

    @property
    def alone(self) -> bool:
        """Whether a stage that needs ranks may compute in the runner's process."""
        return self.world_size == 1 and self.launcher == "torchrun"
