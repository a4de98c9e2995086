"""The rollout commands as a user types them: exit codes, messages and files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_npd.manifest import is_sealed, read_manifest
from megatron_npd.serving.pool import ServerPool
from tests.helpers import make_tiny_model
from tests.serving.fake import FakeServer, die_after, write_prompts

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--max-model-len", "64", "--max-tokens", "20", "--concurrency", "4", "--server-patience", "0"]


def call(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_rollout_dies_with_the_server_and_goes_on(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path / "prompts", [5] * 10), tmp_path / "out"
    flags = ["--prompts", prompts, "--out", out, "--round", "2", "--policy-version", "v0002", *SHORT]
    with FakeServer(version="v0002") as server:
        server.trouble = die_after(server, 7)
        failed = call("rollout", *flags, "--urls", server.url)
        answered = server.answered
    assert failed.returncode == 2 and not is_sealed(out)
    error = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and f"{server.url} must generate" in error[0] and "Traceback" not in failed.stderr
    with FakeServer(version="v0002") as server:
        finished = call("rollout", *flags, "--urls", server.url)
        assert finished.returncode == 0, finished.stderr
        assert len(server.asked) == 20 - answered
    manifest = read_manifest(out, kind="rollouts")
    assert manifest.counts["kept"] == 20 and manifest.provenance["round"] == 2
    again = call("rollout", *flags, "--urls", server.url)  # the server is gone, and not needed
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("flags", [[], ["--urls", "http://127.0.0.1:1", "--model", "m"]])
def test_rollout_needs_a_model_or_urls(tmp_path: Path, flags: list[str]) -> None:
    result = call("rollout", "--prompts", tmp_path, "--out", tmp_path / "out", *flags)
    assert result.returncode == 2 and "--model or from running servers (--urls)" in result.stderr


@pytest.mark.parametrize("command", [("rollout", "--out", "out"), ("evaluate",)])
@pytest.mark.parametrize("manifest", ["{", "[]", '{"kind": "packs"}'])
def test_damaged_prompts_are_refused_before_a_server_is_started(
    tiny_model_dir: Path, tmp_path: Path, command: tuple[str, ...], manifest: str
) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "manifest.json").write_text(manifest)
    tool, *flags = command
    flags = [str(tmp_path / flag) if flag == "out" else flag for flag in flags]
    result = call(tool, "--prompts", tmp_path / "prompts", "--model", tiny_model_dir, *flags)
    assert result.returncode == 2 and str(tmp_path / "prompts") in result.stderr and "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "starting vLLM" not in result.stderr


@pytest.mark.server
def test_refresh_and_evaluate_a_real_server(
    served_pool: ServerPool, token_file: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    url = served_pool.urls[0]
    door = ["--urls", url, "--token-file", token_file]
    problems = tmp_path / "problems.jsonl"
    problems.write_text(
        "".join(json.dumps({"prompt": f"{i} + 1?", "response": f"#### {i + 1}"}) + "\n" for i in range(4))
    )
    bad = make_tiny_model(tmp_path / "bad", num_hidden_layers=1)
    refused = call("refresh", *door, "--policy", bad, "--version", "v0001")
    assert refused.returncode == 2 and "nothing was loaded" in refused.stderr
    assert served_pool.version(url) == "v0000"
    done = call("refresh", *door, "--policy", tiny_model_dir, "--version", "v0000")
    assert done.returncode == 0, done.stderr
    flags = [*door, "--max-model-len", "128", "--max-tokens", "8", "--out", tmp_path / "result.json"]
    evaluated = call("evaluate", "--prompts", problems, "--model", tiny_model_dir, *flags)
    assert evaluated.returncode == 0, evaluated.stderr
    assert evaluated.stdout == "accuracy 0.00 % (0 of 4)\n"
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["total"] == 4 and len(result["wrong"]) == 4 and result["wrong"][3]["expected"] == "4"
