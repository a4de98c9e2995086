"""The safetensors files of a Hugging Face directory: headers checked before use, slices read, shards written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_npd.log import UserError
from megatron_npd.manifest import is_sealed, read_manifest, write_atomic

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FINGERPRINT_BYTES = 2**20
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class HFCheckpoint:
    """The weights of a Hugging Face directory, opened for reading slices.

    Attributes:
        shapes: Shape of each tensor by its name.
        dtypes: Its type: float32, bfloat16 or float16.
    """

    def __init__(self, hf_dir: str | Path) -> None:
        """Open every file and read the headers; where the directory is sealed, the hashes are checked first.

        Raises:
            UserError: No safetensors, a damaged file, an index that does not fit its files, or a type that is no float.
        """
        self.path = Path(hf_dir)
        if is_sealed(self.path):  # one of a run's policies
            read_manifest(self.path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._readers: dict[str, Any] = {}
        self._files: dict[str, Path] = {}
        index = self._read_index()
        for file in [SINGLE_FILE] if index is None else sorted(set(index.values())):
            self._open(self.path / file)
        if index is not None:
            for name in sorted(index.keys() ^ self._files.keys()):
                found = self._files.get(name)
                raise UserError(
                    f"{self.path / INDEX_FILE} must list the tensors of its files, got {name} only in "
                    f"{found.name if found else 'the index'}; download the model again"
                )

    def _read_index(self) -> dict[str, str] | None:
        file = self.path / INDEX_FILE
        if not has_weights(self.path):
            raise UserError(
                f"{self.path} must hold {SINGLE_FILE} or {INDEX_FILE}, got neither; convert other weight files with "
                "transformers' save_pretrained"
            )
        if (self.path / SINGLE_FILE).is_file():
            return None  # what transformers prefers too
        try:
            index = json.loads(file.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} must be a safetensors index, got {error!r}; download the model again") from error
        for name, shard in index.items() if isinstance(index, dict) else [("weight_map", index)]:
            if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".."):
                raise UserError(f"{file} must name files of its directory, got {shard!r} for {name}; do not use it")
        return index

    def _open(self, file: Path) -> None:
        try:
            reader = safe_open(file, framework="pt")
            names = reader.keys()
        except (SafetensorError, FileNotFoundError) as error:
            raise UserError(f"{file} must be a whole safetensors file, got {error}; download it again") from error
        for name in names:
            header = reader.get_slice(name)
            if name in self._files:
                raise UserError(f"{name} must be in one file, got it in {self._files[name]} and {file}; remove one")
            if header.get_dtype() not in _DTYPES:
                raise UserError(
                    f"{name} in {file} must be {' or '.join(_DTYPES)}, got {header.get_dtype()}; use the model's "
                    "unquantised weights"
                )
            self._files[name], self._readers[name] = file, reader
            self.shapes[name], self.dtypes[name] = tuple(header.get_shape()), _DTYPES[header.get_dtype()]

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
                    f"{name} in {self._files[name]} must have shape {list(shape)} by config.json, got "
                    f"{list(self.shapes[name])}; check config.json"
                )
        for name in self.shapes.keys() - shapes.keys():
            raise UserError(
                f"{self._files[name]} must hold the model's tensors only, got {name}; the model that config.json "
                "describes has none of that name"
            )

    def drop_copy(self, name: str, original: str) -> None:
        """Forget a tensor that repeats another one (a tied output layer that was saved all the same).

        Raises:
            UserError: They differ.
        """
        if name not in self.shapes:
            return
        if not torch.equal(self.read(name), self.read(original)):
            raise UserError(
                f"{name} in {self._files[name]} must equal {original}, to which config.json ties it, got other "
                "numbers; set tie_word_embeddings to false or remove the tensor"
            )
        del self.shapes[name], self.dtypes[name]

    def read(self, name: str, where: tuple[slice, ...] = ()) -> torch.Tensor:
        """One tensor's rectangle, in its own type, on the CPU; only its bytes are read."""
        piece = self._readers[name].get_slice(name)
        return piece[where] if where else piece[:]


def has_weights(hf_dir: str | Path) -> bool:
    """Whether a Hugging Face directory holds safetensors weights (and not a configuration only)."""
    return any((Path(hf_dir) / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))


class ShardWriter:
    """Writes tensors, as they come, into safetensors files named as transformers names them.

    A shard is written when its last tensor has come, so one shard is what the memory has to hold.
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
        """Take one whole tensor, and write its shard if it was the last one of it."""
        file = self._file_of[name]
        waiting = self._waiting[file]
        assert name not in waiting, f"{name} came twice"
        waiting[name] = tensor.contiguous()
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


def model_fingerprint(hf_dir: str | Path) -> str:
    """16 hex digits that tell one model from another: configuration, sizes, first and last MiB of each weight file.

    A full hash of a 72B teacher takes minutes; a changed model differs in its headers or in these weights.
    """
    digest = hashlib.sha256((Path(hf_dir) / "config.json").read_bytes())
    for file in sorted(Path(hf_dir).glob("*.safetensors")):
        with open(file, "rb") as stream:
            size = stream.seek(0, 2)
            digest.update(f"{file.name} {size}".encode())
            for start in (0, max(size - _FINGERPRINT_BYTES, 0)):
                stream.seek(start)
                digest.update(stream.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]
