"""Zones at their bounds, filters, histogram."""

from __future__ import annotations

import json
from typing import get_args, get_type_hints

import numpy as np
import pytest

from megatron_npd.config import SelectConfig
from megatron_npd.selection.metrics import FILTERS, histogram, zones

DELTA = np.array([-0.5, np.float32(0.1), 0.25, 0.5, 0.5001, np.nan, np.inf], np.float32)
ZONES = ["degenerate", "proximal", "proximal", "proximal", "disconnect", "undefined", "disconnect"]


def test_the_proximal_zone_includes_both_bounds() -> None:
    assert zones(DELTA, float(np.float32(0.1)), 0.5).tolist() == ZONES


def test_with_tau_below_lower_nothing_is_proximal() -> None:
    assert set(zones(DELTA, 0.3, 0.2).tolist()) == {"degenerate", "disconnect", "undefined"}


def test_filters() -> None:
    assert FILTERS["delta_ifd"](np.array(ZONES)).tolist() == [False, True, True, True, False, False, False]
    assert FILTERS["none"](np.array(ZONES)).tolist() == [True, True, True, True, True, False, True]
    assert set(FILTERS) == set(get_args(get_type_hints(SelectConfig)["filter"]))


def test_the_histogram_counts_every_defined_sample_and_is_json() -> None:
    rng = np.random.default_rng(0)
    delta = np.concatenate([rng.normal(0.1, 0.1, 1000), [50.0, -50.0, np.nan]]).astype(np.float32)
    result = json.loads(json.dumps(histogram(delta, 0.0, 0.3)))
    assert sum(result["counts"]) == 1002 and len(result["edges"]) == len(result["counts"]) + 1 == 61
    assert -2 < result["edges"][0] < 0.0 and 0.3 < result["edges"][-1] < 2
    assert result["counts"][0] >= 1 and result["counts"][-1] >= 1  # the outliers


@pytest.mark.parametrize("delta", [[], [np.nan], [0.25], [0.25, 0.25]])
def test_the_histogram_of_little(delta: list[float]) -> None:
    counts = histogram(np.array(delta, np.float32), 0.25, 0.25)["counts"]
    assert sum(counts) == np.isfinite(delta).sum()
