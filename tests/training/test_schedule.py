"""The schedule file: boundaries, appending, and refusing to change what was scheduled."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_npd.data.row_schedule import ScheduleEntry, load_schedule
from megatron_npd.errors import UserError
from megatron_npd.lock import LOCK, hold_lock
from megatron_npd.training.refresh_schedule import round_boundaries
from megatron_npd.training.schedule import append_entry


def entry(index: int, from_row: int) -> ScheduleEntry:
    return ScheduleEntry(
        from_row=from_row, packs=f"rounds/{index:04d}/packs", round=index, policy_version=f"v{index:04d}"
    )


@pytest.mark.parametrize(
    ("steps", "updates", "expected"), [(100, 0, [100]), (100, 1, [50, 100]), (100, 2, [33, 66, 100]), (3, 2, [1, 2, 3])]
)
def test_updates_are_spread_evenly(steps: int, updates: int, expected: list[int]) -> None:
    assert round_boundaries(steps, updates) == expected


def test_appending_twice_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "schedule.jsonl"
    append_entry(path, entry(0, 0))
    append_entry(path, entry(1, 80))
    before = path.read_bytes()
    append_entry(path, entry(0, 0))
    append_entry(path, entry(1, 80))
    assert path.read_bytes() == before
    assert load_schedule(path) == [entry(0, 0), entry(1, 80)]


def test_a_scheduled_round_cannot_be_changed_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "schedule.jsonl"
    append_entry(path, entry(0, 0))
    with pytest.raises(UserError, match="must keep what was scheduled for round 0"):
        append_entry(path, entry(0, 8))
    with pytest.raises(UserError, match="must hold round 1 next, got round 2"):
        append_entry(path, entry(2, 160))
    assert load_schedule(path) == [entry(0, 0)]


def test_one_process_appends_at_a_time_beside_the_runs_controller(tmp_path: Path) -> None:
    path = tmp_path / "schedule.jsonl"
    append_entry(path, entry(0, 0))
    with (
        hold_lock(tmp_path, name=".schedule.jsonl.lock"),
        pytest.raises(UserError, match=f"one writer, got a second one beside process {os.getpid()}"),
    ):
        append_entry(path, entry(1, 80))
    with hold_lock(tmp_path):
        append_entry(path, entry(1, 80))
        assert (tmp_path / LOCK).exists() and len(load_schedule(path)) == 2
