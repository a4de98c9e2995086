"""The packed megatron-core scorer against transformers, one unpacked sequence at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dist import run_distributed
from tests.helpers import VOCAB_SIZE, make_tiny_model
from tests.teacher.reference import TOKENS, TransformersModel, check_top_k

# Rows of 64: one sequence that fills a row, some of one token, many that share rows, an odd number of rows.
LENGTHS = [(40, 25), (1, 1), (5, 30), (3, 9), (20, 1), (1, 40), (12, 12), (7, 22), (30, 30), (2, 5), (9, 3)]
TOLERANCE = 1e-4  # ten times tighter than what the store needs


def sequences(seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return (
        [rng.integers(0, TOKENS, prefix) for prefix, _ in LENGTHS],
        [rng.integers(0, TOKENS, response) for _, response in LENGTHS],
    )


def score(hf_dir: Path, *, top_k: int, micro_batch_size: int = 1, vocab_size: int | None = None) -> Any:
    from megatron_npd.platform.initialize import initialize_distributed
    from megatron_npd.teacher.megatron_scorer import Scorer

    initialize_distributed()
    scorer = Scorer(hf_dir, seq_length=64, micro_batch_size=micro_batch_size, bf16=False, vocab_size=vocab_size)
    forwards: list[tuple[int, int, int]] = []
    scores = scorer.score(*sequences(), top_k=top_k, on_forward=lambda *counts: forwards.append(counts))
    scored, tokens, row_tokens = (sum(counts) for counts in zip(*forwards, strict=True))
    assert scored == sum(response for _, response in LENGTHS)
    assert tokens == sum(prefix + response - 1 for prefix, response in LENGTHS)
    assert tokens <= row_tokens <= 64 * micro_batch_size * len(forwards)  # the last row's end is not computed
    return scores


def check(scores: Any, hf_dir: Path, columns: int | None = None) -> None:
    """Every number of ``scores`` against transformers."""
    model = TransformersModel(hf_dir, columns)
    losses = scores.losses()
    for index, (prefix, response) in enumerate(zip(*sequences(), strict=True)):
        part = slice(scores.starts_N[index], scores.starts_N[index + 1])
        expected = model(prefix, response)
        check_top_k(scores.ids_RK[part], scores.logprobs_RK[part], expected.logprobs, TOLERANCE)
        assert np.abs(scores.sampled_logprobs_R[part] - expected.sampled.numpy()).max() < TOLERANCE
        tail = expected.logprobs.sort(descending=True).values[:, scores.ids_RK.shape[1] :].logsumexp(1)
        assert np.abs(scores.log_tail_R[part] - tail.clamp(min=-30).numpy()).max() < TOLERANCE
        assert abs(losses[index] - expected.loss) < TOLERANCE


@pytest.mark.parametrize("micro_batch_size", [1, 3])
@pytest.mark.parametrize(
    ("family", "overrides"),
    [("qwen2", {}), ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 2}), ("qwen3", {})],
)
def test_packed_scores_equal_transformers(
    tmp_path: Path, family: str, overrides: dict[str, Any], micro_batch_size: int
) -> None:
    path = make_tiny_model(tmp_path / "model", family=family, **overrides)
    check(score(path, top_k=10, micro_batch_size=micro_batch_size), path)


def test_columns_beyond_the_students_vocabulary_have_no_probability(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "model", vocab_size=352)
    scores = score(path, top_k=10, vocab_size=VOCAB_SIZE)
    assert scores.ids_RK.max() < VOCAB_SIZE
    check(scores, path, columns=VOCAB_SIZE)


def test_a_smaller_teacher_vocabulary_bounds_the_softmax(tiny_model_dir: Path) -> None:
    check(score(tiny_model_dir, top_k=10, vocab_size=10 * VOCAB_SIZE), tiny_model_dir)


def test_the_whole_vocabulary_leaves_no_tail(tiny_model_dir: Path) -> None:
    scores = score(tiny_model_dir, top_k=VOCAB_SIZE)
    assert (scores.log_tail_R == -30).all()
    assert np.abs(np.exp(scores.logprobs_RK.astype(np.float64)).sum(1) - 1).max() < 1e-5


def test_losses_alone_need_no_top_k(tiny_model_dir: Path) -> None:
    scores, full = score(tiny_model_dir, top_k=0), score(tiny_model_dir, top_k=4)
    assert scores.ids_RK is None and scores.logprobs_RK is None and scores.log_tail_R is None
    assert np.abs(scores.losses() - full.losses()).max() < 1e-6


def test_bfloat16_is_near_float32(tiny_model_dir: Path) -> None:
    from megatron_npd.teacher.megatron_scorer import Scorer

    full = score(tiny_model_dir, top_k=4)
    half = Scorer(tiny_model_dir, seq_length=64, micro_batch_size=1, bf16=True).score(*sequences(), top_k=4)
    assert half is not None
    difference = np.abs(half.sampled_logprobs_R - full.sampled_logprobs_R)
    assert 0 < difference.max() < 0.2  # 8 bits of mantissa in two layers


def test_nothing_to_score(tiny_model_dir: Path) -> None:
    from megatron_npd.platform.initialize import initialize_distributed
    from megatron_npd.teacher.megatron_scorer import Scorer

    initialize_distributed()
    scores = Scorer(tiny_model_dir, seq_length=64, micro_batch_size=1, bf16=False).score([], [], top_k=4)
    assert scores is not None and scores.losses().shape == (0,) and scores.ids_RK is not None
    assert scores.ids_RK.shape == (0, 4)


def _score_in_layout(rank: int, world_size: int, hf_dir: str, sizes: dict[str, int], vocab_size: int) -> Any:
    from megatron_npd.platform.initialize import initialize_distributed
    from megatron_npd.teacher.megatron_scorer import Scorer

    initialize_distributed(**sizes)
    options: dict[str, Any] = (
        {"num_layers_in_first_pipeline_stage": 1} if "pipeline_model_parallel_size" in sizes else {}
    )
    shape: dict[str, Any] = {"seq_length": 64, "micro_batch_size": 2, "bf16": False, "vocab_size": vocab_size}
    scorer, counts = Scorer(hf_dir, **shape, **options), []
    scores = scorer.score(*sequences(), top_k=10, on_forward=lambda *numbers: counts.append(numbers))
    assert sum(scored for scored, _, _ in counts) == sum(response for _, response in LENGTHS)
    assert all(tokens <= row_tokens <= 128 for _, tokens, row_tokens in counts)
    return scores


@pytest.mark.parametrize("layout", ["tp", "pp", "cp", "cp-pp"])
def test_layouts_agree(tmp_path: Path, layout: str) -> None:
    # 303 columns: tensor-parallel ranks need a padded one, which must have no probability;
    # three layers: pipeline stages are uneven
    path = make_tiny_model(tmp_path / "model", num_key_value_heads=2, vocab_size=303, num_hidden_layers=3)
    axes = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size", "cp": "context_parallel_size"}
    sizes = {axes[axis]: 2 for axis in layout.split("-")}
    results = run_distributed(_score_in_layout, 2 ** len(sizes), str(path), sizes, 303)
    if "pp" in layout:
        assert results[: len(results) // 2] == [None] * (len(results) // 2)
        results = results[len(results) // 2 :]
    for other in results[1:]:
        assert all(np.array_equal(*pair) for pair in zip(_arrays(results[0]), _arrays(other), strict=True))
    check(results[-1], path)
    alone = score(path, top_k=10, micro_batch_size=2)
    assert np.abs(results[-1].logprobs_RK - alone.logprobs_RK).max() < 1e-4
    gaps = np.diff(alone.logprobs_RK, axis=1, append=-np.inf)
    clear = (np.abs(gaps) > 1e-4) & (np.abs(np.roll(gaps, 1, axis=1)) > 1e-4)  # no tie with a neighbour
    assert (results[-1].ids_RK == alone.ids_RK)[clear].all() and clear.mean() > 0.9


# By the number of processes; experts are shared by copies of the model, by context-parallel ranks, or by both.
SHARED: dict[int, dict[str, dict[str, int]]] = {
    2: {
        "ep2": {"expert_model_parallel_size": 2},
        "ep2-cp2": {"expert_model_parallel_size": 2, "context_parallel_size": 2},
    },
    4: {
        "ep4-cp2": {"expert_model_parallel_size": 4, "context_parallel_size": 2},
        "ep2-tp2": {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2},
        "ep2-pp2": {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    },
}


def _score_in_layouts(rank: int, world_size: int, hf_dir: Path, layouts: dict[str, dict[str, int]]) -> Any:
    from megatron_npd.platform.initialize import initialize_distributed
    from megatron_npd.teacher.megatron_scorer import Scorer

    found = {}
    for name, sizes in layouts.items():
        initialize_distributed(**sizes)
        scorer, counts = Scorer(hf_dir, seq_length=64, micro_batch_size=1, bf16=False), []
        found[name] = scorer.score(*sequences(), top_k=10, on_forward=lambda *n, counts=counts: counts.append(n))
        scored, tokens, row_tokens = (sum(numbers) for numbers in zip(*counts, strict=True))
        assert scored == sum(response for _, response in LENGTHS)  # the other copy's too
        assert tokens == sum(prefix + response - 1 for prefix, response in LENGTHS) <= row_tokens
        copies = sizes["expert_model_parallel_size"] // sizes.get("context_parallel_size", 1)
        assert len(counts) == -(-5 // copies)
    return found


def test_copies_that_share_experts_score_as_one(tmp_path: Path) -> None:
    """Five rows: of two copies one has padding alone in the last forward."""
    path = make_tiny_model(tmp_path / "model", family="qwen3_moe", num_key_value_heads=2)
    alone = score(path, top_k=10)
    check(alone, path)
    for world, layouts in SHARED.items():
        results = run_distributed(_score_in_layouts, world, path, layouts)
        for name in layouts:
            scores = [result[name] for result in results if result[name] is not None]
            assert len(scores) == (world // 2 if "pp" in name else world)
            for other in scores[1:]:
                assert all(np.array_equal(*pair) for pair in zip(_arrays(scores[0]), _arrays(other), strict=True))
            check(scores[0], path)


def _arrays(scores: Any) -> list[np.ndarray]:
    return [scores.ids_RK, scores.logprobs_RK, scores.log_tail_R, scores.sampled_logprobs_R]
