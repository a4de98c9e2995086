"""What a model directory's weights are: one rule for trainer, teacher, export, fingerprint and servers.

They are the files that ``model.safetensors.index.json`` names, or ``model.safetensors`` alone. Another safetensors file
beside them is refused: transformers prefers ``model.safetensors`` to the index, vLLM ``consolidated*.safetensors`` to
both, and without an index vLLM takes every file there is. Of the tensors, buffers that no model reads are left out, and
a tied output layer is the embedding: a copy of it must be equal, one that stands alone takes the embedding's name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npd.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_JSON_BYTES = 64 * 2**20  # of a header, an index or a configuration; 1000 tensors need about 0.1 MiB
_UNUSED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
_IN_LAYER = re.compile(r"model\.layers\.")  # where tensors are named so, the embedding is called EMBEDDING
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}
_BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8}
_UNDEFINED = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}  # bits of NaN and infinity
_UNDEFINED |= {"F8_E4M3": 0x7F, "F8_E5M2": 0x1F << 2}
_FREE_KEYS = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")  # say nothing that the headers do not
_FINGERPRINT_BYTES = 2**20
_CHUNK = 2**22


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """One tensor: its type as safetensors names it, its shape, and its bytes' place in a file."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    name: str  # in the file
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of a model directory, of which the headers have been read and checked.

    Attributes:
        directory: The directory.
        config: Its ``config.json``.
        tensors: Name -> header, in the order of the files.
        tied_copy: The output layer, where it repeats the embedding; it is not among ``tensors``.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorHeader]
    tied_copy: TensorHeader | None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.stop - header.start for header in self.tensors.values())

    def describe(self) -> dict[str, dict[str, Any]]:
        """Tensors (``"F32 [64, 64]"``) and configuration: equal for models that can take each other's weights."""
        config = {key: value for key, value in self.config.items() if key not in _FREE_KEYS}
        return {"tensors": {name: str(header) for name, header in self.tensors.items()}, "config": config}

    def stream(self) -> Iterator[tuple[str, TensorHeader, np.ndarray]]:
        """Each tensor with its bytes, in memory of their own: what is hashed is what is used.

        Raises:
            UserError: A file cannot be read, a number is NaN or infinite, or a tied copy differs.
        """
        self.check_tied_copy()
        for name, header in self.tensors.items():
            data = self._read(header)
            check_finite(f"{name} in {self.directory / header.file}", header.dtype, data)
            yield name, header, data

    def content_hash(self) -> str:
        """``ContentHash`` of all tensors: reads every byte, at 1 to 2 GB/s.

        Raises:
            UserError: As for ``stream``.
        """
        content = ContentHash()
        for name, header, data in self.stream():
            content.add(name, str(header), data)
        return content.hexdigest()

    def check_tied_copy(self) -> None:
        """Raise UserError if the output layer of a tied model is there and differs from the embedding."""
        if self.tied_copy is None:
            return
        original = self.tensors[EMBEDDING]
        if str(original) != str(self.tied_copy) or not np.array_equal(self._read(original), self._read(self.tied_copy)):
            raise UserError(
                f"{HEAD} in {self.directory / self.tied_copy.file} must equal {EMBEDDING}, to which config.json ties "
                "it, got other numbers; set tie_word_embeddings to false or remove the tensor"
            )

    def _read(self, header: TensorHeader) -> np.ndarray:
        path = self.directory / header.file
        try:
            with open(path, "rb") as stream:
                stream.seek(header.start)
                data = np.fromfile(stream, np.uint8, header.stop - header.start)
        except OSError as error:
            raise UserError(f"{path} must be readable, got {error}; restore the file") from error
        if data.size != header.stop - header.start:
            raise UserError(f"{path} must stay as it is while it is read, got another length; restore the file")
        return data


