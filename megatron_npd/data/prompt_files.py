"""The records of a JSONL or Parquet file of prompts, read with bounds on what a line or a row may take in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from megatron_npd.records import BadRecord
from megatron_npd.user_files import open_parquet, parse_json, plain_values, read_rows

_BATCH = 1024  # records handed on together
_BATCH_BYTES = 2**23  # of them, or one record; encoding them takes some 200 times as much
_LONGEST = 2**25  # bytes of a record; longer ones are passed over without being held in memory

_GROWTH = 2**30  # of the process, as rows of Parquet are read


@dataclass(frozen=True, kw_only=True)
class Source:
    """One record of the file. ``line`` counts lines (JSONL) or rows (Parquet) from 1; Parquet has no byte offset."""

    line: int
    byte_offset: int | None
    size: int
    value: Any = None
    bad: BadRecord | None = None


def read_batches(path: Path) -> Iterator[list[Source]]:
    """The records of a file, 1024 or 8 MiB of them at a time.

    Raises:
        UserError: A Parquet file cannot be read, or two of its columns have one name.
    """
    batch: list[Source] = []
    size = 0
    for source in _read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path):
        if batch and (len(batch) == _BATCH or size + source.size > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(source)
        size += source.size
    if batch:
        yield batch


def _read_jsonl(path: Path) -> Iterator[Source]:
    offset = 0
    with open(path, "rb") as stream:
        for line in count(1):
            raw = stream.readline(_LONGEST)
            if not raw:
                return
            start, offset = offset, offset + len(raw)
            if len(raw) == _LONGEST and raw[-1:] != b"\n":
                while (rest := stream.readline(_LONGEST)) and rest[-1:] != b"\n":
                    offset += len(rest)
                offset += len(rest)
                bad = BadRecord("line_too_long", f"{offset - start} bytes, at most {_LONGEST} are read")
                yield Source(line=line, byte_offset=start, size=0, bad=bad)
                continue
            text = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
            if not text.strip():
                continue
            value, bad = None, None
            try:
                value = parse_json(text)
            except BadRecord as problem:
                bad = problem
            yield Source(line=line, byte_offset=start, size=len(raw), value=value, bad=bad)


def _read_parquet(path: Path) -> Iterator[Source]:
    """Strings stay in Parquet's dictionaries until their row's turn comes: repeated, they take no room in the file."""
    line = 0
    with open_parquet(path) as file:
        names = [file.schema.column(index).path for index in range(len(file.schema))]
    with open_parquet(path, read_dictionary=names) as file:
        groups = range(file.num_row_groups)
        for batch in read_rows(
            path, file, most=_BATCH, usual_bytes=_BATCH_BYTES, most_bytes=_GROWTH, row_groups=groups
        ):
            whole = _expanded_bytes(batch) <= _BATCH_BYTES
            rows = range(batch.num_rows)
            for part in [batch] if whole else (batch.slice(index, 1) for index in rows):
                size = _expanded_bytes(part) // max(part.num_rows, 1)
                bad = BadRecord("row_too_large", f"{size} bytes, at most {_LONGEST} are read")
                small = size <= _LONGEST
                for value in _values(part) if small else [bad]:
                    line += 1
                    if isinstance(value, BadRecord):
                        yield Source(line=line, byte_offset=None, size=size, bad=value)
                    else:
                        yield Source(line=line, byte_offset=None, size=size, value=value)


def _values(rows: pa.RecordBatch) -> Iterable[Any]:
    """The rows as dictionaries; one by one, which takes longer, where not all of them are."""
    try:
        return rows.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError):
        return plain_values(rows)


def _expanded_bytes(values: pa.RecordBatch | pa.Array) -> int:
    """What the values take once every string of a dictionary is written out."""
    if isinstance(values, pa.RecordBatch):
        return sum(_expanded_bytes(column) for column in values.columns)
    if isinstance(values, pa.DictionaryArray):
        lengths = pc.call_function("binary_length", [values.dictionary]).take(values.indices)
        return values.indices.nbytes + (lengths.sum().as_py() or 0)
    if isinstance(values, pa.MapArray):  # flatten takes no maps, and keys and items are those before the slice, too
        first, after = values.offsets[0].as_py(), values.offsets[-1].as_py()
        parts = (part.slice(first, after - first) for part in (values.keys, values.items))
        return 4 * len(values) + sum(map(_expanded_bytes, parts))
    if isinstance(values, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        return 4 * len(values) + _expanded_bytes(values.flatten())
    if isinstance(values, pa.StructArray):
        return sum(_expanded_bytes(column) for column in values.flatten())
    return values.nbytes
