"""Kills and stops of a whole asynchronous run on real engines, at random moments, by one command; prints a table.

``python tests/faults/engines.py --kills 100``

Two vLLM servers, annotator, trainer and runner work on overlapping rounds. One process after another is killed (-9) or
stopped: a server's for good, which must then be found out, the others' for some seconds. What ends the run is followed
by the same command. At its end every book must balance, the responses must be the undisturbed run's, and no process of
it may be left. Exit code 1 where one of these promises is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from megatron_npd.audit.numbers import json_lines  # noqa: E402
from megatron_npd.audit.verify import verify_run  # noqa: E402
from megatron_npd.data.row_schedule import load_schedule  # noqa: E402
from megatron_npd.run_dir import RunDir  # noqa: E402
from tests.helpers import make_tiny_model  # noqa: E402

ROUNDS, STEPS = 4, 12
MARK = "MEGATRON_NPD_FAULTS"  # in the environment of all processes of a run
# By a part of the command line, or of the name: vLLM names its engine.
KINDS = {
    "runner": "megatron_npd run",
    "trainer": "megatron_npd train",
    "annotator": "megatron_npd annotate",
    "server": "api_server",
    "engine": "EngineCore",
}
SERVERS = ("server", "engine")
GRACE = 60.0  # seconds in which the processes of a run that has ended must be gone
MOST = 12  # kills of one run


def write_inputs(root: Path) -> list[str]:
    """Models and prompts, and the command that runs on them."""
    student = make_tiny_model(root / "student")
    teacher = make_tiny_model(root / "teacher", seed=1, num_hidden_layers=3)
    lines = [{"prompt": f"Tom has {n} apples and buys 7 more. How many?"} for n in range(48)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags: dict[str, Any] = {
        "teacher": teacher,
        "student": student,
        "prompts": root / "prompts.jsonl",
        "updates": ROUNDS - 1,
        "max-lead": 1,
        "rollout.num-servers": 2,
        "rollout.concurrency": 4,
        "rollout.max-tokens": 24,
        "rollout.max-model-len": 128,
        "rollout.shard-size": 16,
        "rollout.request-timeout": 20,
        "annotate.seq-length": 256,
        "annotate.top-k": 4,
        "select.filter": "none",
        "pack.seq-length": 256,
        "train.train-iters": STEPS,
        "train.global-batch-size": 2,
        "train.lr": 1e-3,
        "eval.held-out": 4,
        "platform": "cpu",
    }
    return [sys.executable, "-m", "megatron_npd", "run", *(f"--{name}={value}" for name, value in flags.items())]


class Disturbed:
    """One run, started again until it ends well.

    Args:
        command: Without the run's directory.
        run: Its directory.
        log: What it prints, over all starts.
    """

    def __init__(self, command: list[str], run: RunDir, log: Path) -> None:
        self.command, self.run, self.log = [*command, f"--run-dir={run.root}"], run, log
        self.mark = uuid.uuid4().hex
        self.starts = 0
        self._groups: set[int] = set()  # of its servers: vLLM's engine writes its title over its environment

    def start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: self.mark}
        with open(self.log, "ab") as log:
            return subprocess.Popen(self.command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def processes(self) -> Iterator[tuple[str, psutil.Process]]:
        """What there is of it, with its kind; empty: another, like a guard's shell."""
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                group = os.getpgid(process.pid)
                if process.environ().get(MARK) == self.mark:
                    self._groups |= {group} - {os.getpgid(0)}
                elif group not in self._groups:
                    continue
                if process.status() != psutil.STATUS_ZOMBIE:
                    line = f"{process.name()} {' '.join(process.cmdline())}"
                    yield next((kind for kind, part in KINDS.items() if part in line), ""), process

    def left(self) -> list[str]:
        """Processes that outlive the run."""
        until = time.monotonic() + GRACE
        while (there := list(self.processes())) and time.monotonic() < until:
            time.sleep(0.5)
        for _, process in there:
            with suppress(psutil.Error):
                process.kill()
        return [kind or "another" for kind, _ in there]

    def disturb(self, rng: random.Random, kills: int, gap: float, ends: Counter[str]) -> list[str]:
        """Run it to its end, with some kills on the way; broken promises."""
        broken: list[str] = []
        while True:
            process = self.start()
            until = time.monotonic() + rng.expovariate(1 / gap)
            while process.poll() is None:
                time.sleep(0.1)
                if kills and time.monotonic() > until and (hit := self._strike(rng)):
                    ends[hit] += 1
                    kills -= 1
                    until = time.monotonic() + rng.expovariate(1 / gap)
            broken += [f"a {kind} outlived the run" for kind in self.left()]
            if process.returncode == 0:
                return broken
            if self.starts > MOST + 3:
                return [*broken, f"it did not end after {self.starts} starts; see {self.log}"]

    def _strike(self, rng: random.Random) -> str:
        """Kill or stop one process of a kind chosen among those that are there."""
        there = [(kind, process) for kind, process in self.processes() if kind]
        if not there:
            return ""
        kind = rng.choice(sorted({kind for kind, _ in there}))
        victim = rng.choice([process for other, process in there if other == kind])
        stop = rng.random() < 0.3
        with suppress(psutil.Error):
            victim.send_signal(signal.SIGSTOP if stop else signal.SIGKILL)
            if stop and kind not in SERVERS:
                time.sleep(rng.uniform(1, 5))
                victim.send_signal(signal.SIGCONT)
            return f"{kind} {'stopped' if stop else 'killed'}"
        return ""


