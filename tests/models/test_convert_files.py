"""Safetensors directories: what is read, what is refused by name, how shards are written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_npd.log import UserError
from megatron_npd.models.families import load_spec
from megatron_npd.models.hf_checkpoint import HFCheckpoint, ShardWriter
from megatron_npd.models.mapping import hf_shapes
from megatron_npd.weights import INDEX_FILE, SINGLE_FILE

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
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    (model_dir / SINGLE_FILE).unlink()
    writer = ShardWriter(model_dir, shapes, dtypes, total * 2 // 3)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finalize()
    return tensors


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

    def write(weight_map: object) -> None:
        file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    write({name: shard for name, shard in index["weight_map"].items() if name != Q_PROJ})
    with pytest.raises(UserError, match=Q_PROJ):
        check(model_dir)
    write(index["weight_map"] | {"model.extra": "model-00001-of-00002.safetensors"})
    with pytest.raises(UserError, match=r"model\.extra only in the index"):
        check(model_dir)
    write(index["weight_map"] | {Q_PROJ: "../model.safetensors"})
    with pytest.raises(UserError, match=r"\.\./model"):
        check(model_dir)
    write([])
    with pytest.raises(UserError, match="weight_map"):
        check(model_dir)
    write(index["weight_map"])
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
