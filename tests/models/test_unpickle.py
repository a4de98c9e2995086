"""Pickles planted in a checkpoint and sealed again: refused with a clear error, and nothing of them runs."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch

from megatron_npd.errors import UserError
from megatron_npd.manifest import is_sealed
from megatron_npd.models.convert import megatron_to_hf
from megatron_npd.models.unpickle import _Unpickler
from tests.models.common import exchange, make_trainer, restore, save, saved, seal_again, write_common


class Planted:
    """Makes a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    trainer = make_trainer(tiny_model_dir)
    trainer.step(0)
    return save(trainer, tmp_path_factory.mktemp("written"), 1)


def _index(path: Path, marker: Path) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(Planted(marker)))


def _inside_the_index(path: Path, marker: Path) -> None:
    index = pickle.loads((path / ".metadata").read_bytes())
    index.planner_data = {"key": Planted(marker)}
    (path / ".metadata").write_bytes(pickle.dumps(index))


def _common_state(path: Path, marker: Path) -> None:
    write_common(path, {"optimizer": Planted(marker)})


def _part(path: Path, marker: Path) -> None:
    """Behind the tensors of a part, where the index has an object that the model asks for."""
    exchange(path, "_extra_state", saved(Planted(marker)))


def _beside_the_numbers(path: Path, marker: Path) -> None:
    """In the pickle that torch.save writes beside a tensor's numbers."""
    exchange(path, "decoder.final_layernorm.weight", saved(Planted(marker)))


def _no_index(path: Path, marker: Path) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(3))


def _huge(path: Path, marker: Path) -> None:
    (path / ".metadata").write_bytes(b"\x80\x04\x8e" + (2**62).to_bytes(8, "little"))  # a string of 4 EiB


def _change_of_a_class(path: Path, marker: Path) -> None:
    (path / ".metadata").write_bytes(b"\x80\x02cpathlib\nPosixPath\n(N}U\x07plantedK\x01stb.")


def _elsewhere(path: Path, marker: Path) -> None:
    index = pickle.loads((path / ".metadata").read_bytes())
    next(iter(index.storage_data.values())).relative_path = "../planted"
    torch.save(Planted(marker), path.parent / "planted")
    (path / ".metadata").write_bytes(pickle.dumps(index))


@pytest.mark.parametrize(
    "plant",
    [
        *(_index, _inside_the_index, _common_state, _part, _beside_the_numbers, _elsewhere, _no_index, _huge),
        _change_of_a_class,
    ],
)
def test_a_planted_pickle_runs_nowhere(
    written: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    plant: Callable[[Path, Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # as some clusters set it
    path, marker = tmp_path / "iter_0000001", tmp_path / "marker"
    shutil.copytree(written, path)
    plant(path, marker)
    seal_again(path)
    found = r"posix\.mkdir|\.\./planted|no index: .*|pathlib\.PosixPath"
    words = rf"iter_0000001 must hold tensors and .* got a pickle with ({found}); do"
    with pytest.raises(UserError, match=words):
        restore(make_trainer(tiny_model_dir, load=False), path)
    if plant in (_common_state, _part):  # the conversion opens neither
        megatron_to_hf(path, tiny_model_dir, tmp_path / "hf")
    else:
        with pytest.raises(UserError, match=words):
            megatron_to_hf(path, tiny_model_dir, tmp_path / "hf")
        assert not is_sealed(tmp_path / "hf")
    assert not hasattr(Path, "planted") and not marker.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_the_planted_pickles_would_run(tmp_path: Path) -> None:
    """Else the test above shows nothing."""
    pickle.loads(pickle.dumps(Planted(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def test_a_path_that_a_newer_python_wrote_is_a_path() -> None:
    """From Python 3.13 on paths are pickled under another module's name, which others do not have."""
    written = pickle.dumps(PosixPath("iter_0000100"), protocol=2).replace(b"cpathlib._local\n", b"cpathlib\n")
    newer = written.replace(b"cpathlib\n", b"cpathlib._local\n")
    assert newer != written
    for text in (written, newer):
        assert _Unpickler(io.BytesIO(text)).load() == PosixPath("iter_0000100")
