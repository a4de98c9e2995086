"""Processes that end with the one that started them, however that one ends.

A killed parent tells nobody. Each of our processes therefore looks from a thread at those that it belongs to:
torchrun's agent, and the process that the environment names (``npd run``), which may be further up.
Linux's PR_SET_PDEATHSIG would not do: it knows the direct parent alone, torchrun, which stands between a controller and
its ranks, is not ours to change, and it fires when the parent's *thread* ends. Nor would a pidfd: kernels before 5.3
have none, and Python as conda and uv ship it cannot open one. vLLM, which runs no code of ours early enough, is ended
by the guard in ``serving/server.py``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress

import psutil

_STARTER = "MEGATRON_NPD_STARTER"  # environment: the pid to end with
_LOOK_SECONDS = 0.5
_STOP_SECONDS = 30.0  # for what a process does on SIGTERM, like stopping its servers
_watched: set[int] = set()
_lost = threading.Event()  # one of them has ended


def child_environment() -> dict[str, str]:
    """This process's environment for a child that is to end with it, as are our programs that the child starts."""
    return os.environ | {_STARTER: str(os.getpid())}


def has_starter() -> bool:
    """Whether one of our programs started this process, rather than a user."""
    return _STARTER in os.environ


def has_lost_starter() -> bool:
    """Whether a process that this one is to end with has ended."""
    return _lost.is_set()


def end_with_starter() -> None:
    """Tie this process to the one that the environment names and, under torchrun, to its agent; at once if it is gone.

    Called before anything long by every command and by ``initialize_distributed``; a second call changes nothing.
    """
    if starter := os.environ.get(_STARTER):
        end_with(int(starter))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(os.getppid())


def end_with(pid: int) -> None:
    """End this process when its ancestor ``pid`` ends: SIGTERM, and SIGKILL where that does not help in 30 s."""
    if pid in _watched:
        return
    _watched.add(pid)
    ancestor = next((process for process in psutil.Process().parents() if process.pid == pid), None)
    if ancestor is None:  # it has ended, and its number may be another process's by now
        print(
            f"error: process {pid}, which started this one, must be running and seen from here, got none above it; if "
            f"it runs elsewhere (srun, another container), unset {_STARTER}",
            file=sys.stderr,
            flush=True,
        )
        _end()
    else:
        threading.Thread(target=_watch, args=(ancestor,), name="lifeline", daemon=True).start()


def _watch(ancestor: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        # A zombie's own parent may never ask for it.
        while ancestor.is_running() and ancestor.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_LOOK_SECONDS)
    print(
        f"error: process {ancestor.pid}, which started this one, must run until this one is done, got its end; "
        "start it again, and what is sealed or saved stays",
        file=sys.stderr,
        flush=True,
    )
    _end()


def _end() -> None:
    _lost.set()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_STOP_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
