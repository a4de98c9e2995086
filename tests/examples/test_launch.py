"""The cluster script: what --dry-run prints, what is refused, and a whole run with processes that stand for nodes."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_npd.manifest import is_sealed, read_manifest
from tests.helpers import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "launch" / "npd_72b_to_7b.sh"


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script with its defaults, on the first of six nodes where nothing else is said."""
    environment = {"MASTER_ADDR": "node0"} | environment
    return subprocess.run(
        [SCRIPT, *arguments], env=os.environ | environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_dry_run_prints_every_stage_with_its_sizes(tmp_path: Path) -> None:
    environment = {"RUN": str(tmp_path / "run"), "TEACHER_TP": "8", "TRAIN_ITERS": "900"}
    done = launch("--dry-run", **environment)
    assert done.returncode == 0, done.stderr
    for expected in (
        "tools/rollout.py",
        "tools/annotate.py",
        "-m megatron_npd.torchrun --nnodes 4 --node-rank 0 --nproc-per-node 8 --master-addr node0",
        "--tensor-model-parallel-size 8",
        "--follow-seconds 600",
        "tools/select.py",
        "tools/pack.py",
        "pretrain_npd.py",
        "--exit-at-iteration 450",
        "--exit-at-iteration 900",
        "tools/convert_checkpoint.py --direction megatron-to-hf",
        "tools/refresh.py",
        "tools/report.py",
    ):
        assert expected in done.stdout, expected
    assert not (tmp_path / "run").exists()
    server = launch("--dry-run", **environment, NODE_RANK="5").stdout
    assert server.count("tools/serve.py") == 1 and "pretrain_npd" not in server
    assert "tools/serve.py" in launch("--dry-run", **environment, NNODES="8", NODE_RANK="4").stdout


def test_further_flags_reach_their_stage() -> None:
    done = launch("--train.adam-beta2", "0.98", "--dry-run", "--rollout.temperature=0.8", "--train.log-interval", "5")
    lines = done.stdout.splitlines()
    assert all(line.endswith(" --adam-beta2 0.98 --log-interval 5") for line in lines if "pretrain_npd.py" in line)
    assert all("--temperature=0.8" in line for line in lines if "tools/rollout.py" in line)
    assert done.stdout.count("--adam-beta2") == done.stdout.count("--temperature=0.8") == 2
    assert "0.98 must follow a flag" in launch("0.98", "--train.adam-beta2").stderr
    assert "--STAGE.FLAG VALUE" in launch("--lr").stdout


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NNODES": "8", "SERVER_NODES": "2"}, r"TRAIN_NODES \+ SERVER_NODES must be NNODES \(8\).*got 4 \+ 2"),
        ({"NNODES": "4"}, r"each at least 1, got 4 \+ 0"),
        ({"NODE_RANK": "6"}, r"NODE_RANK must be from 0 to NNODES - 1 \(5\), got 6"),
        ({"MASTER_ADDR": "localhost"}, "MASTER_ADDR must be the first node's name .* got localhost"),
        ({"TEACHER_TP": "3"}, r"a multiple of TEACHER_TP x TEACHER_PP \(3 x 1\), got 32"),
        ({"STUDENT_PP": "3"}, r"a multiple of STUDENT_TP x STUDENT_PP \(4 x 3\), got 32"),
        ({"GLOBAL_BATCH_SIZE": "12"}, r"a multiple of MICRO_BATCH_SIZE x replicas \(1 x 8\), got 12"),
        ({"SLURM_STEP_NUM_TASKS": "48"}, "one task a node, got 48 for 6 nodes"),
        ({}, "ATTEMPT must be the same on every node and new at each start, got none"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    done = launch(**environment, RUN=str(tmp_path / "run"))
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr
    assert not done.stdout and not (tmp_path / "run").exists()


def test_a_name_that_a_node_alone_reaches_is_refused(tmp_path: Path) -> None:
    """Debian gives a host's own name 127.0.1.1."""
    (tmp_path / "hostname").write_text("#!/bin/sh\necho localhost\n")
    (tmp_path / "hostname").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN": str(tmp_path / "run"), "NODE_RANK": "5"}
    assert re.search("SERVER_HOST must be this node's name .* got localhost", launch(**environment).stderr)
    assert not (tmp_path / "run").exists()


def test_slurm_says_which_node_this_is(tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"  # as Slurm's prints a list of nodes
    scontrol.write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames gpu[07-14]" ] && printf "gpu%02d\\n" 7 8 9 10 11 12 13 14\n'
    )
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_NUM_NODES": "8", "SLURM_NODEID": "3", "SLURM_JOB_NODELIST": "gpu[07-14]", "MASTER_ADDR": ""}
    done = launch("--dry-run", **slurm, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert "--nnodes 4 --node-rank 3" in done.stdout and "--master-addr gpu07 " in done.stdout
    sbatch = (SCRIPT.parent / "npd.sbatch").read_text()
    assert f" examples/launch/{SCRIPT.name} " in sbatch and "--ntasks-per-node=1" in sbatch


def test_commands_end_with_a_script_that_is_killed(tmp_path: Path) -> None:
    python = tmp_path / "python"  # a command of ours that has work for ten minutes
    python.write_text(
        f"#!{sys.executable}\nimport os, sys, time\nfrom megatron_npd.lifeline import end_with_starter\n"
        "end_with_starter()\nopen(os.environ['PIDS'], 'w').write(f'{os.getpid()}\\n')\ntime.sleep(600)\n"
    )
    python.chmod(0o755)
    os.mkfifo(tmp_path / "pids")
    environment = {"NNODES": "5", "NODE_RANK": "4", "MASTER_ADDR": "node0", "ATTEMPT": "1", "PYTHON": str(python)}
    environment |= {"SERVER_HOST": "127.0.0.1", "PIDS": str(tmp_path / "pids"), "PYTHONPATH": str(ROOT)}
    environment["RUN"] = str(tmp_path / "run")
    script = subprocess.Popen([SCRIPT], env=os.environ | environment, stdout=subprocess.DEVNULL)
    children = []
    try:
        with open(tmp_path / "pids") as pids:
            command = psutil.Process(int(pids.readline()))
        children = psutil.Process(script.pid).children(recursive=True)
        assert command in children
    finally:
        script.kill()
        script.wait()
    assert not psutil.wait_procs(children, timeout=60)[1]


def start_nodes(environment: dict[str, str], logs: list[Path]) -> list[int]:
    """Exit codes of the script's processes, one a node."""
    nodes = []
    for rank, path in enumerate(logs):
        with open(path, "wb") as log:
            node = os.environ | environment | {"SLURM_NODEID": str(rank)}
            nodes.append(subprocess.Popen([SCRIPT], env=node, stdout=log, stderr=subprocess.STDOUT))
    try:
        return [node.wait(timeout=1100) for node in nodes]
    finally:
        for node in nodes:
            node.terminate()


@pytest.mark.timeout(1200)  # some thirty processes start one after another: 3 minutes where nothing else runs
def test_three_processes_stand_for_three_nodes(tmp_path: Path) -> None:
    """Two train, one serves. A first start fails and ends on every node; its requeued job has the same number."""
    teacher = make_tiny_model(tmp_path / "teacher", seed=1, num_hidden_layers=3, num_key_value_heads=2)
    student = make_tiny_model(tmp_path / "student", num_key_value_heads=2)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {n} + 7?"}) + "\n" for n in range(8)))
    run = tmp_path / "run"
    environment = os.environ | {
        "RUN": str(run),
        "TEACHER": str(teacher),
        "STUDENT": str(student),
        "PROMPTS": str(prompts),
        "PYTHON": "false",
        "PLATFORM": "cpu",
        "MASTER_ADDR": "127.0.0.2",  # loopback too, by an address that several nodes could share
        "MASTER_PORT": free_port(),
        "SERVER_PORT": free_port(),
        "SERVER_HOST": "127.0.0.1",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NUM_NODES": "3",
        "TRAIN_NODES": "2",
        "DEVICES_PER_NODE": "1",
        "SERVERS_PER_NODE": "1",
        "TEACHER_TP": "2",
        "STUDENT_TP": "2",
        "BF16": "false",
        "SERVER_DTYPE": "float32",
        "TOP_K": "4",
        "TEACHER_SEQ_LENGTH": "256",
        "SEQ_LENGTH": "256",
        "MAX_TOKENS": "12",
        "MAX_MODEL_LEN": "128",
        "GLOBAL_BATCH_SIZE": "1",
        "TRAIN_ITERS": "4",
        "LR_WARMUP_ITERS": "1",
        "LR": "1e-3",
        "FILTER": "none",
        "OMP_NUM_THREADS": "1",
    }
    logs = [tmp_path / f"node{rank}.log" for rank in range(3)]
    assert start_nodes(environment, logs) == [1, 1, 1]
    assert "another node failed: node 2, exit code 1" in logs[0].read_text()
    assert start_nodes(environment, logs[:1]) == [2]
    assert "ATTEMPT must be new at each start, got 7.0.0 again" in logs[0].read_text()
    codes = start_nodes(environment | {"SLURM_RESTART_COUNT": "1", "PYTHON": sys.executable}, logs)
    printed = "\n".join(path.read_text() for path in logs)
    assert codes == [0, 0, 0], printed[-6000:]
    with socket.socket() as probe:  # the servers end with the run
        assert probe.connect_ex(("127.0.0.1", int(environment["SERVER_PORT"]))) != 0
    assert is_sealed(run / "policies" / "v0002"), printed[-6000:]
    assert read_manifest(run / "rounds" / "0001" / "rollouts").provenance["policy_version"] == "v0001"
    for index in (0, 1):
        read_manifest(run / "rounds" / f"{index:04d}" / "annotations", kind="annotations")
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert [entry["steps"] for entry in summary["training"]] == [[1, 2], [3, 4]]
    assert f"the report {run}/report/report.html" in logs[0].read_text()
