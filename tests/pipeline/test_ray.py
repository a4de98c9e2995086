"""A run on Ray, on a real cluster of two nodes on this machine: undisturbed, and with what it consists of killed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from megatron_npd.config.cluster import ClusterConfig
from megatron_npd.config.command_line import parse_config
from megatron_npd.config.run import NPDConfig
from megatron_npd.errors import UserError
from megatron_npd.manifest import is_sealed, read_manifest
from megatron_npd.pipeline.launch import LAUNCHERS
from megatron_npd.platform import get_platform
from tests.helpers import make_tiny_model, wait_for

get_platform("cpu")

from megatron_npd.audit.numbers import json_lines  # noqa: E402
from megatron_npd.audit.verify import verify_run  # noqa: E402
from megatron_npd.pipeline.launch_ray import run_on_ray  # noqa: E402
from megatron_npd.pipeline.nodes import free_port  # noqa: E402
from megatron_npd.run_dir import RunDir  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0  # seconds, for what another process does
STAGES = ("rollouts", "annotations", "selection", "packs")
ON_RAY = ("--launcher=ray", "--nnodes=3", "--train-nodes=2")
MARK = "MEGATRON_NPD_TEST"  # environment: of all processes of the cluster here, and of what they start


@pytest.fixture(scope="module")
def mark() -> str:
    return f"ray-{os.getpid()}"


@pytest.fixture(scope="module")
def cluster(mark: str) -> Iterator[str]:
    """Address of two nodes of Ray, each with room for a rank and a server."""
    directory = tempfile.mkdtemp(prefix="ray-")  # paths of sockets must be short
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0", MARK: mark}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["RAY_TMPDIR"] = directory  # of the file that names the cluster, which must not be another one's
    (Path(directory) / "ray").mkdir()
    # The address is the one that ray.init takes for this machine's.
    node = {"num_cpus": 2, "object_store_memory": 80 * 2**20, "node_ip_address": ray.util.get_node_ip_address()}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        cluster = Cluster(
            initialize_head=True, head_node_args=node | {"include_dashboard": False, "temp_dir": directory}
        )
        try:
            cluster.add_node(**node)
            yield str(cluster.address)
        finally:
            cluster.shutdown()
            shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> list[str]:
    """A run of two rounds, all but its directory and where it is computed."""
    root = tmp_path_factory.mktemp("ray")
    lines = [{"prompt": f"Tom has {n} apples and buys 7 more. How many?"} for n in range(12)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields = {
        "teacher": make_tiny_model(root / "teacher", seed=1, num_hidden_layers=3),
        "student": tiny_model_dir,
        "prompts": root / "prompts.jsonl",
        "server_port": free_port(5000 + os.getpid() % 4000),  # below those that the kernel gives to connections
        "master_port": free_port(5100 + os.getpid() % 4000),
        "eval.held_out": 0,
        "rollout.concurrency": 1,
        "rollout.max_tokens": 12,
        "rollout.max_model_len": 128,
        "rollout.shard_size": 16,
        "annotate.seq_length": 256,
        "annotate.top_k": 4,
        "select.filter": "none",
        "pack.seq_length": 256,
        "train.train_iters": 6,
        "train.global_batch_size": 2,
        "train.lr": 1e-3,
        "train.save_interval": 1,
        "platform": "cpu",
    }
    return [f"--{name}={value}" for name, value in fields.items()]


@contextmanager
def started(*flags: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run, which ends with the context, and must have succeeded then."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    process = subprocess.Popen([sys.executable, "-m", "megatron_npd", "run", *flags], env=environment)
    try:
        yield process
        assert process.wait(PATIENCE) == 0
    finally:
        process.terminate()
        process.wait()


def files(run: Path) -> dict[str, bytes]:
    """All that the stages of a run have sealed; of checkpoints, whose pickles hold times, the tensors."""
    parts = [path for part in ("prompts", "rounds", "policies") for path in (run / part).rglob("*")]
    parts += [run / "schedule.jsonl", *(run / "checkpoints").rglob("*.distcp")]
    return {str(path.relative_to(run)): path.read_bytes() for path in parts if path.is_file() and path.name != ".lock"}


def check(run: RunDir) -> None:
    """What holds at the end of such a run, whatever happened on the way."""
    assert verify_run(run.root).problems == []
    assert [line["iteration"] for line in json_lines(run.metrics)] == [1, 2, 3, 4, 5, 6]
    for index in (0, 1):
        for stage in STAGES:
            books = read_manifest(run.round(index) / stage).counts
            assert books["in"] == books["kept"] == (24 if stage != "packs" else books["in"]), stage
    assert is_sealed(run.policy(2))


@pytest.fixture(scope="module")
def undisturbed(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The run without Ray."""
    run = RunDir(tmp_path_factory.mktemp("plain") / "run")
    with started(*flags, f"--run-dir={run.root}", "--nproc-per-node=2"):
        pass
    check(run)
    return run


