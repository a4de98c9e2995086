"""Safetensors directories: what is read, what is refused by name, how shards are written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_npd.errors import UserError
from megatron_npd.manifest import file_sha256, is_sealed
from megatron_npd.models.convert import _open_to_servers, hf_to_megatron
from megatron_npd.models.families import load_spec
from megatron_npd.models.hf_checkpoint import HFCheckpoint, write_weights
from megatron_npd.models.mapping import hf_shapes
from megatron_npd.models.streams import Block
from megatron_npd.weights import INDEX_FILE, SINGLE_FILE, read_weights
from tests.helpers import failing

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def rewrite(model_dir: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(model_dir / SINGLE_FILE)
    change(tensors)
    save_file(tensors, model_dir / SINGLE_FILE)
    return model_dir


def split(model_dir: Path) -> dict[str, torch.Tensor]:
    """Turn the single file into two shards and an index; returns the tensors."""
    tensors = load_file(model_dir / SINGLE_FILE)
    (model_dir / SINGLE_FILE).unlink()
    write(model_dir, tensors, sum(tensor.nbytes for tensor in tensors.values()) * 2 // 3)
    return tensors


def write(
    out_dir: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int, workers: int = 2
) -> tuple[str, dict[str, str]]:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def fill(block: Block, out: torch.Tensor) -> None:
        out.copy_(tensors[block.name][block.first :][: len(out)])

    return write_weights(out_dir, shapes, dtypes, fill, max_shard_bytes=max_shard_bytes, workers=workers)


def check(model_dir: Path) -> None:
    HFCheckpoint(model_dir).check(hf_shapes(load_spec(model_dir)))


def test_slices_and_headers(model_dir: Path) -> None:
    tensors = load_file(model_dir / SINGLE_FILE)
    checkpoint = HFCheckpoint(model_dir)
    checkpoint.check(hf_shapes(load_spec(model_dir)))
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert set(checkpoint.dtypes.values()) == {torch.float32}
    assert torch.equal(checkpoint.read(Q_PROJ), tensors[Q_PROJ])
    part = (slice(3, 9), slice(16, 32))
    assert torch.equal(checkpoint.read(Q_PROJ, part), tensors[Q_PROJ][part])


def test_shards_are_written_and_read_as_transformers_does(model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    tensors = split(model_dir)
    files = sorted(file.name for file in model_dir.glob("*.safetensors"))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    check(model_dir)
    checkpoint = HFCheckpoint(model_dir)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    state = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_missing_unexpected_and_misshaped_tensors_are_named(model_dir: Path) -> None:
    with pytest.raises(UserError, match="must hold the tensor " + Q_PROJ):
        check(rewrite(model_dir, lambda tensors: tensors.pop(Q_PROJ)))
    with pytest.raises(UserError, match=rf"{Q_PROJ} in .*{SINGLE_FILE} must have shape \[64, 64\].*\[63, 64\]"):
        check(rewrite(model_dir, lambda tensors: tensors.update({Q_PROJ: torch.zeros(63, 64)})))
    with pytest.raises(UserError, match=rf"{SINGLE_FILE} must .* got model.extra"):
        check(
            rewrite(
                model_dir, lambda tensors: tensors.update({Q_PROJ: torch.zeros(64, 64), "model.extra": torch.zeros(1)})
            )
        )


def test_quantised_weights_are_refused(model_dir: Path) -> None:
    with pytest.raises(UserError, match=rf"{Q_PROJ} in .* got I8"):
        check(rewrite(model_dir, lambda tensors: tensors.update({Q_PROJ: torch.zeros(64, 64, dtype=torch.int8)})))


def test_files_that_are_missing_or_damaged_are_named(model_dir: Path) -> None:
    data = (model_dir / SINGLE_FILE).read_bytes()
    (model_dir / SINGLE_FILE).write_bytes(data[:-10])
    with pytest.raises(UserError, match=f"{SINGLE_FILE} must be a whole safetensors file"):
        check(model_dir)
    (model_dir / SINGLE_FILE).unlink()
    with pytest.raises(UserError, match=r"must hold model\.safetensors or"):
        check(model_dir)


def test_an_index_that_does_not_fit_is_refused(model_dir: Path) -> None:
    split(model_dir)
    file = model_dir / INDEX_FILE
    index = json.loads(file.read_text())

    def put(weight_map: object) -> None:
        file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    put({name: shard for name, shard in index["weight_map"].items() if name != Q_PROJ})
    with pytest.raises(UserError, match=Q_PROJ):
        check(model_dir)
    put(index["weight_map"] | {"model.extra": "model-00001-of-00002.safetensors"})
    with pytest.raises(UserError, match=r"model\.extra only in the index"):
        check(model_dir)
    put(index["weight_map"] | {Q_PROJ: "../model.safetensors"})
    with pytest.raises(UserError, match=r"\.\./model"):
        check(model_dir)
    put([])
    with pytest.raises(UserError, match="weight_map"):
        check(model_dir)
    put(index["weight_map"])
    (model_dir / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002"):
        check(model_dir)


def test_a_saved_copy_of_a_tied_head_is_dropped_only_if_equal(model_dir: Path) -> None:
    embedding = "model.embed_tokens.weight"
    rewrite(model_dir, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    checkpoint = HFCheckpoint(model_dir)
    checkpoint.check(hf_shapes(load_spec(model_dir)))
    rewrite(model_dir, lambda tensors: tensors["lm_head.weight"].mul_(2))
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        HFCheckpoint(model_dir)


def test_a_tied_head_that_is_saved_alone_is_the_embedding(model_dir: Path) -> None:
    embedding = HFCheckpoint(model_dir).read("model.embed_tokens.weight")
    rewrite(model_dir, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    check(model_dir)
    assert torch.equal(HFCheckpoint(model_dir).read("model.embed_tokens.weight", (slice(5, 9),)), embedding[5:9])


def test_buffers_that_no_model_reads_are_passed_over(model_dir: Path) -> None:
    left = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(16, dtype=torch.float64) for i in range(2)}
    check(rewrite(model_dir, lambda tensors: tensors.update(left)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_undefined_weights_are_neither_exported_nor_loaded(model_dir: Path, tmp_path: Path, value: float) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match=rf"{Q_PROJ} of the model to export .* must hold finite numbers"):
        write(out, {Q_PROJ: torch.full((2, 3), value, dtype=torch.bfloat16)}, 10**6)
    rewrite(model_dir, lambda tensors: tensors[Q_PROJ][7].fill_(value))
    with pytest.raises(UserError, match=rf"{Q_PROJ} and .* in .* must hold finite numbers, got NaN or infinity"):
        hf_to_megatron(model_dir, tmp_path / "megatron")
    assert not is_sealed(tmp_path / "megatron" / "iter_0000000")


def test_file_systems_without_permissions_take_an_export(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model_dir / SINGLE_FILE).chmod(0o600)
    with monkeypatch.context() as patch:
        patch.setattr(os, "chmod", failing(errno.EPERM))
        _open_to_servers(model_dir)
    _open_to_servers(model_dir)
    assert (model_dir / SINGLE_FILE).stat().st_mode == (model_dir / "config.json").stat().st_mode


def test_an_exports_content_is_that_of_its_files(model_dir: Path) -> None:
    tensors = load_file(model_dir / SINGLE_FILE)
    (model_dir / SINGLE_FILE).unlink()  # they lie in it
    content, hashes = write(model_dir, tensors, 10**9)
    assert content == read_weights(model_dir).content_hash()
    assert hashes == {SINGLE_FILE: file_sha256(model_dir / SINGLE_FILE)}


@pytest.mark.parametrize("workers", [1, 3])
def test_a_file_is_byte_for_byte_what_safetensors_writes(tmp_path: Path, workers: int) -> None:
    tensors = {
        "z": torch.ones(3, dtype=torch.bfloat16),
        "b": torch.ones(2, 2),
        "a10": torch.zeros(1),
        "a9": torch.ones(7),
    }
    tensors["h"] = torch.ones(5, dtype=torch.float16)
    write(tmp_path, tensors, 10**9, workers)
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / SINGLE_FILE).read_bytes() == (tmp_path / "expected").read_bytes()
