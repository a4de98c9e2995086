"""The annotation store: what the teacher left for every sample, as Megatron IndexedDataset pairs keyed by sample.

A store is a sealed directory of kind ``annotations`` with sealed shards ``shard-00000/`` of kind ``annotations-shard``:

- ``tokens.bin/.idx``: int32, prompt + response, one sequence a sample, in sample order;
- ``generator.bin/.idx``: float32, log-probability of each *response* token under the policy that sampled it; NaN where
  the policy lag is not defined;
- ``teacher.bin/.idx``: uint16 view of ``records.teacher_record_dtype(top_k)``, one record per response token; absent
  where ``top_k`` is 0 (no teacher);
- ``samples.parquet``: ``records.SAMPLE_SCHEMA``, one row a sample in the same order.

Generator and teacher are entries of ``store.streams.STREAMS``; a further one is written and read as they are.

The directory's provenance names ``top_k``, ``vocab_size``, ``round`` and ``policy_version``.

Readers map data and indices, so that the processes of a machine share them; lengths and metadata are read when asked
for.

Legend: P prompt tokens, n response tokens, k top-k width, N samples.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_npd.errors import UserError
from megatron_npd.manifest import MANIFEST, Manifest, read_manifest
from megatron_npd.platform import get_platform
from megatron_npd.records import SAMPLE_SCHEMA, SAMPLES_FILE
from megatron_npd.store.streams import STREAMS, stream_items

STORE_KIND = "annotations"
SHARD_KIND = "annotations-shard"


def _indexed_dataset():
    get_platform()  # the CPU platform prepares the process before megatron.core is imported
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def check_token_ids(tokens: npt.NDArray[np.integer], vocab_size: int, where: str) -> None:
    """Refuse token ids outside ``0 .. vocab_size - 1``.

    Raises:
        UserError: An id is out of range; ``where`` names file and record.
    """
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size):
        bad = tokens[(tokens < 0) | (tokens >= vocab_size)].flat[0]
        raise UserError(f"{where} must hold token ids in 0..{vocab_size - 1}, got {bad}; use the student's tokenizer")


class StoreShardWriter:
    """Writes the IndexedDataset pairs of one shard with megatron-core's own builder.

    The caller writes ``samples.parquet`` beside them and seals the directory; a killed attempt is written anew.

    Args:
        path: The shard's directory (it exists, held with ``manifest.writing``).
        top_k: Width of the teacher records; 0: none.
        vocab_size: V*, the student's vocabulary; every id is below it.
    """

    def __init__(self, path: str | Path, top_k: int, *, vocab_size: int) -> None:
        if not 0 <= top_k <= vocab_size:
            raise UserError(f"top_k must be in 0..{vocab_size} (the vocabulary), got {top_k}; lower it")
        self.path, self.top_k, self.vocab_size, self.num_samples = Path(path), top_k, vocab_size, 0
        self._mcore = _indexed_dataset()
        self._items = stream_items(top_k)
        self._tokens = self._builder("tokens", np.dtype(np.int32))
        self._builders = {name: self._builder(name, STREAMS[name].number) for name in self._items}

    def _builder(self, name: str, dtype: np.dtype):
        return self._mcore.IndexedDatasetBuilder(str(self.path / f"{name}.bin"), dtype=dtype.type)

    def add(self, tokens: npt.NDArray[np.integer], *, checked: bool = False, **streams: np.ndarray) -> None:
        """Append one sample.

        Args:
            tokens: Prompt + response ids [P + n], P >= 1 and n >= 1.
            checked: The caller has ids and items checked already, all of a shard at once.
            streams: Items of each stream of the store by name, [n] each: ``generator`` float32, and ``teacher``,
                ``teacher_record_dtype(top_k)``, exactly where ``top_k`` > 0.

        Raises:
            UserError: The sample breaks a rule of the format; nothing of it is written.
        """
        where = f"{self.path} sample {self.num_samples}"
        tokens = np.asarray(tokens)
        assert tokens.ndim == 1 and streams.keys() == self._items.keys(), f"{where}: {set(streams)}"
        if tokens.size < 2:
            raise UserError(f"{where} must have a prompt and a response, got {tokens.size} tokens; drop it before")
        if not checked:
            check_token_ids(tokens, self.vocab_size, where)
        n = len(next(iter(streams.values())))
        flat = {"tokens": tokens.astype(np.int32)}
        for name, items in streams.items():
            assert items.dtype == self._items[name], f"{where}: {items.dtype} is not {self._items[name]}"
            if len(items) != n or not 1 <= n < tokens.size:
                raise UserError(
                    f"{where} must have a record per response token and a prompt of 1 token or more, got {len(items)} "
                    f"records of the {name} for {tokens.size} tokens; annotate again"
                )
            if not checked:
                STREAMS[name].check(items, self.vocab_size, where)
            flat[name] = np.ascontiguousarray(items).view(np.uint8).view(STREAMS[name].number)
            if flat[name].size > np.iinfo(np.int32).max:
                raise UserError(f"{where} must have less than 2**31 numbers, got {flat[name].size}; lower top_k")
        for name, numbers in flat.items():
            builder = self._tokens if name == "tokens" else self._builders[name]
            builder.add_document(numbers, [numbers.size])  # pyright: ignore[reportArgumentType]  (it takes arrays)
        self.num_samples += 1

    def finalize(self) -> None:
        """Close the data files and write their indices."""
        self._tokens.finalize(str(self.path / "tokens.idx"))
        for name, builder in self._builders.items():
            builder.finalize(str(self.path / f"{name}.idx"))


_INDEX = struct.Struct("<9sQBQQ")  # what an .idx begins with: magic, version, code of the dtype, sequences, documents
_TOKEN = np.dtype("<i4")
_CODES = {"<i4": 4, "<f4": 7, "<u2": 8}  # megatron-core's, of the dtypes that we use


def _index_bytes(lengths: npt.NDArray[np.int32], number: np.dtype) -> bytes:
    """The ``.idx`` file that megatron-core writes for sequences of these lengths, in numbers, one document each.

    Our readers compare with it rather than parse what a damaged file says.
    """
    N = len(lengths)
    pointers = np.cumsum(lengths, dtype="<i8") * number.itemsize
    parts = (lengths, np.concatenate([[0], pointers[:-1]])[:N].astype("<i8"), np.arange(N + 1, dtype="<i8"))
    return b"".join([_INDEX.pack(b"MMIDIDX\0\0", 1, _CODES[number.str], N, N + 1), *(part.tobytes() for part in parts)])


def _mapped(file: Path) -> npt.NDArray[np.uint8]:
    """A file's bytes, mapped by Arrow: unlike Python's mapping it keeps no file descriptor, of which there are few."""
    if not file.stat().st_size:
        return np.zeros(0, np.uint8)
    try:
        with pa.memory_map(str(file)) as source:
            return np.frombuffer(source.read_buffer(), np.uint8)
    except OSError as error:
        raise UserError(f"{file} must be on a file system with mmap, got {error}; copy the store to another") from error


_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stream:
    """A mapped pair: the items of all samples one after another, and of each sample where they are, from the index."""

    items: np.ndarray
    numbers_per_item: int
    lengths: npt.NDArray[np.int32]  # [N], in numbers
    pointers: npt.NDArray[np.int64]  # [N], in bytes

    @classmethod
    def open(cls, prefix: Path, number: np.dtype, item: np.dtype) -> _Stream:
        numbers_per_item = item.itemsize // number.itemsize
        index, data = _mapped(prefix.with_suffix(".idx")), _mapped(prefix.with_suffix(".bin"))
        N = max(len(index) - _INDEX.size - 8, 0) // 20  # of each sequence 4 bytes for its length, 8 twice
        if len(index) < _INDEX.size + 20 * N:
            raise UserError(f"{prefix}.idx must be a whole index, got {len(index)} bytes; annotate again")
        lengths = np.frombuffer(index, "<i4", N, _INDEX.size)
        whole = (lengths > 0).all() and not (lengths % numbers_per_item).any()
        if not whole or index.tobytes() != _index_bytes(lengths, number):
            raise UserError(f"{prefix}.idx must be as megatron-core writes it, got another index; annotate again")
        if len(data) != lengths.sum(dtype=np.int64) * number.itemsize:
            raise UserError(f"{prefix}.bin must have the bytes that {prefix.name}.idx says, got {len(data)}")
        return cls(
            items=data.view(item),
            numbers_per_item=numbers_per_item,
            lengths=lengths,
            pointers=np.frombuffer(index, "<i8", N, _INDEX.size + 4 * N),
        )

    def of(self, local: int) -> np.ndarray:
        """The items of a sample."""
        first = int(self.pointers[local]) // self.items.itemsize
        return self.items[first : first + int(self.lengths[local]) // self.numbers_per_item]

    def will_need(self, locals_M: npt.NDArray[np.integer]) -> None:
        """Ask the kernel for the samples' bytes in large reads; neighbours in the file as one range."""
        locals_M = np.sort(locals_M)
        page, number_bytes = mmap.PAGESIZE, self.items.itemsize // self.numbers_per_item
        begins = self.pointers[locals_M]
        firsts, ends = begins // page * page, begins + self.lengths[locals_M] * number_bytes
        apart = np.flatnonzero(np.concatenate([[True], firsts[1:] > ends[:-1], [True]]))
        for begin, after in pairwise(apart.tolist()):
            first, size = int(firsts[begin]), int(ends[after - 1] - firsts[begin])
            _madvise(self.items.ctypes.data + first, size, mmap.MADV_WILLNEED)


