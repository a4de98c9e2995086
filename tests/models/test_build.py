"""The megatron-core model: layouts that must agree with transformers, and those that cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_npd.errors import UserError
from megatron_npd.models.families import FAMILIES
from megatron_npd.platform.initialize import initialize_distributed
from tests.dist import run_distributed
from tests.helpers import make_tiny_model
from tests.models.common import LENGTHS, TinyTrainer, packed_inputs


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, one key-value head (fewer than TP = 2 has ranks), a vocabulary that TP = 2 pads."""
    return make_tiny_model(tmp_path_factory.mktemp("hf") / "model", vocab_size=305)


def _reference(model_dir: Path, seeds: list[int]) -> tuple[float, float]:
    """Mean loss over the rows of ``seeds`` and the norm of its gradient, by transformers, segment by segment."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    total = torch.zeros(())
    for seed in seeds:
        tokens, _, bounds = packed_inputs(LENGTHS, model.config.vocab_size, seed=seed)
        pieces = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        logits = torch.cat([model(tokens[:, a:b]).logits for a, b in pieces], dim=1)[0]
        total = total + torch.nn.functional.cross_entropy(logits, tokens.roll(-1, 1)[0], reduction="sum")
    loss = total / (len(seeds) * sum(LENGTHS))
    loss.backward()
    norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    return loss.item(), norms.norm().item()


def _first_steps(
    rank: int, world: int, model_dir: Path, tensor: int, pipeline: int, sequence_parallel: bool, expert: int = 1
) -> tuple[list[float], float]:
    from megatron_npd.models.build import build_model, load_hf_weights, load_spec

    sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    initialize_distributed(**sizes, expert_model_parallel_size=expert)
    spec = load_spec(model_dir)
    model = build_model(spec, sequence_parallel=sequence_parallel)
    load_hf_weights(model, spec)
    trainer = TinyTrainer(model, spec.vocab_size)
    losses = [trainer.step(0)]
    norm = trainer.grad_norm
    return losses + [trainer.step(i) for i in (1, 2)], norm


@pytest.mark.parametrize(
    ("world", "tensor", "pipeline", "sequence_parallel"),
    [(1, 1, 1, False), (2, 2, 1, False), (2, 2, 1, True), (2, 1, 2, False), (4, 2, 2, True)],
    ids=["one", "tp2", "tp2-sp", "pp2", "tp2-pp2-sp"],
)
def test_loss_and_gradient_equal_transformers(
    model_dir: Path, world: int, tensor: int, pipeline: int, sequence_parallel: bool
) -> None:
    results = run_distributed(_first_steps, world, model_dir, tensor, pipeline, sequence_parallel)
    losses, norm = max(results)  # the earlier pipeline stage reports zeros
    want_loss, want_norm = _reference(model_dir, [0])
    assert losses[0] == pytest.approx(want_loss, abs=2e-6)
    assert norm == pytest.approx(want_norm, rel=1e-5)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("family", [family.name for family in FAMILIES.values()])
def test_loss_and_gradient_equal_transformers_in_each_family(tmp_path: Path, family: str) -> None:
    model_dir = make_tiny_model(tmp_path / "model", family=family, num_key_value_heads=2)
    (losses, norm), *_ = run_distributed(_first_steps, 2, model_dir, 2, 1, True)
    want_loss, want_norm = _reference(model_dir, [0])
    assert losses[0] == pytest.approx(want_loss, abs=2e-6)
    assert norm == pytest.approx(want_norm, rel=1e-5)


@pytest.mark.parametrize("normalised", [True, False])
def test_experts_that_ranks_share_equal_transformers(tmp_path: Path, normalised: bool) -> None:
    model_dir = make_tiny_model(tmp_path / "model", family="qwen3_moe", norm_topk_prob=normalised)
    results = run_distributed(_first_steps, 2, model_dir, 1, 1, False, 2)
    want_loss, want_norm = _reference(model_dir, [0, 1])
    for losses, norm in results:
        assert losses[0] == pytest.approx(want_loss, abs=2e-6)
        assert norm == pytest.approx(want_norm, rel=1e-5)


def test_data_parallel_gradient_equals_transformers(model_dir: Path) -> None:
    results = run_distributed(_first_steps, 2, model_dir, 1, 1, False)
    want_loss, want_norm = _reference(model_dir, [0, 1])
    for losses, norm in results:
        assert losses[0] == pytest.approx(want_loss, abs=2e-6)
        assert norm == pytest.approx(want_norm, rel=1e-5)


def _packing(rank: int, world: int, model_dir: Path) -> None:
    from megatron_npd.models.build import build_model, load_hf_weights, load_spec, packed_params

    initialize_distributed()
    spec = load_spec(model_dir)
    for bf16, tolerance in ((False, 2e-6), (True, 0.05)):
        model = build_model(spec, bf16=bf16)
        lengths = [3, 40, 1, 16]
        tokens, positions, bounds = packed_inputs(lengths, spec.vocab_size)
        with torch.no_grad():
            unloaded = model(tokens, positions, None, packed_seq_params=packed_params(bounds))
            assert not unloaded.any()  # zeros, not what memory held
            load_hf_weights(model, spec)
            packed = model(tokens, positions, None, packed_seq_params=packed_params(bounds))
        assert packed.dtype == (torch.bfloat16 if bf16 else torch.float32)
        assert packed.shape == (1, 60, spec.vocab_size)
        for start, length in zip(bounds[:-1].tolist(), lengths, strict=True):
            alone = packed_params(torch.tensor([0, length], dtype=torch.int32))
            piece = slice(start, start + length)
            with torch.no_grad():
                logits = model(tokens[:, piece], positions[:, piece], None, packed_seq_params=alone)
            torch.testing.assert_close(logits, packed[:, piece], atol=tolerance, rtol=0)


def test_packed_equals_separate(model_dir: Path) -> None:
    run_distributed(_packing, 1, model_dir)


def _refusal(rank: int, world: int, model_dir: Path, tensor: int, pipeline: int) -> str:
    from megatron_npd.models.build import build_model, load_spec

    initialize_distributed(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    with pytest.raises(UserError) as caught:
        build_model(load_spec(model_dir))
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "tensor", "pipeline", "words"),
    [
        ({"num_attention_heads": 3, "hidden_size": 96}, 2, 1, "attention heads"),
        ({"num_hidden_layers": 3}, 1, 2, "layers"),
        ({"intermediate_size": 95}, 2, 1, "MLP width"),
    ],
)
def test_impossible_layouts_are_user_errors(
    tmp_path: Path, overrides: dict, tensor: int, pipeline: int, words: str
) -> None:
    directory = make_tiny_model(tmp_path / "model", **overrides)
    for message in run_distributed(_refusal, 2, directory, tensor, pipeline):
        assert words in message and "must be a multiple of" in message


def _one_after_another(rank: int, world: int, first: Path, second: Path) -> list[float]:
    """Two models of different sizes in turn in one process, twice; nothing of one may reach the other."""
    return [_first_steps(rank, world, path, 1, 1, False)[0][2] for path in (first, second, first, second)]


def test_models_may_take_turns_in_one_process(model_dir: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", num_hidden_layers=1, seed=3, rope_parameters={"rope_theta": 500.0})
    for losses in run_distributed(_one_after_another, 2, model_dir, other):
        assert losses[:2] == losses[2:]
        assert losses[0] != losses[1]
