"""Saving on several ranks: what goes wrong on one of them ends all."""

from __future__ import annotations

import types
from pathlib import Path

import pytest

from megatron_npd.errors import UserError
from megatron_npd.manifest import seal, writing
from tests.dist import run_distributed
from tests.training.make_run import config


def _save_beside_a_damaged_one(rank: int, world: int, root: Path) -> str:
    from megatron_npd.platform.initialize import initialize_distributed
    from megatron_npd.training import saving

    initialize_distributed()
    saving.save_checkpoint = lambda *_, **__: None  # pyright: ignore
    saver = saving.Saver(config(root, root, root), stop=9)
    with pytest.raises(UserError) as caught:
        saver.save(types.SimpleNamespace(model=None, optimizer=None, scheduler=None), {"iteration": 2})  # pyright: ignore
    return str(caught.value)


def test_an_earlier_checkpoint_that_is_damaged_stops_all_ranks(tmp_path: Path) -> None:
    """Rank 0 alone looks at it: the others would go on to the next step, and wait there."""
    with writing(tmp_path / "iter_0000001") as directory:
        (directory / "state.json").write_text("{}")
        seal(directory, kind="checkpoint")
    (tmp_path / "iter_0000001/state.json").write_text("[]")
    first, second = run_distributed(_save_beside_a_damaged_one, 2, tmp_path)
    assert first == second and "iter_0000001/state.json must have" in first
    assert (tmp_path / "iter_0000001").is_dir()
