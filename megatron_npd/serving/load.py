"""How many requests a server is given at once: as many as it works on, by what it says of its queue."""

from __future__ import annotations

import re

_WAITING = re.compile(r"^vllm:num_requests_waiting(?:\{[^}\n]*\})? (\S+)$", re.MULTILINE)


class Load:
    """The requests of one server.

    Args:
        bound: Most at once.

    Attributes:
        limit: How many it may have now.
        in_flight: How many it has.
    """

    def __init__(self, bound: int) -> None:
        self.bound = self.limit = bound
        self.in_flight = 0

    def see(self, waiting: int) -> None:
        """Take in how many requests wait in the server's queue: those it gets no more of, others may take them.

        Where none waits it may have more again, at once what it works on without a queue, then a quarter each time.
        """
        if waiting > 0:
            self.limit = max(1, self.in_flight - waiting)
        else:
            self.limit = min(self.bound, max(self.limit, self.in_flight) + max(1, self.limit // 4))


def waiting_requests(metrics: str) -> int | None:
    """Requests in the queues of a server, of all its engines; None where it does not say (``--disable-log-stats``).

    Args:
        metrics: What it answers on ``/metrics``.
    """
    try:
        found = [int(float(value)) for value in _WAITING.findall(metrics)]
    except (ValueError, OverflowError):
        return None
    return sum(found) if found else None
