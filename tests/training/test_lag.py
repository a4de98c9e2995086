"""The policy lag's estimators against METHOD section 4, and the tokens that they leave out."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_npd.training.lag import lag_parts


def test_both_by_the_formula_where_they_are_defined() -> None:
    learner = torch.tensor([-1.0, -2.0, -0.5, -9.0, -3.0])
    generator = torch.tensor([-1.5, -1.0, math.nan, -1.0, -3.0])
    parts = lag_parts(learner, generator)  # the third is not defined

    ratios = [0.5, -1.0, -8.0, 0.0]
    assert parts["lag_tokens"].tolist() == [1, 1, 0, 1, 1]
    defined = ~parts["lag_k1"].isnan()
    assert defined.tolist() == (~parts["lag_k3"].isnan()).tolist() == [True, True, False, True, True]
    assert parts["lag_k1"][defined].tolist() == pytest.approx([-r for r in ratios])
    assert parts["lag_k3"][defined].tolist() == pytest.approx([math.exp(r) - 1 - r for r in ratios])


def test_both_estimate_the_divergence() -> None:
    torch.manual_seed(0)
    generator, learner = (torch.log_softmax(torch.randn(50), 0) for _ in range(2))
    learner = torch.log_softmax(0.7 * generator + 0.3 * learner, 0)
    sampled = torch.multinomial(generator.exp(), 200_000, replacement=True)
    divergence = float((generator.exp() * (generator - learner)).sum())

    parts = lag_parts(learner[sampled], generator[sampled])

    assert divergence > 0.02
    assert float(parts["lag_k1"].mean()) == pytest.approx(divergence, rel=0.05)
    assert float(parts["lag_k3"].mean()) == pytest.approx(divergence, rel=0.05)
