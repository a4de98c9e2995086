"""Checkpoints are judged by their headers: every kind of damage is named, whole ones are described."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_npd.errors import UserError
from megatron_npd.models.hf_checkpoint import HFCheckpoint
from megatron_npd.weights import INDEX_FILE, SINGLE_FILE, model_fingerprint, read_weights


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of three tensors in two files with an index."""
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "x-1.safetensors")
    save_file({"c": torch.zeros((), dtype=torch.float16)}, tmp_path / "x-2.safetensors")
    weight_map = {"a": "x-1.safetensors", "b": "x-1.safetensors", "c": "x-2.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "config.json").write_text(
        json.dumps({"hidden_size": 4, "transformers_version": "5", "dtype": "float32"})
    )
    return tmp_path


def test_names_shapes_types_and_settings(sharded: Path) -> None:
    weights = read_weights(sharded)
    assert weights.describe() == {
        "tensors": {"a": "F32 [2, 3]", "b": "BF16 [4]", "c": "F16 []"},
        "config": {"hidden_size": 4},
    }
    assert [header.file for header in weights.tensors.values()] == ["x-1.safetensors"] * 2 + ["x-2.safetensors"]


def test_every_cut_is_seen(sharded: Path) -> None:
    file = sharded / "x-1.safetensors"
    data = file.read_bytes()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"x-1\.safetensors must be a whole safetensors file"):
            read_weights(sharded)
    file.write_bytes(data + b"x")
    with pytest.raises(UserError, match="whole safetensors file"):
        read_weights(sharded)


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
        read_weights(sharded)


def test_index_and_files_must_agree(sharded: Path) -> None:
    save_file({"c": torch.zeros(()), "d": torch.zeros(1)}, sharded / "x-2.safetensors")
    with pytest.raises(UserError, match=r"x-2\.safetensors must hold what .* lists, got d only in the file"):
        read_weights(sharded)
    (sharded / "x-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"x-2\.safetensors must be a whole safetensors file, got .*No such file"):
        read_weights(sharded)
    weight_map = {"a": "x-1.safetensors", "b": "x-1.safetensors", "c": "x-1.safetensors"}
    (sharded / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"x-1\.safetensors must hold what .* lists, got c only in the index"):
        read_weights(sharded)
    weight_map = {"a": "x-3.safetensors", "b": "x-1.safetensors"}
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, sharded / "x-3.safetensors")
    (sharded / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"must hold what .* lists, got a only in the file"):
        read_weights(sharded)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "consolidated.safetensors", "consolidated-1.safetensors", "y.safetensors"]
)
def test_a_second_copy_of_the_weights_is_refused_by_all(sharded: Path, name: str) -> None:
    """transformers would read the first, vLLM the second and third, and without an index vLLM the last one too."""
    save_file({"a": torch.ones(2, 3)}, sharded / name)
    for read in (read_weights, model_fingerprint, HFCheckpoint):
        with pytest.raises(UserError, match=rf"one copy of its weights, which {INDEX_FILE} says .*, got {name} beside"):
            read(sharded)
    (sharded / name).unlink()
    assert read_weights(sharded).tensors and model_fingerprint(sharded)
    (sharded / INDEX_FILE).unlink()
    with pytest.raises(UserError, match=rf"must hold {SINGLE_FILE} or {INDEX_FILE}, got neither"):
        read_weights(sharded)
    (sharded / "x-1.safetensors").rename(sharded / SINGLE_FILE)
    with pytest.raises(UserError, match=rf"which {SINGLE_FILE} says .*, got x-2\.safetensors beside it"):
        read_weights(sharded)


def test_the_content_names_bytes_whatever_the_files(sharded: Path, tmp_path: Path) -> None:
    weights = read_weights(sharded)
    single = tmp_path / "single"
    single.mkdir()
    shutil.copy(sharded / "config.json", single)
    tensors = {"c": torch.zeros((), dtype=torch.float16), "b": torch.zeros(4, dtype=torch.bfloat16)}
    save_file(tensors | {"a": torch.zeros(2, 3)}, single / SINGLE_FILE)
    assert read_weights(single).content_hash() == weights.content_hash()
    seen = {weights.content_hash()}
    for change in ({"a": torch.full((2, 3), 2.0**-140)}, {"a": torch.zeros(3, 2)}, {"c": torch.zeros(())}):
        save_file(tensors | {"a": torch.zeros(2, 3)} | change, single / SINGLE_FILE)
        seen.add(read_weights(single).content_hash())
    assert len(seen) == 4 and all(len(content) == 16 for content in seen)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(
    sharded: Path, dtype: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_npd.weights._CHUNK", 16)
    largest = torch.full((100,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
    save_file({"c": largest}, sharded / "x-2.safetensors")
    assert read_weights(sharded).content_hash()
    largest[-1] = value
    save_file({"c": largest}, sharded / "x-2.safetensors")
    with pytest.raises(UserError, match=r"c in .*x-2\.safetensors must hold finite numbers, got NaN or infinity"):
        read_weights(sharded).content_hash()


def test_a_file_that_shrinks_while_it_is_read_is_told(sharded: Path) -> None:
    weights = read_weights(sharded)
    (sharded / "x-1.safetensors").write_bytes((sharded / "x-1.safetensors").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"x-1\.safetensors must stay as it is while it is read"):
        weights.content_hash()


def test_sizes_of_what_is_parsed_are_bounded(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_npd.weights.MAX_JSON_BYTES", 1000)
    file = sharded / "x-2.safetensors"
    whole = file.read_bytes()
    header = whole[8 : 8 + int.from_bytes(whole[:8], "little")].ljust(1001)
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))
    with pytest.raises(UserError, match=r"x-2\.safetensors .*got a header of 1001 bytes, more than 1000"):
        read_weights(sharded)
    file.write_bytes(whole)
    for name in (INDEX_FILE, "config.json"):
        text = (sharded / name).read_text()
        (sharded / name).write_text(text + 1000 * " ")
        with pytest.raises(UserError, match=rf"{name} must be JSON, got more than 1000 bytes"):
            read_weights(sharded)
        (sharded / name).write_text(text)


@pytest.mark.parametrize("name", ["../x-1.safetensors", "/etc/passwd", "..", "", 3, None])
def test_an_index_names_files_of_its_directory(sharded: Path, name: object) -> None:
    (sharded / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="must name files of its directory"):
        read_weights(sharded)


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, "{}", '{"weight_map": [1]}'])
def test_an_index_of_another_form(sharded: Path, text: str) -> None:
    (sharded / INDEX_FILE).write_text(text)
    with pytest.raises(UserError, match=INDEX_FILE):
        read_weights(sharded)


def test_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must be a Hugging Face model directory, got no config\.json"):
        read_weights(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=rf"must hold {SINGLE_FILE} or {INDEX_FILE}, got neither"):
        read_weights(tmp_path)