class ContentHash:
    """16 hex digits that name weights: every byte of every tensor, whatever files they lie in and in whatever order."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, name: str, header: str, data: np.ndarray) -> None:
        """Take one tensor: its name, type and shape as ``"F32 [64, 64]"``, and its bytes, [bytes] uint8."""
        self.add_hashed(name, header, hashlib.sha256(data.data).hexdigest())

    def add_hashed(self, name: str, header: str, sha256: str) -> None:
        """Take one tensor of whose bytes the hash is known, in hex."""
        self._lines.append(f"{name} {header} {sha256}\n")

    def __len__(self) -> int:
        return len(self._lines)

    def hexdigest(self) -> str:
        """The hash of what has been added."""
        return hashlib.sha256("".join(sorted(self._lines)).encode()).hexdigest()[:16]


def check_finite(what: str, dtype: str, data: np.ndarray) -> None:
    """Raise UserError if one of a tensor's numbers is NaN or infinite.

    Args:
        what: Names tensor and file.
        dtype: As safetensors names it; of integers every value is a number.
        data: Its bytes, [bytes] uint8.
    """
    if dtype not in _UNDEFINED:
        return
    bits = data.view(f"u{_BITS[dtype] // 8}")
    mask = bits.dtype.type(_UNDEFINED[dtype])
    for start in range(0, bits.size, _CHUNK):
        if ((bits[start : start + _CHUNK] & mask) == mask).any():
            raise UserError(f"{what} must hold finite numbers, got NaN or infinity; use weights from before they arose")


def has_weights(directory: str | Path) -> bool:
    """Whether a Hugging Face directory holds safetensors weights (and not a configuration only)."""
    return any((Path(directory) / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))


def read_weights(directory: str | Path) -> Weights:
    """Read and check every header of a model directory.

    Raises:
        UserError: Weights of another form or more than one copy of them; a file is missing, cut or damaged; or the
            files do not hold what the index lists.
    """
    directory = Path(directory)
    config = read_config(directory)
    files, index = _files(directory)
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        here = _read_header(directory / file)
        if index is not None and (wrong := {key for key, name in index.items() if name == file} ^ here.keys()):
            where = "the file" if min(wrong) in here else "the index"
            raise UserError(
                f"{directory / file} must hold what {INDEX_FILE} lists, got {min(wrong)} only in {where}; "
                "download or export the model again"
            )
        if twice := tensors.keys() & here.keys():
            raise UserError(f"{directory} must hold each tensor once, got {min(twice)} in two files; remove one")
        tensors |= here
    tensors = {name: header for name, header in tensors.items() if not name.endswith(_UNUSED)}
    tied_copy = None
    if config.get("tie_word_embeddings") is True and HEAD in tensors and any(map(_IN_LAYER.match, tensors)):
        head = tensors.pop(HEAD)
        tied_copy = head if EMBEDDING in tensors else None
        tensors.setdefault(EMBEDDING, head)
    return Weights(directory=directory, config=config, tensors=tensors, tied_copy=tied_copy)


def model_fingerprint(directory: str | Path) -> str:
    """16 hex digits that tell one model from another: configuration, sizes, first and last MiB of each weight file.

    A full hash of a 72B teacher takes minutes; a changed model differs in its headers or in these weights.

    Raises:
        UserError: The directory holds more than one copy of its weights.
    """
    directory = Path(directory)
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for name in _files(directory)[0] if has_weights(directory) else []:
        with open(directory / name, "rb") as stream:
            size = stream.seek(0, 2)
            digest.update(f"{name} {size}".encode())
            for start in (0, max(size - _FINGERPRINT_BYTES, 0)):
                stream.seek(start)
                digest.update(stream.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]


def read_config(directory: str | Path) -> dict[str, Any]:
    """``config.json`` of a model directory.

    Raises:
        UserError: It is missing or malformed.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} must be a Hugging Face model directory, got no config.json in it; check the path")
    return read_object(path)


def language_config(config: dict[str, Any]) -> dict[str, Any]:
    """What a ``config.json`` says of the language model: a part of it, where the model reads images too."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else config


def _files(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the weight files, sorted, and the index (tensor -> file) where there is one."""
    if not has_weights(directory):
        raise UserError(
            f"{directory} must hold {SINGLE_FILE} or {INDEX_FILE}, got neither; convert other weight files with "
            "transformers' save_pretrained"
        )
    path = directory / INDEX_FILE
    index: dict[str, str] | None = None
    if path.is_file():
        index = read_object(path).get("weight_map")
        for name in index.values() if isinstance(index, dict) and index else [index]:
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
                raise UserError(f"{path} must name files of its directory in weight_map, got {name!r}; do not use it")
    files = sorted(set(index.values())) if index else [SINGLE_FILE]
    if others := sorted({file.name for file in directory.glob("*.safetensors")} - set(files)):
        raise UserError(
            f"{directory} must hold one copy of its weights, which {INDEX_FILE if index else SINGLE_FILE} says are "
            f"{files[0]}{', ...' if files[1:] else ''}, got {', '.join(others[:3])} beside it: programs differ in what "
            "they read; move that away"
        )
    return files, index


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file that came with a model, if it is of a reasonable size.

    Raises:
        UserError: It cannot be read, or is no such object.
    """
    try:
        with open(path, "rb") as stream:
            text = stream.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"{type(value).__name__} in place of a JSON object")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} must be JSON, got {error}; restore the file") from error


def _read_header(path: Path) -> dict[str, TensorHeader]:
    try:
        with open(path, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            length = path.stat().st_size
            if size > length - 8:
                raise ValueError(f"{length} bytes with a header of {size}")
            if size > MAX_JSON_BYTES:
                raise ValueError(f"a header of {size} bytes, more than {MAX_JSON_BYTES}")
            entries = json.loads(stream.read(size))
        entries.pop("__metadata__", None)
        end = 0
        headers: dict[str, TensorHeader] = {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            (start, stop), dtype, shape = entry["data_offsets"], entry["dtype"], tuple(entry["shape"])
            if start != end or (stop - start) * 8 != prod(shape) * _BITS[dtype]:
                raise ValueError(f"tensor {name} at bytes {start} to {stop} for {dtype} {list(shape)}")
            end = stop
            place = {"file": path.name, "name": name, "start": 8 + size + start, "stop": 8 + size + stop}
            headers[name] = TensorHeader(dtype=dtype, shape=shape, **place)
        if length != 8 + size + end:
            raise ValueError(f"{length} bytes where the header describes {8 + size + end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} must be a whole safetensors file, got {error}; download or export it again") from error
    return headers
