"""When a training run saves, and which of its checkpoints it keeps."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_npd.config.training import TrainConfig
from megatron_npd.durable import fsync_path
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.manifest import is_sealed
from megatron_npd.models.checkpoint import Saving, saved_state, together
from megatron_npd.paths import checkpoints
from megatron_npd.training.step import TrainStep

_TEMPORARY = "temporary"  # in a checkpoint's state: a later one replaces it


class Saver:
    """The checkpoints of one call of ``train``: kept ones by steps, and between them one by time, replaced by the next.

    With ``async_save`` one may be on its way to the disk; it is finished, by all ranks together, at the end of a step
    after which all have written, before the next one, or at the end. One that becomes a policy is waited for.

    Args:
        cfg: Gives ``save``, ``save_interval``, ``save_interval_in_mins``, ``most_recent_k`` and ``async_save``.
        stop: The step at which the call ends.
    """

    def __init__(self, cfg: TrainConfig, stop: int) -> None:
        self._cfg, self._stop = cfg, stop
        self._last = time.monotonic()
        self._saving: Saving | None = None
        self._provenance = {"config": asdict(cfg), "versions": versions()}

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
            UserError: As for ``Saving``.
        """
        self.finish()
        iteration, policy = state["iteration"], "policy" in state
        step.gather_parameters()
        self._saving = Saving(
            self._cfg.save,
            iteration,
            model=step.chunks,
            optimizer=step.optimizer,
            scheduler=step.scheduler,
            state=state if policy or self._is_kept(iteration) else {**state, _TEMPORARY: True},
            provenance=self._provenance,
            in_background=self._cfg.async_save and not policy,
        )
        if policy or not self._cfg.async_save:
            self.finish()
        self._last = time.monotonic()

    def written(self) -> bool:
        """Whether this rank's part of a checkpoint that is not finished is on the disk."""
        return self._saving is not None and self._saving.done()

    def finish(self) -> None:
        """Seal the checkpoint that is on its way, if one is, and remove those that it replaces."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        path = saving.finish()
        with together():
            if dist.get_rank() == 0:
                _remove_replaced(path, self._cfg.most_recent_k)

    def late(self) -> bool:
        """Whether it is time for one, by this rank's clock: no two agree."""
        minutes = self._cfg.save_interval_in_mins
        return bool(minutes) and time.monotonic() - self._last >= 60 * minutes

    def _is_kept(self, iteration: int) -> bool:
        interval = self._cfg.save_interval
        return iteration == self._stop or bool(interval and iteration % interval == 0)


def versions() -> dict[str, str]:
    """What computes: the versions of Python, torch, megatron-core and this package."""
    found = {"python": platform.python_version()}
    for name in ("torch", "megatron-core", "megatron-npd"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _remove_replaced(newest: Path, most_recent: int) -> None:
    """Remove earlier temporary checkpoints, what killed attempts left of others, and those beyond the newest kept ones.

    A policy's is no matter of number. A directory first gets another name, so that no part of it is taken for a
    checkpoint if this is killed.
    """
    root, end = newest.parent, int(newest.name.removeprefix("iter_"))
    earlier = [path for iteration, path in checkpoints(root).items() if iteration <= end]
    left = most_recent or len(earlier)
    for path in reversed(earlier):
        try:
            state = saved_state(path) if is_sealed(path) else {_TEMPORARY: True}
        except UserError as error:  # it is not for an older one to end the run
            get_logger().warning("%s is kept, as its state cannot be read: %s", path, error)
            continue
        if "policy" in state:
            continue
        if path == newest or (left > 0 and not state.get(_TEMPORARY)):
            left -= 1
        else:
            path.rename(root / f".{path.name}")
    fsync_path(root)
    for path in root.glob(".iter_*"):
        shutil.rmtree(path)
