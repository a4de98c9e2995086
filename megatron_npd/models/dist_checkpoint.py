"""Parameters of a checkpoint in torch's distributed format, read and written by rows in one process.

megatron-core stores each parameter whole, whatever the parallel layout, those of all layers stacked; the index tells of
which pieces a stored tensor is made, and where each of them lies, as torch.save writes a tensor. So no process group is
needed, and no piece has to be read whole.

Legend: R rows of a parameter; C its columns, where it has any.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.manifest import MANIFEST, read_manifest, unlisted, verified_file
from megatron_npd.models.checkpoint_files import COMMON_FILE, INDEX_FILE, KIND, MALFORMED, STATE_FILE, malformed
from megatron_npd.models.streams import HashedFile, read_rows
from megatron_npd.models.unpickle import read_index, read_layout, refused
from megatron_npd.paths import is_megatron_lm
from megatron_npd.stoppable import check_stop

Shape = tuple[int, ...]
_MAX_FILE_BYTES = 10**9  # several threads check the hashes of several files
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
# What Transformer Engine's fused layers call the norms, and with them what Megatron-LM writes.
_FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_MODEL = ("embedding.", "decoder.", "output_layer.")  # how the names of parameters begin, beside the optimizer's state
_CONTENT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_CONTENT |= {"common_backend": "torch", "common_backend_version": 1}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A parameter as a checkpoint holds it.

    Attributes:
        key: Name of the stored tensor.
        place: Which layer, and which expert of it, of that tensor it is: the first indices; (): all of it.
        shape: The parameter's own shape.
        dtype: Type of its numbers in the files.
        pieces: What it is made of.
    """

    key: str
    place: Shape
    shape: Shape
    dtype: torch.dtype
    pieces: tuple[ChunkStorageMetadata, ...]

    def __str__(self) -> str:
        return f"{self.key}{list(self.place)}" if self.place else self.key


