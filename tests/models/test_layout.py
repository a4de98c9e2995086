"""Which stages a model's depth can be cut into: what is refused, by name, and what megatron-core then builds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_npd.config.training import TrainConfig
from megatron_npd.errors import UserError
from megatron_npd.models.families.base import ModelSpec
from megatron_npd.models.families.config import load_spec
from megatron_npd.models.layout import check_layout, with_parts
from tests.helpers import make_tiny_model


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return load_spec(make_tiny_model(tmp_path_factory.mktemp("layout") / "model", num_hidden_layers=8))


@pytest.mark.parametrize(
    ("pipeline", "split"),
    [
        (4, {}),
        (2, {"virtual": 4}),
        (3, {"first": 2}),
        (2, {"first": 3}),
        (3, {"first": 1, "last": 1}),
        (2, {"first": 5, "last": 3}),
        (3, {"first": 2, "last": 2, "virtual": 2}),
    ],
)
def test_a_depth_that_can_be_cut(spec: ModelSpec, pipeline: int, split: dict[str, int]) -> None:
    check_layout(spec, 1, pipeline, **split)


@pytest.mark.parametrize(
    ("pipeline", "split", "words"),
    [
        (3, {}, r"layers of .* must be a multiple of pipeline_model_parallel_size \(3\), got 8"),
        (2, {"virtual": 3}, r"each pipeline stage of .* virtual_pipeline_model_parallel_size \(3\), got 4"),
        (
            1,
            {"virtual": 2},
            "virtual_pipeline_model_parallel_size must be left out with pipeline_model_parallel_size 1",
        ),
        (1, {"last": 2}, "decoder_last_pipeline_num_layers must be left out with pipeline_model_parallel_size 1"),
        (3, {"first": 3}, r"decoder_first_pipeline_num_layers \(3\) and .* a multiple of the 2 stages between, got 5"),
        (2, {"first": 3, "last": 3}, r"must be 0, got 2"),
        (3, {"first": 4, "last": 4}, "each pipeline stage of .* must be a positive multiple"),
        (2, {"first": 9}, "each pipeline stage of .* must be a positive multiple"),
        (2, {"first": 3, "virtual": 2}, r"virtual_pipeline_model_parallel_size \(2\), got 3"),
    ],
)
def test_a_depth_that_cannot(spec: ModelSpec, pipeline: int, split: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_layout(spec, 1, pipeline, **split)


def test_stages_without_a_place_in_the_world_are_refused(tmp_path: Path) -> None:
    from megatron_npd.training.trainer import check_batch
    from tests.training.make_run import config

    cfg = config(tmp_path, tmp_path, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    assert check_batch(cfg, 64, 2) == 4
    with pytest.raises(UserError, match=r"must be a multiple of pipeline_model_parallel_size \(2\) .* got 1"):
        check_batch(cfg, 64, 4)


def test_parts_are_counted_by_their_layers(spec: ModelSpec) -> None:
    cfg = TrainConfig(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1)
    parts = with_parts(cfg, spec)
    assert parts.virtual_pipeline_model_parallel_size == spec.num_layers // 2
    assert parts.num_layers_per_virtual_pipeline_stage == 0 and with_parts(parts, spec) is parts
    words = r"must be a multiple of pipeline_model_parallel_size x num_layers_per_virtual_pipeline_stage = 2 x 5, got"
    with pytest.raises(UserError, match=words):
        with_parts(replace(cfg, num_layers_per_virtual_pipeline_stage=5), spec)
