"""The order of rows: epochs, schedules, and what each rank of a layout trains on."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from megatron_npd.data.row_schedule import (
    RowSchedule,
    ScheduleEntry,
    load_schedule,
    microbatch_positions,
    schedule_text,
)
from megatron_npd.errors import UserError


def entry(from_row: int, packs: str = "p", round_index: int = 0) -> ScheduleEntry:
    return ScheduleEntry(from_row=from_row, packs=packs, round=round_index, policy_version="v")


WHOLE = schedule_text([entry(0, "a"), entry(7, "b", 1)])


def test_the_order_is_a_permutation_an_epoch_and_a_function_of_the_position() -> None:
    entries, rows = [entry(0), entry(25)], [10, 7]
    schedule = RowSchedule(entries, rows, seed=5)
    order = [schedule.locate(position) for position in range(60)]

    assert [place for place, _ in order] == [0] * 25 + [1] * 35
    first = [row for _, row in order[:25]]
    assert sorted(first[:10]) == sorted(first[10:20]) == list(range(10)) and first[:10] != first[10:20]
    second = [row for _, row in order[25:]]
    assert all(sorted(second[start : start + 7]) == list(range(7)) for start in range(0, 35, 7))
    again = RowSchedule(entries, rows, seed=5)
    assert [again.locate(position) for position in reversed(range(60))] == order[::-1]
    assert [RowSchedule(entries, rows, seed=6).locate(position) for position in range(60)] != order
    assert (
        RowSchedule([*entries, entry(40)], [*rows, 3], seed=5).locate(39) == order[39]
    )  # a later round changes nothing
    assert schedule.epoch(10) == 1.0 and schedule.epoch(25) == 0.0


@pytest.mark.parametrize("replay", [0.25, 0.1, 0.7])
def test_a_share_of_the_rows_comes_from_all_earlier_entries(replay: float) -> None:
    """Evenly among the others; what is replayed, and what is not, goes through its rows once before any comes again."""
    entries, rows = [entry(0), entry(25), entry(125)], [10, 7, 5]
    schedule = RowSchedule(entries, rows, seed=5, replay=replay)
    order = [schedule.locate(position) for position in range(425)]
    assert order[:25] == [RowSchedule(entries, rows, seed=5).locate(position) for position in range(25)]
    for index, first, end in ((1, 25, 125), (2, 125, 425)):
        part = order[first:end]
        again = [place for place in part if place[0] < index]
        number = sum(rows[:index])
        assert abs(len(again) - replay * len(part)) <= 1
        gaps = np.diff([at for at, place in enumerate(part) if place[0] < index])
        assert gaps.max() - gaps.min() <= 1
        for epoch in range(len(again) // number):
            seen = again[epoch * number : (epoch + 1) * number]
            assert sorted(seen) == [(source, row) for source in range(index) for row in range(rows[source])]
        own = [row for source, row in part if source == index]
        assert sorted(own[: rows[index]]) == list(range(rows[index]))
    assert [schedule.locate(position) for position in reversed(range(425))] == order[::-1]
    assert schedule.epoch(125) == 0.0


def test_the_order_never_changes_between_releases() -> None:
    schedule = RowSchedule([entry(0)], [8], seed=1234)
    assert [schedule.locate(position)[1] for position in range(16)] == [5, 6, 3, 7, 4, 1, 2, 0, 7, 3, 0, 2, 4, 6, 5, 1]


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)])
def test_every_layout_trains_on_the_same_global_batch(micro_batch_size: int, dp_size: int) -> None:
    positions = [
        microbatch_positions(40, global_batch_size=8, micro_batch_size=micro_batch_size, dp_rank=rank, dp_size=dp_size)
        for rank in range(dp_size)
    ]
    assert all(len(batch) == micro_batch_size for rank in positions for batch in rank)
    in_order = [row for step in zip(*positions, strict=True) for batch in step for row in batch]
    assert in_order == list(range(40, 48))


def test_a_global_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="global_batch_size must be a multiple"):
        microbatch_positions(0, global_batch_size=6, micro_batch_size=2, dp_rank=0, dp_size=2)


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), [(1, 2), (2, 2), (1, 4), (3, 1)])
def test_balanced_ranks_share_the_same_global_batch_with_even_costs(micro_batch_size: int, dp_size: int) -> None:
    rng = np.random.default_rng(0)
    balanced, by_position = [], []
    for _ in range(30):
        costs = rng.lognormal(0, 1, 12)
        layout = {"global_batch_size": 12, "micro_batch_size": micro_batch_size, "dp_size": dp_size}
        ranks = [microbatch_positions(40, **layout, dp_rank=rank, costs=costs) for rank in range(dp_size)]
        places = [[position - 40 for batch in rank for position in batch] for rank in ranks]
        assert sorted(itertools.chain(*places)) == list(range(12))
        assert all(len(batch) == micro_batch_size for rank in ranks for batch in rank)
        assert len({len(rank) for rank in ranks}) == 1
        assert all(list(costs[rank]) == sorted(costs[rank], reverse=True) for rank in places)
        balanced.append(max(costs[rank].sum() for rank in places))
        by_position.append(costs.reshape(-1, dp_size, micro_batch_size).sum(axis=(0, 2)).max())
        if dp_size == 2:  # against the best of all ways to halve the batch
            halves = [costs[list(part)].sum() for part in itertools.combinations(range(12), 6)]
            assert balanced[-1] <= 1.1 * min(max(half, costs.sum() - half) for half in halves)
    assert dp_size == 1 or np.mean(balanced) < 0.9 * np.mean(by_position)


def test_rows_of_equal_cost_keep_their_order() -> None:
    ranks = [
        microbatch_positions(0, global_batch_size=6, micro_batch_size=1, dp_rank=rank, dp_size=2, costs=[5.0] * 6)
        for rank in range(2)
    ]
    assert ranks == [[[0], [2], [4]], [[1], [3], [5]]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "rising from 0"),
        ('{"from_row": 0, "packs": "a", "round": 0', "line 1 must be JSON"),
        ('{"from_row": 0, "packs": "a", "round": 0}', "line 1 must have the fields"),
        ('{"from_row": "0", "packs": "a", "round": 0, "policy_version": "v"}', "line 1 must have the fields"),
        ("[1]", "line 1 must have the fields"),
        ('{"from_row": 4, "packs": "a", "round": 0, "policy_version": "v"}', "rising from 0"),
        (2 * '{"from_row": 0, "packs": "a", "round": 0, "policy_version": "v"}\n', "rising from 0"),
        ('{"from_row": 0, "packs": "a", "round": 0, "policy_version": "v"}\n', "it was cut or changed"),
        (WHOLE.removesuffix("\n"), "it was cut or changed"),
        (WHOLE.replace('"from_row": 7', '"from_row": 3'), "it was cut or changed"),
        (WHOLE.replace('"b"', '"c"'), "it was cut or changed"),
        ("".join(WHOLE.splitlines(keepends=True)[::2]), "it was cut or changed"),
        ("[" * 100_000, "line 1 must be JSON"),
        ("\udcff", "UTF-8"),
    ],
)
def test_a_broken_schedule_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "schedule.jsonl").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        load_schedule(tmp_path / "schedule.jsonl")


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data_path must be"):
        load_schedule(tmp_path / "nowhere")
