"""Teacher data made elsewhere becomes a store: sealed shards from ranges of records, by any number of processes.

A shard is a function of its records alone, so that the store's bytes do not depend on the number of workers or on
where an earlier attempt was killed. What a record may look like: ``store/external.py``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice, pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_npd.errors import UserError
from megatron_npd.lifeline import end_with
from megatron_npd.log import get_logger, progress
from megatron_npd.manifest import Manifest, file_sha256, read_manifest, seal, sealed_from, writing
from megatron_npd.quarantine import QUARANTINE_FILE, check_quarantined, in_words
from megatron_npd.records import SAMPLE_SCHEMA, SAMPLES_FILE, BadRecord
from megatron_npd.store.annotation_store import SHARD_KIND, STORE_KIND, StoreShardWriter
from megatron_npd.store.external import Sample, parse_sample
from megatron_npd.store.repeats import find_repeated, sample_hashes
from megatron_npd.store.teacher_records import count_in_top_k, warn_of_few_in_top_k
from megatron_npd.user_files import open_parquet, parse_json, plain_values, read_rows

_LINE_BYTES = 2**30  # a longer line is no record: an answer for 32768 tokens with 10 alternatives has some 40 MB
_PARQUET_ROWS = 16  # read at a time
_GROWTH = 2**32  # bytes of the process, as rows of Parquet are read


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A shard's records: ``count`` lines (JSONL) or rows (Parquet) from ``first`` on; ``offset`` bytes before them."""

    source: Path
    shard: Path
    first: int
    count: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class _Setting:
    top_k: int
    vocab_size: int
    provenance: dict[str, Any]

    def parse(self, value: Any) -> Sample:
        """The sample in a record; BadRecord where it holds none."""
        if isinstance(value, BadRecord):
            raise value
        version = self.provenance["policy_version"]
        return parse_sample(value, top_k=self.top_k, vocab_size=self.vocab_size, policy_version=version)


def preprocess(
    sources: Sequence[str | Path],
    out_dir: str | Path,
    *,
    top_k: int,
    vocab_size: int,
    policy_version: str = "data",
    shard_size: int = 4096,
    workers: int = 1,
    max_quarantined: float = 0.1,
) -> Manifest:
    """Turn records or saved answers of a server into a sealed store (``store/annotation_store.py``).

    Bad records are quarantined in each shard's ``quarantine.jsonl`` with file, line and reason. Records of one id and
    content are merged. Sealed shards of a killed attempt are kept.

    Args:
        sources: ``.jsonl`` or ``.parquet`` files, in order.
        out_dir: Directory to seal; one sealed from the same input is left as it is.
        top_k: k of the store; 0: tokens alone.
        vocab_size: V* of the student.
        policy_version: Of the policy that generated the responses.
        shard_size: Records a shard.
        workers: Processes; 1 works in this one.
        max_quarantined: Share of the records that may be quarantined.

    Returns:
        The manifest. Counts: the books, ``response_tokens``, and how many of these are ``in_top_k``.

    Raises:
        UserError: A file cannot be read, an id stands for two contents, too much was quarantined, or nothing is left.
    """
    out_dir, paths = Path(out_dir), [Path(source) for source in sources]
    if shard_size < 1 or workers < 1 or not 0 <= top_k <= vocab_size:
        raise UserError(
            f"shard_size and workers must be at least 1 and top_k in 0..{vocab_size}, "
            f"got {shard_size}, {workers} and {top_k}; change them"
        )
    provenance = {
        "top_k": top_k,
        "vocab_size": vocab_size,
        "round": 0,
        "policy_version": policy_version,
        "shard_size": shard_size,
        "sources": [_source_sha256(path) for path in paths],
    }
    if manifest := sealed_from(out_dir, kind=STORE_KIND, provenance=provenance):
        return manifest
    parts = _parts(paths, out_dir, shard_size)
    setting = _Setting(top_k=top_k, vocab_size=vocab_size, provenance=provenance)
    with writing(out_dir, resume=True):
        books = _convert_all(parts, setting, workers, max_quarantined)
        dropped, where = in_words(books["quarantined"]), ", ".join(map(str, paths))
        if not books["kept"]:
            raise UserError(
                f"{where} must hold a usable record, got {books['in']} records, {dropped}; see {QUARANTINE_FILE} in "
                f"the shards of {out_dir}"
            )
        if top_k:
            warn_of_few_in_top_k(books, out_dir)
        manifest = seal(out_dir, kind=STORE_KIND, provenance=provenance, counts=books)
    note = f"; {dropped} (see {QUARANTINE_FILE} in its shards)" if books["quarantined"] else ""
    get_logger().info("%d of %d records in %s%s", books["kept"], books["in"], out_dir, note)
    return manifest


