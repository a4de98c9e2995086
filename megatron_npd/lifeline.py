"""Processes that end with the one that started them, however that one ends.

A killed parent tells nobody. Each of our processes therefore watches those that it belongs to, from a thread and
through pidfds: torchrun's agent, and the process that the environment names (controller or launch script), which may be
further up. Linux's PR_SET_PDEATHSIG would not do: it knows the direct parent alone, torchrun, which stands between a
controller and its ranks, is not ours to change, and it fires when the parent's *thread* ends. vLLM, which runs no code
of ours early enough, is ended by the guard in ``rollout/server.py``.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time

import psutil

_STARTER = "MEGATRON_NPD_STARTER"  # environment: the pid to end with; examples/launch sets it too
_STOP_SECONDS = 30.0  # for what a process does on SIGTERM, like stopping its servers
_watched: set[int] = set()


def child_environment() -> dict[str, str]:
    """This process's environment for a child that is to end with it, as are our programs that the child starts."""
    return os.environ | {_STARTER: str(os.getpid())}


def has_starter() -> bool:
    """Whether one of our programs started this process, rather than a user."""
    return _STARTER in os.environ


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
    try:
        ancestor = os.pidfd_open(pid)
    except ProcessLookupError:
        _end()
        return
    if pid not in (process.pid for process in psutil.Process().parents()):
        _end()  # it ended before we looked, and the number is another process's by now
    threading.Thread(target=_watch, args=(ancestor,), name="lifeline", daemon=True).start()


def _watch(ancestor: int) -> None:
    ended = select.poll()
    ended.register(ancestor, select.POLLIN)
    ended.poll()
    _end()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_STOP_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
