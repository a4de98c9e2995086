"""What a run goes on from: the newest whole checkpoint, whatever lies beside it, and how many of them are kept."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from megatron_npd.config.training import TrainConfig
from megatron_npd.errors import UserError
from megatron_npd.manifest import is_sealed, read_manifest
from megatron_npd.models import checkpoint_writer
from megatron_npd.training.trainer import train
from tests.dist import run_distributed
from tests.helpers import logged
from tests.training.make_run import column, config, make_packs
from tests.training.test_trainer import exact


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_packs(tmp_path_factory.mktemp("packs"))


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _train(rank: int, _: int, cfg: TrainConfig) -> tuple[int, str]:
    with logged() as said:
        return train(cfg).iteration, "\n".join(said)


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(
    tmp_path: Path, tiny_model_dir: Path, packs: Path
) -> None:
    cfg = config(tiny_model_dir, packs, tmp_path / "run", train_iters=4, save_interval=2, lr_warmup_iters=0)
    run_distributed(_train, 2, cfg)
    whole, weights = exact(tmp_path / "run/metrics.jsonl"), tmp_path / "run/iter_0000004/__1_0.distcp"
    original = weights.read_bytes()
    flip(weights)
    (first, said), (second, _) = run_distributed(_train, 2, cfg)
    assert first == second == 4
    assert "iter_0000004 is damaged" in said and "__1_0.distcp must have sha256" in said
    assert f"resumed from {tmp_path}/run/iter_0000002" in said
    assert names(tmp_path / "run") == ["damaged_iter_0000004", "iter_0000002", "iter_0000004"]
    assert exact(tmp_path / "run/metrics.jsonl") == whole and weights.read_bytes() == original

    planted = tmp_path / "run/iter_0000004/planted.distcp"
    planted.write_bytes(b"pickle")
    with pytest.raises(AssertionError, match=r"must hold what its manifest.json lists, got planted.distcp too"):
        run_distributed(_train, 2, cfg)
    assert names(tmp_path / "run") == ["damaged_iter_0000004", "iter_0000002", "iter_0000004"], "left as it is"

    planted.unlink()
    flip(tmp_path / "run/iter_0000004/.metadata")
    flip(tmp_path / "run/iter_0000002/.metadata")
    with pytest.raises(AssertionError, match="must hold a whole checkpoint, got damage in all of them"):
        run_distributed(_train, 2, cfg)
    damaged = ["damaged_iter_0000002", "damaged_iter_0000004", "damaged_iter_0000004.1"]
    assert names(tmp_path / "run") == damaged


def test_the_newest_are_kept_and_another_batch_size_only_where_it_is_asked_for(
    tmp_path: Path, tiny_model_dir: Path, packs: Path
) -> None:
    fields: dict[str, Any] = {"train_iters": 9, "save_interval": 2, "most_recent_k": 2, "lr_warmup_iters": 0}
    train(config(tiny_model_dir, packs, tmp_path / "run", exit_at_iteration=8, **fields))
    assert names(tmp_path / "run") == ["iter_0000006", "iter_0000008"]
    provenance = read_manifest(tmp_path / "run/iter_0000008").provenance
    assert provenance["config"]["train_iters"] == 9 and {"python", "torch", "megatron-core"} <= {
        *provenance["versions"]
    }

    other = config(tiny_model_dir, packs, tmp_path / "run", global_batch_size=2, **fields)
    with pytest.raises(UserError, match=r"global_batch_size must be 4, .* got 2; give --change-global-batch-size"):
        train(other)
    result = train(
        config(tiny_model_dir, packs, tmp_path / "run", global_batch_size=2, change_global_batch_size=True, **fields)
    )
    assert column(result.metrics_path, "rows_consumed")[-2:] == [32, 34]
    assert names(tmp_path / "run") == ["iter_0000006", "iter_0000008", "iter_0000009"]  # the last one is a policy


def test_a_checkpoint_in_the_background_is_none_before_all_of_it_is_on_the_disk(
    tmp_path: Path, tiny_model_dir: Path, packs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"train_iters": 8, "save_interval": 3, "lr_warmup_iters": 0}
    train(config(tiny_model_dir, packs, tmp_path / "whole", **fields))
    write, steps = checkpoint_writer._write, threading.Event()
    seen: list[tuple[int, bool]] = []

    def slow(*args: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            steps.wait(60)  # two more steps are done meanwhile
        write(*args)

    from megatron_npd.training.step import TrainStep

    run = TrainStep.run

    def stepping(self: TrainStep, batches: Any, iteration: int, ask: Any) -> Any:
        result = run(self, batches, iteration, ask)
        seen.append((iteration, is_sealed(tmp_path / "run/iter_0000003")))
        if iteration == 5:
            steps.set()
        return result

    monkeypatch.setattr(checkpoint_writer, "_write", slow)
    monkeypatch.setattr(TrainStep, "run", stepping)
    result = train(config(tiny_model_dir, packs, tmp_path / "run", async_save=True, **fields))
    assert dict(seen)[4] is False and dict(seen)[5] is False and dict(seen)[7] is True
    assert exact(result.metrics_path) == exact(tmp_path / "whole/metrics.jsonl")
    for name in names(tmp_path / "whole"):
        for file in (tmp_path / "whole" / name).glob("*.distcp"):
            assert file.read_bytes() == (tmp_path / "run" / name / file.name).read_bytes(), file


def test_all_checkpoints_of_load_are_damaged(tmp_path: Path, tiny_model_dir: Path, packs: Path) -> None:
    train(config(tiny_model_dir, packs, tmp_path / "first", train_iters=1, lr_warmup_iters=0))
    flip(tmp_path / "first/iter_0000001/state.json")
    with pytest.raises(UserError, match="got damage in all of them"):
        train(config(tiny_model_dir, packs, tmp_path / "second", load=str(tmp_path / "first")))
    assert names(tmp_path / "first") == ["iter_0000001"]  # another run's is left as it is

    # A run whose own are damaged does not begin anew from those that it once began with.
    train(config(tiny_model_dir, packs, tmp_path / "good", train_iters=1, lr_warmup_iters=0))
    cfg = config(
        tiny_model_dir, packs, tmp_path / "third", load=str(tmp_path / "good"), train_iters=2, lr_warmup_iters=0
    )
    train(cfg)
    flip(tmp_path / "third/iter_0000002/.metadata")
    with pytest.raises(UserError, match=r"third must hold a whole checkpoint, got damage in all of them"):
        train(cfg)
    shutil.rmtree(tmp_path / "first")
