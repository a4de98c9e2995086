"""Checkpoints that somebody changed and sealed again, and weights that are not finite, end in one error for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_npd.log import UserError
from megatron_npd.manifest import MANIFEST, is_sealed, seal
from tests.dist import run_distributed
from tests.helpers import make_tiny_model
from tests.models.common import make_trainer, restore, save

STATES = ["{", "[]", "{}", '{"state": [], "optimizer": null, "scheduler": true}', "[" * 100_000]
METADATA = ["[]", '{"sharded_back', '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "extra": 2}']
COMMON: list[Any] = [[], {}, {"optimizer": {"param_groups": 3}}, {"optimizer": [], "scheduler": 1}, b""]


def _tampered(rank: int, world: int, model_dir: Path, root: Path) -> None:
    trainer = make_trainer(model_dir)
    trainer.step(0)
    path = save(trainer, root, 1)
    again = make_trainer(model_dir, load=False)
    for name, contents in {"state.json": STATES, "metadata.json": METADATA, "common.pt": COMMON}.items():
        file = path / name
        before = file.read_bytes()
        for content in contents:
            if isinstance(content, str | bytes):
                file.write_bytes(content.encode() if isinstance(content, str) else content)
            else:
                torch.save(content, file)
            (path / MANIFEST).unlink()
            seal(path, kind="checkpoint", counts={"iteration": 1})
            with pytest.raises(UserError) as caught:
                restore(again, path)
            assert str(file) in str(caught.value), (content, caught.value)
        file.write_bytes(before)


def test_tampered_files_are_named(tmp_path: Path) -> None:
    run_distributed(_tampered, 1, make_tiny_model(tmp_path / "model"), tmp_path / "run")


def _not_finite(rank: int, world: int, model_dir: Path, root: Path) -> list[str]:
    from megatron_npd.models.build import load_spec
    from megatron_npd.models.convert import export_hf

    trainer = make_trainer(model_dir, 1, 2)
    if rank == 1:  # of the pipeline: rank 0 has no part in it
        with torch.no_grad():
            next(iter(trainer.model.parameters())).view(-1)[0] = float("nan")
    messages = []
    with pytest.raises(UserError) as caught:
        save(trainer, root, 7)
    messages.append(str(caught.value))
    with pytest.raises(UserError) as caught:
        export_hf(trainer.model, load_spec(model_dir), root / "hf")
    return [*messages, str(caught.value)]


def test_weights_that_are_not_finite_stop_all_ranks(tmp_path: Path) -> None:
    first, second = run_distributed(
        _not_finite, 2, make_tiny_model(tmp_path / "model", tie_word_embeddings=False), tmp_path, timeout=100
    )
    assert first == second, json.dumps([first, second])
    assert "after step 7 must hold finite numbers" in first[0]
    assert "must hold finite numbers" in first[1]
    assert not is_sealed(tmp_path / "iter_0000007")
    assert not is_sealed(tmp_path / "hf")
