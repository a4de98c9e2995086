"""Work done ahead: a background thread that takes an iterator's next items while the caller is busy."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetcher(Generic[Item], Iterator[Item]):
    """Iterates over ``items`` in their order, ``depth`` of them made ahead by one thread.

    What ``items`` raises is raised at the place where its next item would have come; after that, and after the last
    item, the iteration is over. Use as a context manager, or call ``close``: the thread then ends before anything that
    the iterator reads is taken away.

    Args:
        items: Only the thread touches it from now on.
        depth: Items made ahead at most.
    """

    def __init__(self, items: Iterator[Item], *, depth: int) -> None:
        assert depth > 0
        self._items, self._wait, self._over = items, 0.0, False
        # (item, None), then (None, what ended the iteration); put only where there is room, so that the thread never
        # blocks on it for good.
        self._queue: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue()
        self._room = threading.Semaphore(depth)
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            while True:
                self._room.acquire()
                if self._closed:
                    return
                self._queue.put((next(self._items), None))
        except BaseException as error:  # StopIteration too: the caller's iteration ends as this one did
            self._queue.put((None, error))

    def __next__(self) -> Item:
        if self._over:
            raise StopIteration
        start = time.perf_counter()
        item, error = self._queue.get()
        self._wait += time.perf_counter() - start
        if error is not None:
            self._over = True
            self._thread.join()
            raise error
        self._room.release()
        return item  # pyright: ignore[reportReturnType]  (an item unless there is an error)

    def take_wait(self) -> float:
        """Seconds that the caller waited for items since the last call."""
        wait, self._wait = self._wait, 0.0
        return wait

    def close(self) -> None:
        """End the thread, after the item that it is making; items made ahead are dropped."""
        self._closed = self._over = True
        self._room.release()
        self._thread.join()

    def __enter__(self) -> Prefetcher[Item]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
