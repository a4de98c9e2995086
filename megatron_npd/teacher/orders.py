"""Rounds to annotate as they are named: what an annotator that lives through a run is told by its standard input."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import fields
from queue import Empty, SimpleQueue
from threading import Thread

import torch.distributed as dist

from megatron_npd.config.settings import AnnotateOrder
from megatron_npd.errors import UserError
from megatron_npd.teacher.annotate import Annotator, from_rank_0

_POLL_SECONDS = 0.2  # of ranks that are several: none may wait in a collective, which keeps a device busy


def annotate_orders(annotator: Annotator, lines: Iterable[str]) -> None:
    """Annotate each round that is ordered, until there are no more orders; every rank calls it.

    Args:
        annotator: Of this rank.
        lines: Orders as lines of JSON; rank 0's count, which alone reads them.

    Raises:
        UserError: As ``Annotator.annotate`` does.
    """
    annotator.join()
    orders = SimpleQueue[str | None]()
    alone = dist.get_world_size() == 1
    if dist.get_rank() == 0:
        Thread(target=_read, args=(lines, orders), daemon=True).start()

    def following() -> str | None:
        try:
            return orders.get(block=alone)
        except Empty:
            return ""

    while (line := from_rank_0(following)) is not None:
        if line.strip():
            annotator.annotate(_order(line))
        else:
            time.sleep(_POLL_SECONDS)


def _order(line: str) -> AnnotateOrder:
    names = ", ".join(field.name for field in fields(AnnotateOrder))
    try:
        return AnnotateOrder(**json.loads(line))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"an order must be a line of JSON with {names}, got {line.strip()[:200]}; {error}") from error


def _read(lines: Iterable[str], orders: SimpleQueue[str | None]) -> None:
    for line in lines:
        orders.put(line)
    orders.put(None)
