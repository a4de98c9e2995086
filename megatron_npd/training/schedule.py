"""``schedule.jsonl``: which round's packs and which policy train from which row on.

A line is appended and synced before the first step that uses it, and never changed; a resumed run replays the file.
"""

from __future__ import annotations

from pathlib import Path

from megatron_npd.data.row_schedule import ScheduleEntry, load_schedule, schedule_text
from megatron_npd.durable import write_atomic
from megatron_npd.errors import UserError
from megatron_npd.lock import hold_lock
from megatron_npd.manifest import file_inside


def append_entry(path: str | Path, entry: ScheduleEntry) -> None:
    """Append one round to the schedule, durably; a round that stands there already must be the same.

    Raises:
        UserError: The schedule holds the round with other values, ends before the round that precedes it, another
            process is appending to it, or the packs lie outside its directory.
    """
    path = Path(path)
    # Not the directory's own lock, which the run's runner holds.
    with hold_lock(path.parent, name=f".{path.name}.lock", trust_remote_holder=False):
        _append(path, entry)


def _append(path: Path, entry: ScheduleEntry) -> None:
    entries = load_schedule(path) if path.exists() else []
    if entry.round < len(entries):
        if entries[entry.round] != entry:
            raise UserError(
                f"{path} must keep what was scheduled for round {entry.round} ({entries[entry.round]}), got {entry}; "
                "use a new run directory for another configuration"
            )
        return
    if entry.round != len(entries):
        raise UserError(f"{path} must hold round {len(entries)} next, got round {entry.round}; rerun the earlier round")
    file_inside(path.parent, entry.packs)
    write_atomic(
        path, schedule_text([*entries, entry])
    )  # the old lines and the new one, or the old ones: never a torn line
