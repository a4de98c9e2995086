"""Checkpoints are judged by their headers: every kind of damage is named, whole ones are described."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_npd.log import UserError
from megatron_npd.rollout.headers import INDEX, read_headers


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of three tensors in two files with an index."""
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "x-1.safetensors")
    save_file({"c": torch.zeros((), dtype=torch.float16)}, tmp_path / "x-2.safetensors")
    weight_map = {"a": "x-1.safetensors", "b": "x-1.safetensors", "c": "x-2.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "config.json").write_text(
        json.dumps({"hidden_size": 4, "transformers_version": "5", "dtype": "float32"})
    )
    return tmp_path


def test_names_shapes_types_and_settings(sharded: Path) -> None:
    headers = read_headers(sharded)
    assert headers.tensors == {"a": "F32 [2, 3]", "b": "BF16 [4]", "c": "F16 []"}
    assert headers.files == ["x-1.safetensors", "x-2.safetensors"]
    assert headers.config == {"hidden_size": 4}
    (sharded / INDEX).unlink()
    assert read_headers(sharded) == headers


def test_every_cut_is_seen(sharded: Path) -> None:
    file = sharded / "x-1.safetensors"
    data = file.read_bytes()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"x-1\.safetensors must be a whole safetensors file"):
            read_headers(sharded)
    file.write_bytes(data + b"x")
    with pytest.raises(UserError, match="whole safetensors file"):
        read_headers(sharded)


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}, "tensor t at bytes 0 to 8"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "tensor t at bytes 4 to 12"),
        ({"dtype": "F12", "shape": [2], "data_offsets": [0, 3]}, "F12"),
        ({"shape": [2]}, "data_offsets"),
    ],
)
def test_headers_that_contradict_themselves(sharded: Path, entry: dict, found: str) -> None:
    header = json.dumps({"t": entry}).encode()
    (sharded / "x-2.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    with pytest.raises(UserError, match=found):
        read_headers(sharded)


def test_index_and_files_must_agree(sharded: Path) -> None:
    save_file({"c": torch.zeros(()), "d": torch.zeros(1)}, sharded / "x-2.safetensors")
    with pytest.raises(UserError, match=r"x-2\.safetensors must hold what .* lists, got a difference in d"):
        read_headers(sharded)
    (sharded / "x-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"x-2\.safetensors must be a whole safetensors file, got .*No such file"):
        read_headers(sharded)
    (sharded / INDEX).unlink()
    save_file({"a": torch.zeros(1)}, sharded / "x-3.safetensors")
    with pytest.raises(UserError, match="each tensor once, got a in two files"):
        read_headers(sharded)


@pytest.mark.parametrize("name", ["../x-1.safetensors", "/etc/passwd", "..", "", 3, None])
def test_an_index_names_files_of_its_directory(sharded: Path, name: object) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="must name files of its directory"):
        read_headers(sharded)


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, "{}", '{"weight_map": [1]}'])
def test_an_index_of_another_form(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(UserError, match=INDEX):
        read_headers(sharded)


def test_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json must be a readable JSON file"):
        read_headers(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"got no \*\.safetensors"):
        read_headers(tmp_path)
