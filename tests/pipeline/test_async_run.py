"""Overlapping rounds (``max_lead`` 1) on real engines: undisturbed, and stopped while two stages are at work."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_npd.config.run import NPDConfig
from megatron_npd.data.row_schedule import load_schedule
from megatron_npd.manifest import is_sealed, read_manifest
from megatron_npd.platform import get_platform

get_platform("cpu")

pytestmark = pytest.mark.server

from megatron_npd.audit.numbers import json_lines  # noqa: E402
from megatron_npd.audit.report import write_report  # noqa: E402
from megatron_npd.audit.status import status  # noqa: E402
from megatron_npd.audit.verify import verify_run  # noqa: E402
from megatron_npd.pipeline.runner import run_npd  # noqa: E402
from megatron_npd.run_dir import RunDir  # noqa: E402
from tests.helpers import hear_interrupts, wait_for  # noqa: E402
from tests.pipeline.test_overlap import workers  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("rollouts", "annotations", "selection", "packs")
PATIENCE = 300.0  # seconds, for what another process does


@pytest.fixture(scope="module")
def ahead(recipe: NPDConfig) -> NPDConfig:
    """Three rounds; the trainer waits for round 1, and takes round 2 if that is there in time."""
    run_dir = str(Path(recipe.run_dir).with_name("ahead"))
    train = dataclasses.replace(recipe.train, train_iters=6)
    return dataclasses.replace(recipe, run_dir=run_dir, updates=2, max_lead=1, train=train)


def books(run: RunDir, index: int) -> dict[str, Any]:
    """What a round's manifests count."""
    return {name: read_manifest(run.round(index) / name).counts for name in STAGES}


def check(run: RunDir) -> None:
    """What holds at the end of such a run, whatever happened on the way."""
    assert verify_run(run.root).problems == []
    for index, version in ((0, "v0000"), (1, "v0000"), (2, "v0001")):
        assert index == 2 or is_sealed(run.packs(index))
        if is_sealed(run.rollouts(index)):
            assert read_manifest(run.rollouts(index)).provenance["policy_version"] == version
    assert [entry.round for entry in load_schedule(run.schedule)] in ([0, 1], [0, 1, 2])
    assert [line["iteration"] for line in json_lines(run.metrics)] == [1, 2, 3, 4, 5, 6]
    assert all(is_sealed(run.policy(index)) for index in (1, 2, 3))
    assert " to do" not in status(run.root)


def test_rounds_that_overlap(ahead: NPDConfig) -> None:
    table = run_npd(ahead, write_report)
    run = RunDir(Path(ahead.run_dir))
    check(run)
    assert workers() == []
    begun = {(line["stage"], line["round"]): line["at"] for line in json_lines(run.seconds, "at")}
    assert begun["rollout", 1] < begun["select", 0], "round 1 was generated while round 0 was annotated"
    assert "at work: servers " in table and is_sealed(run.held_out.annotations(3))
    assert (run.report / "timeline.png").exists()


def annotators(runner: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in runner.children(recursive=True):
        try:
            found += [process] if "annotate" in process.cmdline() else []
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.timeout(1200)
def test_stopped_while_two_stages_are_at_work_it_ends_with_the_same_books(ahead: NPDConfig) -> None:
    """Ctrl-C, then kill -9, then to the end; each time in the middle of round 1's rollouts, round 0 being annotated."""
    undisturbed = RunDir(Path(ahead.run_dir))
    assert is_sealed(undisturbed.policy(3))
    run = RunDir(undisturbed.root.with_name("stopped"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_npd", "run", "--config", str(undisturbed.config)]
    command += [f"--run_dir={run.root}", "--rollout.concurrency=1", "--eval.held_out=0", "--eval.prompts="]

    def responses() -> int:
        return sum(path.read_bytes().count(b"\n") - 1 for path in run.rollouts(1).glob("*.journal"))

    there = 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = subprocess.Popen(command, env=environment, preexec_fn=hear_interrupts)
        annotator, *_ = wait_for(lambda process=process: annotators(psutil.Process(process.pid)), process)
        annotator.suspend()  # round 0 stays in the making
        wait_for(lambda before=there: responses() > before, process)
        process.send_signal(number)
        if number == signal.SIGKILL:
            process.wait()
        annotator.resume()
        assert process.wait(PATIENCE) == code
        annotator.wait(PATIENCE)  # no process outlives the run
        assert not is_sealed(run.rollouts(1)) and not is_sealed(run.annotations(0))
        there = responses()
        assert there > 0
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    check(run)
    for index in (0, 1):
        assert books(run, index) == books(undisturbed, index)