class DistCheckpoint:
    """A checkpoint in torch's distributed format, opened for reading rows of parameters."""

    def __init__(self, path: str | Path, files: Iterable[str]) -> None:
        """Read the index; hashes are the caller's to check (``open_sealed``).

        Args:
            path: Directory of the checkpoint.
            files: Names of its files; the index may lead to no other.

        Raises:
            UserError: The index is missing or of another form, or names what may run code.
        """
        self.path = Path(path)
        try:
            self._index = read_index(self.path / INDEX_FILE, set(files))
        except pickle.UnpicklingError as error:
            raise refused(self.path, error) or error from error
        except OSError as error:
            raise malformed(self.path / INDEX_FILE, error) from error
        self._tensors = {
            key: entry for key, entry in self._index.state_dict_metadata.items() if key.startswith(_MODEL)
            and isinstance(entry, TensorStorageMetadata)
        }  # fmt: skip
        self._starts: dict[MetadataIndex, int] = {}
        self._pieces: dict[str, dict[Shape, list[ChunkStorageMetadata]]] = {}

    @classmethod
    def open(cls, path: str | Path, workers: int = 1, *, verify: bool = True) -> DistCheckpoint:
        """Open what ``save_checkpoint`` sealed, or what Megatron-LM wrote, for which nobody vouches.

        Args:
            path: Directory of the checkpoint.
            workers: Threads that check hashes.
            verify: Check every file's hash first; else only that of the index.

        Raises:
            UserError: As for ``DistCheckpoint`` or ``read_manifest``, or a file lies there that no hash vouches for.
        """
        if is_megatron_lm(path):
            get_logger().warning("%s has no %s: damage to its files would not be seen", path, MANIFEST)
            return cls(path, [file.name for file in Path(path).iterdir()])
        manifest = read_manifest(path, kind=KIND, verify=False)
        if foreign := unlisted(path, manifest):
            raise UserError(f"{path} must hold what its {MANIFEST} lists, got {foreign[0]} too; move that away")
        pool = ThreadPoolExecutor(workers)
        try:
            files = manifest.files if verify else [INDEX_FILE]
            for _ in pool.map(partial(verified_file, path, kind=KIND), files):
                check_stop()
        finally:
            pool.shutdown(cancel_futures=True)
        return cls(path, manifest.files)

    def find(self, name: str, shape: Shape) -> Stored:
        """Where a parameter lies.

        Args:
            name: Its global name in megatron-core (``decoder.layers.3.mlp.linear_fc2.weight``).
            shape: Its shape in a model that is not cut; a vocabulary may have more rows, as padding.

        Raises:
            UserError: The checkpoint has none of that name, or one of another shape or type.
        """
        key, place = next(((key, place) for key, place in stored_as(name) if key in self._tensors), ("", ()))
        if not key:
            raise self._another_model(f"no {stored_as(name)[0][0]}")
        entry = self._tensors[key]
        size, dtype = _shape(entry.size), getattr(entry.properties, "dtype", None)
        pieces = self._pieces_at(key, len(place)).get(place, [])
        size = size[len(place) :] if all(index < count for index, count in zip(place, size, strict=False)) else ()
        padded = name.endswith(("word_embeddings.weight", "output_layer.weight")) and size[:1] > shape[:1]
        if size[1:] != shape[1:] or (size[:1] != shape[:1] and not padded):
            raise self._another_model(f"{key} of shape {list(entry.size)} where it would have {list(shape)} (a layer)")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise self._another_model(f"{key} of type {dtype}")
        return Stored(key=key, place=place, shape=size, dtype=dtype, pieces=tuple(pieces))

    def check_all_used(self, found: Iterable[Stored]) -> None:
        """Insist that the parameters that were found are all there are.

        Raises:
            UserError: The checkpoint holds another one, or more layers.
        """
        used: dict[str, Shape] = {}
        for stored in found:
            before = used.get(stored.key, (0,) * len(stored.place))
            used[stored.key] = tuple(max(most, index + 1) for most, index in zip(before, stored.place, strict=True))
        for key, entry in self._tensors.items():
            if key not in used:
                raise self._another_model(f"{key} too")
            for axis, has, wanted in zip(("layers", "experts"), entry.size, used[key], strict=False):
                if has != wanted:
                    raise self._another_model(f"{key} of {has} {axis} where config.json has {wanted}")

    def _pieces_at(self, key: str, axes: int) -> dict[Shape, list[ChunkStorageMetadata]]:
        """The pieces of a stored tensor by the indices of its first axes."""
        if key not in self._pieces:
            found = self._pieces[key] = {}
            for piece in self._tensors[key].chunks:
                spans = zip(piece.offsets[:axes], piece.sizes[:axes], strict=True)
                for place in product(*(range(first, first + count) for first, count in spans)):
                    found.setdefault(place, []).append(piece)
        return self._pieces[key]

    def read(self, stored: Stored, first: int, out_RC: Tensor) -> None:
        """Fill a tensor with a parameter's rows, cast to its type.

        Args:
            stored: The parameter.
            first: Its first row to read.
            out_RC: What to fill, [R, C] or [R].

        Raises:
            UserError: A piece is not there, not whole or not stored as torch.save does it.
        """
        filled = 0
        for piece in stored.pieces:
            plane, start, size = 0, _shape(piece.offsets), _shape(piece.sizes)
            for index in stored.place:
                plane, start, size = plane * size[0] + index - start[0], start[1:], size[1:]
            low, high = max(first, start[0]), min(first + len(out_RC), start[0] + size[0])
            if low >= high:
                continue
            target_RC = out_RC[low - first : high - first]
            if out_RC.dim() > 1:
                target_RC = target_RC[:, start[1] : start[1] + size[1]]
            row = stored.dtype.itemsize * torch.Size(size[1:]).numel()
            place, at = self._place(stored, piece)
            at += (plane * size[0] + low - start[0]) * row
            read_rows(self.path / place.relative_path, at, stored.dtype, target_RC)
            filled += target_RC.numel()
        if filled != out_RC.numel():
            raise malformed(self.path / INDEX_FILE, f"{stored} with rows that no piece or several have")

    def _place(self, stored: Stored, piece: ChunkStorageMetadata) -> tuple[_StorageInfo, int]:
        """The file that holds a piece, and the byte at which its numbers begin."""
        key = MetadataIndex(stored.key, piece.offsets)
        if key not in self._index.storage_data:
            raise malformed(self.path / INDEX_FILE, f"no place for a piece of {stored}")
        place = self._index.storage_data[key]
        if key not in self._starts:
            file = self.path / place.relative_path
            try:
                with open(file, "rb") as stream:
                    self._starts[key] = _start_of_numbers(stream, place, stored.dtype, tuple(piece.sizes))
            except pickle.UnpicklingError as error:
                raise refused(self.path, error) or error from error
            except (*MALFORMED, OSError, struct.error, zipfile.BadZipFile) as error:
                raise malformed(file, error) from error
        return place, self._starts[key]

    def _another_model(self, got: str) -> UserError:
        return UserError(f"{self.path} must hold this model, got {got}; give the directory that it started from")


def stored_as(name: str) -> list[tuple[str, Shape]]:
    """The stored tensors that may hold a parameter, each with its place in it (``Stored``); ours writes the first."""
    if not (match := _LAYER.fullmatch(name)):
        return [(name, ())]
    layer, inner = match.groups()
    expert: Shape = ()
    if of_expert := _EXPERT.fullmatch(inner):
        inner, expert = f"mlp.experts.experts.{of_expert[2]}", (int(of_expert[1]),)
    fused = next((new + inner.removeprefix(old) for old, new in _FUSED.items() if inner.startswith(old)), inner)
    stacked: list[tuple[str, Shape]] = [(f"decoder.layers.{part}", (int(layer), *expert)) for part in (inner, fused)]
    return stacked + [(f"decoder.layers.{layer}.{part}", expert) for part in (inner, fused)]


