"""The same run in every parallel layout: losses, gradients, weights, and checkpoints that move between layouts."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_npd.config.training import TrainConfig
from megatron_npd.errors import UserError
from megatron_npd.models.build import build_model, load_spec
from megatron_npd.models.checkpoint import load_checkpoint
from megatron_npd.models.convert import megatron_to_hf
from megatron_npd.platform import get_platform
from megatron_npd.training import saving
from megatron_npd.training.step import TrainStep
from megatron_npd.training.trainer import train
from tests.dist import run_distributed
from tests.helpers import make_tiny_model
from tests.models.common import chained
from tests.training.make_run import SEQ_LENGTH, column, config, make_packs

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {},
    "dp2-mbs2": {"micro_batch_size": 2, "use_distributed_optimizer": False},
    "tp2-sp-fused": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "fused_linear_loss": True},
    "pp2-fused": {"pipeline_model_parallel_size": 2, "fused_linear_loss": True},
    "dp2-fused": {"fused_linear_loss": True},
    "tp2-as-on-devices": {"tensor_model_parallel_size": 2},  # padded vocabulary, fused SwiGLU
}
TOLERANCE = 1e-4
VOCAB_SIZE = 305


def _train_all(rank: int, world_size: int, configs: list[TrainConfig]) -> None:
    platform = get_platform()
    for cfg in configs:
        devices = cfg.save.endswith("as-on-devices")
        platform.fuses_swiglu, platform.vocab_multiple = devices, 128 if devices else 1
        assert train(cfg).finished
    if rank:  # whose clock stands still: rank 0's counts
        saving.time = SimpleNamespace(monotonic=lambda: 0.0)
    fields = {"save_interval": 0, "save_interval_in_mins": 1e-9, "train_iters": 2, "lr_warmup_iters": 0}
    assert train(dataclasses.replace(configs[0], save=f"{configs[0].save}-timed", **fields)).finished
    with pytest.raises(UserError, match=r"global_batch_size must be a multiple of .* 1 x 2, got 3"):
        train(dataclasses.replace(configs[0], save="", tensor_model_parallel_size=1, global_batch_size=3))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of the runs ``tp1`` (this process), one a layout (two processes), and three that changed the layout.

    The model's embedding is tied and has a number of rows that no parallel size, and not 128, divides.
    """
    root = tmp_path_factory.mktemp("layouts")
    packs = make_packs(root, vocab_size=VOCAB_SIZE)
    model = make_tiny_model(root / "model", vocab_size=VOCAB_SIZE)

    def layout(name: str, **fields: Any) -> TrainConfig:
        return config(model, packs, root / name, save_interval=10, **fields)

    train(layout("tp1"))
    shutil.copytree(root / "tp1/iter_0000010", root / "tp1-to-tp2/iter_0000010")
    moved = layout("tp1-to-tp2", **LAYOUTS["tp2-sp"])
    run_distributed(_train_all, 2, [*(layout(name, **fields) for name, fields in LAYOUTS.items()), moved])
    for name in ("dp2", "pp2"):
        shutil.copytree(root / name / "iter_0000010", root / f"{name}-to-tp1/iter_0000010")
        train(layout(f"{name}-to-tp1"))
    return root


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_gradient_norms_are_those_of_one_process(runs: Path, name: str) -> None:
    for quantity in ("loss", "ce", "kd", "grad_norm", "student_mass", "lag_k1", "response_tokens", "lr"):
        expected, got = (column(runs / run / "metrics.jsonl", quantity) for run in ("tp1", name))
        assert len(got) == 20
        assert got == pytest.approx(expected, abs=TOLERANCE, rel=TOLERANCE), quantity
    hashes = [column(runs / run / "metrics.jsonl", "samples_sha256") for run in ("tp1", name)]
    assert hashes[0] == hashes[1] and len({*hashes[0]}) > 10
    assert expected[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])  # the warm-up, in which every step trains


def test_padding_of_the_vocabulary_is_not_exported(runs: Path, tmp_path: Path) -> None:
    exports = {}
    for name in ("tp2", "tp2-as-on-devices"):
        megatron_to_hf(runs / name / "iter_0000020", runs / "model", tmp_path / name)
        exports[name] = load_file(tmp_path / name / "model.safetensors")
    assert exports["tp2"].keys() == exports["tp2-as-on-devices"].keys()
    for name, value in exports["tp2"].items():
        torch.testing.assert_close(exports["tp2-as-on-devices"][name], value, atol=TOLERANCE, rtol=1e-3, msg=name)


def final_state(path: Path, model_dir: Path, packs: Path) -> dict[str, torch.Tensor]:
    """Weights and Adam's moments of a checkpoint, loaded into one process."""
    spec = load_spec(model_dir)
    model = build_model(spec)
    step = TrainStep(
        config(model_dir, packs),
        [model],
        vocab_size=spec.vocab_size,
        micro_batch_tokens=SEQ_LENGTH,
        num_micro_batches=1,
    )
    load_checkpoint(path, model=model, optimizer=step.optimizer)
    (optimizer,) = chained(step.optimizer)
    result = {}
    for name, parameter in model.named_parameters():
        result[f"weight {name}"] = parameter.detach().clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            value = optimizer._get_main_param_and_optimizer_states(parameter)[moment]
            result[f"{moment} {name}"] = value.clone()
    return result


def test_rank_0_decides_when_time_is_up(runs: Path) -> None:
    assert [path.name for path in (runs / "tp2-timed").glob("iter_*")] == ["iter_0000002"]


@pytest.mark.parametrize("name", ["tp2", "tp2-sp", "pp2", "dp2", "tp2-sp-fused", "pp2-fused", "dp2-fused"])
def test_weights_and_gradient_moments_are_those_of_one_process(runs: Path, name: str) -> None:
    expected, got = (final_state(runs / run / "iter_0000020", runs / "model", runs / "packs") for run in ("tp1", name))
    start = final_state(runs / "tp1/iter_0000010", runs / "model", runs / "packs")
    assert got.keys() == expected.keys() and len(got) > 30
    for key, value in expected.items():
        scale = float(value.abs().max())
        assert not torch.equal(value, start[key]), f"{key} did not train"
        torch.testing.assert_close(got[key], value, atol=TOLERANCE * max(scale, 1e-8), rtol=1e-3, msg=key)


def test_a_checkpoint_goes_on_in_another_layout(runs: Path) -> None:
    expected = column(runs / "tp1/metrics.jsonl", "loss")[10:]
    for name in ("tp1-to-tp2", "dp2-to-tp1", "pp2-to-tp1"):
        assert column(runs / name / "metrics.jsonl", "loss") == pytest.approx(expected, abs=TOLERANCE), name
