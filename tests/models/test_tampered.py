"""Checkpoints that somebody changed and sealed again, and weights that are not finite, end in one error for all."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_npd.log import UserError
from megatron_npd.manifest import is_sealed
from megatron_npd.platform.mcore_versions import NEWER
from tests.dist import run_distributed
from tests.helpers import make_tiny_model
from tests.models.common import make_trainer, other_common, read_common, restore, save, seal_again

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
METADATA = ["[]", '{"sharded_back']
if not NEWER:  # which passes over what it does not know
    METADATA += ['{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "extra": 2}']
WEIGHT = "embedding.word_embeddings.weight"
COMMON: list[Any] = [[], {}, {"optimizer": {"param_groups": 3}}, {"optimizer": [], "scheduler": 1}, b""]
BESIDE = "iter_0000001" if NEWER else "common.pt"  # what is named where it is the state beside the tensors


def _tampered(rank: int, world: int, model_dir: Path, root: Path) -> None:
    trainer = make_trainer(model_dir)
    trainer.step(0)
    path = save(trainer, root, 1)
    again = make_trainer(model_dir, load=False)
    for name, contents in {"state.json": STATES, "metadata.json": METADATA}.items():
        file = path / name
        before = file.read_bytes()
        for content in contents:
            file.write_text(content)
            seal_again(path)
            with pytest.raises(UserError) as caught:
                restore(again, path)
            assert str(caught.value).startswith(str(file)), (content, caught.value)
        file.write_bytes(before)
    for content in COMMON:
        with other_common(path, content), pytest.raises(UserError) as caught:
            restore(again, path)
        assert f"{BESIDE} must be as save_checkpoint wrote it, got" in str(caught.value), (content, caught.value)


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

    def refused(words: str, *, with_optimizer: bool) -> None:
        with pytest.raises(UserError, match=words) as caught:
            restore(again, path) if with_optimizer else load_checkpoint(path, model=again.model)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    index = path / ".metadata"
    good = index.read_bytes()
    for change in INDICES.values():
        changed = pickle.loads(good)
        change(changed)
        index.write_bytes(pickle.dumps(changed))
        seal_again(path)
        for with_optimizer in (True, False):
            refused("got a pickle with no index|embedding|common_state", with_optimizer=with_optimizer)
    index.unlink()
    seal_again(path)
    for with_optimizer in (True, False):
        refused(r"\.metadata must be as save_checkpoint wrote it, got no such file", with_optimizer=with_optimizer)
    index.write_bytes(good)
    group = ("optimizer", "optimizer", "param_groups", 0)
    for place in ((*group, "step"), (*group, "eps"), ("scheduler", "num_steps"), ("scheduler", "lr_decay_style")):
        for value in (None, [], 2**70, float("nan"), True, torch.zeros(2)):
            state = read_common(path)
            _change(state, place, value)
            with other_common(path, state):  # weights alone need nothing of it
                refused(f"{BESIDE} must be as save_checkpoint wrote it, got", with_optimizer=True)
    for name in ("step", "betas", "eps"):
        state = read_common(path)
        del state["optimizer"]["optimizer"]["param_groups"][1][name]
        words = rf"{BESIDE} must be as .* got state\.optimizer\.optimizer\.param_groups\.1 without {name};"
        with other_common(path, state):
            refused(words, with_optimizer=True)
    seal_again(path)
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
