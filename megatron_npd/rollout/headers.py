"""What a directory of safetensors holds, from its headers alone; read by the client and inside the server."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_npd.log import UserError

INDEX = "model.safetensors.index.json"
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}
_BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8}
_FREE_KEYS = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")  # say nothing that the headers do not


@dataclass(frozen=True, kw_only=True)
class Headers:
    """Tensors and configuration of a checkpoint.

    Attributes:
        tensors: Name -> ``"F32 [64, 64]"``.
        files: Names of the safetensors files, sorted.
        config: ``config.json`` without the keys that may differ between equal models.
    """

    tensors: dict[str, str]
    files: list[str]
    config: dict[str, Any]


def read_headers(directory: str | Path) -> Headers:
    """Read and check every header of a checkpoint.

    Raises:
        UserError: A file is missing, cut or damaged, or the files do not hold what the index lists.
    """
    directory = Path(directory)
    config = {key: value for key, value in _read_json(directory / "config.json").items() if key not in _FREE_KEYS}
    index = _read_index(directory / INDEX) if (directory / INDEX).is_file() else None
    files = sorted(set(index.values()) if index else {file.name for file in directory.glob("*.safetensors")})
    if not files:
        raise UserError(f"{directory} must hold model weights, got no *.safetensors in it; export the policy again")
    tensors: dict[str, str] = {}
    for name in files:
        here = _read_header(directory / name)
        if index is not None and (wrong := {key for key, file in index.items() if file == name} ^ here.keys()):
            raise UserError(
                f"{directory / name} must hold what {INDEX} lists, got a difference in {min(wrong)}; export it again"
            )
        if twice := tensors.keys() & here.keys():
            raise UserError(f"{directory} must hold each tensor once, got {min(twice)} in two files; export it again")
        tensors |= here
    return Headers(tensors=tensors, files=files, config=config)


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> file, each a file of the same directory."""
    index = _read_json(path).get("weight_map")
    for name in index.values() if isinstance(index, dict) else [index]:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise UserError(f"{path} must name files of its directory in weight_map, got {name!r}; export it again")
    return index or {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError(f"{type(value).__name__} in place of an object")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} must be a readable JSON file, got {error}; export the policy again") from error


def _read_header(path: Path) -> dict[str, str]:
    try:
        with open(path, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            length = path.stat().st_size
            if size > length - 8:
                raise ValueError(f"{length} bytes with a header of {size}")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            if start != end or (stop - start) * 8 != prod(entry["shape"]) * _BITS[entry["dtype"]]:
                raise ValueError(f"tensor {name} at bytes {start} to {stop} for {entry['dtype']} {entry['shape']}")
            end = stop
        if length != 8 + size + end:
            raise ValueError(f"{length} bytes where the header describes {8 + size + end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} must be a whole safetensors file, got {error}; export the policy again") from error
    return {name: f"{entry['dtype']} {entry['shape']}" for name, entry in header.items()}
