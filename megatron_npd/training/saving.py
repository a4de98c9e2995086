"""When a training run saves, and which of its checkpoints it keeps."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_npd.config.training import TrainConfig
from megatron_npd.durable import fsync_path
from megatron_npd.manifest import is_sealed
from megatron_npd.models.checkpoint import save_checkpoint, saved_state, together
from megatron_npd.training.step import TrainStep

_TEMPORARY = "temporary"  # in a checkpoint's state: a later one replaces it


class Saver:
    """The checkpoints of one call of ``train``: kept ones by steps, and between them one by time, replaced by the next.

    Args:
        cfg: Gives ``save``, ``save_interval`` and ``save_interval_in_mins``.
        stop: The step at which the call ends.
    """

    def __init__(self, cfg: TrainConfig, stop: int) -> None:
        self._cfg, self._stop = cfg, stop
        self._last = time.monotonic()

    def due(self, iteration: int, *, marked: bool, late: bool) -> bool:
        """Whether a checkpoint follows this step; every rank asks after each step, and all get the same answer.

        Args:
            iteration: Number of the step, from 1.
            marked: Whether the checkpoint becomes a policy, so that it is made, and kept.
            late: What all ranks agree on: that rank 0's ``late`` is true, or that the run stops.
        """
        return bool(self._cfg.save) and (marked or self._is_kept(iteration) or late)

    def save(self, step: TrainStep, state: Mapping[str, Any]) -> None:
        """Write a checkpoint of ``state["iteration"]`` steps and remove those that it replaces; all ranks together.

        Raises:
            UserError: As for ``save_checkpoint``, or an earlier checkpoint is damaged; it stays.
        """
        iteration = state["iteration"]
        step.gather_parameters()
        save_checkpoint(
            self._cfg.save,
            iteration,
            model=step.chunks,
            optimizer=step.optimizer,
            scheduler=step.scheduler,
            state=state if "policy" in state or self._is_kept(iteration) else {**state, _TEMPORARY: True},
        )
        with together():
            if dist.get_rank() == 0:
                _remove_replaced(Path(self._cfg.save), iteration)
        self._last = time.monotonic()

    def _is_kept(self, iteration: int) -> bool:
        interval = self._cfg.save_interval
        return iteration == self._stop or bool(interval and iteration % interval == 0)

    def late(self) -> bool:
        """Whether it is time for one, by this rank's clock: no two agree."""
        minutes = self._cfg.save_interval_in_mins
        return bool(minutes) and time.monotonic() - self._last >= 60 * minutes


def _remove_replaced(root: Path, iteration: int) -> None:
    """Remove earlier temporary checkpoints, and what killed attempts left of others.

    A directory first gets another name, so that no part of it is taken for a checkpoint if this is killed.
    """
    for path in root.glob("iter_*"):
        number = re.fullmatch(r"iter_(\d+)", path.name)
        if number and int(number[1]) < iteration and not (is_sealed(path) and not saved_state(path).get(_TEMPORARY)):
            path.rename(root / f".{path.name}")
    fsync_path(root)
    for path in root.glob(".iter_*"):
        shutil.rmtree(path)
