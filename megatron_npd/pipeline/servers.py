"""The rollout servers of a run: launched or found at the first need, refreshed when another policy is asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock

from megatron_npd.config.run import NPDConfig
from megatron_npd.config.settings import RolloutConfig
from megatron_npd.durable import write_atomic
from megatron_npd.log import get_logger
from megatron_npd.manifest import is_sealed, read_manifest
from megatron_npd.pipeline.environment import timed
from megatron_npd.pipeline.launch import Job, Launcher
from megatron_npd.pipeline.nodes import POLL_SECONDS, Nodes
from megatron_npd.run_dir import RunDir, version
from megatron_npd.serving.access import keep_token, read_token
from megatron_npd.serving.compared import known_answer
from megatron_npd.serving.pool import RESTARTS, ServerPool
from megatron_npd.serving.refresh import refresh
from megatron_npd.serving.server import ServerLost, VLLMServer, start_servers

TEACHER = "teacher"  # policy version of responses that the teacher gave


def policy_dir(run: RunDir, cfg: NPDConfig, index: int) -> Path:
    """HF directory of a policy; number 0 is the student as given."""
    return run.policy(index) if index else Path(cfg.student)


def newest_policy(run: RunDir, cfg: NPDConfig) -> int:
    """Number of the newest policy that the run has exported; 0: none yet."""
    return max((index for index in range(1, cfg.updates + 2) if is_sealed(run.policy(index))), default=0)


class Servers:
    """The pool with the policy that is on it; a context, which stops what was launched.

    Args:
        run: The run.
        cfg: Its configuration.
        launcher: Tells the servers of other nodes, and starts some on all nodes where those take turns.
    """

    def __init__(self, run: RunDir, cfg: NPDConfig, launcher: Launcher | None = None) -> None:
        self.run, self.cfg, self._launcher = run, cfg, launcher or Launcher(cfg)
        self._pool: ServerPool | None = None
        self._job: Job | None = None  # of servers on all nodes
        self._served: int | None = None  # number of the policy on the servers
        self._noting = Lock()  # a server may be found in another thread

    def serve(self, index: int) -> ServerPool:
        """The pool, with policy ``index`` on it."""
        policy = policy_dir(self.run, self.cfg, index)
        if self._pool is None:
            with timed(self.run, "server start", index):
                if self.launches and self.cfg.nnodes > 1:
                    self._pool = self._open_on_nodes(policy, version(index))
                else:
                    urls, token = self._launcher.given() or (self.cfg.rollout.urls, "")
                    rollout = replace(self.cfg.rollout, urls=urls)
                    self._pool = ServerPool.open(
                        policy, rollout, version=version(index), log_dir=self.run.logs, token=token
                    )
            self._pool.changed = self._note
            if self._job is not None or self._pool.servers:  # given ones may hold another run's weights by that name
                self._served = index
        elif (given := self._launcher.given()) is not None:
            self._pool.follow(given[0])
        if self._served != index:
            with timed(self.run, "refresh", index) as measured:
                measured |= refresh(self._pool, policy, version(index)).as_record()
            self._served = index
        self._note()
        return self._pool

    def _open_on_nodes(self, policy: Path, name: str) -> ServerPool:
        if is_sealed(policy):  # a flipped bit loads silently
            read_manifest(policy)
        rollout = {field.name: getattr(self.cfg.rollout, field.name) for field in fields(RolloutConfig)}
        own = {"model": str(policy), "policy_version": name, "log_dir": str(self.run.logs), "restarts": RESTARTS}
        self._job, urls = self._launcher.serve(rollout | own | {"platform": self.cfg.platform})
        assert self._launcher.nodes is not None
        token = read_token(self._launcher.nodes.token_file)
        pool = ServerPool(urls, replace(self.cfg.rollout, urls=urls), token=token)
        pool.reference = known_answer(policy)
        return pool

    @property
    def launches(self) -> bool:
        """Whether they are launched here, or on all nodes in turn, rather than given or others'."""
        return not self.cfg.rollout.urls and self.cfg.training_nodes == self.cfg.nnodes

    def stop(self) -> None:
        """Stop the servers that were launched here; the next policy that is asked for starts them again."""
        if self.launches:
            self._close()

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.close()
        if self._job is not None:
            self._job.end()
        if self._pool is not None or self._job is not None:
            with suppress(OSError):
                self.run.servers.unlink(missing_ok=True)
        self._pool = self._served = self._job = None

    def _note(self) -> None:
        """Keep which servers are asked, and for what, in ``report/servers.json``, for those who look at the run.

        ``policy`` (version), ``asked`` (URLs), ``lost`` (URLs with the reason's first line) and ``written``. There is
        no such file while nothing is served.
        """
        assert self._pool is not None
        with self._noting, suppress(OSError):  # a run does not end because nobody can look at it
            # Copied at once: another thread may lose a server meanwhile.
            lost = {url: str(error).partition("\n")[0] for url, error in self._pool.lost.copy().items()}
            policy = None if self._served is None else version(self._served)
            state = {"policy": policy, "asked": sorted(self._pool.urls), "lost": lost}
            state["written"] = datetime.now(UTC).isoformat(timespec="seconds")
            self.run.report.mkdir(parents=True, exist_ok=True)
            write_atomic(self.run.servers, json.dumps(state, indent=1) + "\n")

    @contextmanager
    def of_teacher(self) -> Iterator[ServerPool]:
        """Servers of the teacher, for its own responses: those that are given, else launched for that time alone."""
        given = self.cfg.annotate
        cfg = replace(self.cfg.rollout, urls=given.urls, token_file=given.token_file if given.urls else "")
        with timed(self.run, "server start"):
            pool = ServerPool.open(self.cfg.teacher, cfg, version=TEACHER, log_dir=self.run.logs)
        with pool:
            yield pool

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def run_server_node(run: RunDir, cfg: NPDConfig, nodes: Nodes) -> None:
    """Serve the newest policy on this node until the run is done; the first node refreshes it.

    Raises:
        UserError: A server could not be started, or as for ``watch_servers``.
    """
    newest = newest_policy(run, cfg)
    token, host = keep_token(nodes.token_file), cfg.host_name()
    servers = [
        VLLMServer(
            policy_dir(run, cfg, newest),
            cfg.rollout,
            host=host,
            port=cfg.server_port + index,
            log_dir=run.logs,
            index=cfg.node_rank * cfg.rollout.num_servers + index,
            token=token,
        )
        for index in range(cfg.rollout.num_servers)
    ]
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
        start_servers(servers, version=version(newest))
        nodes.announce([server.url for server in servers])
        watch_servers(servers, nodes.done)


def watch_servers(servers: Sequence[VLLMServer], done: Callable[[], bool], restarts: int = RESTARTS) -> None:
    """Start again what dies, until there is nothing left to serve; who asks gives it the policy of the others.

    Raises:
        UserError: One died more often than it is worth, or does not start again.
    """
    left = {server.url: restarts for server in servers}
    while not done():
        for server in servers:
            try:
                server.check_alive()
            except ServerLost as error:
                if not left[server.url]:
                    raise
                left[server.url] -= 1
                get_logger().warning("%s", error)
                server.restart()
        time.sleep(POLL_SECONDS)
