"""The rounds of a run as its trainer takes them: each one's packs, once they are sealed, at a global batch's boundary.

The trainer alone appends to ``schedule.jsonl``: rank 0 sees the packs, appends the row from which they train, syncs,
and tells the others; only then does any rank read them. A resumed trainer finds the line and replays it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_npd.config.training import TrainConfig
from megatron_npd.data.row_schedule import PACKS_KIND, ScheduleEntry, load_schedule, schedule_text
from megatron_npd.durable import write_atomic
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.manifest import is_sealed, read_manifest
from megatron_npd.models.checkpoint import together
from megatron_npd.run_dir import RunDir
from megatron_npd.training.interrupt import Interrupt, Interrupted
from megatron_npd.training.refresh_schedule import Progress
from megatron_npd.training.schedule import append_entry

_POLL_SECONDS = 0.2
_TELL_SECONDS = 10.0  # the other ranks are told that often that the wait goes on: a collective must not take long

Result = TypeVar("Result")


class Rounds:
    """The schedule of a trainer's data: of a run that grows, or of packs that are all there.

    Args:
        cfg: ``data_path``: a run's directory, a ``schedule.jsonl``, or a sealed directory of packs; ``updates``,
            ``max_lead`` and ``train_iters``.
        interrupt: What ends a wait for packs, as rank 0 sees it.

    Attributes:
        schedule: What the packed data set is opened from.
        entries: Rounds of a run that grows that are scheduled, the same on all ranks; they may begin at later rows.
        before_waiting: What all ranks do before they wait for packs.
    """

    def __init__(self, cfg: TrainConfig, interrupt: Interrupt) -> None:
        self._interrupt, path = interrupt, Path(cfg.data_path)
        self._run = RunDir(path) if path.is_dir() and not is_sealed(path) else None
        self._updates, self._max_lead, self._train_iters = cfg.updates, cfg.max_lead, cfg.train_iters
        self.schedule = path if self._run is None else self._run.schedule
        self.entries: list[ScheduleEntry] = []
        self.before_waiting: Callable[[], object] = lambda: None

    def begin(self, trained: Sequence[Mapping[str, Any]]) -> None:
        """Have the schedule there, with the first round once its packs are sealed; all ranks call it together.

        Args:
            trained: ``state`` of the checkpoint that the run goes on from.

        Raises:
            UserError: The packs, or the schedule, are damaged, or it is not the one that the checkpoint was trained by.
        """
        if self._run is not None:
            entries = [ScheduleEntry(**entry) for entry in trained]
            self.entries = self._wait(0, lambda seconds: self._begin(entries, seconds))

    def following(self, progress: Progress, iteration: int, rows_consumed: int) -> ScheduleEntry | None:
        """The round that trains from this row on, if a new one does; all ranks call it together before each step.

        A round may train once the policy of its number is marked. The trainer waits for its packs where more than
        ``max_lead`` policies would be marked without it; else it takes them when it sees them. After the last refresh
        it waits for the rounds that are ahead of it too, one after another, so that each trains for an even share of
        the steps that are left: nothing is generated for nothing.

        Args:
            progress: Checkpoints that were marked so far, and steps since.
            iteration: Steps done.
            rows_consumed: At the boundary of a global batch.

        Raises:
            UserError: The packs, or the schedule, are damaged.
            Interrupted: The run is to stop, while it waits.
        """
        index, due = len(self.entries), min(progress.policies, self._updates)
        lead = min(self._max_lead, self._updates)
        # What an earlier attempt scheduled for a later row stands: this one takes nothing before it.
        if self._run is None or index > due or self.entries[-1].from_row >= rows_consumed:
            return None
        if due == self._updates:
            lead -= (lead + 1) * progress.steps // (progress.steps + self._train_iters - iteration)
        if index <= due - lead:
            entry = self._wait(index, lambda seconds: self._append(index, rows_consumed, seconds))
        else:
            entry = _on_rank_0(lambda: self._append(index, rows_consumed, 0.0))
        if entry is not None:
            self.entries.append(entry)
            get_logger().info("round %d trains from row %d on", index, rows_consumed)
        return entry

    def state(self, rows_consumed: int) -> list[dict[str, Any]]:
        """The entries that trained so far, for a checkpoint: with it a lost ``schedule.jsonl`` is written again."""
        return [vars(entry) for entry in self.entries if entry.from_row < rows_consumed]

    def _wait(self, index: int, look: Callable[[float], Result | None]) -> Result:
        assert self._run is not None
        seconds = 0.0
        while (result := _on_rank_0(partial(look, seconds))) is None:
            if _on_any_rank(self._interrupt.asked()):
                raise Interrupted
            if not seconds:
                self.before_waiting()
                get_logger().info("waiting for %s", self._run.packs(index))
            seconds = _TELL_SECONDS
        return result

    def _begin(self, trained: list[ScheduleEntry], seconds: float) -> list[ScheduleEntry] | None:
        """Rank 0: the schedule, as it stands, as the checkpoint knows it, or with the first round."""
        path = self.schedule
        if trained and not path.exists():
            write_atomic(path, schedule_text(trained))
        if not path.exists() and self._append(0, 0, seconds) is None:
            return None
        entries = load_schedule(path)
        if entries[: len(trained)] != trained:
            raise UserError(
                f"{path} must begin with the rounds that the checkpoint was trained with, {trained}, got {entries}; "
                "restore it, or remove it and the trainer writes it again"
            )
        return entries

    def _append(self, index: int, from_row: int, seconds: float) -> ScheduleEntry | None:
        """Rank 0: append a round, if its packs are sealed within these seconds."""
        run, until = self._run, time.monotonic() + seconds
        assert run is not None
        packs = run.packs(index)
        while not is_sealed(packs):
            if time.monotonic() >= until or self._interrupt.asked():
                return None
            time.sleep(_POLL_SECONDS)
        made = read_manifest(packs, kind=PACKS_KIND, verify=False).provenance
        if made["round"] != index:
            raise UserError(f"{packs} must hold round {index}, got round {made['round']}; pack that round again")
        name, version = os.path.relpath(packs, run.root), str(made["policy_version"])
        entry = ScheduleEntry(from_row=from_row, packs=name, round=index, policy_version=version)
        append_entry(run.schedule, entry)
        return entry


def _on_any_rank(asked: bool) -> bool:
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, asked)
    return any(answers)


def _on_rank_0(function: Callable[[], Result]) -> Result:
    """What the function gives on rank 0, on all ranks; what it raises too."""
    result: list[Any] = [None]
    with together():
        if dist.get_rank() == 0:
            result = [function()]
    dist.broadcast_object_list(result, src=0)
    return result[0]