def _source_sha256(path: Path) -> str:
    if path.suffix not in (".jsonl", ".parquet") or not path.is_file():
        raise UserError(f"input must be .jsonl or .parquet files, got {path}; check the path")
    return file_sha256(path)


def _parts(paths: Sequence[Path], out_dir: Path, shard_size: int) -> list[_Part]:
    parts: list[_Part] = []
    for path in paths:
        starts = _jsonl_starts(path, shard_size) if path.suffix == ".jsonl" else _parquet_starts(path, shard_size)
        for (first, offset), (after, _) in pairwise(starts):
            shard = out_dir / f"shard-{len(parts):05d}"
            parts.append(_Part(source=path, shard=shard, first=first, count=after - first, offset=offset))
    return parts


def _jsonl_starts(path: Path, shard_size: int) -> Iterator[tuple[int, int]]:
    """Line and byte where each shard begins, and those of the file's end."""
    lines = offset = 0
    yield 0, 0
    with open(path, "rb") as stream:
        while raw := stream.readline(_LINE_BYTES):
            offset += len(raw)
            lines += raw.endswith(b"\n") or not stream.peek(1)
            if lines and lines % shard_size == 0 and raw.endswith(b"\n") and stream.peek(1):
                yield lines, offset
    if lines:
        yield lines, offset


def _parquet_starts(path: Path, shard_size: int) -> Iterator[tuple[int, int]]:
    with open_parquet(path) as file:
        rows = file.metadata.num_rows
    yield from ((row, 0) for row in range(0, rows, shard_size))
    if rows:
        yield rows, 0


def _convert_all(parts: list[_Part], setting: _Setting, workers: int, max_quarantined: float) -> dict[str, Any]:
    """The books of all shards, converted where they are not sealed yet."""
    total = sum(part.count for part in parts)
    reasons, hashes = Counter[str](), []
    convert = partial(_convert, setting=setting)
    pool = nullcontext()
    if workers > 1:
        pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin_worker, initargs=(os.getpid(),))
    with pool as executor, progress(total, "preprocess", "record") as bar:
        try:
            for part, own in zip(parts, executor.map(convert, parts) if executor else map(convert, parts), strict=True):
                hashes.append(own)
                reasons.update(_counts(part)["quarantined"])
                check_quarantined(reasons, total, max_quarantined, part.source)
                bar.update(part.count)
        except BaseException:
            if executor:
                executor.shutdown(cancel_futures=True)
            raise
    repeated = find_repeated(hashes, [part.shard for part in parts], partial(_two_contents, parts, setting))
    for number, places in repeated.items():  # rare: the shard is made again without them
        shutil.rmtree(parts[number].shard)
        convert(parts[number], skip=frozenset(places))
    books = [_counts(part) for part in parts]
    reasons = sum((Counter(book["quarantined"]) for book in books), Counter())
    sums = {name: sum(book[name] for book in books) for name in ("in", "kept", "response_tokens", "in_top_k")}
    check_quarantined(reasons, sums["in"], max_quarantined, "the input")
    return {**sums, "quarantined": dict(sorted(reasons.items())), "pending": 0}


def _two_contents(parts: list[_Part], setting: _Setting, name: str, numbers: list[int]) -> UserError:
    """The error for records of two contents under one sample id, with the id and the lines that users know."""
    found: dict[tuple[int, bytes, bytes], str] = {}
    row: dict[str, Any] = {}
    for part in (parts[number] for number in numbers):
        for line, value in _read(part):
            with suppress(BadRecord):
                sample = setting.parse(value)
                if sample.row["sample_id"] == name:
                    row, items = sample.row, b"".join(items.tobytes() for items in sample.streams.values())
                    content = row["prompt_len"], sample.tokens.tobytes(), items
                    found.setdefault(content, f"line {line} of {part.source}")
    first, second, *_ = found.values()
    return UserError(
        f"records must differ in id or path, got id {row['prompt_id']!r} with path {row['path']} on {first} and, with "
        f"other content, on {second}; give several responses to one prompt a path each (0, 1, ...), or rename one of "
        "the ids"
    )


def _counts(part: _Part) -> Mapping[str, Any]:
    return read_manifest(part.shard, kind=SHARD_KIND, verify=False).counts


def _begin_worker(parent: int) -> None:
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group: the parent alone answers it


def _convert(part: _Part, *, setting: _Setting, skip: frozenset[int] = frozenset()) -> npt.NDArray[np.uint64]:
    """Make and seal a shard where it is not sealed yet; ``skip``: places of samples that are repeated.

    Returns:
        Hash of the id and hash of the content of each sample [n, 2].
    """
    provenance = setting.provenance | {"first": part.first, "count": part.count}
    if not sealed_from(part.shard, kind=SHARD_KIND, provenance=provenance):
        with writing(part.shard) as directory:
            counts = _write_shard(part, directory, setting, skip)
            seal(directory, kind=SHARD_KIND, provenance=provenance, counts=counts)
    return sample_hashes(part.shard, setting.top_k)


