"""Work done ahead: order, bound, errors, and an end without a thread left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from megatron_npd.data.prefetch import Prefetcher


def test_items_come_in_order_and_the_iteration_ends() -> None:
    with Prefetcher(iter(range(50)), depth=3) as items:
        assert list(items) == list(range(50))
        assert list(items) == []
        assert items.take_wait() >= 0 and items.take_wait() == 0


@pytest.mark.parametrize("depth", [1, 4])
def test_no_more_than_depth_items_are_made_ahead(depth: int) -> None:
    made, enough = [], threading.Event()

    def source() -> Iterator[int]:
        for item in range(100):
            made.append(item)
            if len(made) == taken + depth:
                enough.set()
            yield item

    taken = 0
    with Prefetcher(source(), depth=depth) as items:
        for _ in range(5):
            assert enough.wait(30)  # the thread goes on to the bound by itself ...
            enough.clear()
            assert len(made) == taken + depth  # ... and waits there
            taken += 1
            next(items)
        assert enough.wait(30)
    assert len(made) <= taken + depth


def test_an_error_comes_up_in_the_caller_at_its_place() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("the third")

    items = Prefetcher(source(), depth=8)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(ValueError, match="the third"):
        next(items)
    assert list(items) == []
    items.close()


def test_closing_ends_the_thread_whatever_it_is_doing() -> None:
    before = threading.active_count()
    for taken in range(3):
        items = Prefetcher(iter(range(1000)), depth=2)
        for _ in range(taken):
            next(items)
        items.close()
        items.close()
        assert list(items) == [] and threading.active_count() == before
