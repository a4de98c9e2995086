"""Checkpoints that somebody changed and sealed again, and weights that are not finite, end in one error for all."""

from __future__ import annotations

import pickle
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
INDICES: dict[str, Any] = {
    "no parts": lambda index: setattr(index, "storage_data", {}),
    "another start": lambda index: setattr(index, "storage_meta", [1]),
    "no entry": lambda index: index.state_dict_metadata.update({WEIGHT: None}),
    "no pieces": lambda index: setattr(index.state_dict_metadata[WEIGHT], "chunks", []),
    "half": lambda index: setattr(index.state_dict_metadata[WEIGHT].chunks[0], "sizes", torch.Size([2, 64])),
    "outside": lambda index: setattr(index.state_dict_metadata[WEIGHT].chunks[0], "offsets", torch.Size([400, 0])),
    "another key": lambda index: index.storage_data.update(a=next(iter(index.storage_data.values()))),
    "no number": lambda index: setattr(next(iter(index.storage_data.values())), "offset", "x"),
}
METADATA = ["[]", '{"sharded_back', '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "extra": 2}']
WEIGHT = "embedding.word_embeddings.weight"
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


def _change(state: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        state = state[key]
    state[path[-1]] = value


def _tampered_index(rank: int, world: int, model_dir: Path, root: Path) -> None:
    """What is of another form, or of another type at one place, in the index and in what stands beside the tensors."""
    from megatron_npd.models.checkpoint import load_checkpoint

    trainer = make_trainer(model_dir)
    trainer.step(0)
    path = save(trainer, root, 1)
    again = make_trainer(model_dir, load=False)

    def refused(file: Path, words: str) -> None:
        (path / MANIFEST).unlink()
        seal(path, kind="checkpoint", counts={"iteration": 1})
        messages = []
        for load in (lambda: restore(again, path), lambda: load_checkpoint(path, model=again.model)):
            if file.name == "common.pt" and messages:
                break  # weights alone need nothing of it
            with pytest.raises(UserError, match=words) as caught:
                load()
            messages.append(str(caught.value))
        assert all(str(path) in message and "\n" not in message for message in messages), messages

    index, common = path / ".metadata", path / "common.pt"
    good = index.read_bytes()
    for change in INDICES.values():
        changed = pickle.loads(good)
        change(changed)
        index.write_bytes(pickle.dumps(changed))
        refused(index, "got a pickle with no index|embedding")
    index.unlink()
    refused(index, r"\.metadata must be as save_checkpoint wrote it, got no such file")
    index.write_bytes(good)
    group = ("optimizer", "optimizer", "param_groups", 0)
    for place in ((*group, "step"), (*group, "eps"), ("scheduler", "num_steps"), ("scheduler", "lr_decay_style")):
        for value in (None, [], 2**70, float("nan"), True, torch.zeros(2)):
            state = torch.load(common, weights_only=True)
            before = common.read_bytes()
            _change(state, place, value)
            torch.save(state, common)
            refused(common, "common.pt must be as save_checkpoint wrote it, got")
            common.write_bytes(before)
    before = common.read_bytes()
    for name in ("step", "betas", "eps"):
        state = torch.load(common, weights_only=True)
        del state["optimizer"]["optimizer"]["param_groups"][1][name]
        torch.save(state, common)
        refused(common, rf"common\.pt must be as .* got state\.optimizer\.optimizer\.param_groups\.1 without {name};")
        common.write_bytes(before)
    (path / MANIFEST).unlink()
    seal(path, kind="checkpoint", counts={"iteration": 1})
    restore(again, path)
    assert again.step(1) == trainer.step(1)


def test_a_tampered_index_or_optimizer_state_is_named(tmp_path: Path) -> None:
    run_distributed(_tampered_index, 1, make_tiny_model(tmp_path / "model"), tmp_path / "run")


def test_tampered_files_are_named(tmp_path: Path) -> None:
    run_distributed(_tampered, 1, make_tiny_model(tmp_path / "model"), tmp_path / "run")


def _not_finite(rank: int, world: int, model_dir: Path, root: Path) -> str:
    trainer = make_trainer(model_dir, 1, 2)
    if rank == 1:  # of the pipeline: rank 0 has no part in it
        with torch.no_grad():
            next(iter(trainer.model.parameters())).view(-1)[0] = float("nan")
    with pytest.raises(UserError) as caught:
        save(trainer, root, 7)
    return str(caught.value)


def test_weights_that_are_not_finite_stop_all_ranks(tmp_path: Path) -> None:
    first, second = run_distributed(
        _not_finite, 2, make_tiny_model(tmp_path / "model", tie_word_embeddings=False), tmp_path, timeout=100
    )
    assert first == second
    assert "after step 7 must hold finite numbers" in first
    assert not is_sealed(tmp_path / "iter_0000007")
