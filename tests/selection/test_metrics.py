"""Zones at their bounds, filters, histogram."""

from __future__ import annotations

import json
from typing import get_args, get_type_hints

import numpy as np
import pytest

from megatron_npd.config.settings import SelectConfig
from megatron_npd.selection import metrics
from megatron_npd.selection.metrics import FILTERS, histogram, sample_weights

DELTA = np.array([-0.5, np.float32(0.1), 0.25, 0.5, 0.5001, np.nan, np.inf], np.float32)
ZONES = ["degenerate", "proximal", "proximal", "proximal", "disconnect", "undefined", "disconnect"]


def zones(measure: np.ndarray, lower: float, tau: float) -> list[str]:
    return [list(metrics.ZONES)[number] for number in metrics.zones(measure, lower, tau)]


def test_the_proximal_zone_includes_both_bounds() -> None:
    assert zones(DELTA, float(np.float32(0.1)), 0.5) == ZONES


def test_with_tau_below_lower_nothing_is_proximal() -> None:
    assert set(zones(DELTA, 0.3, 0.2)) == {"degenerate", "disconnect", "undefined"}


def test_filters() -> None:
    defined = [zone != "undefined" for zone in ZONES]
    degenerate, disconnect = ([zone == name for zone in ZONES] for name in ("degenerate", "disconnect"))
    both = [d and not (low or high) for d, low, high in zip(defined, degenerate, disconnect, strict=True)]
    expected = {
        "delta_ifd": ("delta", both),
        "delta_ifd_lower": ("delta", [d and not low for d, low in zip(defined, degenerate, strict=True)]),
        "delta_ifd_upper": ("delta", [d and not high for d, high in zip(defined, disconnect, strict=True)]),
        "student_ifd": ("ifd_student", both),
        "teacher_ifd": ("ifd_teacher", both),
        "perplexity": ("delta", defined),
        "none": ("delta", [True] * len(ZONES)),
    }
    numbers = np.array([list(metrics.ZONES).index(zone) for zone in ZONES])
    found = {name: (chosen.measure, chosen.keeps(numbers).tolist()) for name, chosen in FILTERS.items()}
    assert found == expected
    assert [name for name, chosen in FILTERS.items() if chosen.by_perplexity] == ["perplexity"]
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


def test_weights_have_mean_one_over_the_kept_tokens_and_prompts_share_one() -> None:
    kept = np.array([True, True, True, False, True])
    lens, prompts = np.array([2, 4, 6, 100, 8]), np.array([0, 1, 1, 1, 2])
    assert sample_weights(kept, lens).tolist() == [1, 1, 1, 0, 1]
    weights = sample_weights(kept, lens, prompts_N=prompts)
    assert weights[3] == 0 and weights[1] == weights[2] == pytest.approx(weights[0] / 2) and weights[0] == weights[4]
    assert (weights * lens).sum() == pytest.approx(20)
    copies = np.array([3, 1, 2, 7, 1])
    shared = sample_weights(kept, lens, copies_N=copies, prompts_N=prompts)
    assert shared[2] == pytest.approx(2 * shared[1]) and shared[1] + shared[2] == pytest.approx(shared[0])
    assert shared[0] == pytest.approx(shared[4])
    alone = sample_weights(kept, lens, copies_N=copies)
    assert (alone[[0, 1, 2, 4]] / alone[4]).tolist() == pytest.approx([3, 1, 2, 1])
    factor = np.array([0.5, 1.0, 1.0, np.nan, 0.25])
    weighed = sample_weights(kept, lens, prompts_N=prompts, factor_N=factor)
    assert (weighed * lens).sum() == pytest.approx(20) and weighed[3] == 0
    assert weighed[0] / weighed[4] == pytest.approx(2) and weighed[1] / weighed[0] == pytest.approx(1)
    assert sample_weights(np.zeros(2, bool), lens[:2]).tolist() == [0, 0]
