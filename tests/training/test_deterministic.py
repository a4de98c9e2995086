"""``deterministic_mode``: two runs give the same bits, all ranks compute in it, and the environment is looked at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_npd.errors import UserError
from megatron_npd.platform import get_platform
from megatron_npd.platform.cuda import Device
from megatron_npd.platform.deterministic import deterministic
from megatron_npd.training import step
from megatron_npd.training.metrics import is_time
from megatron_npd.training.trainer import train
from tests.dist import run_distributed
from tests.helpers import make_tiny_model
from tests.training.make_run import config, make_packs, read_metrics

VARIABLES = Device.deterministic_environment


def _train(rank: int, world_size: int, model: Path, packs: Path, root: Path) -> list[tuple[Any, ...]]:
    """What each run's forwards saw: torch's mode, megatron-core's, and the lookup of the embedding."""
    seen: list[tuple[Any, ...]] = []
    params = step.packed_params

    def look(cu_seqlens: torch.Tensor) -> Any:
        seen.append((torch.get_deterministic_debug_mode(), torch.empty(3).isnan().all().item()))
        return params(cu_seqlens)

    step.packed_params = look
    for name, mode in (("one", True), ("two", True), ("off", False)):
        made: list[Any] = []
        build = step.TrainStep.__init__

        def keep(self: Any, cfg: Any, chunks: Any, *, build: Any = build, made: Any = made, **sizes: Any) -> None:
            build(self, cfg, chunks, **sizes)
            made.append(chunks[0])

        step.TrainStep.__init__ = keep
        fields = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "deterministic_mode": mode}
        train(config(model, packs, root / name, train_iters=4, lr_warmup_iters=1, **fields))
        step.TrainStep.__init__ = build
        seen.append((name, made[0].config.deterministic_mode, made[0].embedding.word_embeddings.deterministic_mode))
    seen.append((torch.get_deterministic_debug_mode(),))
    return seen


def test_two_runs_are_the_same_bits_and_every_rank_is_in_the_mode(tmp_path: Path) -> None:
    model, packs = make_tiny_model(tmp_path / "model"), make_packs(tmp_path)
    for seen in run_distributed(_train, 2, model, packs, tmp_path):
        built = [row for row in seen if len(row) == 3]
        assert built == [("one", True, True), ("two", True, True), ("off", False, False)]
        end = seen.index(built[1])
        assert {row for row in seen[:end] if len(row) == 2} == {(2, True)}
        assert {row[0] for row in seen[end:] if len(row) == 2} == {0} and seen[-1] == (0,)
    one, two, off = (
        [{name: value for name, value in line.items() if not is_time(name)} for line in read_metrics(path)]
        for path in (tmp_path / name / "metrics.jsonl" for name in ("one", "two", "off"))
    )
    assert one == two and len(one) == 4
    assert [line["loss"] for line in off] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    files = [sorted((tmp_path / name / "iter_0000004").rglob("*.distcp")) for name in ("one", "two")]
    assert files[0] and [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(type(get_platform("cpu")), "deterministic_environment", VARIABLES)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    return monkeypatch


def test_the_libraries_are_told_where_nobody_told_them(as_on_cuda: pytest.MonkeyPatch) -> None:
    as_on_cuda.setenv("NCCL_ALGO", "Tree")
    with pytest.raises(RuntimeError, match="inside"), deterministic(True):
        assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"]) == (":4096:8", "Tree")
        assert torch.are_deterministic_algorithms_enabled()
        raise RuntimeError("inside")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("name", "value"), [("NCCL_ALGO", "NVLS"), ("CUBLAS_WORKSPACE_CONFIG", ":0:0")])
def test_what_contradicts_the_mode_is_refused(as_on_cuda: pytest.MonkeyPatch, name: str, value: str) -> None:
    as_on_cuda.setenv(name, value)
    words = f"{name} must be {' or '.join(VARIABLES[name])} with deterministic_mode, got {value}; unset it, and it is "
    with pytest.raises(UserError) as error, deterministic(True):
        raise AssertionError("not reached")
    assert str(error.value) == words + VARIABLES[name][0]


def test_variables_that_come_too_late_are_refused(as_on_cuda: pytest.MonkeyPatch) -> None:
    as_on_cuda.setattr(torch.distributed, "is_initialized", lambda: True)
    late = pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG must be set before the ranks join")
    with late, deterministic(True):
        raise AssertionError("not reached")
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
