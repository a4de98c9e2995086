"""Runs stages in fresh processes, each forked from one that has imported everything and run nothing.

``python -m tests.faults.zygote`` reads a request a line (JSON) and answers a line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a stage's process ended: exit code, or minus the signal; events counted; what it printed."""

    code: int
    events: int
    text: str


class Zygote:
    """The parent of the stages' processes; a context manager.

    Args:
        inputs: From ``world.make_inputs``.
        server: URL of the stand-in server.
    """

    def __init__(self, inputs: Path, server: str) -> None:
        environment = os.environ | {"NPD_FAULTS_INPUTS": str(inputs), "NPD_FAULTS_SERVER": server}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def run(self, stage: str, run: Path, mode: str = "none", at: int = 0, kill_after: float = 0.0) -> Outcome:
        """Run a stage; ``kill_after`` seconds from its start it is killed, where that is not 0."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"stage": stage, "run": str(run), "mode": mode, "at": at, "kill_after": kill_after}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _serve() -> None:
    from tests import preload  # noqa: F401

    # isort: split
    import megatron_npd.data.packing
    import megatron_npd.loop.schedule
    import megatron_npd.models.convert
    import megatron_npd.rollout.generate
    import megatron_npd.selection.select
    import megatron_npd.teacher.annotate  # noqa: F401
    from tests.faults import disturb, world

    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as count:
            pid = os.fork()
            if pid == 0:
                _child(request, output, count, disturb, world)
            timer = threading.Timer(request["kill_after"], os.kill, (pid, signal.SIGKILL))
            if request["kill_after"]:
                timer.start()
            _, status = os.waitpid(pid, 0)
            timer.cancel()
            output.seek(0)
            count.seek(0)
            text, events = output.read(), count.read()
        answer = {"code": os.waitstatus_to_exitcode(status), "events": int(events or 0), "text": text[-4000:]}
        print(json.dumps(answer), flush=True)


def _child(request: dict[str, Any], output: Any, count: Any, disturb: Any, world: Any) -> None:
    code = 1
    try:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdin.close()
        from megatron_npd.log import run_main

        disturbance = disturb.Disturbance(request["mode"], request["at"])
        disturbance.install()
        try:
            run_main(lambda: world.STAGES[request["stage"]](Path(request["run"])))
        except SystemExit as end:
            code = end.code
        os.write(count.fileno(), str(disturbance.count).encode())
    except BaseException:
        import traceback

        os.write(2, traceback.format_exc().encode())
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
