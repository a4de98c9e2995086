"""A rank's micro-batches, one global batch after another, made ahead by a thread."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_npd.config.training import TrainConfig
from megatron_npd.data.batch import PackedBatch
from megatron_npd.data.packed_dataset import PackedDataset
from megatron_npd.data.prefetch import Prefetcher
from megatron_npd.data.row_schedule import ScheduleEntry, microbatch_positions
from megatron_npd.platform.base import Platform, local_rank

_PREFETCHED = 4  # micro-batches made ahead: a pipeline's first stages take several at once


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """What all ranks together train on in a step.

    Attributes:
        samples: Ids of its samples, row by row in the order of position, whatever the layout.
        attention_cost: Sum of the squared lengths of its segments.
    """

    samples: Sequence[str]
    attention_cost: float

    @property
    def sha256(self) -> str:
        """16 hex digits of a hash of the samples' ids, each with a newline: the same in every layout."""
        return hashlib.sha256("".join(f"{name}\n" for name in self.samples).encode()).hexdigest()[:16]


class BatchLoader(Iterator[PackedBatch]):
    """This rank's micro-batches, one global batch after another, made ahead by a thread.

    Attributes:
        rows_consumed: Rows handed out over all ranks, counted when a global batch begins.
        whole: The global batch that began last, on rank 0; None elsewhere.
    """

    def __init__(
        self, data: PackedDataset, cfg: TrainConfig, rows_per_step: int, platform: Platform, rows_consumed: int
    ) -> None:
        self.rows_consumed = rows_consumed
        self.whole: GlobalBatch | None = None
        self._data, self._platform, self._rows_per_step = data, platform, rows_per_step
        dp_size = parallel_state.get_data_parallel_world_size()
        self._layout = {
            "global_batch_size": rows_per_step,
            "micro_batch_size": cfg.micro_batch_size,
            "dp_rank": parallel_state.get_data_parallel_rank(),
            "dp_size": dp_size,
        }
        self._balance = cfg.balance_attention and dp_size > 1
        self._per_step = rows_per_step // (cfg.micro_batch_size * dp_size)
        self._handed_out = 0
        self._batches = Prefetcher(self._make(rows_consumed), depth=_PREFETCHED)

    def extend(self, entry: ScheduleEntry) -> None:
        """Have one more round train from the next global batch on; what was made ahead is dropped."""
        assert self._handed_out % self._per_step == 0 and entry.from_row == self.rows_consumed
        self._batches.close()
        self._data.extend(entry)
        self._batches = Prefetcher(self._make(self.rows_consumed), depth=_PREFETCHED)

    def _make(self, rows_consumed: int) -> Iterator[tuple[PackedBatch, GlobalBatch | None]]:
        self._platform.set_device(local_rank())  # a thread has its own current device
        device = self._platform.device(local_rank())
        for number, (positions, following) in enumerate(pairwise(self._positions(rows_consumed))):
            self._data.will_need(following)  # the kernel reads the next rows while these are gathered
            whole, first = None, rows_consumed + number // self._per_step * self._rows_per_step
            if number % self._per_step == 0 and dist.get_rank() == 0:
                rows = range(first, first + self._rows_per_step)
                costs = self._data.attention_costs(rows)
                whole = GlobalBatch(samples=self._data.sample_ids(rows), attention_cost=float(costs.sum()))
            yield self._data.batch(positions, pin_memory=device.type != "cpu").to(device), whole

    def _positions(self, rows_consumed: int) -> Iterator[list[int]]:
        for first in count(rows_consumed, self._rows_per_step):
            costs = self._data.attention_costs(range(first, first + self._rows_per_step)) if self._balance else None
            yield from microbatch_positions(first, **self._layout, costs=costs)

    def entry(self) -> ScheduleEntry:
        """The schedule's entry of the next global batch's first row."""
        return self._data.entries[self._data.schedule.entry(self.rows_consumed)]

    def __next__(self) -> PackedBatch:
        batch, whole = next(self._batches)
        if self._handed_out % self._per_step == 0:
            self.rows_consumed += self._rows_per_step
            self.whole = whole
        self._handed_out += 1
        return batch

    def take_wait(self) -> float:
        """Seconds waited for micro-batches since the last call."""
        return self._batches.take_wait()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self._batches.close()
