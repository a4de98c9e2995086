"""The policy lag's estimators against METHOD section 4, and the tokens that they leave out."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_npd.training.lag import lag_sums


def test_sums_by_the_formula_over_the_defined_tokens_alone() -> None:
    learner = torch.tensor([-1.0, -2.0, -0.5, -9.0, -3.0])
    generator = torch.tensor([-1.5, -1.0, math.nan, -1.0, -3.0])
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])  # the fourth is no response token, the third is not defined

    k1, k3, count = lag_sums(learner, generator, mask).tolist()

    ratios = [0.5, -1.0, 0.0]
    assert count == 3
    assert k1 == pytest.approx(-sum(ratios))
    assert k3 == pytest.approx(sum(math.exp(r) - 1 - r for r in ratios))


def test_both_estimate_the_divergence() -> None:
    torch.manual_seed(0)
    generator, learner = (torch.log_softmax(torch.randn(50), 0) for _ in range(2))
    learner = torch.log_softmax(0.7 * generator + 0.3 * learner, 0)
    sampled = torch.multinomial(generator.exp(), 200_000, replacement=True)
    divergence = float((generator.exp() * (generator - learner)).sum())

    k1, k3, count = lag_sums(learner[sampled], generator[sampled], torch.ones(len(sampled))).tolist()

    assert divergence > 0.02
    assert k1 / count == pytest.approx(divergence, rel=0.05)
    assert k3 / count == pytest.approx(divergence, rel=0.05)


def test_nothing_defined_is_a_count_of_zero() -> None:
    assert lag_sums(torch.tensor([-1.0]), torch.tensor([math.nan]), torch.ones(1)).tolist() == [0.0, 0.0, 0.0]
