"""The rounds of a run as its trainer takes them: each one's packs, once they are sealed, at a global batch's boundary.

The trainer alone appends to ``schedule.jsonl``: rank 0 sees the packs, appends the row from which they train, syncs,
and tells the others; only then does any rank read them. A resumed trainer finds the line and replays it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch.distributed as dist

from megatron_npd.data.row_schedule import PACKS_KIND, ScheduleEntry, load_schedule
from megatron_npd.log import get_logger
from megatron_npd.manifest import is_sealed, read_manifest
from megatron_npd.models.checkpoint import together
from megatron_npd.run_dir import RunDir
from megatron_npd.training.schedule import append_entry

_POLL_SECONDS = 0.2
_TELL_SECONDS = 10.0  # the other ranks are told that often that the wait goes on: a collective must not take long


class Rounds:
    """The schedule of a trainer's data: of a run that grows, or of packs that are all there.

    Args:
        data_path: A run's directory, a ``schedule.jsonl``, or a sealed directory of packs.
    """

    def __init__(self, data_path: str) -> None:
        path = Path(data_path)
        self._run = RunDir(path) if path.is_dir() and not is_sealed(path) else None
        self.schedule = path if self._run is None else self._run.schedule

    @property
    def grows(self) -> bool:
        """Whether further rounds may come."""
        return self._run is not None

    def take(self, index: int, from_row: int, *, wait: bool) -> bool:
        """Have a round's packs train from a row on, if they do not yet; all ranks call it together.

        Args:
            index: Number of the round.
            from_row: Rows consumed.
            wait: Until they are sealed.

        Returns:
            Whether they stand in the schedule; without a run, whose schedule is what it is, always.

        Raises:
            UserError: The packs, or the schedule, are damaged.
        """
        if self._run is None:
            return True
        waited = False
        while not (taken := self._together(index, from_row, _TELL_SECONDS if wait else 0.0)) and wait:
            if not waited:
                get_logger().info("waiting for %s", self._run.packs(index))
            waited = True
        return taken

    def _together(self, index: int, from_row: int, seconds: float) -> bool:
        answer = [False]
        with together():
            if dist.get_rank() == 0:
                answer = [self._look(index, from_row, seconds)]
        dist.broadcast_object_list(answer, src=0)
        return answer[0]

    def _look(self, index: int, from_row: int, seconds: float) -> bool:
        """Rank 0: append the round, once it is sealed, unless it stands there."""
        run, until = self._run, time.monotonic() + seconds
        assert run is not None
        if run.schedule.exists() and index < len(load_schedule(run.schedule)):
            return True
        packs = run.packs(index)
        while not is_sealed(packs):
            if time.monotonic() >= until:
                return False
            time.sleep(_POLL_SECONDS)
        version = str(read_manifest(packs, kind=PACKS_KIND, verify=False).provenance["policy_version"])
        name = os.path.relpath(packs, run.root)
        append_entry(run.schedule, ScheduleEntry(from_row=from_row, packs=name, round=index, policy_version=version))
        return True
