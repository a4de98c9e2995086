"""The order of training rows: from ``schedule.jsonl`` and the seed to each rank's micro-batches.

A row's position in training is the number of rows consumed before it, over all ranks. Position -> (round's packs,
row) is a pure function of ``schedule.jsonl``, the seed and the share that is replayed, so that any parallel layout
trains on the same rows and a resumed run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from heapq import heappop, heappush
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_npd.errors import UserError
from megatron_npd.manifest import is_sealed, read_manifest

PACKS_KIND = "packs"
_REPLAYED = 1  # sets the orders of what is replayed apart


@dataclass(frozen=True, kw_only=True)
class ScheduleEntry:
    """One line of ``schedule.jsonl``: from which row on which packs train.

    Attributes:
        from_row: Rows consumed (over all ranks, since the run's start) when these packs begin to train.
        packs: Packs directory, relative to the schedule file.
        round: Index of the round.
        policy_version: Version of the policy that generated its responses.
    """

    from_row: int
    packs: str
    round: int
    policy_version: str


def schedule_text(entries: Sequence[ScheduleEntry]) -> str:
    """What ``schedule.jsonl`` holds: a line per entry, then the sha256 of these lines, so that a change shows."""
    lines = "".join(json.dumps(vars(entry), sort_keys=True) + "\n" for entry in entries)
    return lines + json.dumps({"sha256": hashlib.sha256(lines.encode()).hexdigest()}) + "\n"


def load_schedule(path: str | Path) -> list[ScheduleEntry]:
    """Read ``schedule.jsonl``; a packs directory gives the schedule of that directory alone.

    Raises:
        UserError: The path holds neither, a line is not an entry, ``from_row`` does not begin at 0 and rise, or the
            file was cut or changed.
    """
    path = Path(path)
    if is_sealed(path):
        provenance = read_manifest(path, kind=PACKS_KIND, verify=False).provenance
        version = str(provenance["policy_version"])
        return [ScheduleEntry(from_row=0, packs=".", round=int(provenance["round"]), policy_version=version)]
    if not path.is_file():
        raise UserError(f"data_path must be a sealed packs directory or a schedule.jsonl, got {path}; check the path")
    entries: list[ScheduleEntry] = []
    names = {field.name: {"int": int, "str": str}[str(field.type)] for field in fields(ScheduleEntry)}
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be UTF-8 text, got {error}; restore the file") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line or line.startswith('{"sha256"'):
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} must be JSON, got {error}; remove the line and rerun") from error
        if not isinstance(value, dict) or {name: type(item) for name, item in value.items()} != names:
            raise UserError(f"{path} line {number} must have the fields {', '.join(names)}, got {line}")
        entries.append(ScheduleEntry(**value))
    starts = [entry.from_row for entry in entries]
    if not starts or starts[0] != 0 or any(after <= before for before, after in pairwise(starts)):
        raise UserError(f"{path} must have entries with from_row rising from 0, got {starts}; restore the file")
    if text != schedule_text(entries):
        raise UserError(
            f"{path} must end in the sha256 of its lines, got another: it was cut or changed; restore it, or remove it "
            "and its trainer appends its rounds again"
        )
    return entries


class RowSchedule:
    """Which row trains at which position: a pure function of its arguments.

    Within an entry all rows are seen once before any is seen again; every epoch has its own order. Positions that
    replay lie evenly among the others, and go through the rows of all earlier entries in the same way.

    Args:
        entries: From ``load_schedule``.
        num_rows: Rows of each entry's packs.
        seed: Seed of the order.
        replay: Share of the positions, from the second entry on, at which rows of earlier entries train.
    """

    def __init__(
        self, entries: Sequence[ScheduleEntry], num_rows: Sequence[int], seed: int, replay: float = 0.0
    ) -> None:
        assert len(entries) == len(num_rows) > 0 and entries[0].from_row == 0 and min(num_rows) > 0
        self._starts = [entry.from_row for entry in entries]
        self._num_rows, self._seed, self._replay = list(num_rows), seed, replay
        self._ends = list(accumulate(num_rows))  # of each entry's rows among those of all
        self._orders: dict[tuple[int, ...], npt.NDArray[np.int64]] = {}

    def entry(self, position: int) -> int:
        """The index of the entry that trains at ``position``; unlike ``locate`` it may be asked from any thread."""
        return bisect_right(self._starts, position) - 1

    def locate(self, position: int) -> tuple[int, int]:
        """The index of the entry and the row in its packs that train at ``position`` (rows consumed before)."""
        entry = self.entry(position)
        done = position - self._starts[entry]
        replayed, again = (int((done + more) * self._replay) if entry else 0 for more in (0, 1))
        if again > replayed:
            epoch, place = divmod(replayed, self._ends[entry - 1])
            row = int(self._order(self._ends[entry - 1], entry, epoch, _REPLAYED)[place])
            source = bisect_right(self._ends, row)
            return source, row - (self._ends[source] - self._num_rows[source])
        epoch, place = divmod(done - replayed, self._num_rows[entry])
        return entry, int(self._order(self._num_rows[entry], entry, epoch)[place])

    def epoch(self, position: int) -> float:
        """Passes over the current entry's rows before ``position``."""
        entry = self.entry(position)
        done = position - self._starts[entry]
        return (done - (int(done * self._replay) if entry else 0)) / self._num_rows[entry]

    def _order(self, rows: int, *key: int) -> npt.NDArray[np.int64]:
        if key not in self._orders:
            if len(self._orders) > 3:  # a batch spans two orders at most, and two of what is replayed
                self._orders.clear()
            # Sorted raw bits: numpy promises a stable bit stream, but not a stable shuffle, over its versions.
            bits = np.random.PCG64(np.random.SeedSequence([self._seed, *key])).random_raw(rows)
            self._orders[key] = np.argsort(bits, kind="stable")
        return self._orders[key]


def microbatch_positions(
    rows_consumed: int,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    costs: npt.ArrayLike | None = None,
) -> list[list[int]]:
    """The positions of one rank's micro-batches in the global batch that begins at ``rows_consumed``.

    Over all ranks the lists are disjoint and cover the global batch, whatever the layout.

    Args:
        rows_consumed: First position of the global batch.
        global_batch_size: Rows of the global batch.
        micro_batch_size: Rows of a micro-batch.
        dp_rank: This data-parallel rank.
        dp_size: Data-parallel ranks.
        costs: Cost of each row of the global batch: the ranks then get sums as even as greedy choice makes them
            (longest processing time first, as many rows to each), dear rows first. None: in the order of position.

    Raises:
        UserError: ``global_batch_size`` is no multiple of ``micro_batch_size * dp_size``.
    """
    step = micro_batch_size * dp_size
    if global_batch_size % step:
        raise UserError(
            f"global_batch_size must be a multiple of micro_batch_size x data-parallel ranks = {micro_batch_size} x "
            f"{dp_size}, got {global_batch_size}; change one of them"
        )
    if costs is None:
        places = [
            place
            for first in range(dp_rank * micro_batch_size, global_batch_size, step)
            for place in range(first, first + micro_batch_size)
        ]
    else:
        places = _balanced(np.asarray(costs, dtype=np.float64), dp_size)[dp_rank]
    positions = [rows_consumed + place for place in places]
    return [positions[first : first + micro_batch_size] for first in range(0, len(positions), micro_batch_size)]


def _balanced(costs_B: npt.NDArray[np.float64], dp_size: int) -> list[list[int]]:
    """Each rank's places in the global batch, as many for each, every next dearest one to the rank with least."""
    ranks: list[list[int]] = [[] for _ in range(dp_size)]
    open_ranks = [(0.0, rank) for rank in range(dp_size)]  # a heap: equal sums go by rank
    for place in np.argsort(-costs_B, kind="stable").tolist():
        load, rank = heappop(open_ranks)
        ranks[rank].append(place)
        if len(ranks[rank]) < len(costs_B) // dp_size:
            heappush(open_ranks, (load + float(costs_B[place]), rank))
    return ranks
