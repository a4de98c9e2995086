"""A run on a Ray cluster: its processes are actors in one placement group, which Ray places, logs and starts again.

The command that a user starts (``run_on_ray``) makes the actors and waits: one for the ranks of each training node, one
for each server, one for the runner. The runner finds the others by name (``RayLauncher``). Process groups, files and
stages are those of a run without Ray.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from threading import Lock
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_npd.config.run import NPDConfig
from megatron_npd.errors import USER_ERROR, UserError
from megatron_npd.log import get_logger
from megatron_npd.pipeline.launch import STOP_SECONDS, Job, Launcher, command_line
from megatron_npd.pipeline.launch_ray_actors import LOST, Ranks, Runner, Server
from megatron_npd.pipeline.signals import Signals
from megatron_npd.serving.access import make_token
from megatron_npd.serving.devices import devices_of
from megatron_npd.serving.pool import RESTARTS
from megatron_npd.stoppable import check_stop

_LOOK_SECONDS = 0.5
_PLACE_SECONDS = 600.0  # for nodes that are still to come, or to come back
_END_SECONDS = STOP_SECONDS["train"]
_ANSWER_SECONDS = 30.0
_RESOURCES = {"cuda": "GPU", "npu": "NPU", "cpu": ""}  # what Ray calls a platform's devices


def run_on_ray(cfg: NPDConfig, run: Callable[[NPDConfig], str]) -> str:
    """Run on the Ray cluster that ``RAY_ADDRESS`` names or that this machine belongs to, until the run has ended.

    Args:
        cfg: The whole run.
        run: Runs it in the runner's process; a function that can be imported there.

    Returns:
        What ``run`` does.

    Raises:
        UserError: There is no cluster, or none with room; or as ``run`` does; or a part died more often than it is
            started again.
    """
    if cfg.node_rank:
        raise UserError(f"node_rank must be 0 with launcher ray, got {cfg.node_rank}; start the command once")
    try:
        ray.init(address="auto", logging_level=logging.WARNING)
    except ConnectionError as error:
        raise UserError(
            f"launcher ray must find a Ray cluster, got none ({str(error).splitlines()[0]}); start one with ray start "
            "(examples/launch/npd_ray.sbatch), or set RAY_ADDRESS"
        ) from error
    try:
        with Signals(cfg.exit_duration_in_mins), _placed(cfg) as group, _actors(cfg, group) as (runner, devices):
            return _ask(runner.run.remote(cfg, run, devices, os.getcwd()))
    except RayActorError as error:
        raise _died("runner and ranks", error) from error
    finally:
        ray.shutdown()


@contextmanager
def _placed(cfg: NPDConfig) -> Iterator[PlacementGroup]:
    """Room for the run: a bundle for the ranks of each training node, and one for each server."""
    name = _RESOURCES.get(cfg.platform) if cfg.platform != "auto" else None
    if name is None:
        name = next((name for name in ("GPU", "NPU") if ray.cluster_resources().get(name)), "")
    ranks = {"CPU": float(cfg.nproc_per_node)} | ({name: float(cfg.nproc_per_node)} if name else {})
    server = {"CPU": 1.0} | ({name: float(devices_of(cfg.rollout))} if name else {})
    bundles = [ranks] * cfg.training_nodes + [server] * _server_count(cfg)
    group = placement_group(bundles, strategy="SPREAD")
    try:
        get_logger().info("placing %s on Ray's nodes", bundles)
        try:
            ray.get(group.ready(), timeout=_PLACE_SECONDS)
        except GetTimeoutError as error:
            raise UserError(
                f"the Ray cluster must have room for {bundles}, got {ray.available_resources()} after "
                f"{_PLACE_SECONDS:g} s; add nodes, or lower nnodes or nproc_per_node"
            ) from error
        yield group
    finally:
        remove_placement_group(group)


@contextmanager
def _actors(cfg: NPDConfig, group: PlacementGroup) -> Iterator[tuple[Any, dict[str, str]]]:
    """The actors of a run, which end with the context: the runner, and the devices of the node that it is on."""

    def start(kind: type, name: str, bundle: int, *arguments: Any, **options: Any) -> Any:
        where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        restarts = {"max_restarts": RESTARTS, "name": name}
        return ray.remote(kind).options(scheduling_strategy=where, **restarts, **options).remote(*arguments)

    def takes(bundle: int) -> dict[str, Any]:
        needs = dict(group.bundle_specs[bundle])
        return {"num_cpus": needs.pop("CPU"), "num_gpus": needs.pop("GPU", 0), "resources": needs}

    directory, token = os.getcwd(), make_token()
    actors: list[Any] = []
    runner: Any = None
    try:
        for index in range(cfg.training_nodes):
            actors.append(start(Ranks, _ranks(index), index, directory, **takes(index)))
        for index in range(_server_count(cfg)):
            bundle = cfg.training_nodes + index
            actors.append(start(Server, _server(index), bundle, cfg, index, token, directory, **takes(bundle)))
        runner = start(Runner, "npd-runner", 0, num_cpus=0, max_task_retries=RESTARTS)
        yield runner, ray.get(actors[0].devices.remote())
    finally:
        if runner is not None:
            ray.kill(runner)  # first: it would start again what ends
        ends = [actor.stop.remote() for actor in actors]
        ray.wait(ends, num_returns=len(ends), timeout=_END_SECONDS)
        for actor in actors:
            ray.kill(actor)


def _server_count(cfg: NPDConfig) -> int:
    return (cfg.nnodes - cfg.training_nodes) * cfg.rollout.num_servers


def _ranks(index: int) -> str:
    return f"npd-ranks-{index}"


def _server(index: int) -> str:
    return f"npd-server-{index}"


def _ask(references: Any, timeout: float | None = None) -> Any:
    """What actors answer; a UserError of theirs as one."""
    try:
        return ray.get(references, timeout=timeout)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise


class RayLauncher(Launcher):
    """Starts commands on the actors that ``run_on_ray`` made, from the runner.

    Args:
        cfg: The run.
    """

    def __init__(self, cfg: NPDConfig) -> None:
        super().__init__(cfg)
        self.ranks = [ray.get_actor(_ranks(index)) for index in range(cfg.training_nodes)]
        self._servers = [ray.get_actor(_server(index)) for index in range(_server_count(cfg))]
        self._urls: dict[int, str] = {}
        self._token = ""
        self._port, self._starting, self._numbers = cfg.master_port, Lock(), itertools.count(time.time_ns())

    def given(self) -> tuple[tuple[str, ...], str] | None:
        """URLs of the servers, where they are now, and their token; waits until all have answered once.

        Raises:
            UserError: One could not be started the first time, or none is left.
        """
        if not self._servers:
            return None
        gone: set[int] = set()
        while True:
            for index, server in enumerate(self._servers):
                try:
                    url = _ask(server.url.remote(), _ANSWER_SECONDS)
                    self._token = self._token or _ask(server.token.remote(), _ANSWER_SECONDS)
                except ActorDiedError as error:
                    if len(gone := gone | {index}) == len(self._servers):
                        raise _died("all servers", error) from error
                except (RayActorError, GetTimeoutError):  # on its way back; it is known by its last address
                    continue
                else:
                    self._urls |= {index: url} if url else {}
            if len(self._urls.keys() | gone) == len(self._servers):
                return tuple(self._urls.values()), self._token
            check_stop()
            time.sleep(_LOOK_SECONDS)

    def start(self, command: str, fields: Mapping[str, Any], *, told: bool = False) -> RayJob:
        """Start a command on all training nodes; ``told``: as ``Job`` has it."""
        self._jobs.append(job := RayJob(self, command, fields, told=told))
        return job

    def lines(self, command: str, fields: Mapping[str, Any]) -> list[list[str]]:
        """How a command is started on each training node, without the interpreter; they meet at the first one."""
        with self._starting:
            address, port = _ask(self.ranks[0].meeting_point.remote(self._port))
            self._port = port + 1
        nodes = [replace(self.cfg, node_rank=rank, master_addr=address) for rank in range(len(self.ranks))]
        return [command_line(node, command, fields, port)[1:] for node in nodes]

    def number(self) -> int:
        """A number that no part of a command had, of this runner or of one before it."""
        return next(self._numbers)

    def __enter__(self) -> RayLauncher:
        _patiently(lambda: _ask([ranks.stop.remote() for ranks in self.ranks]))  # what a runner that died has left
        return self


class RayJob(Job):
    """A command on all training nodes, started again where a part of it died, for three times.

    A trainer then goes on from its checkpoint, an annotator from its sealed shards.

    Args:
        launcher: The way to the nodes.
        command: Of ``python -m megatron_npd``.
        fields: Its configuration, flat.
        told: Whether its first process reads what ``tell`` says.
    """

    def __init__(self, launcher: RayLauncher, command: str, fields: Mapping[str, Any], *, told: bool) -> None:
        self.command, self.call, self._nodes = command, None, None
        self._launcher, self._fields, self._told = launcher, fields, told
        self._lines: list[str] = []
        self._ended, self._left, self._number = False, RESTARTS, 0
        self._start()

    def running(self) -> bool:
        """Whether it has still to end.

        Raises:
            UserError: It has failed, by its user's doing or more often than it is started again.
        """
        try:
            codes = _ask([ranks.poll.remote(self._number) for ranks in self._launcher.ranks])
        except RayActorError:
            codes = [LOST]
        failed = [code for code in codes if code]
        if not failed:
            return None in codes
        if USER_ERROR in failed or not self._left:
            raise UserError(f"{self.command} must exit with 0, got {failed[0]}; see its messages above, then run again")
        self._left -= 1
        get_logger().warning("%s ended with %d: it is started again, from what it has saved", self.command, failed[0])
        self._start()
        return True

    def _start(self) -> None:
        """Start all parts, once the actors of all nodes are there, and tell again what was told."""

        def start() -> None:
            self._end()
            self._number = self._launcher.number()
            lines = self._launcher.lines(self.command, self._fields)
            for rank, (ranks, line) in enumerate(zip(self._launcher.ranks, lines, strict=True)):
                _ask(ranks.start.remote(self._number, line, self._told and not rank))

        _patiently(start)
        for line in self._lines:
            self._send(line)
        if self._ended:
            self.tell_end()

    def tell(self, line: str) -> None:
        """Give its first process a line, and again where it is started again."""
        self._lines.append(line)
        self._send(line)

    def _send(self, line: str) -> None:
        with suppress(RayActorError):  # ``running`` says what became of it
            _ask(self._launcher.ranks[0].tell.remote(self._number, line))

    def tell_end(self) -> None:
        """Say that there is nothing more to tell."""
        self._ended = True
        with suppress(RayActorError):
            _ask(self._launcher.ranks[0].tell_end.remote(self._number))

    def ask_to_stop(self) -> None:
        """Nothing: ``stop`` asks all nodes, and waits for them."""

    def stop(self) -> None:
        """End it on all nodes, if it has not ended; it is not started again."""
        self._left = 0
        with suppress(RayActorError):  # what an actor had started ends with it
            self._end()

    def _end(self) -> None:
        _ask([ranks.stop.remote(self._number) for ranks in self._launcher.ranks])


def _patiently(ask: Callable[[], object]) -> None:
    """Ask actors, again while one of them is on its way back.

    Raises:
        UserError: It does not come back.
    """
    until = time.monotonic() + _PLACE_SECONDS
    while True:
        try:
            ask()
            return
        except RayActorError as error:
            if isinstance(error, ActorDiedError) or time.monotonic() > until:
                raise _died("the ranks of a node", error) from error
        check_stop()
        time.sleep(_LOOK_SECONDS)


def _died(what: str, error: RayActorError) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(f"{what} must die at most {RESTARTS} times, got {reason}; see Ray's logs, then run again")
