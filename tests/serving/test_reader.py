"""How a worker reads a checkpoint ahead: as far as there is room, hashed, and with its trouble told to who takes it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_npd.errors import UserError
from megatron_npd.serving import worker_extension
from megatron_npd.serving.worker_extension import WorkerExtension, _Reader
from megatron_npd.weights import SINGLE_FILE, read_weights


def a_worker() -> WorkerExtension:
    """Of no engine: reading needs none."""
    extension: Any = WorkerExtension  # for type checkers it is vLLM's worker
    return extension()


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_all_is_read_hashed_and_given(tiny_model_dir: Path) -> None:
    expected = load_file(tiny_model_dir / SINGLE_FILE)
    with _Reader(str(tiny_model_dir)) as reader:
        wait_for(lambda: reader.ready)
        assert reader.taken == 0 and len(reader.content) == len(expected)
        taken = dict(reader)
    assert reader.taken == len(expected) == len(taken)
    assert all(taken[name].equal(tensor) for name, tensor in expected.items())
    assert reader.content.hexdigest() == read_weights(tiny_model_dir).content_hash()


def test_what_finds_no_room_is_read_when_it_is_taken(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_extension, "free_memory", lambda: -1)
    with _Reader(str(tiny_model_dir)) as reader:
        wait_for(lambda: reader.ready)
        assert len(reader.content) == worker_extension._AHEAD < len(reader.weights.tensors)
        assert len(list(reader)) == len(reader.weights.tensors) == len(reader.content)


def test_a_cut_file_is_an_error_before_anything_is_read(tiny_model_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", SINGLE_FILE):
        (tmp_path / name).write_bytes((tiny_model_dir / name).read_bytes())
    weights = read_weights(tmp_path)
    with open(tmp_path / SINGLE_FILE, "r+b") as stream:
        stream.truncate(max(header.stop for header in weights.tensors.values()) - 8)
    with pytest.raises(UserError, match="must be a whole safetensors file"):
        _Reader(str(tmp_path))


def test_only_what_has_not_changed_since_is_taken_from_memory(tiny_model_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", SINGLE_FILE):
        (tmp_path / name).write_bytes((tiny_model_dir / name).read_bytes())
    worker = a_worker()
    assert worker.npd_staged() == {"ready": True}  # of nothing
    assert worker.npd_stage(str(tmp_path)) == {}
    staged = worker._npd_staged
    assert staged is not None
    wait_for(lambda: worker.npd_staged() == {"ready": True})
    assert worker._npd_reader(str(tmp_path)) is staged
    assert worker.npd_stage(str(tmp_path)) == {}
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + " ")
    assert worker._npd_reader(str(tmp_path)) is not staged and worker._npd_staged is None
    assert "error" in worker.npd_stage(str(tmp_path / "nowhere"))
    assert worker.npd_stage("") == {} and worker._npd_staged is None


def test_numbers_that_are_none_are_told_before_anything_is_taken(tmp_path: Path, tiny_model_dir: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = load_file(tiny_model_dir / SINGLE_FILE)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, tmp_path / SINGLE_FILE)
    (tmp_path / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    worker = a_worker()
    assert worker.npd_stage(str(tmp_path)) == {}
    wait_for(lambda: "must hold finite numbers" in worker.npd_staged().get("error", ""))
    with pytest.raises(UserError, match="must hold finite numbers"), worker._npd_reader(str(tmp_path)) as reader:
        list(reader)


def test_what_nobody_takes_is_let_go_of(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_extension, "_KEPT_SECONDS", 0.05)
    for free in (1, -1):  # all of it is in memory, or some of it
        monkeypatch.setattr(worker_extension, "free_memory", lambda free=free: free)
        worker = a_worker()
        assert worker.npd_stage(str(tiny_model_dir)) == {}
        staged = worker._npd_staged
        assert staged is not None
        wait_for(lambda staged=staged: staged.error is not None)
        assert not staged._tensors and worker._npd_reader(str(tiny_model_dir)) is not staged
