"""A run of several rounds: what stops all ranks, and what must not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_npd.config.training import TrainConfig
from megatron_npd.errors import UserError
from megatron_npd.links import links_of
from megatron_npd.run_dir import RunDir
from megatron_npd.training.trainer import train
from tests.dist import run_distributed
from tests.training.make_run import config, make_round

ROUNDS = 2


def run_config(model: Path, run: Path, **fields: object) -> TrainConfig:
    """A trainer of a run whose rounds are all there, two steps each."""
    for index in range(ROUNDS):
        make_round(run, index)
    more = {"train_iters": 2 * ROUNDS, "updates": ROUNDS - 1, "lr_warmup_iters": 0, **fields}
    return config(model, run, str(RunDir(run).checkpoints), **more)


def test_a_run_is_one_of_wandbs_whose_links_stop_no_round(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    assert train(run_config(tiny_model_dir, tmp_path, wandb_project="npd")).finished
    wandb = RunDir(tmp_path).checkpoints / "wandb"
    assert len(list(wandb.glob("offline-run-*"))) == 1 and (wandb / "latest-run").is_symlink()
    assert not list(links_of(tmp_path)), "the run can go on, and verify has nothing to say of it"


def _damaged(rank: int, _: int, cfg: TrainConfig, late: bool) -> str:
    run = RunDir(Path(cfg.data_path))
    if rank == 0:
        file = run.round(int(late)) / "annotations/shard-00000/tokens.bin"
        data = bytearray(file.read_bytes())
        data[0] ^= 1
        file.write_bytes(data)
    dist.barrier()
    with pytest.raises(UserError) as caught:
        train(cfg)
    return str(caught.value)


@pytest.mark.parametrize("late", [False, True])
def test_a_round_that_is_damaged_stops_all_ranks(tmp_path: Path, tiny_model_dir: Path, late: bool) -> None:
    """One rank of a machine hashes what they read."""
    first, second = run_distributed(_damaged, 2, run_config(tiny_model_dir, tmp_path), late)
    assert first == second and f"rounds/{int(late):04d}/" in first and "shard-00000/tokens.bin must have" in first
