"""Axes of parallelism that need more layers, or more processes, than ``test_layouts.py`` has; alone and combined.

Losses, gradient norms, weights and Adam's moments against one process, as there. The model is tied, has fewer key-value
heads than four tensor-parallel ranks, and rows of several segments.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_npd.config.training import TrainConfig
from megatron_npd.models.convert import megatron_to_hf
from megatron_npd.training.metrics import is_time
from megatron_npd.training.trainer import train
from tests.dist import run_distributed
from tests.helpers import make_tiny_model
from tests.training.make_run import column, config, make_packs, read_metrics
from tests.training.test_layouts import TOLERANCE, final_state

TP2, PP2, CP2 = (
    {f"{axis}_size": 2} for axis in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel")
)
SP: dict[str, Any] = {"sequence_parallel": True}
VPP2: dict[str, Any] = PP2 | {"virtual_pipeline_model_parallel_size": 2}
OVERLAP: dict[str, Any] = {"overlap_grad_reduce": True, "overlap_param_gather": True}
FULL: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
# By the number of processes. Four share two cores in many places: they do as many steps as show a difference, for 20
# would take 40 s more.
STEPS = {2: 20, 4: 6}
AXES: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "cp2": CP2,
        "cp2-fused-mbs2": CP2 | {"fused_linear_loss": True, "micro_batch_size": 2},
        "vpp2": VPP2,
        "vpp2-by-layers": PP2 | {"num_layers_per_virtual_pipeline_stage": 1},
        "pp2-uneven": PP2 | {"decoder_first_pipeline_num_layers": 3},
        "dp2-overlap": OVERLAP,
    },
    4: {
        "tp4": {"tensor_model_parallel_size": 4},
        "pp4": {"pipeline_model_parallel_size": 4},
        "cp4": {"context_parallel_size": 4},
        "tp2-pp2": TP2 | PP2,
        "tp2-cp2-sp": TP2 | CP2 | SP,
        "cp2-pp2": CP2 | PP2,
        "cp2-dp2": CP2,
        "vpp2-cp2-overlap-recompute": VPP2 | CP2 | OVERLAP | FULL,
    },
}
NAMES = [(name, world) for world, layouts in AXES.items() for name in layouts]
MOVED = {"one-to-vpp2": 2, "one-to-cp4": 4}
RESUMED = {"tp2-cp2-sp-to-one": "tp2-cp2-sp", "cp2-pp2-to-one": "cp2-pp2"}
HALF = 3


def _train_all(rank: int, world_size: int, configs: list[TrainConfig]) -> None:
    for cfg in configs:
        assert train(cfg).iteration == STEPS[world_size]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run in each layout, of ``one``, and of those that go on in another layout than they began in."""
    root = tmp_path_factory.mktemp("axes")
    packs = make_packs(root, vocab_size=305)
    shape: dict[str, Any] = {
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 305,
    }
    model = make_tiny_model(root / "model", **shape)

    def layout(name: str, steps: int, **fields: Any) -> TrainConfig:
        again = HALF if name in ("one", *RESUMED.values()) else 0  # a checkpoint for another layout to go on from
        return config(model, packs, root / name, save_interval=again, exit_at_iteration=steps, **fields)

    train(layout("one", STEPS[2]))
    for world, layouts in AXES.items():
        configs = [layout(name, STEPS[world], **fields) for name, fields in layouts.items()]
        for name in (name for name, processes in MOVED.items() if processes == world):
            shutil.copytree(root / f"one/iter_{HALF:07d}", root / f"{name}/iter_{HALF:07d}")
            configs.append(layout(name, STEPS[world], **layouts[name.removeprefix("one-to-")]))
        run_distributed(_train_all, world, configs)
    for name, source in RESUMED.items():
        shutil.copytree(root / f"{source}/iter_{HALF:07d}", root / f"{name}/iter_{HALF:07d}")
        train(layout(name, STEPS[4]))
    return root


@pytest.mark.parametrize(("name", "world"), NAMES)
def test_numbers_of_each_step_are_those_of_one_process(runs: Path, name: str, world: int) -> None:
    for quantity in ("loss", "ce", "kd", "grad_norm", "student_mass", "lag_k1", "lag_k3", "response_tokens", "tokens"):
        expected, got = (column(runs / run / "metrics.jsonl", quantity) for run in ("one", name))
        assert len(got) == STEPS[world]
        assert got == pytest.approx(expected[: STEPS[world]], abs=TOLERANCE, rel=TOLERANCE), quantity


@pytest.mark.parametrize(("name", "world"), NAMES)
def test_weights_and_gradient_moments_are_those_of_one_process(runs: Path, name: str, world: int) -> None:
    step = f"iter_{STEPS[world]:07d}"
    expected, got = (final_state(runs / run / step, runs / "model", runs / "packs") for run in ("one", name))
    assert got.keys() == expected.keys() and len(got) == 3 * (4 * 7 + 2)
    for key, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(got[key], value, atol=TOLERANCE * max(scale, 1e-8), rtol=1e-3, msg=key)


@pytest.mark.parametrize("name", [*RESUMED, *MOVED])
def test_a_checkpoint_goes_on_in_another_layout(runs: Path, name: str) -> None:
    for quantity in ("loss", "grad_norm", "response_tokens"):
        expected, got = (column(runs / run / "metrics.jsonl", quantity) for run in ("one", name))
        assert got == pytest.approx(expected[HALF : STEPS[MOVED.get(name, 4)]], abs=TOLERANCE), quantity


def test_parts_by_their_layers_are_those_by_their_number(runs: Path) -> None:
    one, other = (
        [{name: value for name, value in line.items() if not is_time(name)} for line in read_metrics(path)]
        for path in (runs / name / "metrics.jsonl" for name in ("vpp2", "vpp2-by-layers"))
    )
    assert one == other and len(one) == STEPS[2]


def test_the_policy_of_a_model_in_parts_is_that_of_one_process(runs: Path) -> None:
    weights = []
    for name in ("one", "vpp2"):
        megatron_to_hf(runs / name / f"iter_{STEPS[2]:07d}", runs / "model", runs / f"{name}-hf")
        weights.append(load_file(runs / f"{name}-hf" / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=TOLERANCE, rtol=1e-3, msg=name)
