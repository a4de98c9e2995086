"""What the backward computes anew is the same to the bit, and is not kept meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_npd.config.command_line import parse_config
from megatron_npd.config.training import TrainConfig
from megatron_npd.data.packed_dataset import PackedDataset, Streams
from megatron_npd.errors import UserError
from megatron_npd.models.build import build_chunks, load_hf_weights, load_spec
from megatron_npd.platform.initialize import initialize_distributed
from megatron_npd.training.step import TrainStep
from tests.helpers import make_tiny_model
from tests.planning.test_memory import Alive
from tests.training.make_run import SEQ_LENGTH, config, make_packs

RECOMPUTE: dict[str, dict[str, Any]] = {
    "selective": {"recompute_granularity": "selective"},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ("mlp",)},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
    "uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def _three_steps(model_dir: Path, packs: Path, **fields: Any) -> tuple[list[Any], list[torch.Tensor], int]:
    """Metrics and weights after three steps, and the most bytes that autograd kept."""
    initialize_distributed()
    cfg, spec = config(model_dir, packs, **fields), load_spec(model_dir)
    chunks = build_chunks(spec, **cfg.transformer_options)
    load_hf_weights(chunks[0], spec)
    step = TrainStep(cfg, chunks, vocab_size=spec.vocab_size, micro_batch_tokens=SEQ_LENGTH, num_micro_batches=4)
    data = PackedDataset(packs, seed=0, streams=Streams())
    alive = Alive({parameter.untyped_storage().data_ptr() for parameter in chunks[0].parameters()})
    with torch.autograd.graph.saved_tensors_hooks(alive.pack, alive.unpack):
        means = [step.run(iter([data.batch([4 * i + j]).to("cpu") for j in range(4)]), i + 1, dict) for i in range(3)]
    return means, [parameter.detach().clone() for parameter in chunks[0].parameters()], alive.most


def test_nothing_changes_but_time_and_memory(tmp_path: Path) -> None:
    packs, model = make_packs(tmp_path), make_tiny_model(tmp_path / "model", num_hidden_layers=4)
    means, weights, kept = _three_steps(model, packs)
    most = {}
    for name, fields in RECOMPUTE.items():
        got, others, most[name] = _three_steps(model, packs, **fields)
        assert got == means, name
        assert all(torch.equal(a, b) for a, b in zip(others, weights, strict=True)), name
    assert most["uniform"] < most["block"] < most["mlp"] < most["selective"] < kept


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--recompute-granularity=full", "recompute_method must be uniform or block with recompute_granularity full"),
        ("--recompute-method=block", "recompute_method must be none without recompute_granularity full, got block"),
        ("--recompute-granularity=full --recompute-method=block", "recompute_num_layers must be at least 1 with"),
        ("--recompute-granularity=selective --recompute-num-layers=1", "recompute_num_layers must be 0 without"),
        (
            "--overlap-param-gather",
            "overlap_param_gather must be false without use_distributed_optimizer and overlap_gr",
        ),
        (
            "--overlap-param-gather --overlap-grad-reduce --fused-linear-loss",
            "overlap_param_gather must be false with fused_linear_loss",
        ),
        ("--virtual-pipeline-model-parallel-size=0", "virtual_pipeline_model_parallel_size must be at least 1, got 0"),
        (
            "--num-layers-per-virtual-pipeline-stage=1",
            "num_layers_per_virtual_pipeline_stage must be 0 without pipeline_model_parallel_size, with uneven",
        ),
        (
            "--num-layers-per-virtual-pipeline-stage=1 --pipeline-model-parallel-size=2 "
            "--virtual-pipeline-model-parallel-size=2",
            "num_layers_per_virtual_pipeline_stage must be 0 without .* got 1; virtual_pipeline_model_parallel_size",
        ),
        ("--decoder-last-pipeline-num-layers=-1", "decoder_last_pipeline_num_layers must be at least 0, got -1"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_config(TrainConfig, flags.split())
