"""What the nodes of one start tell one another, through small files under ``attempts/`` of the run.

The first node leads: it writes each command that all training nodes are to start together as ``calls/0000.json``, and
at the end ``done``. A server node writes its servers' addresses. Whoever fails writes ``failed``, whoever is stopped by
a signal ``stopped``, and all others end.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_npd.config.cluster import ClusterConfig
from megatron_npd.durable import write_atomic
from megatron_npd.errors import UserError
from megatron_npd.run_dir import RunDir
from megatron_npd.stoppable import StoppedBySignal, check_stop

END = "end"  # in the place of a command: what an earlier call started is to end
POLL_SECONDS = 0.5
SILENT_SECONDS = 120.0  # a shared file system may show a node's file late


def _text(path: Path) -> str:
    """What a file holds; empty where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def free_port(port: int) -> int:
    """The first port from this one on that nothing on this machine uses, not even to connect to others.

    Raises:
        UserError: There is none.
    """
    for candidate in range(port, 2**16):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", candidate))
            return candidate
    raise UserError(f"master_port must have a free port from it on, got {port}; give a lower one")


@dataclass(frozen=True, kw_only=True)
class Call:
    """A command that all training nodes start together, or (``END``) end.

    Attributes:
        number: In the order of a start's calls.
        command: Of ``python -m megatron_npd``, or ``END``.
        port: Of the first node, where they meet.
        fields: Its configuration, flat; of ``END``: the ``number`` of the call that is ended.
    """

    number: int
    command: str
    port: int
    fields: dict[str, Any]


class Nodes:
    """One node's part in a start of the run; a context, which tells the others when this node fails.

    Args:
        run: The run, on a file system that all nodes share.
        cfg: The nodes.
    """

    def __init__(self, run: RunDir, cfg: ClusterConfig) -> None:
        self.cfg, self.state = cfg, run.attempts / cfg.attempt
        self._failed, self._done, self._calls = self.state / "failed", self.state / "done", 0
        self._stopped = self.state / "stopped"
        self._port, self._calling = cfg.master_port, threading.Lock()
        self._alive, self._silent = self.state / "alive", False
        self._closed = threading.Event()

    def __enter__(self) -> Nodes:
        own = self.state / f"node-{self.cfg.node_rank}"
        own.parent.mkdir(parents=True, exist_ok=True)
        try:
            own.mkdir()
        except FileExistsError:
            raise UserError(
                f"attempt must be new at each start, got {self.cfg.attempt} again; give another on every node"
            ) from None
        threading.Thread(target=self._watch, name="nodes", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._closed.set()
        if kind is not None and issubclass(kind, StoppedBySignal):
            self.tell_stopped()
        elif kind is not None and not self._failed.exists() and not self._stopped.exists():
            write_atomic(self._failed, f"node {self.cfg.node_rank}: {error or kind.__name__}\n")
        elif kind is None and self.cfg.node_rank == 0:
            write_atomic(self._done, "\n")

    def tell_stopped(self) -> None:
        """Tell the other nodes that this one was asked to stop, so that they stop too."""
        write_atomic(self._stopped, "\n")

    @property
    def token_file(self) -> Path:
        """The servers' token of this start."""
        return self.state / "token"

    def announce(self, urls: list[str]) -> None:
        """Tell the first node where this node's servers answer."""
        write_atomic(self.state / f"node-{self.cfg.node_rank}" / "urls", json.dumps(urls))

    def urls(self) -> tuple[str, ...]:
        """The servers of all server nodes, once all have announced theirs."""
        files = [self.state / f"node-{rank}" / "urls" for rank in range(self.cfg.training_nodes, self.cfg.nnodes)]
        while not all(file.exists() for file in files):
            check_stop()
            time.sleep(POLL_SECONDS)
        return tuple(url for file in files for url in json.loads(file.read_text()))

    def urls_file(self, rank: int, call: Call) -> Path:
        """Where a training node says at which URLs its servers answer, which it started for a call."""
        return self.state / f"node-{rank}" / f"urls-{call.number:04d}"

    def urls_of(self, call: Call) -> tuple[str, ...] | None:
        """The servers that all training nodes started for a call; None: not all answer yet."""
        told = [_text(self.urls_file(rank, call)).strip() for rank in range(self.cfg.training_nodes)]
        return tuple(url for urls in told for url in urls.split(",")) if all(told) else None

    def call(self, command: str, fields: Mapping[str, Any]) -> Call:
        """Have all training nodes start a command; they meet at another port of the first node for each."""
        with self._calling:
            port = 0 if command == END else free_port(self._port)
            call = Call(number=self._calls, command=command, port=port, fields=dict(fields))
            path = self.state / "calls" / f"{call.number:04d}.json"
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, json.dumps(asdict(call), default=str))
            self._calls, self._port = call.number + 1, port + 1 if port else self._port
        return call

    def end(self, call: Call) -> None:
        """Have the other training nodes end what they started for a call, and wait until all have, if they live."""
        order, until = self.call(END, {"number": call.number}), time.monotonic() + SILENT_SECONDS
        marks = [self._ended(order, rank) for rank in range(1, self.cfg.training_nodes)]
        over = (self._failed, self._stopped)  # then the others end what they started without a mark
        while not all(mark.exists() for mark in marks) and not any(path.exists() for path in over):
            if time.monotonic() >= until:
                return
            time.sleep(POLL_SECONDS)

    def ended(self, order: Call) -> None:
        """Tell the first node that this one did what ``end`` asked for."""
        write_atomic(self._ended(order, self.cfg.node_rank), "\n")

    def _ended(self, order: Call, rank: int) -> Path:
        return self.state / "calls" / f"{order.number:04d}.node-{rank}"

    def calls(self) -> Iterator[Call | None]:
        """The commands that the first node has started; None: none yet; ends with that node."""
        while True:
            done = self._done.exists()  # asked first: no call comes after it
            path = self.state / "calls" / f"{self._calls:04d}.json"
            if path.exists():
                call = Call(**json.loads(path.read_text()))
                lists = {name: tuple(value) for name, value in call.fields.items() if isinstance(value, list)}
                yield replace(call, fields=call.fields | lists)
                self._calls += 1
            elif done:
                return
            else:
                yield None
                time.sleep(POLL_SECONDS)

    def done(self) -> bool:
        """Whether the first node has finished the run."""
        return self._done.exists()

    def _watch(self) -> None:
        """End this node once another one has failed: its main thread may be waiting for anything.

        A first node that was killed says nothing: it counts in ``alive`` while it runs, and the others look at that.
        """
        beats, seen, since = 0, "", time.monotonic()
        while not self._closed.wait(POLL_SECONDS):
            if self.cfg.node_rank == 0:
                beats += 1
                with suppress(OSError):  # a full disk ends the run elsewhere
                    self._alive.write_text(str(beats))
            elif (now := _text(self._alive)) != seen:
                seen, since = now, time.monotonic()
            self._silent = bool(seen) and time.monotonic() - since > SILENT_SECONDS
            if self._failed.exists() or self._stopped.exists() or self._silent:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def check(self) -> None:
        """Raise UserError where this node must end because another one failed."""
        if self._failed.exists():
            raise UserError(f"another node failed: {self._failed.read_text().strip()}; see its log")
        if self._silent:
            raise UserError(
                f"the first node must give a sign of life every {SILENT_SECONDS:g} s, got none; see its log, and start "
                "all nodes again"
            )
