"""Checkpoints: resuming is bitwise, layouts may change, and nothing unsealed or damaged is read."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner

from megatron_npd.errors import UserError
from megatron_npd.manifest import is_sealed, read_manifest
from megatron_npd.paths import latest_checkpoint
from megatron_npd.platform.mcore_versions import COMMON_OBJECT, NEWER
from tests.dist import run_distributed
from tests.helpers import make_tiny_model
from tests.models.common import full_state, make_trainer, read_common, restore, save, saved, seal_again

LAYOUTS = {"dp2": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}  # of two processes: (tensor, pipeline)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, a vocabulary that TP=2 has to pad, untied so that every parameter is its own."""
    return make_tiny_model(tmp_path_factory.mktemp("hf") / "model", vocab_size=305, tie_word_embeddings=False)


def _resume_bitwise(rank: int, world: int, model_dir: Path, root: Path, layout: tuple[int, int], options: dict) -> None:
    trainer = make_trainer(model_dir, *layout, **options)
    for iteration in range(3):
        trainer.step(iteration)
    path = save(trainer, root, 3)
    at_save = full_state(trainer)
    losses = [trainer.step(iteration) for iteration in range(3, 6)]

    again = make_trainer(model_dir, *layout, load=False, **options)
    assert restore(again, path) == {"iteration": 3, "rows": 6}
    restored = full_state(again)
    assert restored.keys() == at_save.keys()
    for name, tensor in at_save.items():
        assert torch.equal(tensor, restored[name]), name
    assert [again.step(iteration) for iteration in range(3, 6)] == losses
    assert again.optimizer.param_groups[0]["lr"] == trainer.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("layout", "options"),
    [("dp2", {}), ("tp2", {"sp": True}), ("pp2", {}), ("dp2", {"bf16": True}), ("tp2", {"distributed": False})],
    ids=["dp", "tp-sp", "pp", "dp-bf16", "tp-replicated-optimizer"],
)
def test_resume_is_bitwise(model_dir: Path, tmp_path: Path, layout: str, options: dict) -> None:
    run_distributed(_resume_bitwise, 2, model_dir, tmp_path, LAYOUTS[layout], options)


def _train_and_save(rank: int, world: int, model_dir: Path, root: Path, layout: tuple[int, int]) -> list[float]:
    trainer = make_trainer(model_dir, *layout)
    losses = [trainer.step(iteration) for iteration in range(3)]
    save(trainer, root, 3)
    return losses + [trainer.step(iteration) for iteration in range(3, 6)]


def _load_and_train(rank: int, world: int, model_dir: Path, path: Path, layout: tuple[int, int]) -> list[float]:
    trainer = make_trainer(model_dir, *layout, load=False)
    restore(trainer, path)
    return [trainer.step(iteration) for iteration in range(3, 6)]


@pytest.mark.parametrize("written", ["tp2", "pp2"])
def test_other_layouts_load_it(model_dir: Path, tmp_path: Path, written: str) -> None:
    """TP or PP = 2 writes; one process and the other layout go on with the same losses (rows are those of one rank)."""
    losses = max(run_distributed(_train_and_save, 2, model_dir, tmp_path, LAYOUTS[written]))
    path = tmp_path / "iter_0000003"
    single = run_distributed(_load_and_train, 1, model_dir, path, (1, 1))[0]
    other = max(run_distributed(_load_and_train, 2, model_dir, path, LAYOUTS["pp2" if written == "tp2" else "tp2"]))
    assert single == pytest.approx(losses[3:], abs=2e-5)
    assert other == pytest.approx(losses[3:], abs=2e-5)
    # The continuation is a continuation: without the optimizer's state the losses differ visibly.
    assert abs(losses[5] - losses[3]) > 1e-3


def _dp_resharding(rank: int, world: int, model_dir: Path, path: Path) -> dict[str, Any]:
    """The optimizer state that one process sees is what two data-parallel ranks wrote between them."""
    trainer = make_trainer(model_dir, load=False)
    restore(trainer, path)
    return full_state(trainer)


