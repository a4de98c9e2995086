"""The safetensors files of a Hugging Face directory: headers checked before use, slices read, shards written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_npd.durable import write_atomic
from megatron_npd.errors import UserError
from megatron_npd.manifest import is_sealed, read_manifest
from megatron_npd.weights import INDEX_FILE, SINGLE_FILE, ContentHash, check_finite, read_weights

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
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

    def _file(self, name: str) -> Path:
        return self.path / self._headers[name].file


class ShardWriter:
    """Writes tensors, as they come, into safetensors files named as transformers names them.

    A shard is written when its last tensor has come, so one shard is what the memory has to hold.

    Attributes:
        content: The hash of all that has been written, as servers compute it of what they load.
    """

    def __init__(
        self,
        out_dir: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        max_shard_bytes: int,
    ) -> None:
        """Plan the shards.

        Args:
            out_dir: Existing directory.
            shapes: Shape of each tensor that will come, in order.
            dtypes: Type of each.
            max_shard_bytes: Size that no shard exceeds (unless a single tensor does).
        """
        self.out_dir = out_dir
        self.content = ContentHash()
        sizes = {name: torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in shapes.items()}
        self._total = sum(sizes.values())
        plan: list[list[str]] = []
        room = 0
        for name, size in sizes.items():
            if not plan or size > room:
                plan.append([])
                room = max_shard_bytes
            plan[-1].append(name)
            room -= size
        self._shards = {
            f"model-{number:05d}-of-{len(plan):05d}.safetensors" if len(plan) > 1 else SINGLE_FILE: names
            for number, names in enumerate(plan, start=1)
        }
        self._file_of = {name: file for file, names in self._shards.items() for name in names}
        self._waiting: dict[str, dict[str, torch.Tensor]] = {file: {} for file in self._shards}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one whole tensor, and write its shard if it was the last one of it.

        Raises:
            UserError: A number of it is NaN or infinite, or the disk is full.
        """
        file = self._file_of[name]
        waiting = self._waiting[file]
        assert name not in waiting, f"{name} came twice"
        waiting[name] = tensor = tensor.contiguous()
        dtype, data = _NAMES[tensor.dtype], tensor.view(torch.uint8).flatten().numpy()
        check_finite(f"{name} of the model to export into {self.out_dir.parent}", dtype, data)
        self.content.add(name, f"{dtype} {list(tensor.shape)}", data)
        if len(waiting) == len(self._shards[file]):
            try:
                save_file(waiting, self.out_dir / file, metadata={"format": "pt"})
            except SafetensorError as error:  # how a full disk shows
                raise UserError(f"{self.out_dir / file} must be written, got {error}; make room and rerun") from error
            del self._waiting[file]

    def finalize(self) -> None:
        """Write the index where there is more than one shard."""
        assert not self._waiting, f"tensors never came for {list(self._waiting)}"
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": self._file_of}
            write_atomic(self.out_dir / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")
