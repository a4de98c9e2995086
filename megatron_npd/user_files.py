"""Files that users made, JSON lines and Parquet: no name stands for two values, and reading has a bound in memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from operator import methodcaller
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_npd.errors import UserError
from megatron_npd.limits import memory_growth
from megatron_npd.records import BadRecord

_VALUE_BYTES = 16  # of a number in a list while it is read: the value twice, and its levels


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text in which no key stands twice in one object.

    Raises:
        BadRecord: ``not_utf8``, ``bad_json`` or ``repeated_key``.
    """
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise BadRecord("not_utf8", str(error)) from error
    except (ValueError, RecursionError) as error:
        raise BadRecord("bad_json", str(error)) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        key = _repeated(key for key, _ in pairs)
        raise BadRecord("repeated_key", f"an object must hold a key once, got {key!r} twice; take one of them out")
    return value


def _repeated(names: Iterable[str]) -> str:
    return next((name for name, count in Counter(names).items() if count > 1), "")


def open_parquet(path: Path, **options: Any) -> pq.ParquetFile:
    """A Parquet file of a user.

    Raises:
        UserError: It cannot be read, or two columns have one name, or two fields of a column.
    """
    try:
        file = pq.ParquetFile(path, **options)
        names = _twice(pa.struct(list(file.schema_arrow)))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    if names:
        file.close()
        raise UserError(f"columns of {path} must differ in name, got {names} twice; rename or drop one of them")
    return file


def _unreadable(path: Path, error: BaseException) -> UserError:
    return UserError(f"{path} must be a readable Parquet file, got: {error}; write it again")


def _twice(kind: pa.DataType) -> str:
    """The first name that two fields of a type have, with those above it; "" where there is none."""
    fields = [kind.field(index) for index in range(kind.num_fields)]
    if pa.types.is_struct(kind) and (name := _repeated(field.name for field in fields)):
        return name
    for field in fields:
        if name := _twice(field.type):
            return f"{field.name}.{name}"
    return ""


def read_rows(
    path: Path, file: pq.ParquetFile, *, most: int, usual_bytes: int, most_bytes: int, row_groups: Iterable[int]
) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file, some at a time: what is repeated takes no room in a file, but in memory it does.

    Args:
        path: Its name in errors.
        file: The file.
        most: Rows read at a time.
        usual_bytes: What they may take as far as their averages tell.
        most_bytes: What the process may grow by as they are read.
        row_groups: Which parts of the file.

    Raises:
        UserError: The file cannot be read, or a row takes more memory.
    """
    for group in row_groups:
        rows, done = _rows_at_a_time(file.metadata.row_group(group), most, usual_bytes), 0
        batches = file.iter_batches(rows, row_groups=[group], use_threads=False)  # a thread reserves memory, too
        while True:
            try:
                with memory_growth(most_bytes):
                    batch = next(batches, None)
            except MemoryError as error:
                if rows == 1:
                    raise _too_large(path, file, group, done, f"{most_bytes // 2**20} MiB", error) from error
                rows = 1  # each alone may fit; else it is known which one does not
                batches = islice(file.iter_batches(1, row_groups=[group], use_threads=False), done, None)
                continue
            except (pa.ArrowException, OSError) as error:
                raise _unreadable(path, error) from error
            if batch is None:
                break
            done += len(batch)
            yield batch


def plain_values(rows: pa.RecordBatch, plain: Callable[[Any], Any] = methodcaller("as_py")) -> Iterator[Any]:
    """Each row as a dictionary of values without Arrow; a ``BadRecord`` in the place of one of which a value has none.

    Such are strings that are no UTF-8, times finer than microseconds or beyond the year 9999, time zones that nobody
    knows.

    Args:
        rows: Some rows.
        plain: Gives a value without Arrow.
    """
    for index in range(rows.num_rows):
        row, name = dict[str, Any](), ""
        try:
            for name, column in zip(rows.schema.names, rows.columns, strict=True):
                row[name] = plain(column[index])
        except (pa.ArrowException, ValueError, OverflowError) as error:
            reason = "not_utf8" if isinstance(error, UnicodeDecodeError) else "wrong_type"
            yield BadRecord(reason, f"{name} must hold a value that Python has, got: {error}; convert or drop it")
        else:
            yield row


def _too_large(path: Path, file: pq.ParquetFile, group: int, done: int, most: str, error: BaseException) -> UserError:
    """The error for the row after ``done`` others of a row group, of which no part can be read."""
    row = sum(file.metadata.row_group(earlier).num_rows for earlier in range(group)) + done + 1
    return UserError(
        f"row {row} of {path} (row {done + 1} of row group {group}) must take at most {most} as it is read, got more: "
        f"{error}; it cannot be read in part: write the file again without it, or with a shorter one"
    )


def _rows_at_a_time(group: pq.RowGroupMetaData, most: int, usual_bytes: int) -> int:
    """By the bytes of an average row; one where a value is written as what it shares with the one before."""
    columns = [group.column(index) for index in range(group.num_columns)]
    if any("DELTA_BYTE_ARRAY" in column.encodings for column in columns):
        return 1
    total = group.total_byte_size + _VALUE_BYTES * sum(column.num_values for column in columns)
    return int(min(max(usual_bytes * group.num_rows / max(total, 1), 1), most))
