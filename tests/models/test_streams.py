"""Weights on their way between files: memory that is used again must be hashed before it is."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_npd.manifest import file_sha256
from megatron_npd.models import hf_checkpoint, streams
from megatron_npd.models.dist_checkpoint import DistWriter
from megatron_npd.models.streams import Block, blocks, in_order
from megatron_npd.weights import read_weights

# A large part is hashed beside, small ones at once: as in a layer, whose projections have biases and norms.
SHAPES = {f"{layer}.{name}": shape for layer in range(6) for name, shape in (("weight", (300, 300)), ("bias", (8,)))}
DTYPES = dict.fromkeys(SHAPES, torch.float32)


class SlowHash:
    """sha256 of a machine that is busy with other work."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, data: memoryview | bytes) -> None:
        time.sleep(0.02 if len(data) > 2**18 else 0.0)
        self._hash.update(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def fill(block: Block, tensor: torch.Tensor) -> None:
    tensor.fill_(1.0 + list(SHAPES).index(block.name))


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (streams, hf_checkpoint):
        monkeypatch.setattr(module, "hashlib", SimpleNamespace(sha256=SlowHash))


@pytest.mark.parametrize("workers", [1, 4])
def test_exported_files_have_the_hashes_that_are_sealed(tmp_path: Path, workers: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    content, hashes = hf_checkpoint.write_weights(
        tmp_path, SHAPES, DTYPES, fill, max_shard_bytes=10**6, workers=workers
    )
    assert len(hashes) > 1
    assert hashes == {name: file_sha256(tmp_path / name) for name in hashes}
    assert content == read_weights(tmp_path).content_hash()


@pytest.mark.parametrize("workers", [1, 4])
def test_checkpoint_files_have_the_hashes_that_are_sealed(tmp_path: Path, workers: int) -> None:
    work = [block for name, shape in SHAPES.items() for block in blocks(name, shape, torch.float32, 2**24)]
    writer = DistWriter(tmp_path)
    for block, tensor in in_order(fill, work, DTYPES, workers):
        writer.add(block.name, tuple(tensor.shape), (0,) * tensor.dim(), tensor)
        if block is work[-1]:
            writer.close()
    hashes = writer.finish({"iteration": 0})
    assert hashes == {name: file_sha256(tmp_path / name) for name in hashes}