def _write_shard(part: _Part, directory: Path, setting: _Setting, skip: frozenset[int]) -> dict[str, Any]:
    reasons: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    accepted = in_top_k = 0
    writer = StoreShardWriter(directory, setting.top_k, vocab_size=setting.vocab_size)
    with open(directory / QUARANTINE_FILE, "w", encoding="utf-8") as quarantine:
        for line, value in _read(part):
            try:
                sample = setting.parse(value)
                accepted += 1
                if accepted - 1 in skip:
                    raise BadRecord("duplicate", f"the same sample as before: {sample.row['sample_id']}")
            except BadRecord as problem:
                reasons[problem.reason] += 1
                entry = {"file": part.source.name, "line": line, "reason": problem.reason, "detail": str(problem)[:500]}
                quarantine.write(json.dumps(entry) + "\n")
                continue
            writer.add(sample.tokens, **sample.streams, checked=True)
            if (teacher := sample.streams.get("teacher")) is not None:
                in_top_k += count_in_top_k(teacher, sample.tokens[-len(teacher) :])
            rows.append(sample.row)
    writer.finalize()
    pq.write_table(pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA), directory / SAMPLES_FILE)
    return {
        "in": len(rows) + reasons.total(),
        "kept": len(rows),
        "quarantined": dict(sorted(reasons.items())),
        "pending": 0,
        "response_tokens": sum(row["response_len"] for row in rows),
        "in_top_k": in_top_k,
    }


def _read(part: _Part) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and value of each record of a part; a ``BadRecord`` where the line holds none."""
    if part.source.suffix == ".parquet":
        yield from _read_rows(part)
        return
    with open(part.source, "rb") as stream:
        stream.seek(part.offset)
        for line in range(part.first + 1, part.first + part.count + 1):
            raw = stream.readline(_LINE_BYTES)
            if len(raw) == _LINE_BYTES and not raw.endswith(b"\n"):
                while (more := stream.readline(_LINE_BYTES)) and not more.endswith(b"\n"):
                    pass
                yield line, BadRecord("line_too_long", f"a line must be shorter than {_LINE_BYTES} bytes")
                continue
            text = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
            if not text.strip():
                continue
            try:
                yield line, _parse_json(text)
            except BadRecord as problem:
                yield line, problem


def _parse_json(text: bytes) -> Any:
    """What a line holds.

    msgspec takes a quarter of json's time, but not NaN and infinity, which json writes.

    Raises:
        BadRecord: It holds no JSON value, or a key of the record stands twice: msgspec takes the last.
    """
    try:
        value = msgspec.json.decode(text)
        names = [json.dumps(key).encode() for key in value] if isinstance(value, dict) else []
        if again := [name for name in names if text.count(name) > 1]:  # in values, or twice as a key
            parts = [bytes(part) for part in msgspec.json.decode(text, type=dict[str, msgspec.Raw]).values()]
            if any(text.count(name) > 1 + sum(part.count(name) for part in parts) for name in again):
                return parse_json(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return parse_json(text)
    return value


def _read_rows(part: _Part) -> Iterator[tuple[int, Any]]:
    with open_parquet(part.source) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = [0, *accumulate(sizes)]
        groups = [
            group
            for group, (start, end) in enumerate(pairwise(starts))
            if start < part.first + part.count and end > part.first
        ]
        limits = {"most": _PARQUET_ROWS, "usual_bytes": _LINE_BYTES, "most_bytes": _GROWTH}
        batches = read_rows(part.source, file, row_groups=groups, **limits)
        rows = (row for batch in batches for row in plain_values(batch, _plain))
        skipped = part.first - starts[groups[0]]
        yield from enumerate(islice(rows, skipped, skipped + part.count), start=part.first + 1)


def _plain(value: pa.Scalar) -> Any:
    """A value without Arrow; a list of numbers, or of equally long lists of numbers, as an array."""
    if not isinstance(value, pa.ListScalar | pa.LargeListScalar) or not value.is_valid:
        return value.as_py()
    numbers, width = value.values, None
    if _is_list(numbers.type) and not numbers.null_count and len(numbers):
        fixed = pa.types.is_fixed_size_list(numbers.type)
        widths = [numbers.type.list_size] if fixed else numbers.value_lengths().unique().to_pylist()
        if len(widths) != 1:
            return value.as_py()
        numbers, width = numbers.flatten(), widths[0]
    if numbers.null_count or not (pa.types.is_integer(numbers.type) or pa.types.is_floating(numbers.type)):
        return value.as_py()
    array = numbers.to_numpy()
    return array if width is None else array.reshape(-1, width)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
