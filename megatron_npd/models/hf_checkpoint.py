"""The safetensors files of a Hugging Face directory: headers checked before use, slices read, files written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_npd.durable import write_atomic
from megatron_npd.errors import UserError
from megatron_npd.manifest import is_sealed, read_manifest
from megatron_npd.models.families.base import ModelSpec, Rule
from megatron_npd.models.mapping import hf_shapes
from megatron_npd.models.streams import Block, HashedFile, as_bytes, blocks, in_order, read_rows
from megatron_npd.weights import INDEX_FILE, SINGLE_FILE, ContentHash, check_finite, read_weights

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # in the order of safetensors' files
_BLOCK_BYTES = 2**24  # of a tensor at a time: small enough for a cache, large enough for a thread
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class HFCheckpoint:
    """The weights of a Hugging Face directory, opened for reading slices.

    Attributes:
        shapes: Shape of each tensor by its name.
        dtypes: Its type: float32, bfloat16 or float16.
    """

    def __init__(self, hf_dir: str | Path) -> None:
        """Read the headers; where the directory is sealed, the hashes are checked first.

        Raises:
            UserError: As for ``read_weights``, or a type that is no float.
        """
        self.path = Path(hf_dir)
        if is_sealed(self.path):  # one of a run's policies
            read_manifest(self.path)
        weights = read_weights(self.path)
        weights.check_tied_copy()
        self._headers = weights.tensors
        for name, header in self._headers.items():
            if header.dtype not in _DTYPES:
                raise UserError(
                    f"{name} in {self.path / header.file} must be {' or '.join(_DTYPES)}, got {header.dtype}; use the "
                    "model's unquantised weights"
                )
        self.shapes = {name: header.shape for name, header in self._headers.items()}
        self.dtypes = {name: _DTYPES[header.dtype] for name, header in self._headers.items()}
        self._readers: dict[str, Any] = {}

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare the headers with the tensors that the model has.

        Raises:
            UserError: A tensor is missing, unexpected or of another shape; the message names file and tensor.
        """
        for name, shape in shapes.items():
            if name not in self.shapes:
                raise UserError(f"{self.path} must hold the tensor {name}, got no such tensor; check its config.json")
            if self.shapes[name] != shape:
                raise UserError(
                    f"{name} in {self._file(name)} must have shape {list(shape)} by config.json, got "
                    f"{list(self.shapes[name])}; check config.json"
                )
        for name in self.shapes.keys() - shapes.keys():
            raise UserError(
                f"{self._file(name)} must hold the model's tensors only, got {name}; the model that config.json "
                "describes has none of that name"
            )

    def read(self, name: str, where: tuple[slice, ...] = ()) -> torch.Tensor:
        """One tensor's rectangle, in its own type, on the CPU; only its bytes are read."""
        file = self._file(name)
        if file.name not in self._readers:
            self._readers[file.name] = safe_open(file, framework="pt")
        piece = self._readers[file.name].get_slice(self._headers[name].name)
        return piece[where] if where else piece[:]

    def read_into(self, name: str, first: int, out: torch.Tensor) -> None:
        """Fill a tensor with the rows of another one from ``first`` on, cast to its type; only their bytes are read.

        Raises:
            UserError: The file cannot be read.
        """
        header, dtype = self._headers[name], self.dtypes[name]
        row = torch.Size(header.shape[1:]).numel() * dtype.itemsize
        read_rows(self._file(name), header.start + first * row, dtype, out)

    def _file(self, name: str) -> Path:
        return self.path / self._headers[name].file


def open_checkpoint(spec: ModelSpec) -> HFCheckpoint:
    """The weights of ``spec.path``, their headers compared with the model that ``config.json`` describes.

    Raises:
        UserError: As for ``HFCheckpoint``, or a tensor is missing, unexpected or of another shape.
    """
    checkpoint = HFCheckpoint(spec.path)
    checkpoint.check(hf_shapes(spec))
    return checkpoint


def widest(rule: Rule, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """A type that holds all of a rule's tensors exactly."""
    first, *rest = (dtypes[name] for name in rule.hf)
    for dtype in rest:
        first = torch.promote_types(first, dtype)
    return first


def write_weights(
    out_dir: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    fill: Callable[[Block, torch.Tensor], object],
    *,
    max_shard_bytes: int,
    workers: int,
) -> tuple[str, dict[str, str]]:
    """Write safetensors files, named as transformers names them and byte for byte as safetensors lays them out.

    Args:
        out_dir: Existing directory.
        shapes: Shape of each tensor, in the order in which files take them up.
        dtypes: Type of each.
        fill: Gives rows of a tensor their numbers; called in several threads.
        max_shard_bytes: Size that no file's tensors exceed (unless a single one does).
        workers: Threads that make rows ahead.

    Returns:
        The hash of the content, as servers compute it of what they load, and the sha256 of each weight file.

    Raises:
        UserError: A number is NaN or infinite.
        OSError: The disk is full.
    """
    sizes = {name: torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in shapes.items()}
    files = _plan(sizes, dtypes, max_shard_bytes)

    def checked(block: Block, tensor: torch.Tensor) -> None:
        fill(block, tensor)
        what = f"{block.name} of the model to export into {out_dir.parent}"
        check_finite(what, _NAMES[tensor.dtype], as_bytes(tensor).numpy())

    order = [name for names in files.values() for name in names]
    work = [block for name in order for block in blocks(name, shapes[name], dtypes[name], _BLOCK_BYTES)]
    made = in_order(checked, work, dtypes, workers)
    hashes, tensor_hashes = {}, {name: hashlib.sha256() for name in order}
    try:
        for file, names in files.items():
            stream = HashedFile(out_dir / file)
            try:
                stream.write(_header({name: (dtypes[name], shapes[name], sizes[name]) for name in names}))
                for name in names:
                    last = False
                    while not last:
                        block, tensor = next(made)
                        stream.settle()  # the memory of the block before is used again for the next one
                        stream.write(as_bytes(tensor).numpy().data, also=tensor_hashes[name])
                        last = block.last
            finally:
                hashes[file] = stream.close()
    finally:
        made.close()
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_atomic(out_dir / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")
    content = ContentHash()
    for name, sha256 in tensor_hashes.items():
        content.add_hashed(name, f"{_NAMES[dtypes[name]]} {list(shapes[name])}", sha256.hexdigest())
    return content.hexdigest(), hashes


def _plan(sizes: Mapping[str, int], dtypes: Mapping[str, torch.dtype], max_shard_bytes: int) -> dict[str, list[str]]:
    """Name of each file -> its tensors, in the file's order."""
    plan: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not plan or size > room:
            plan.append([])
            room = max_shard_bytes
        plan[-1].append(name)
        room -= size
    return {
        f"model-{number:05d}-of-{len(plan):05d}.safetensors" if len(plan) > 1 else SINGLE_FILE: sorted(
            names, key=lambda name: (list(_NAMES).index(dtypes[name]), name)
        )
        for number, names in enumerate(plan, start=1)
    }


def _header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...], int]]) -> bytes:
    """What stands before a file's tensors, given with type, shape and bytes in the file's order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
