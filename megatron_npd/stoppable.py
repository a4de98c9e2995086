"""Threads that can be asked to stop: what Ctrl-C is to the main one.

What takes long in one looks at ``stopping``, or calls ``check_stop``; what does not, like a refresh, is waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Stopped(BaseException):
    """Raised in a thread that was asked to stop."""


class StoppedBySignal(SystemExit):
    """Raised in the main thread at a signal that asks a command to stop, and to leave what another call goes on from.

    An exit, for which asyncio's tasks make room as they do for no other exception; with code 0.
    """

    def __init__(self, name: str) -> None:
        super().__init__(0)
        self.name = name


class Worker(threading.Thread):
    """A thread that does one thing, from its construction on.

    Args:
        function: What it does.
        ended: Is set at its end, however that comes.

    Attributes:
        stop: Whether it was asked to stop.
        done: Whether it has ended, or is about to.
        error: What the function raised; None: nothing, or it has not ended.
    """

    def __init__(self, function: Callable[[], object], ended: threading.Event) -> None:
        super().__init__(daemon=True)
        self.stop = self.done = False
        self.error: BaseException | None = None
        self._function, self._ended = function, ended
        self.start()

    def run(self) -> None:
        try:
            self._function()
        except BaseException as error:
            self.error = error
        finally:
            self.done = True
            self._ended.set()


def stopping() -> bool:
    """Whether the thread that asks was asked to stop; never so for threads of another kind."""
    thread = threading.current_thread()
    return isinstance(thread, Worker) and thread.stop


def check_stop() -> None:
    """Raise ``Stopped`` in a thread that was asked to stop."""
    if stopping():
        raise Stopped