def _shape(size: torch.Size) -> Shape:
    return (*size,)


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        left = max(0, self._length - self._at)
        self._stream.seek(self._start + self._at)
        data = self._stream.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data


def _start_of_numbers(stream: BinaryIO, place: _StorageInfo, dtype: torch.dtype, size: Shape) -> int:
    """Byte of a file at which the numbers of a piece begin, row after row; AssertionError where they do not so."""
    window = _Window(stream, place.offset, place.length)
    with zipfile.ZipFile(window) as archive:  # pyright: ignore[reportArgumentType]  (read, seek, tell are what it needs)
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        layout = read_layout(archive.read(names["data.pkl"]))
        record = archive.getinfo(names[f"data/{layout.storage[2]}"])
        assert "byteorder" not in names or archive.read(names["byteorder"]) == b"little", (
            "numbers of another byte order"
        )
    assert layout.storage[1] == dtype, f"{layout.storage[1]} where the index has {dtype}"
    contiguous = torch.empty(size, device="meta").stride()
    assert (tuple(layout.size), tuple(layout.stride)) == (size, contiguous), f"a piece {layout.size} by {layout.stride}"
    assert record.compress_type == zipfile.ZIP_STORED, "compressed numbers"
    end = (layout.first + torch.Size(size).numel()) * dtype.itemsize
    assert layout.first >= 0 and end <= record.file_size, "fewer numbers than it has"
    window.seek(record.header_offset + 26)
    name_bytes, extra_bytes = struct.unpack("<HH", window.read(4))
    start = record.header_offset + 30 + name_bytes + extra_bytes
    assert start + record.file_size <= place.length, "a piece of another length"
    return place.offset + start + layout.first * dtype.itemsize


class DistWriter:
    """Writes a checkpoint of weights alone that megatron-core loads into any layout, piece by piece."""

    def __init__(self, directory: Path) -> None:
        """Args: directory: Where the files go, fresh."""
        self._directory = directory
        self._index: dict[str, Any] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._file: HashedFile | None = None
        self._hashes: dict[str, str] = {}

    def add(self, key: str, size: Shape, offsets: Shape, piece: Tensor) -> None:
        """Write one piece of a stored tensor.

        Args:
            key: Name of the stored tensor.
            size: Its shape, of all layers.
            offsets: Where the piece lies in it.
            piece: The piece; what it has fewer dimensions, it is one wide in the first ones. It must stay as it is
                until the next one was written, or the file closed.

        Raises:
            OSError: The disk is full.
        """
        piece = piece.view(*(1 for _ in size[piece.dim() :]), *piece.shape)
        if key not in self._index:
            self._index[key] = TensorStorageMetadata(TensorProperties(piece.dtype), torch.Size(size), [])
        self._index[key].chunks.append(ChunkStorageMetadata(torch.Size(offsets), piece.shape))
        self._save(MetadataIndex(key, offsets), piece)

    def add_object(self, key: str, value: Any) -> None:
        """Write what is no tensor."""
        self._index[key] = BytesStorageMetadata()
        self._save(MetadataIndex(key), value)

    def finish(self, state: Mapping[str, Any]) -> dict[str, str]:
        """Write the index and what else ``load_checkpoint`` reads; returns the sha256 of the large files by name.

        Args:
            state: As for ``save_checkpoint``.
        """
        self.close()
        index = Metadata(self._index, None, self._places, StorageMeta(), CURRENT_DCP_VERSION)
        (self._directory / INDEX_FILE).write_bytes(pickle.dumps(index))
        (self._directory / "metadata.json").write_text(json.dumps(_CONTENT))
        torch.save({}, self._directory / COMMON_FILE)
        content = {"state": dict(state), "optimizer": None, "scheduler": False}
        (self._directory / STATE_FILE).write_text(json.dumps(content, indent=1) + "\n")
        return self._hashes

    def _save(self, key: MetadataIndex, value: Any) -> None:
        if self._file is None or self._file.bytes >= _MAX_FILE_BYTES:
            self.close()
            self._file = HashedFile(self._directory / f"__0_{len(self._hashes)}.distcp")
        self._file.settle()
        start = self._file.bytes
        try:
            torch.save(value, self._file)  # pyright: ignore[reportArgumentType]  (it writes and flushes)
        except (OSError, RuntimeError) as error:
            raise self._file.failure or error from error
        self._places[key] = _StorageInfo(self._file.path.name, start, self._file.bytes - start)

    def close(self) -> None:
        """End the file that is being written."""
        if self._file is not None:
            self._hashes[self._file.path.name] = self._file.close()
            self._file = None