def processes(mark: str, *words: str) -> list[psutil.Process]:
    """Those of the cluster with certain words on their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and all(word in " ".join(process.cmdline()) for word in words):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.timeout(1200)
def test_files_are_those_of_the_run_without_ray(
    cluster: str, flags: list[str], undisturbed: RunDir, mark: str, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    with started(*flags, *ON_RAY, f"--run-dir={run.root}", RAY_ADDRESS=cluster):
        pass
    check(run)
    assert files(run.root) == files(undisturbed.root)
    assert processes(mark, "megatron_npd") == processes(mark, "vllm") == []


@pytest.mark.timeout(1200)
def test_what_is_killed_comes_back_and_nothing_is_lost_or_doubled(
    cluster: str, flags: list[str], undisturbed: RunDir, mark: str, tmp_path: Path
) -> None:
    """kill -9 of a server in a round, of the trainer's processes on both nodes after its third step, of the runner."""
    run = RunDir(tmp_path / "run")

    def kill(*words: str) -> None:
        victims = processes(mark, *words)
        assert victims
        for victim in victims:
            victim.kill()

    def responses() -> int:
        return sum(path.read_bytes().count(b"\n") - 1 for path in run.rollouts(0).glob("*.journal"))

    port = next(flag for flag in flags if flag.startswith("--server_port")).partition("=")[2]
    two = ("--rollout.num-servers=2", f"--run-dir={run.root}")
    with started(*flags, *ON_RAY, *two, RAY_ADDRESS=cluster) as process:
        wait_for(lambda: responses() > 0, process)
        kill("vllm", f"--port {port}")
        wait_for(lambda: is_sealed(run.checkpoint_at(3)), process)  # it waits for the second round
        kill("megatron_npd train")
        wait_for(lambda: is_sealed(run.rollouts(1)), process)
        kill("ray::Runner")
    check(run)
    assert files(run.root) == files(undisturbed.root)
    assert len(list(run.logs.glob(f"vllm-{port}-*.log"))) > 1, "the server was started again"
    assert processes(mark, "megatron_npd") == processes(mark, "vllm") == []


def test_without_a_cluster_or_without_the_package_it_is_said(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    cfg = parse_config(NPDConfig, [*flags, *ON_RAY, f"--run-dir={tmp_path / 'run'}"])
    monkeypatch.setattr(ray, "init", refuse)  # that of this test's module would be found
    with pytest.raises(UserError, match=r"launcher ray must find a Ray cluster, got none .* with ray start"):
        run_on_ray(cfg, lambda _: "")
    with pytest.raises(UserError, match="node_rank must be 0 with launcher ray, got 1"):
        run_on_ray(dataclasses.replace(cfg, node_rank=1), lambda _: "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"got none installed; pip install 'megatron-npd\[ray\]'"):
        LAUNCHERS["ray"](cfg, None)


def test_one_node_needs_no_ray() -> None:
    with pytest.raises(UserError, match="nnodes must be at least 2 with launcher ray, got 1"):
        ClusterConfig(launcher="ray")
    cfg = ClusterConfig(launcher="ray", nnodes=2)  # neither attempt nor master_addr
    assert dataclasses.replace(cfg, node_rank=1, master_addr="127.0.0.1").training_nodes == 2
