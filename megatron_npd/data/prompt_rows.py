"""The rows of a sealed prompts directory, read in parts: columns may hold more than memory, or Arrow's 2 GiB, can."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_npd.records import PROMPTS_FILE, parquet_batches

_BATCH = 1024  # rows read at a time: those of a row group as prompts are written


def rows_of_round(prompts: int, most: int, round_index: int) -> range:
    """The prompts that a round asks, by their rows: rounds take turns, so that all are asked before one is again.

    Args:
        prompts: How many there are.
        most: That a round asks; 0: all of them.
        round_index: Number of the round.
    """
    turns = -(-prompts // most) if most else 1
    return range(round_index % max(turns, 1), prompts, max(turns, 1))


class PromptRows:
    """Rows of ``records.PROMPT_SCHEMA``; the caller has read the directory's manifest.

    Args:
        prompts_dir: Sealed directory of kind ``prompts``.
        most: Rows that there are of a round; 0: all, whatever the round.
        round_index: Number of the round (``rows_of_round``).
    """

    def __init__(self, prompts_dir: str | Path, most: int = 0, round_index: int = 0) -> None:
        self._file = pq.ParquetFile(Path(prompts_dir) / PROMPTS_FILE)
        groups = range(self._file.num_row_groups)
        self._starts = [0, *accumulate(self._file.metadata.row_group(group).num_rows for group in groups)]
        self._rows = rows_of_round(self._starts[-1], most, round_index)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def turns(self) -> int:
        """Rounds until the same rows are asked again."""
        return self._rows.step

    def batches(self, *columns: str) -> Iterator[pa.RecordBatch]:
        """These columns of all rows of the directory, in order."""
        return parquet_batches(self._file, _BATCH, columns=columns)

    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each prompt, int32 [rows]."""
        lengths = [batch.column(0).value_lengths().to_numpy() for batch in self.batches("prompt_ids")]
        return np.concatenate([np.zeros(0, np.int32), *lengths])[self._rows.start :: self._rows.step]

    def read(self, first: int, after: int, *columns: str) -> pa.Table:
        """These columns of the rows ``first`` .. ``after - 1``; row groups apart from them are not read."""
        rows, parts = np.array(self._rows[first:after], np.int64), []
        for group, (at, end) in enumerate(pairwise(self._starts)):
            if not ((rows >= at) & (rows < end)).any():
                continue
            for batch in parquet_batches(self._file, _BATCH, row_groups=[group], columns=columns):
                own = rows[(rows >= at) & (rows < at + batch.num_rows)]
                parts.append(batch.take(pa.array(own - at)))  # these alone are kept: a round may ask few of many
                at += batch.num_rows
        return pa.Table.from_batches(parts).combine_chunks()
