"""The cluster script: every command printed by --dry-run, and a whole run with two processes standing for two nodes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_npd.manifest import is_sealed, read_manifest
from tests.helpers import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "launch" / "npd_72b_to_7b.sh"


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_dry_run_prints_every_stage_with_its_sizes(tmp_path: Path) -> None:
    environment = os.environ | {"RUN": str(tmp_path / "run"), "NODE_RANK": "0", "TEACHER_TP": "8", "TRAIN_ITERS": "900"}
    done = subprocess.run([SCRIPT, "--dry-run"], env=environment, capture_output=True, text=True, check=True)
    for expected in (
        "tools/rollout.py",
        "tools/annotate.py",
        "--tensor-model-parallel-size 8",
        "--follow-seconds 600",
        "tools/select.py",
        "tools/pack.py",
        "pretrain_npd.py",
        "--exit-at-iteration 450",
        "--exit-at-iteration 900",
        "tools/convert_checkpoint.py --direction megatron-to-hf",
        "tools/refresh.py",
    ):
        assert expected in done.stdout, expected
    assert not (tmp_path / "run").exists()
    server = subprocess.run(
        [SCRIPT, "--dry-run"], env=environment | {"NODE_RANK": "5"}, capture_output=True, text=True, check=True
    )
    assert server.stdout.count("tools/serve.py") == 1 and "pretrain_npd" not in server.stdout


@pytest.mark.timeout(1200)  # some thirty processes start one after another: 3 minutes where nothing else runs
def test_two_processes_stand_for_two_nodes(tmp_path: Path) -> None:
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
        "PYTHON": sys.executable,
        "PLATFORM": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "SERVER_PORT": free_port(),
        "SERVER_HOST": "127.0.0.1",
        "NNODES": "2",
        "TRAIN_NODES": "2",
        "SERVER_NODES": "1",
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
    logs = [tmp_path / f"node{rank}.log" for rank in (0, 1)]
    nodes = []
    for rank, path in enumerate(logs):
        with open(path, "wb") as log:
            node_environment = environment | {"NODE_RANK": str(rank)}
            nodes.append(subprocess.Popen([SCRIPT], env=node_environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [node.wait(timeout=1100) for node in nodes]
    finally:
        for node in nodes:
            node.terminate()
    printed = "\n".join(path.read_text() for path in logs)
    assert codes == [0, 0], printed[-6000:]
    with socket.socket() as probe:  # the servers end with the run
        assert probe.connect_ex(("127.0.0.1", int(environment["SERVER_PORT"]))) != 0
    assert is_sealed(run / "policies" / "v0002"), printed[-6000:]
    assert read_manifest(run / "rounds" / "0001" / "rollouts").provenance["policy_version"] == "v0001"
    for index in (0, 1):
        read_manifest(run / "rounds" / f"{index:04d}" / "annotations", kind="annotations")
