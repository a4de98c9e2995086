"""What a training run goes on from: the newest checkpoint that is whole, which rank 0 finds for all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_npd.config.training import TrainConfig
from megatron_npd.durable import fsync_path
from megatron_npd.errors import Damaged, UserError
from megatron_npd.log import get_logger
from megatron_npd.manifest import is_sealed, read_manifest
from megatron_npd.models.checkpoint import saved_state, together, verify_together
from megatron_npd.models.checkpoint_files import KIND
from megatron_npd.paths import checkpoints


def find_checkpoint(cfg: TrainConfig) -> tuple[Path | None, dict[str, Any]]:
    """The newest whole checkpoint of ``save``, else of ``load``, and its state; all ranks call it together.

    Every file is hashed, by all ranks together. A damaged checkpoint is named and left out; under ``save`` it gets
    another name, ``damaged_iter_0000100``, since the run will come to that step again. What is damaged for one rank has
    to be for rank 0 too, which looks again: a file system may fail a node for a moment.

    Raises:
        UserError: There are checkpoints of the run, and none of them is whole: it would begin anew. Or one cannot be
            read, is another release's, or holds what no hash vouches for.
    """
    damaged: list[str] = []
    while (path := _newest(cfg, damaged)) is not None:
        if damaged and cfg.save and path.parent != Path(cfg.save):
            break
        try:
            verify_together(path)
        except Damaged as error:
            damaged.append(str(path))
            _set_aside(cfg, path, error)
            continue
        answer: list[Any] = [None]
        with together():
            if dist.get_rank() == 0:
                answer = [saved_state(path)]
        dist.broadcast_object_list(answer, src=0)
        return path, answer[0]
    if damaged:
        raise UserError(
            f"{cfg.save or cfg.load} must hold a whole checkpoint, got damage in all of them ({', '.join(damaged)}); "
            "restore one, or give a new save to begin anew"
        )
    return None, {}


def _newest(cfg: TrainConfig, damaged: list[str]) -> Path | None:
    """Rank 0's answer: a shared file system may not show all ranks the same."""
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        found = (path for root in (cfg.save, cfg.load) if root for path in _sealed(Path(root)))
        answer = [next((path for path in found if str(path) not in damaged), None)]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def _sealed(root: Path) -> Iterator[Path]:
    """Checkpoints under a directory, the newest first."""
    return filter(is_sealed, reversed(checkpoints(root).values()))


def _set_aside(cfg: TrainConfig, path: Path, error: UserError) -> None:
    with together():
        if dist.get_rank() == 0:
            _confirm(path, error)
            where = path
            if cfg.save and path.parent == Path(cfg.save):
                names = (f"damaged_{path.name}{f'.{number}' if number else ''}" for number in count())
                where = next(new for new in map(path.with_name, names) if not new.exists())
                path.rename(where)
                fsync_path(path.parent)
            get_logger().warning("%s is damaged (%s) and is left out; it is %s now", path.name, error, where)


def _confirm(path: Path, error: UserError) -> None:
    with suppress(Damaged):
        read_manifest(path, kind=KIND)
        raise UserError(
            f"{path} must be the same for all ranks, got a whole one for rank 0, and for another: {error}; look at how "
            "that node sees the file system"
        )


def check_state(cfg: TrainConfig, state: Mapping[str, Any], checkpoint: Path, rows_per_step: int) -> None:
    """Refuse settings with which a run would not go on with the rows that it would have had.

    Raises:
        UserError: One differs from the checkpoint's.
    """
    if "seed" not in state:  # converted weights
        return
    for name, given in (("seed", cfg.seed), ("replay", cfg.replay)):
        if (trained := state.get(name, 0.0)) != given:
            raise UserError(
                f"{name} must be {trained}, with which {checkpoint} was trained, got {given}: another one would repeat "
                f"some rows and leave others out; give the old {name}"
            )
    before = state.get("global_batch_size", rows_per_step)  # an older version did not note it
    if before != rows_per_step and not cfg.change_global_batch_size:
        raise UserError(
            f"global_batch_size must be {before}, with which {checkpoint} was trained, got {rows_per_step}; give "
            f"--change-global-batch-size to go on after its {state['rows_consumed']} rows with steps of another size"
        )
