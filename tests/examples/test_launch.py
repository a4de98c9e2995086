"""The cluster script: what --dry-run prints, what is refused, and a whole run with processes that stand for nodes."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_npd.config.cluster import ClusterConfig
from megatron_npd.config.command_line import parse_config
from megatron_npd.config.run import NPDConfig
from megatron_npd.errors import UserError
from megatron_npd.manifest import is_sealed, read_manifest
from megatron_npd.pipeline.nodes import free_port
from megatron_npd.platform import get_platform
from tests.helpers import make_tiny_model

get_platform("cpu")

from megatron_npd.audit.verify import verify_run  # noqa: E402
from megatron_npd.pipeline.preflight import check_run  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "launch" / "npd_72b_to_7b.sh"


RECIPE = """
platform: cpu
rollout: {dtype: float32, max_tokens: 12, max_model_len: 128, prompts_per_round: 4}
annotate: {tensor_model_parallel_size: 2, top_k: 4, seq_length: 256, follow_seconds: 600, unconditional: false}
select: {filter: none}
pack: {seq_length: 256}
train: {tensor_model_parallel_size: 2, global_batch_size: 1, train_iters: 4, lr_warmup_iters: 1, lr: 1.0e-3}
eval: {held_out: 2}
"""


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script with its defaults, on the first of six nodes where nothing else is said."""
    sizes = {"NNODES": "6", "TRAIN_NODES": "4"}
    environment = {"MASTER_ADDR": "node0", "PYTHON": sys.executable, **sizes} | environment
    return subprocess.run(
        [SCRIPT, *arguments], env=os.environ | environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_dry_run_prints_what_a_node_would_do(tmp_path: Path) -> None:
    environment = {"RUN": str(tmp_path / "run"), "ATTEMPT": "1"}
    done = launch("--dry-run", "--train.train-iters=900", **environment)
    assert done.returncode == 0, done.stderr
    for expected in (
        "node 0 of 6:",
        "round 0      rollout",
        "round 1      annotate         ranks    to do",
        "-m megatron_npd.torchrun --nnodes 4 --node-rank 0 --master-addr node0 --master-port 29500 --nproc-per-node 8",
        "-m megatron_npd annotate",
        "--tensor_model_parallel_size=8",
        "--follow_seconds=600",
        "-m megatron_npd train",
        "--train_iters=900",
        "--updates=1",
    ):
        assert expected in done.stdout, expected
    assert not (tmp_path / "run").exists()
    trainer = launch("--dry-run", **environment, NODE_RANK="3").stdout
    assert "--node-rank 3 " in trainer and "rollout " not in trainer
    for nodes, rank in (("6", "5"), ("8", "4")):
        server = launch("--dry-run", **environment, NNODES=nodes, NODE_RANK=rank).stdout
        assert "8 servers on ports 8100 to 8107" in server and "train" not in server


@pytest.mark.parametrize("nodes", ["3", "4", "8"])
def test_all_nodes_train_unless_told_otherwise(nodes: str) -> None:
    """Each serves too, in turn; the recipe's batch must fit the nodes."""
    for rank in range(int(nodes)):
        batch = f"--train.global-batch-size={16 * int(nodes)}"
        environment = {"ATTEMPT": "1", "NNODES": nodes, "NODE_RANK": str(rank), "TRAIN_NODES": ""}
        done = launch("--dry-run", batch, **environment)
        assert done.returncode == 0 and f"--nnodes {nodes} --node-rank {rank} " in done.stdout, done.stderr
        assert ("rollout " in done.stdout) == (rank == 0)


def test_further_flags_reach_the_run() -> None:
    done = launch("--train.adam-beta2", "0.98", "--dry-run", "--train.log-interval=5", ATTEMPT="1")
    (train,) = (line for line in done.stdout.splitlines() if "-m megatron_npd train" in line)
    assert "--adam_beta2=0.98" in train and "--log_interval=5" in train
    assert "did you mean --train.lr?" in launch("--lr=1", ATTEMPT="1").stderr


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        ({"TRAIN_NODES": "7"}, [], r"train_nodes must be from 0 to nnodes \(6\), got 7"),
        ({"NNODES": "4"}, ["--take-turns=false"], "train_nodes must be fewer than nnodes, or take_turns set .*, got 4"),
        ({"NNODES": "4"}, ["--launcher=ray"], "train_nodes must be fewer than nnodes, or take_turns set without Ray"),
        ({"NODE_RANK": "6"}, [], r"node_rank must be from 0 to nnodes - 1 \(5\), got 6"),
        ({"MASTER_ADDR": "localhost"}, [], "master_addr must be the first node's name .* got localhost"),
        ({}, ["--rollout.urls=http://a"], "rollout.urls must be empty with server nodes"),
        ({"SLURM_STEP_NUM_TASKS": "48"}, [], "one task per node, got 48 for 6 nodes"),
        ({"ATTEMPT": ""}, [], "attempt must be the same on every node and new at each start, got none"),
        ({"ATTEMPT": "../1"}, [], "attempt must be a plain name"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    tmp_path: Path, environment: dict[str, str], flags: list[str], message: str
) -> None:
    done = launch(*flags, **{"ATTEMPT": "1", "RUN": str(tmp_path / "run"), **environment})
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr
    assert not done.stdout and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"annotate": {"tensor_model_parallel_size": 3}}, "number of processes must be a multiple of .* got 32"),
        ({"train": {"pipeline_model_parallel_size": 3}}, "number of processes must be a multiple of .* got 32"),
        ({"train": {"global_batch_size": 12}}, "global_batch_size must be a multiple of .* got 12"),
    ],
)
def test_layouts_are_checked_over_all_nodes(tmp_path: Path, fields: dict[str, dict[str, int]], message: str) -> None:
    model = make_tiny_model(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1 + 1?"}\n')
    paths = {"run_dir": "run", "teacher": "model", "student": "model", "prompts": "prompts.jsonl"}
    nodes = ["--nnodes=6", "--train-nodes=4", "--nproc-per-node=8", "--master-addr=node0", "--attempt=1"]
    flags = [f"--{stage}.{name}={value}" for stage, values in fields.items() for name, value in values.items()]
    small = ["--rollout.max-model-len=128", "--train.lr=1e-4", "--train.global-batch-size=32", "--platform=cpu"]
    cfg = parse_config(NPDConfig, [*(f"--{k}={tmp_path / v}" for k, v in paths.items()), *nodes, *small, *flags])
    assert model.is_dir()
    with pytest.raises(UserError, match=message):
        check_run(cfg)


def test_a_name_that_a_node_alone_reaches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian gives a host's own name 127.0.1.1."""
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    with pytest.raises(UserError, match=r"server_host must be this node's name .* got localhost"):
        ClusterConfig().host_name()
    assert ClusterConfig(server_host="127.0.0.1").host_name() == "127.0.0.1"


def test_slurm_says_which_node_this_is(tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"  # as Slurm's prints a list of nodes
    scontrol.write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames gpu[07-14]" ] && printf "gpu%02d\\n" 7 8 9 10 11 12 13 14\n'
    )
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_NUM_NODES": "8", "SLURM_NODEID": "3", "SLURM_JOB_NODELIST": "gpu[07-14]", "MASTER_ADDR": ""}
    slurm |= {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "NNODES": ""}
    done = launch("--dry-run", **slurm, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert "--nnodes 4 --node-rank 3 --master-addr gpu07 " in done.stdout
    sbatch = (SCRIPT.parent / "npd.sbatch").read_text()
    assert f" examples/launch/{SCRIPT.name} " in sbatch and "--ntasks-per-node=1" in sbatch


def test_ray_starts_in_the_allocation_and_one_command_on_it(tmp_path: Path) -> None:
    programs = {"hostname": "echo gpu07", "ray": "true", "scontrol": "echo gpu07"}
    programs["srun"] = f'echo "srun $*"; touch {tmp_path}/begun-$$'
    # The script's end is that of its steps in the background, which may not have begun.
    programs["python"] = f'until [ "$(ls {tmp_path} | grep -c begun)" = 2 ]; do sleep 0.05; done; echo "$*"'
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NUM_NODES": "6", "SLURM_JOB_NODELIST": "gpu[07-12]", "SLURM_JOB_ID": "7"}
    slurm["PYTHON"] = str(tmp_path / "python")
    done = subprocess.run(
        [SCRIPT.parent / "npd_ray.sbatch", "--train.lr=1e-5"],
        env=os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    lines = done.stdout.splitlines()  # in any order: the steps are in the background
    words = ("--head", "--exclude", "megatron_npd run")
    head, workers, run = (next(line for line in lines if word in line) for word in words)
    step = "srun --overlap --ntasks-per-node=1 --cpu-bind=none --label"
    assert head == f"{step} --nodes=1 --ntasks=1 --nodelist=gpu07 ray start --head --port=6379 --block"
    assert workers == f"{step} --nodes=5 --ntasks=5 --exclude=gpu07 ray start --address=gpu07:6379 --block"
    assert "--nnodes 6 --node-rank 0 --train-nodes 4 " in run and run.endswith("--launcher ray --train.lr=1e-5")


def start_nodes(environment: dict[str, str], logs: list[Path], *flags: str, ports: Sequence[int] = ()) -> list[int]:
    """Exit codes of the script's processes, one a node; ``ports``: of each one's servers."""
    nodes = []
    for rank, path in enumerate(logs):
        with open(path, "wb") as log:
            node = os.environ | environment | {"SLURM_NODEID": str(rank)}
            node |= {"SERVER_PORT": str(ports[rank])} if ports else {}
            nodes.append(subprocess.Popen([SCRIPT, *flags], env=node, stdout=log, stderr=subprocess.STDOUT))
    try:
        return [node.wait(timeout=1100) for node in nodes]
    finally:
        for node in nodes:
            node.terminate()


def cluster(tmp_path: Path, taken: socket.socket, below: int, **more: str) -> dict[str, str]:
    """Inputs of a small run, and what Slurm and the user of the script say; the master's port is ``taken``."""
    teacher = make_tiny_model(tmp_path / "teacher", seed=1, num_hidden_layers=3, num_key_value_heads=2)
    student = make_tiny_model(tmp_path / "student", num_key_value_heads=2)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {n} + 7?"}) + "\n" for n in range(8)))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return os.environ | {
        "RUN": str(tmp_path / "run"),
        "TEACHER": str(teacher),
        "STUDENT": str(student),
        "PROMPTS": str(prompts),
        "RECIPE": str(tmp_path / "recipe.yaml"),
        "PYTHON": sys.executable,
        "MASTER_ADDR": "127.0.0.2",  # loopback too, by an address that several nodes could share
        "MASTER_PORT": str(taken.getsockname()[1]),  # the next will do
        "SERVER_PORT": str(free_port(below + 100)),
        "SERVER_HOST": "127.0.0.1",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "DEVICES_PER_NODE": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }


@pytest.mark.timeout(1200)  # some thirty processes start one after another: 3 minutes where nothing else runs
def test_three_processes_stand_for_three_nodes(tmp_path: Path) -> None:
    """Two train, one serves. A first start fails and ends on every node; its requeued job has the same number."""
    problems, run = tmp_path / "problems.jsonl", tmp_path / "run"
    problems.write_text(
        "".join(json.dumps({"prompt": f"{n} + 1?", "response": f"#### {n + 1}"}) + "\n" for n in range(3))
    )
    below = 5000 + os.getpid() % 4000  # ports that the kernel gives no connection
    taken = socket.create_server(("", free_port(below)))
    environment = cluster(tmp_path, taken, below, SLURM_JOB_NUM_NODES="3", TRAIN_NODES="2")
    logs = [tmp_path / f"node{rank}.log" for rank in range(3)]
    assert start_nodes(environment, logs, "--rollout.server-args=--no-such-flag") == [2, 2, 2]
    assert "error: another node failed: node 2: " in logs[0].read_text()
    assert start_nodes(environment, logs[:1]) == [2]
    assert "attempt must be new at each start, got 7.0.0 again" in logs[0].read_text()
    codes = start_nodes(
        environment | {"SLURM_RESTART_COUNT": "1"}, logs, f"--eval.prompts={problems}", "--eval.max-tokens=8"
    )
    taken.close()
    printed = "\n\n".join(path.read_text()[-6000:] for path in logs)
    assert codes == [0, 0, 0], printed
    with socket.socket() as probe:  # the servers end with the run
        assert probe.connect_ex(("127.0.0.1", int(environment["SERVER_PORT"]))) != 0
    assert is_sealed(run / "policies" / "v0002"), printed
    assert read_manifest(run / "rounds" / "0001" / "rollouts").provenance["policy_version"] == "v0001"
    for index in (0, 1):
        read_manifest(run / "rounds" / f"{index:04d}" / "annotations", kind="annotations")
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert [entry["steps"] for entry in summary["training"]] == [[1, 2], [3, 4]]
    assert summary["seconds"].keys() >= {"rollout", "annotate", "train", "evaluate", "measure"}
    assert summary["accuracy"]["start"] is not None and len(summary["accuracy"]["rounds"]) == 2
    assert [entry["policy"] for entry in summary["measures"]] == [0, 1, 2]
    assert f"report  {run}/report/report.html" in logs[0].read_text()
    assert verify_run(run).problems == []


@pytest.mark.timeout(1200)
def test_all_nodes_generate_and_then_all_annotate_and_train(tmp_path: Path) -> None:
    """What the script does where it is told no TRAIN_NODES: servers on both nodes, which end for the other stages."""
    run, below = tmp_path / "run", 5000 + os.getpid() % 4000
    with socket.create_server(("", free_port(below))) as taken:
        environment = cluster(tmp_path, taken, below, SLURM_JOB_NUM_NODES="2")
        ports = (int(environment["SERVER_PORT"]), free_port(below + 200))
        logs = [tmp_path / f"node{rank}.log" for rank in range(2)]
        # Both nodes are this machine: the second one's servers need another port.
        codes = start_nodes(environment, logs, "--take-turns", ports=ports)
    printed = "\n\n".join(path.read_text()[-6000:] for path in logs)
    assert codes == [0, 0], printed
    for index in (0, 1):
        made = read_manifest(run / "rounds" / f"{index:04d}" / "rollouts")
        assert made.provenance["policy_version"] == f"v{index:04d}" and made.counts["kept"] == 8, printed
    for rank, port in enumerate(ports):
        assert list((run / "logs" / f"node-{rank}").glob("vllm-*")), printed
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    seconds = [json.loads(line) for line in (run / "report" / "seconds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in seconds if line["stage"] == "server start"] == [0, 1]
    assert is_sealed(run / "policies" / "v0002") and verify_run(run).problems == []
