"""The quickstart's own script, with a twentieth of its problems and steps, on the real engines."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(1200)  # three minutes of one core, most of them two servers' starts and imports
def test_the_script_runs_to_its_table(tmp_path: Path) -> None:
    work, temporary = tmp_path / "work", Path(tempfile.mkdtemp(prefix="t-"))  # short: vLLM puts sockets there
    environment = os.environ | {
        "TMPDIR": str(temporary),  # what lies in /tmp may be others'
        "MEGATRON_NPD_QUICKSTART_TEST": str(tmp_path),  # marks the processes of this run
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, ROOT / "examples/quickstart/run.py", "--work-dir", work, "--fast"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1100,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    left = [process for process in psutil.process_iter() if _is_marked(process, str(tmp_path))]
    assert not left
    temporary.rmdir()  # it must be empty

    run = work / "npd"
    for words in (
        "exact match",
        "start",
        "round 0",
        "round 1",
        "further SFT",
        "SeqKD",
        "on-policy",
        "teacher",
        f"policy  {run}/policies/v0002",
    ):
        assert words in done.stdout, done.stdout
    assert (run / "report" / "report.html").stat().st_size and (run / "report" / "summary.json").is_file()
    verified = subprocess.run(
        [sys.executable, ROOT / "tools/verify.py", run, "--full"], capture_output=True, text=True, check=False
    )
    assert verified.returncode == 0 and "every book balances, every file is whole" in verified.stdout, verified.stdout


def _is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get("MEGATRON_NPD_QUICKSTART_TEST") == mark
    except psutil.Error:
        return False