def responses(run: RunDir, index: int) -> list[dict[str, Any]]:
    """The rows of a round's rollouts."""
    files = sorted(run.rollouts(index).glob("shard-*/rollouts.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def check(run: RunDir, undisturbed: RunDir) -> list[str]:
    """Broken promises of a run that has ended."""
    broken = [str(problem) for problem in verify_run(run.root).problems]
    rounds = [entry.round for entry in load_schedule(run.schedule)]
    if rounds != sorted(set(rounds)) or rounds[:2] != [0, 1]:
        broken.append(f"rounds {rounds} trained")
    if [line["iteration"] for line in json_lines(run.metrics)] != list(range(1, STEPS + 1)):
        broken.append("a step is lost or doubled in the metrics")
    for index in (0, 1):  # both by the student as given
        if responses(run, index) != responses(undisturbed, index):
            broken.append(f"round {index} has other responses")
    for index in range(2, ROUNDS):
        ids = [row["sample_id"] for row in responses(run, index)]
        versions = {row["policy_version"] for row in responses(run, index)}
        if len(ids) != len(set(ids)) or versions - {f"v{index - 1:04d}"}:
            broken.append(f"round {index} has doubled samples or mixed policies: {versions}")
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills and stops, over all runs")
    parser.add_argument("--gap", type=float, default=15.0, help="seconds between two of them, on average")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    options = parser.parse_args()
    root, rng = Path(tempfile.mkdtemp(prefix="megatron_npd-engines-")), random.Random(options.seed)
    command, ends, broken, runs, starts = write_inputs(root), Counter[str](), list[str](), 0, 0
    undisturbed = Disturbed(command, RunDir(root / "undisturbed"), root / "undisturbed.log")
    broken += undisturbed.disturb(rng, 0, 1.0, ends) + check(undisturbed.run, undisturbed.run)
    print(f"undisturbed: {undisturbed.starts} start, {broken or 'whole'}; logs in {root}", flush=True)
    begun = time.monotonic()
    while (done := ends.total()) < options.kills and not broken:
        one = Disturbed(command, RunDir(root / f"run{runs}"), root / f"run{runs}.log")
        broken += one.disturb(rng, min(MOST, options.kills - done), options.gap, ends)
        broken += [] if broken else check(one.run, undisturbed.run)
        runs, starts = runs + 1, starts + one.starts
        print(f"run {runs}: {one.starts} starts, {dict(ends)}, {broken or 'whole'}", flush=True)
    print(
        "\n| kills and stops | times |\n|---|---|\n" + "\n".join(f"| {what} | {ends[what]} |" for what in sorted(ends))
    )
    print(f"{runs} runs, {starts} starts, {time.monotonic() - begun:.0f} s, broken promises: {broken or 'none'}")
    if not broken:
        shutil.rmtree(root)
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
