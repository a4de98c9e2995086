"""Runs stages in fresh processes, each forked from one that has imported everything and run nothing.

``python -m tests.faults.zygote`` reads a request a line (JSON) and answers a line.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a stage's process ended.

    Attributes:
        code: Exit code, or minus the signal.
        events: Events counted, where it was not killed.
        seconds: From the stage's first line to its last, without the fork before and the exit after.
        text: What it printed.
    """

    code: int
    events: int
    seconds: float
    text: str


class Zygote:
    """The parent of the stages' processes; a context manager.

    Args:
        inputs: From ``world.make_inputs``.
        server: URL of the stand-in server.
    """

    def __init__(self, inputs: Path, server: str) -> None:
        environment = os.environ | {"NPD_FAULTS_INPUTS": str(inputs), "NPD_FAULTS_SERVER": server}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(inputs)}
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
        """Run a stage; kill it ``kill_after`` seconds from its first line, where that is not 0."""
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
    import megatron_npd.models.convert
    import megatron_npd.rollout.generate
    import megatron_npd.selection.select
    import megatron_npd.teacher.annotate
    import megatron_npd.training.schedule
    import megatron_npd.training.trainer  # noqa: F401
    from tests.faults import disturb, world

    gc.freeze()  # megatron-core collects garbage by hand, for a quarter of a second with all that was imported
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as count:
            news, tell = os.pipe()  # a byte when the stage begins, and one when it ends; a dead child closes it
            pid = os.fork()
            if pid == 0:
                _child(request, output, count, tell, disturb, world)
            os.close(tell)
            os.read(news, 1)
            begun = time.monotonic()
            if request["kill_after"] and not select.select([news], [], [], request["kill_after"])[0]:
                os.kill(pid, signal.SIGKILL)
            os.read(news, 1)
            seconds = time.monotonic() - begun
            os.close(news)
            _, status = os.waitpid(pid, 0)
            output.seek(0)
            count.seek(0)
            text, events = output.read(), count.read()
        code = os.waitstatus_to_exitcode(status)
        answer = Outcome(code=code, events=int(events or 0), seconds=seconds, text=text[-4000:])
        print(json.dumps(vars(answer)), flush=True)


def _child(request: dict[str, Any], output: Any, count: Any, tell: int, disturb: Any, world: Any) -> None:
    code = 1
    try:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdin.close()
        from megatron_npd.log import run_main

        disturbance = disturb.Disturbance(request["mode"], request["at"])
        disturbance.install()
        os.write(tell, b".")
        try:
            run_main(lambda: (world.STAGES | world.BESIDE)[request["stage"]](Path(request["run"])))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        os.write(tell, b".")
        os.write(count.fileno(), str(disturbance.count).encode())
    except BaseException:
        import traceback

        os.write(2, traceback.format_exc().encode())
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
