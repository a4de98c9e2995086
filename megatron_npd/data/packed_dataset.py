"""The packed data set: training rows gathered from the memory-mapped store, in an order fixed by the seed.

A row's position in training is the number of rows consumed before it, over all ranks. Position -> (round's packs,
row) is a pure function of ``schedule.jsonl`` and the seed, so that any parallel layout trains on the same rows and a
resumed run goes on where it stopped.

Legend: T tokens of a micro-batch, K teacher columns, S segments, R rows of a packs directory, P prompt tokens, n
response tokens.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from torch import Tensor

from megatron_npd.data.batch import PackedBatch
from megatron_npd.data.store import AnnotationStore, check_token_ids
from megatron_npd.log import UserError
from megatron_npd.manifest import MANIFEST, file_sha256, is_sealed, read_manifest
from megatron_npd.records import LOG_TAIL_FLOOR, PACK_SCHEMA, PACKS_FILE, teacher_record_dtype

PACKS_KIND = "packs"
_CHUNK = 4096  # tokens decoded at a time, so that intermediates stay in the cache


@dataclass(frozen=True, kw_only=True)
class Streams:
    """What a rank reads; positions and cu_seqlens always.

    Attributes:
        tokens: Token ids: the first pipeline stage.
        targets: Labels and loss mask: the last stage.
        teacher: Teacher rows and generator log-probs: the last stage, where the loss has a KD part.
    """

    tokens: bool = True
    targets: bool = True
    teacher: bool = True


@dataclass(frozen=True, kw_only=True)
class ScheduleEntry:
    """One line of ``schedule.jsonl``: from which row on which packs train.

    Attributes:
        from_row: Rows consumed (over all ranks, since the run's start) when these packs begin to train.
        packs: Packs directory, relative to the schedule file.
        round: Index of the round.
        policy_version: Version of the policy that generated its answers.
    """

    from_row: int
    packs: str
    round: int
    policy_version: str


def load_schedule(path: str | Path) -> list[ScheduleEntry]:
    """Read ``schedule.jsonl``; a packs directory gives the schedule of that directory alone.

    Raises:
        UserError: The path holds neither, a line is not an entry, or ``from_row`` does not begin at 0 and rise.
    """
    path = Path(path)
    if is_sealed(path):
        provenance = read_manifest(path, kind=PACKS_KIND, verify=False).provenance
        version = str(provenance["policy_version"])
        return [ScheduleEntry(from_row=0, packs=".", round=int(provenance["round"]), policy_version=version)]
    if not path.is_file():
        raise UserError(f"data_path must be a sealed packs directory or a schedule.jsonl, got {path}; check the path")
    entries: list[ScheduleEntry] = []
    names = {field.name: {"int": int, "str": str}[str(field.type)] for field in fields(ScheduleEntry)}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number} must be JSON, got {error}; remove the line and rerun") from error
        if not isinstance(value, dict) or {name: type(item) for name, item in value.items()} != names:
            raise UserError(f"{path} line {number} must have the fields {', '.join(names)}, got {line}")
        entries.append(ScheduleEntry(**value))
    starts = [entry.from_row for entry in entries]
    if not starts or starts[0] != 0 or any(after <= before for before, after in pairwise(starts)):
        raise UserError(f"{path} must have entries with from_row rising from 0, got {starts}; restore the file")
    return entries


class RowSchedule:
    """Which row trains at which position: a pure function of entries, their numbers of rows and the seed.

    Within an entry all rows are seen once before any is seen again; every epoch has its own order.

    Args:
        entries: From ``load_schedule``.
        num_rows: Rows of each entry's packs.
        seed: Seed of the order.
    """

    def __init__(self, entries: Sequence[ScheduleEntry], num_rows: Sequence[int], seed: int) -> None:
        assert len(entries) == len(num_rows) > 0 and entries[0].from_row == 0 and min(num_rows) > 0
        self._starts = [entry.from_row for entry in entries]
        self._num_rows, self._seed = list(num_rows), seed
        self._orders: dict[tuple[int, int], npt.NDArray[np.int64]] = {}

    def locate(self, position: int) -> tuple[int, int]:
        """The index of the entry and the row in its packs that train at ``position`` (rows consumed before)."""
        entry = bisect_right(self._starts, position) - 1
        epoch, place = divmod(position - self._starts[entry], self._num_rows[entry])
        return entry, int(self._order(entry, epoch)[place])

    def epoch(self, position: int) -> float:
        """Passes over the current entry's rows before ``position``."""
        entry = bisect_right(self._starts, position) - 1
        return (position - self._starts[entry]) / self._num_rows[entry]

    def _order(self, entry: int, epoch: int) -> npt.NDArray[np.int64]:
        if (entry, epoch) not in self._orders:
            if len(self._orders) > 1:  # a batch spans two orders at most
                self._orders.clear()
            # Sorted raw bits: numpy promises a stable bit stream, but not a stable shuffle, over its versions.
            bits = np.random.PCG64(np.random.SeedSequence([self._seed, entry, epoch])).random_raw(self._num_rows[entry])
            self._orders[entry, epoch] = np.argsort(bits, kind="stable")
        return self._orders[entry, epoch]


def microbatch_positions(
    rows_consumed: int, *, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[list[int]]:
    """The positions of one rank's micro-batches in the global batch that begins at ``rows_consumed``.

    Over all ranks the lists are disjoint and cover the global batch, whatever the layout.

    Raises:
        UserError: ``global_batch_size`` is no multiple of ``micro_batch_size * dp_size``.
    """
    step = micro_batch_size * dp_size
    if global_batch_size % step:
        raise UserError(
            f"global_batch_size must be a multiple of micro_batch_size x data-parallel ranks = {micro_batch_size} x "
            f"{dp_size}, got {global_batch_size}; change one of them"
        )
    first = rows_consumed + dp_rank * micro_batch_size
    return [
        list(range(first + offset, first + offset + micro_batch_size)) for offset in range(0, global_batch_size, step)
    ]


def decode_teacher(records_T: np.ndarray, vocab_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn teacher records into what the loss takes.

    Args:
        records_T: ``teacher_record_dtype(K)`` [T].
        vocab_size: V*.

    Returns:
        ids int64 [T, K]; log-probs float32 [T, K], rescaled so that their mass is 1 - t_p (METHOD section 2); log t_p
        float32 [T]; generator log-probs float32 [T].

    Raises:
        UserError: An id is out of range or a number is not finite.
    """
    (T,), K = records_T.shape, records_T.dtype["ids"].shape[0]
    ids_TK, logprobs_TK = torch.empty(T, K, dtype=torch.int64), torch.empty(T, K)
    ones_K = torch.ones(K)
    log_tail_T, generator_T = (_contiguous(records_T[name]).float() for name in ("log_tail", "generator_logprob"))
    log_kept_T = torch.log(-torch.expm1(log_tail_T))
    for start in range(0, T, _CHUNK):
        part = slice(start, start + _CHUNK)
        raw_ids = np.ascontiguousarray(records_T["ids"][part])
        check_token_ids(raw_ids, vocab_size, "the store's teacher records")
        ids_TK[part] = torch.from_numpy(raw_ids)
        logprobs = logprobs_TK[part]
        logprobs.copy_(_contiguous(records_T["logprobs"][part]))
        logprobs += (log_kept_T[part] - torch.log(logprobs.exp() @ ones_K))[:, None]
    if not torch.isfinite(logprobs_TK.sum()):
        raise UserError("the store's teacher records must be finite, got inf or NaN; annotate again")
    return ids_TK, logprobs_TK, log_tail_T, generator_T


def _contiguous(field: np.ndarray) -> Tensor:
    """A field of the records by itself: torch takes no strides that are odd multiples of 2 bytes, as with odd K."""
    return torch.from_numpy(np.ascontiguousarray(field))


class PackedRows:
    """The rows of one sealed packs directory over its store.

    Args:
        packs_dir: Sealed directory of kind ``packs``.
        streams: What to read.
        verify: Hash every file of packs and store (once a process) before use.

    Attributes:
        seq_length: Tokens of a row.
        top_k: Width of the teacher records, 0 where the store has none.
        vocab_size: V*.
        policy_version: Of the policy that generated the answers.

    Raises:
        UserError: The directory is damaged, its store is not the one it was made from, or holds no teacher records
            where ``streams`` asks for them.
    """

    def __init__(self, packs_dir: str | Path, *, streams: Streams, verify: bool = True) -> None:
        self.path, self.streams = Path(packs_dir), streams
        provenance = read_manifest(self.path, kind=PACKS_KIND, verify=verify).provenance
        self.seq_length, self._align = int(provenance["seq_length"]), int(provenance["segment_align"])
        self.policy_version = str(provenance["policy_version"])
        self.store = AnnotationStore(self.path / provenance["store"], verify=verify)
        if file_sha256(self.store.path / MANIFEST) != provenance["store_sha256"]:
            raise UserError(f"{self.path} must be packed from {self.store.path} as it is now, got another; pack again")
        self.top_k, self.vocab_size = self.store.top_k, self.store.vocab_size
        if streams.teacher and not self.top_k:
            raise UserError(
                f"{self.store.path} must hold teacher records for kd_alpha > 0, got none; set kd_alpha to 0"
            )
        table = pq.read_table(self.path / PACKS_FILE, schema=PACK_SCHEMA)
        rows, self._offsets, self._lengths, self._samples = (
            table[name].to_numpy() for name in ("row", "offset", "length", "sample_index")
        )
        self._row_starts = np.searchsorted(rows, np.arange(1 + (int(rows[-1]) + 1 if len(rows) else 0)))
        self._check(rows)

    def _check(self, rows: npt.NDArray[np.int32]) -> None:
        lens = self.store.prompt_lens + self.store.response_lens
        first = np.diff(rows, prepend=-1) != 0
        ends = self._offsets + self._lengths
        holds = (
            len(rows) > 0
            and np.all(np.isin(np.diff(rows, prepend=-1), (0, 1)))
            and np.all(self._offsets[first] == 0)
            and np.all(self._offsets[1:][~first[1:]] >= ends[:-1][~first[1:]])
            and np.all(self._offsets % self._align == 0)
            and int(ends.max()) <= self.seq_length
            and 0 <= int(self._samples.min()) <= int(self._samples.max()) < len(self.store)
            and np.array_equal(lens[self._samples], self._lengths)
        )
        if not holds:
            raise UserError(f"{self.path / PACKS_FILE} must hold rows of aligned whole samples, got others; pack again")

    def __len__(self) -> int:
        return len(self._row_starts) - 1

    def segments(self, row: int) -> list[tuple[int, int, int]]:
        """(offset, length, sample index) of each segment of a row, by offset."""
        part = slice(self._row_starts[row], self._row_starts[row + 1])
        columns = (self._offsets[part], self._lengths[part], self._samples[part])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def response_tokens(self, row: int) -> int:
        """Number of response tokens (positions with mask 1) of a row."""
        return int(self.store.response_lens[self._samples[self._row_starts[row] : self._row_starts[row + 1]]].sum())


def make_batch(rows: Sequence[tuple[PackedRows, int]]) -> PackedBatch:
    """Gather rows, laid end to end, from one or more packs directories of one shape (``seq_length``, ``top_k``).

    Labels, mask and teacher rows are shifted inside each segment before padding: record i of a response belongs to
    input position P - 1 + i. The gap up to the next aligned start is masked tail of the segment before it; what is
    left of a row is a masked segment of its own.
    """
    packs = rows[0][0]
    streams, T = packs.streams, packs.seq_length * len(rows)
    tokens_T = np.zeros(T, np.int64)
    mask_T = np.zeros(T, np.float32)
    dtype = teacher_record_dtype(packs.top_k)
    records_T = np.empty(T if streams.teacher else 0, dtype)
    record_bytes = records_T.view(np.uint8)
    filler_bytes = _filler_bytes(packs.top_k, packs.seq_length if streams.teacher else 0)
    size, starts, written = dtype.itemsize, [], 0  # written: first token without a teacher record
    for index, (source, row) in enumerate(rows):
        assert (source.seq_length, source.top_k, source.streams) == (packs.seq_length, packs.top_k, streams)
        base = index * packs.seq_length
        tail = base
        for offset, length, sample in source.segments(row):
            start, end = base + offset, base + offset + length
            starts.append(start)
            tail = -(-end // source._align) * source._align
            first = start + int(source.store.prompt_lens[sample]) - 1  # predicts the first response token
            mask_T[first : end - 1] = 1.0
            if streams.tokens or streams.targets:
                tokens_T[start:end] = source.store.tokens(sample)
            if streams.teacher:
                record_bytes[written * size : first * size] = filler_bytes[: (first - written) * size]
                record_bytes[first * size : (end - 1) * size] = source.store.teacher(sample).view(np.uint8)
                written = end - 1
        if tail < base + packs.seq_length:
            starts.append(tail)
        if streams.teacher:
            record_bytes[written * size : (base + packs.seq_length) * size] = filler_bytes[
                : (base + packs.seq_length - written) * size
            ]
            written = base + packs.seq_length
    if streams.tokens or streams.targets:
        check_token_ids(tokens_T, packs.vocab_size, f"{packs.store.path}")
    bounds = np.array([*starts, T], np.int32)
    lens = np.diff(bounds)
    labels_T = np.append(tokens_T[1:], 0)
    labels_T[mask_T == 0] = 0  # a segment's last position would see the next segment's first token
    ids_TK, logprobs_TK, log_tail_T, generator_T = (
        decode_teacher(records_T, packs.vocab_size) if streams.teacher else (None, None, None, None)
    )
    return PackedBatch(
        tokens=torch.from_numpy(tokens_T)[None] if streams.tokens else None,
        position_ids=torch.from_numpy(np.arange(T) - np.repeat(bounds[:-1], lens).astype(np.int64))[None],
        cu_seqlens=torch.from_numpy(bounds),
        max_seqlen=int(lens.max()),
        labels=torch.from_numpy(labels_T)[None] if streams.targets else None,
        loss_mask=torch.from_numpy(mask_T)[None] if streams.targets else None,
        teacher_ids=ids_TK,
        teacher_logprobs=logprobs_TK,
        teacher_log_tail=log_tail_T,
        generator_logprobs=generator_T,
    )


@lru_cache(maxsize=2)
def _filler_bytes(top_k: int, count: int) -> npt.NDArray[np.uint8]:
    """Valid records for positions that the mask leaves out: uniform over the first ``top_k`` ids."""
    records = np.zeros(count, teacher_record_dtype(top_k))
    records["ids"], records["logprobs"] = np.arange(top_k), -np.log(max(top_k, 1))
    records["log_tail"], records["generator_logprob"] = LOG_TAIL_FLOOR, np.nan
    return records.view(np.uint8)


class PackedDataset:
    """Micro-batches by position, over a schedule or one packs directory.

    Args:
        data_path: ``schedule.jsonl`` or a packs directory.
        seed: Seed of the row order.
        streams: What this rank reads.
        verify: Hash every file (once a process) before use.

    Attributes:
        seq_length: Tokens of a row, the same in all entries.
        top_k: Width of the teacher records.
        vocab_size: V*.
        entries: The schedule.
        schedule: Position -> (entry, row).

    Raises:
        UserError: An entry cannot be read, or its rows have another shape than the first entry's.
    """

    def __init__(self, data_path: str | Path, *, seed: int, streams: Streams, verify: bool = True) -> None:
        path = Path(data_path)
        self.entries = load_schedule(path)
        base = path if path.is_dir() else path.parent
        self._packs = [PackedRows(base / entry.packs, streams=streams, verify=verify) for entry in self.entries]
        shapes = [(packs.seq_length, packs.top_k, packs.vocab_size) for packs in self._packs]
        for entry, shape in zip(self.entries, shapes, strict=True):
            if shape != shapes[0]:
                raise UserError(
                    f"{path}: all packs must have the (seq_length, top_k, vocab_size) {shapes[0]} of the first, "
                    f"got {shape} in {entry.packs}; pack that round again"
                )
        self.seq_length, self.top_k, self.vocab_size = shapes[0]
        self.schedule = RowSchedule(self.entries, [len(packs) for packs in self._packs], seed)

    def batch(self, positions: Sequence[int]) -> PackedBatch:
        """The rows that train at these positions, laid end to end: T = ``len(positions) * seq_length``."""
        located = [self.schedule.locate(position) for position in positions]
        return make_batch([(self._packs[entry], row) for entry, row in located])

    def response_tokens(self, positions: Sequence[int]) -> int:
        """Response tokens (positions with mask 1) of the rows that train at these positions."""
        located = [self.schedule.locate(position) for position in positions]
        return sum(self._packs[entry].response_tokens(row) for entry, row in located)