class AnnotationStore:
    """Reads all shards of a sealed store, memory-mapped; samples are numbered over the shards in order.

    Args:
        path: The store's directory.
        verify: Hash every file against the manifests (once a process), and compare indices and metadata, before use.
        streams: Names of ``STREAMS`` to map, of those that the store has; tokens always are.

    Attributes:
        top_k: Width of the teacher records, 0 where there are none.
        vocab_size: V*.
        round: Index of the round.
        policy_version: Of the policy that generated the responses.
        manifest: The directory's manifest.

    Raises:
        UserError: The store is not sealed, damaged, or its parts do not fit together.
    """

    def __init__(self, path: str | Path, *, verify: bool = True, streams: Collection[str] = tuple(STREAMS)) -> None:
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path, kind=STORE_KIND, verify=verify)
        self.top_k = self._provenance_int("top_k", 0)
        self.vocab_size = self._provenance_int("vocab_size", 1)
        self.round = self._provenance_int("round", 0)
        self.policy_version = str(self.manifest.provenance.get("policy_version", ""))
        if not self.policy_version:
            raise UserError(f"{self.path / MANIFEST} must name policy_version, got none; annotate again")
        names = (PurePosixPath(name) for name in self.manifest.files)
        self._shard_paths = sorted(self.path / name.parent for name in names if name.name == MANIFEST)
        items = {name: item for name, item in stream_items(self.top_k).items() if name in streams}
        self._streams: dict[str, list[_Stream]] = {"tokens": [], **{name: [] for name in items}}
        for path in self._shard_paths:
            for name, stream in self._open_shard(path, verify, items).items():
                self._streams[name].append(stream)
        self._bounds = [0, *accumulate(len(tokens.lengths) for tokens in self._streams["tokens"])]

    def _provenance_int(self, name: str, least: int) -> int:
        value = self.manifest.provenance.get(name)
        if not isinstance(value, int) or value < least:
            raise UserError(f"{self.path / MANIFEST} must name {name} >= {least}, got {value}; annotate again")
        return value

    @staticmethod
    def _schema(columns: tuple[str, ...]) -> pa.Schema:
        return pa.schema([SAMPLE_SCHEMA.field(name) for name in columns])

    def _read_samples(self, shard_path: Path, columns: tuple[str, ...]) -> pa.Table:
        table = pq.read_table(shard_path / SAMPLES_FILE, columns=list(columns))
        expected = self._schema(columns)
        if not table.schema.equals(expected):
            raise UserError(f"{shard_path / SAMPLES_FILE} must have the columns {expected}, got {table.schema}")
        return table

    def _open_shard(self, path: Path, verify: bool, items: Mapping[str, np.dtype]) -> dict[str, _Stream]:
        read_manifest(path, kind=SHARD_KIND, verify=verify)
        shard = {"tokens": _Stream.open(path / "tokens", _TOKEN, _TOKEN)}
        shard |= {name: _Stream.open(path / name, STREAMS[name].number, item) for name, item in items.items()}
        if verify:
            prompt_lens, response_lens = (
                column.to_numpy() for column in self._read_samples(path, ("prompt_len", "response_len")).columns
            )
            agrees = all(
                np.array_equal(
                    stream.lengths // stream.numbers_per_item, response_lens + prompt_lens * (name == "tokens")
                )
                for name, stream in shard.items()
            )
            if not agrees or min(prompt_lens.min(initial=1), response_lens.min(initial=1)) < 1:
                raise UserError(
                    f"{path}: the lengths of {', '.join(f'{name}.idx' for name in shard)} and {SAMPLES_FILE} must "
                    "agree, and prompts and responses have 1 token or more, got others; annotate again"
                )
        return shard

    @cached_property
    def prompt_lens(self) -> npt.NDArray[np.int32]:
        """Tokens of each sample's prompt, int32 [N], read when first asked for."""
        return self._column("prompt_len")

    @cached_property
    def response_lens(self) -> npt.NDArray[np.int32]:
        """Tokens of each sample's response, int32 [N], read when first asked for."""
        return self._column("response_len")

    @cached_property
    def sample_ids(self) -> pa.ChunkedArray:
        """Ids of the samples, read when first asked for."""
        return self.metadata("sample_id")["sample_id"]

    def _column(self, name: str) -> npt.NDArray[np.int32]:
        return np.concatenate([np.zeros(0, np.int32), *(part[name].to_numpy() for part in self.parts(name))])

    def __len__(self) -> int:
        return self._bounds[-1]

    def parts(self, *columns: str) -> Iterator[pa.Table]:
        """The named columns of ``records.SAMPLE_SCHEMA``, shard by shard."""
        for path in self._shard_paths:
            yield self._read_samples(path, columns)

    def metadata(self, *columns: str) -> pa.Table:
        """The named columns of ``records.SAMPLE_SCHEMA`` for all samples, in order."""
        return pa.concat_tables([self._schema(columns).empty_table(), *self.parts(*columns)])

    def rows(self, indices: npt.NDArray[np.integer], *columns: str) -> Iterator[tuple[npt.NDArray[np.int64], pa.Table]]:
        """The named columns of these samples, shard by shard: places in ``indices``, and the rows that belong there."""
        shards = np.searchsorted(self._bounds, indices, side="right") - 1
        order = np.argsort(shards, kind="stable")
        starts = np.searchsorted(shards[order], np.arange(len(self._shard_paths) + 1))
        for number in np.flatnonzero(np.diff(starts)).tolist():
            places = order[starts[number] : starts[number + 1]]
            table = self._read_samples(self._shard_paths[number], columns)
            yield places, table.take(pa.array(indices[places] - self._bounds[number]))

    def shard(self, index: int) -> int:
        """Number of the shard that holds a sample."""
        assert 0 <= index < len(self), f"sample {index} of {len(self)}"
        return bisect_right(self._bounds, index) - 1

    def items(self, name: str, index: int) -> np.ndarray:
        """What a mapped stream, or ``tokens``, holds of a sample: one item per (response) token, a read-only view."""
        shard = self.shard(index)
        return self._streams[name][shard].of(index - self._bounds[shard])

    def tokens(self, index: int) -> npt.NDArray[np.int32]:
        """Prompt + response ids of a sample, int32 [P + n], a read-only view."""
        return self.items("tokens", index)

    def teacher(self, index: int) -> np.ndarray:
        """Teacher records of a sample, ``teacher_record_dtype(top_k)`` [n], a read-only view; needs ``top_k > 0``."""
        return self.items("teacher", index)

    def generator(self, index: int) -> npt.NDArray[np.float32]:
        """Log-probability of each response token under the policy that sampled it, float32 [n], a read-only view.

        NaN where the policy lag is not defined.
        """
        return self.items("generator", index)

    def will_need(self, indices: npt.NDArray[np.integer], names: Collection[str]) -> None:
        """Have the kernel read what these streams (``tokens`` too) hold of samples ahead, in the order of the files."""
        shards = np.searchsorted(self._bounds, indices, side="right") - 1
        for number in np.unique(shards).tolist():
            locals_M = indices[shards == number] - self._bounds[number]
            for name in names:
                self._streams[name][number].will_need(locals_M)
