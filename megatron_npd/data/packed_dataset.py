"""The packed data set: training rows gathered from the memory-mapped store, in the order of ``data/row_schedule.py``.

Legend: T tokens of a micro-batch on this rank, K teacher columns, S segments, R rows of a packs directory, P prompt
tokens, n response tokens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from megatron_npd.data.batch import HostBatch
from megatron_npd.data.row_schedule import PACKS_KIND, RowSchedule, ScheduleEntry, load_schedule
from megatron_npd.errors import UserError
from megatron_npd.links import refuse_links
from megatron_npd.manifest import MANIFEST, file_inside, file_sha256, is_sealed, read_manifest, verified_file
from megatron_npd.models.zigzag import ContextShare, check_alignment
from megatron_npd.records import PACK_SCHEMA, PACKS_FILE
from megatron_npd.store.annotation_store import AnnotationStore, check_token_ids
from megatron_npd.store.decode import as_items, check_records, empty_records
from megatron_npd.store.streams import STREAMS, stream_items


class Streams(frozenset[str]):
    """Names of what a rank reads; positions and cu_seqlens always.

    ``tokens``: token ids, for the first pipeline stage. ``targets``: labels and loss mask, for the last. The names of
    ``store.streams.STREAMS`` (``teacher``, ``generator``): for the last stage, where the objective reads them.

    Args:
        read: Whether each is read, by name; those that are not named are.
    """

    def __new__(cls, **read: bool) -> Streams:
        names = ("tokens", "targets", *STREAMS)
        assert read.keys() <= {*names}, f"streams are {names}, got {set(read)}"
        return super().__new__(cls, (name for name in names if read.get(name, True)))

    @property
    def files(self) -> list[str]:
        """Names of the pairs of files that are read; labels come from tokens."""
        return ["tokens"] * bool(self & {"tokens", "targets"}) + [name for name in STREAMS if name in self]


WHOLE = ContextShare()
_CHECKED = 2**20  # segments checked at a time, so that a process holds no array of all


class PackedRows:
    """The rows of one sealed packs directory over its store, both mapped: the processes of a machine share them.

    Args:
        packs_dir: Sealed directory of kind ``packs``.
        streams: What to read.
        verify: Hash every file of packs and store (once a process), and check them against each other, before use.
        root: The run's directory, where it is known: packs and store lie in it.

    Attributes:
        seq_length: Tokens of a row.
        align: Segments start at multiples of it.
        top_k: Width of the teacher records, 0 where the store has none.
        vocab_size: V*.
        policy_version: Of the policy that generated the responses.
        weighted: Whether a sample's loss weighs other than 1.
        checked: bool [R], rows whose items this process has checked: the first reading of each does.

    Raises:
        UserError: The directory is damaged, its store is not the one it was made from, or holds no teacher records
            where ``streams`` asks for them.
    """

    def __init__(
        self, packs_dir: str | Path, *, streams: Streams, verify: bool = True, root: str | Path | None = None
    ) -> None:
        self.path, self.streams = Path(packs_dir), streams
        provenance = read_manifest(self.path, kind=PACKS_KIND, verify=verify).provenance
        self._truncates = provenance["too_long"] == "truncate"
        self.seq_length, self.align = int(provenance["seq_length"]), int(provenance["segment_align"])
        self.policy_version = str(provenance["policy_version"])
        store = self.path / provenance["store"]
        if root is not None:
            file_inside(root, os.path.relpath(self.path, root))
            file_inside(root, os.path.relpath(store, root))
        if not is_sealed(store) or file_sha256(store / MANIFEST) != provenance["store_sha256"]:
            raise UserError(f"{self.path} must be packed from {store} as it is now, got another; pack again")
        self.store = AnnotationStore(store, verify=verify, streams=streams)
        self.top_k, self.vocab_size = self.store.top_k, self.store.vocab_size
        if "teacher" in streams and not self.top_k:
            raise UserError(
                f"{self.store.path} must hold teacher records for distillation, got none; train with --objective sft"
            )
        self._open()
        if verify:
            self._check()
        self.weighted = bool((self._weights != 1).any())
        self.checked = np.zeros(len(self), bool)

    def _open(self) -> None:
        file = verified_file(self.path, PACKS_FILE, kind=PACKS_KIND, verify=False)
        try:
            with pa.memory_map(str(file)) as source:
                table = pa.ipc.open_file(source).read_all()
            assert table.schema.equals(PACK_SCHEMA) and table.num_rows and table["row"].num_chunks == 1, table.schema
        except (pa.ArrowException, OSError, AssertionError) as error:
            raise UserError(f"{file} must hold one batch of {PACK_SCHEMA.names}, got {error}; pack again") from error
        self._rows, self._offsets, self._lengths, self._prompt_lens, self._samples, self._weights = (
            column.chunk(0).to_numpy() for column in table.columns
        )

    def _check(self) -> None:
        before = -1, 0  # row and end of the segment before
        for start in range(0, len(self._rows), _CHECKED):
            before = self._check_part(slice(start, start + _CHECKED), *before)

    def _check_part(self, part: slice, row_before: int, end_before: int) -> tuple[int, int]:
        """Check some segments, of which the first follows one that ends there; where the last one ends."""
        rows, offsets, lengths, samples = (x[part] for x in (self._rows, self._offsets, self._lengths, self._samples))
        prompt_lens, weights = self._prompt_lens[part], self._weights[part]
        steps, ends = np.diff(rows, prepend=np.int32(row_before)), offsets + lengths
        holds = (
            np.all((steps == 0) | (steps == 1))
            and np.all(offsets >= np.where(steps == 0, np.concatenate([[end_before], ends[:-1]]), 0))
            and np.all(offsets[steps == 1] == 0)
            and np.all(offsets % self.align == 0)
            and int(ends.max()) <= self.seq_length
            and 0 <= int(samples.min()) <= int(samples.max()) < len(self.store)
            and np.array_equal(prompt_lens, self.store.prompt_lens[samples])
            and np.array_equal(lengths, self._packed_lens(samples))
            and np.all(prompt_lens < lengths)
            and np.all(np.isfinite(weights) & (weights >= 0))
        )
        if not holds:
            raise UserError(f"{self.path / PACKS_FILE} must hold rows of aligned whole samples, got others; pack again")
        return int(rows[-1]), int(ends[-1])

    def _packed_lens(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        lens = self.store.prompt_lens[samples] + self.store.response_lens[samples]
        return np.minimum(lens, self.seq_length) if self._truncates else lens

    def __len__(self) -> int:
        return int(self._rows[-1]) + 1

    def _part(self, row: int) -> slice:
        """Where a row's segments are. Sought in its own type: of another, numpy would make a copy of all rows."""
        return slice(*np.searchsorted(self._rows, np.array([row, row + 1], np.int32)).tolist())

    def segments(self, row: int) -> list[tuple[int, int, int, int, float]]:
        """(offset, length, prompt tokens, sample index, weight) of each segment of a row, by offset."""
        part = self._part(row)
        columns = (self._offsets, self._lengths, self._prompt_lens, self._samples, self._weights)
        return list(zip(*(column[part].tolist() for column in columns), strict=True))

    def attention_cost(self, row: int) -> float:
        """The sum of the squared lengths of a row's segments."""
        return float((self._lengths[self._part(row)].astype(np.float64) ** 2).sum())

    def will_need(self, row: int) -> None:
        """Have the kernel read a row's samples ahead."""
        samples = self._samples[self._part(row)]
        self.store.will_need(samples, self.streams.files)

    def sample_ids(self, row: int) -> list[str]:
        """Ids of a row's samples, by offset."""
        return self.store.sample_ids.take(pa.array(self._samples[self._part(row)])).to_pylist()

    def response_tokens(self, row: int) -> int:
        """Number of response tokens (positions with mask 1) of a row."""
        part = self._part(row)
        return int((self._lengths[part] - self._prompt_lens[part]).sum())