def test_data_parallel_size_may_change(model_dir: Path, tmp_path: Path) -> None:
    run_distributed(_train_and_save, 2, model_dir, tmp_path, LAYOUTS["dp2"])
    whole = run_distributed(_dp_resharding, 1, model_dir, tmp_path / "iter_0000003")[0]
    halves = run_distributed(_dp_resharding, 2, model_dir, tmp_path / "iter_0000003")
    for key in ("exp_avg.", "exp_avg_sq."):
        sums = [sum(v.double().sum() for k, v in state.items() if k.startswith(key)) for state in (whole, *halves)]
        assert float(sums[0]) == pytest.approx(float(sums[1] + sums[2]), rel=1e-9)
        assert float(sums[0]) != 0


def _rewrite(rank: int, world: int, model_dir: Path, root: Path) -> float:
    trainer = make_trainer(model_dir)
    assert latest_checkpoint(root) is None
    trainer.step(0)
    begin = time.monotonic()
    path = save(trainer, root, 1)
    seconds = time.monotonic() - begin
    (root / "iter_0000002").mkdir(exist_ok=True)  # a killed attempt
    (root / "iter_0000002" / "__0_0.distcp").write_bytes(b"half")
    (root / "iter_0000010.tmp").mkdir(exist_ok=True)
    assert latest_checkpoint(root) == path
    assert save(trainer, root, 2) == latest_checkpoint(root)
    assert (root / "iter_0000002" / "__0_0.distcp").stat().st_size > 4
    with pytest.raises(UserError, match="must not be sealed yet"):
        save(trainer, root, 2)
    return seconds


def test_directories(model_dir: Path, tmp_path: Path) -> None:
    seconds = run_distributed(_rewrite, 2, model_dir, tmp_path)
    manifest = read_manifest(tmp_path / "iter_0000001", kind="checkpoint")
    assert {".metadata", "state.json"} <= set(manifest.files)
    assert ("common.pt" in manifest.files) != NEWER
    assert manifest.counts == {"iteration": 1}
    assert max(seconds) < 5