def make_batch(
    rows: Sequence[tuple[PackedRows, int]], *, pin_memory: bool = False, share: ContextShare = WHOLE
) -> HostBatch:
    """Gather rows, laid end to end, from one or more packs directories of one shape (``seq_length``, ``top_k``).

    Labels, mask and teacher rows are shifted inside each segment before padding and context-parallel slicing: record i
    of a response belongs to input position P - 1 + i. The gap up to the next aligned start is masked tail of the
    segment before it; what is left of a row is a masked segment of its own.

    Args:
        rows: Packs and the row in them, for each row of the batch.
        pin_memory: Allocate where a device can copy from while the host goes on.
        share: What of each segment is gathered.

    Raises:
        UserError: The store holds what no writer of it leaves: ids out of range, numbers that are no log-probs.
    """
    packs = rows[0][0]
    streams, whole = packs.streams, packs.seq_length * len(rows)
    T, targets = whole // share.size, "targets" in streams
    tokens_T = torch.zeros(T if "tokens" in streams else 0, dtype=torch.int32, pin_memory=pin_memory)
    labels_T = torch.zeros(T if targets else 0, dtype=torch.int32, pin_memory=pin_memory)
    mask_T = torch.zeros(T if targets else 0, dtype=torch.bool, pin_memory=pin_memory)
    weighted = targets and any(source.weighted for source, _ in rows)
    weights_T = torch.ones(T if weighted else 0, dtype=torch.float32, pin_memory=pin_memory)
    tokens, labels, mask, weights = tokens_T.numpy(), labels_T.numpy(), mask_T.numpy(), weights_T.numpy()
    gathers = [
        _Gather(name, item, T, pin_memory) for name, item in stream_items(packs.top_k).items() if name in streams
    ]
    starts, place = [], 0  # of segments in the rows, and of the next run on this rank
    for index, (source, row) in enumerate(rows):
        assert (source.seq_length, source.top_k, source.streams) == (packs.seq_length, packs.top_k, streams)
        base = index * packs.seq_length
        tail, end_of_row = base, base + packs.seq_length
        for offset, length, prompt_len, sample, weight in source.segments(row):
            start, end = base + offset, base + offset + length
            starts.append(start)
            tail = -(-end // source.align) * source.align
            first = start + prompt_len - 1  # predicts the first response token
            ids = source.store.tokens(sample)[:length] if streams.files else None
            items = {gather: source.store.items(gather.name, sample) for gather in gathers}
            for run in share.runs(start, tail):
                if len(tokens):
                    assert ids is not None
                    here, there = _common(start, end, run, place)
                    tokens[here] = ids[there]
                here, there = _common(first, end - 1, run, place)
                if targets:
                    assert ids is not None
                    mask[here] = True
                    labels[here] = ids[prompt_len:][there]
                if weighted:
                    weights[here] = weight
                for gather, values in items.items():
                    gather.put(here, values[there])
                place += len(run)
        if tail < end_of_row:
            starts.append(tail)
            place += (end_of_row - tail) // share.size
    for ids in (tokens, labels):
        check_token_ids(ids, packs.vocab_size, str(packs.store.path))
    _finish(rows, gathers, T)
    bounds = np.array([*starts, whole], np.int32)
    return HostBatch(
        tokens_T=tokens_T if "tokens" in streams else None,
        labels_T=labels_T if targets else None,
        mask_T=mask_T if targets else None,
        weights_T=weights_T if weighted else None,
        cu_seqlens=torch.from_numpy(bounds),
        max_seqlen=int(np.diff(bounds).max()),
        streams={gather.name: gather.tensor for gather in gathers},
        top_k=packs.top_k,
        share=share,
    )


def _finish(rows: Sequence[tuple[PackedRows, int]], gathers: Sequence[_Gather], T: int) -> None:
    """Fill up what was gathered, and check it where one of the rows is read for the first time."""
    packs = rows[0][0]
    for gather in gathers:
        gather.fill(T)
        if not all(source.checked[row] for source, row in rows):
            gather.check(packs.top_k, packs.vocab_size, str(packs.store.path))
    for source, row in rows:
        source.checked[row] = True


def _common(first: int, after: int, run: range, place: int) -> tuple[slice, slice]:
    """Where tokens ``first`` to ``after`` of the rows meet a run, which lies at ``place``: there, and among them."""
    low = max(first, run.start)
    high = max(min(after, run.stop), low)
    return slice(place + low - run.start, place + high - run.start), slice(low - first, high - first)


class _Gather:
    """The items of one stream for T positions: those of samples where they belong, fillers between."""

    def __init__(self, name: str, item: np.dtype, T: int, pin_memory: bool) -> None:
        self.name, self._written = name, 0  # positions before it have their item
        if name == "teacher":
            top_k = item["ids"].shape[0]
            self.tensor = empty_records(T, top_k, pin_memory=pin_memory)
            self._items = as_items(self.tensor, top_k)
            self._filler = STREAMS[name].filler(top_k).view(self._items.dtype)
        else:
            self.tensor = torch.empty(T, dtype=torch.float32, pin_memory=pin_memory)
            self._items = self.tensor.numpy()
            self._filler = STREAMS[name].filler(0)

    def put(self, where: slice, items: np.ndarray) -> None:
        """Set the items of a run of one segment's response, after those of earlier runs."""
        if len(items):
            self.fill(where.start)
            self._items[where] = items.view(self._items.dtype)
            self._written = where.stop

    def fill(self, after: int) -> None:
        """Set fillers up to a position."""
        self._items[self._written : after] = self._filler
        self._written = after

    def check(self, top_k: int, vocab_size: int, where: str) -> None:
        """Refuse items that no writer of a store leaves."""
        if self.name == "teacher":
            check_records(self.tensor.numpy(), top_k, vocab_size, where)
        else:
            STREAMS[self.name].check(self._items, vocab_size, where)


class PackedDataset:
    """Micro-batches by position, over a schedule or one packs directory.

    Args:
        data_path: ``schedule.jsonl`` or a packs directory.
        seed: Seed of the row order.
        streams: What this rank reads.
        replay: Share of the rows that come from earlier rounds.
        share: What of each segment this rank reads.
        verify: Hash every file (once a process) before use.

    Attributes:
        seq_length: Tokens of a row, the same in all entries.
        top_k: Width of the teacher records.
        vocab_size: V*.
        entries: The schedule.
        schedule: Position -> (entry, row).

    Raises:
        UserError: An entry cannot be read, its rows have another shape than the first entry's or segments that cannot
            be shared, or the schedule's run holds a link.
    """

    def __init__(
        self,
        data_path: str | Path,
        *,
        seed: int,
        streams: Streams,
        replay: float = 0.0,
        share: ContextShare = WHOLE,
        verify: bool = True,
    ) -> None:
        path = Path(data_path)
        self._share = share
        self._path, self._seed, self._streams, self._replay, self._verify = path, seed, streams, replay, verify
        self._base, self._root = (path, None) if path.is_dir() else (path.parent, path.parent)
        self.entries: list[ScheduleEntry] = []
        self._packs: list[PackedRows] = []
        self._add(load_schedule(path))

    def extend(self, entry: ScheduleEntry) -> None:
        """Have one more round train from ``entry.from_row`` on; no other thread may use the data set meanwhile.

        Raises:
            UserError: As of the class.
        """
        assert entry.from_row > self.entries[-1].from_row
        self._add([entry])

    def _add(self, entries: Sequence[ScheduleEntry]) -> None:
        if self._root is not None and self._verify:
            refuse_links(self._root)
        for entry in entries:
            self._packs.append(self._open(entry))
            self.entries.append(entry)
        self.schedule = RowSchedule(self.entries, [len(packs) for packs in self._packs], self._seed, self._replay)

    def _open(self, entry: ScheduleEntry) -> PackedRows:
        packs = PackedRows(self._base / entry.packs, streams=self._streams, verify=self._verify, root=self._root)
        shape = (packs.seq_length, packs.top_k, packs.vocab_size)
        if not self._packs:
            self.seq_length, self.top_k, self.vocab_size = shape
        expected = (self.seq_length, self.top_k, self.vocab_size)
        if shape != expected:
            raise UserError(
                f"{self._path}: all packs must have the (seq_length, top_k, vocab_size) {expected} of the first, "
                f"got {shape} in {entry.packs}; pack that round again"
            )
        check_alignment(packs.align, self._share.size, f"segment_align of {packs.path}")
        return packs

    def batch(self, positions: Sequence[int], *, pin_memory: bool = False) -> HostBatch:
        """The rows that train at these positions, laid end to end, or this rank's share of them."""
        located = [self.schedule.locate(position) for position in positions]
        rows = [(self._packs[entry], row) for entry, row in located]
        return make_batch(rows, pin_memory=pin_memory, share=self._share)

    def will_need(self, positions: Sequence[int]) -> None:
        """Have the kernel read these positions' rows ahead, in the order of the files."""
        for entry, row in map(self.schedule.locate, positions):
            self._packs[entry].will_need(row)

    def attention_costs(self, positions: Sequence[int]) -> npt.NDArray[np.float64]:
        """Cost of attention over the rows of these positions, in squared tokens."""
        located = [self.schedule.locate(position) for position in positions]
        return np.array([self._packs[entry].attention_cost(row) for entry, row in located])

    def sample_ids(self, positions: Sequence[int]) -> list[str]:
        """Ids of the samples in the rows that train at these positions, row by row."""
        located = map(self.schedule.locate, positions)
        return [name for entry, row in located for name in self._packs[entry].sample_ids(row)]