def _full_disk(rank: int, world: int, model_dir: Path, root: Path, limit: int) -> str:
    trainer = make_trainer(model_dir)
    trainer.step(0)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # a write beyond it fails as one on a full disk does
    with pytest.raises(UserError) as caught:
        save(trainer, root, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert latest_checkpoint(root) is None
    assert save(trainer, root, 1) == latest_checkpoint(root)
    return str(caught.value)


def test_failed_write_is_a_user_error(model_dir: Path, tmp_path: Path) -> None:
    messages = run_distributed(_full_disk, 2, model_dir, tmp_path / "tensors", 50_000)
    assert "File too large" in messages[0]
    if not NEWER:  # which opens no file with torch alone
        messages += run_distributed(_full_disk, 1, model_dir, tmp_path / "common", 400)  # that file comes first
        assert "iostream error" in messages[-1]
    assert all("must be writable" in message and "Traceback" not in message for message in messages)


def _load_fails(rank: int, world: int, model_dir: Path, path: Path) -> str:
    trainer = make_trainer(model_dir, load=False)
    with pytest.raises(UserError) as caught:
        restore(trainer, path)
    return str(caught.value)


def _one_cannot_read(rank: int, world: int, model_dir: Path, path: Path) -> str:
    whole = FileSystemReader.read_data

    def read_data(self: FileSystemReader, plan: LoadPlan, planner: LoadPlanner) -> Any:
        if any(item.type == LoadItemType.TENSOR for item in plan.items):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(self, plan, planner)

    if rank == 1:
        FileSystemReader.read_data = read_data
    return _load_fails(rank, world, model_dir, path)


def _state(rank: int, world: int, path: Path) -> dict[str, Any]:
    from megatron_npd.models.checkpoint import saved_state

    return saved_state(path)


def test_damaged_or_foreign_checkpoints_are_refused(model_dir: Path, tmp_path: Path) -> None:
    run_distributed(_train_and_save, 1, model_dir, tmp_path, (1, 1))
    path = tmp_path / "iter_0000003"
    assert is_sealed(path)
    other = make_tiny_model(tmp_path / "other", num_hidden_layers=4, tie_word_embeddings=False)
    assert all("must hold this model" in m for m in run_distributed(_load_fails, 2, other, path))
    for name in (".metadata", "__0_0.distcp" if NEWER else "common.pt"):
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 1
        stat = (path / name).stat()
        (path / name).write_bytes(data)
        os.utime(path / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert all("must have sha256" in m for m in run_distributed(_load_fails, 2, model_dir, path))
        data[len(data) // 2] ^= 1
        (path / name).write_bytes(data)
    assert all("got: [Errno 5] Input/output" in m for m in run_distributed(_one_cannot_read, 2, model_dir, path))
    (path / "planted.distcp").write_bytes(b"pickle")
    assert all("got planted.distcp too" in m for m in run_distributed(_load_fails, 2, model_dir, path))
    (path / "planted.distcp").unlink()
    assert run_distributed(_state, 1, path) == [{"iteration": 3, "rows": 6}]
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace("3", "7"))
    with pytest.raises(AssertionError, match=r"state.json must have sha256"):
        run_distributed(_state, 1, path)
    (path / "state.json").write_text(text)
    (path / "manifest.json").unlink()
    assert all("must be a sealed directory" in m for m in run_distributed(_load_fails, 2, model_dir, path))


def _weights_alone(rank: int, world: int, model_dir: Path, root: Path) -> None:
    from megatron_npd.models.checkpoint import load_checkpoint, save_checkpoint

    trainer = make_trainer(model_dir, bf16=True)
    path = save_checkpoint(root, 0, model=trainer.model, state={})
    again = make_trainer(model_dir, load=False, bf16=True)
    assert load_checkpoint(path, model=again.model, optimizer=again.optimizer, scheduler=again.scheduler) == {}
    assert [again.step(i) for i in range(3)] == [trainer.step(i) for i in range(3)]


def test_optimizer_starts_anew_from_weights_alone(model_dir: Path, tmp_path: Path) -> None:
    run_distributed(_weights_alone, 2, model_dir, tmp_path)
    assert json.loads((tmp_path / "iter_0000000" / "state.json").read_text())["optimizer"] is None


def _in_the_other_form(rank: int, world: int, model_dir: Path, root: Path) -> str:
    """A checkpoint as the other megatron-core leaves it: a newer one goes on with it, an older one refuses it."""
    trainer = make_trainer(model_dir)
    trainer.step(0)
    path = save(trainer, root, 1)
    again = make_trainer(model_dir, load=False)
    if NEWER:
        common = read_common(path)
        index = pickle.loads((path / ".metadata").read_bytes())
        del index.state_dict_metadata[COMMON_OBJECT]
        index.storage_data = {key: place for key, place in index.storage_data.items() if key.fqn != COMMON_OBJECT}
        (path / ".metadata").write_bytes(pickle.dumps(index))
        (path / "common.pt").write_bytes(saved(common))
        seal_again(path)
        assert restore(again, path) == {"iteration": 1, "rows": 2}
        assert [again.step(i) for i in range(1, 4)] == [trainer.step(i) for i in range(1, 4)]
        return ""
    (path / "common.pt").unlink()
    seal_again(path)
    with pytest.raises(UserError) as caught:
        restore(again, path)
    return str(caught.value)


def test_a_checkpoint_of_the_other_megatron_core(model_dir: Path, tmp_path: Path) -> None:
    (message,) = run_distributed(_in_the_other_form, 1, model_dir, tmp_path)
    assert NEWER or "iter_0000001 must have a common.pt, as megatron-core 0.16" in message
