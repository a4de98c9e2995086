"""The filters of the paper's Table 3: what each measures, its zones, which of them train, and how much a sample weighs.

A new filter is one line in ``FILTERS``; a new measure is one in ``measures`` too.

Legend: N samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_npd.choices import FilterName
from megatron_npd.selection.ifd import delta_ifd, ifd

# Zone -> why a sample in it is dropped, where the filter drops it. A zone's number is its place here.
ZONES = {
    "degenerate": "degenerate",
    "proximal": "",
    "disconnect": "cognitive_disconnect",
    "undefined": "ifd_undefined",
}

DEGENERATE, PROXIMAL, DISCONNECT, UNDEFINED = np.arange(len(ZONES), dtype=np.int8)

Floats = npt.NDArray[np.float32]
Zones = npt.NDArray[np.int8]


class Filter(NamedTuple):
    """A filter: samples whose measure is defined and within the bounds in force train.

    Attributes:
        measure: A key of ``measures``.
        lower: Whether the lower bound is in force.
        upper: Whether tau is.
        by_perplexity: Whether a sample weighs 1 / (the teacher's perplexity of it), exp(-L(y|x)).
        undefined: Whether samples train whose measure is not defined.
    """

    measure: str
    lower: bool = False
    upper: bool = False
    by_perplexity: bool = False
    undefined: bool = False

    def keeps(self, zones_N: Zones) -> npt.NDArray[np.bool_]:
        """Which samples train, by zone."""
        kept_N = (zones_N != UNDEFINED) | self.undefined
        if self.lower:
            kept_N &= zones_N != DEGENERATE
        if self.upper:
            kept_N &= zones_N != DISCONNECT
        return kept_N


FILTERS: Mapping[FilterName, Filter] = {
    "delta_ifd": Filter("delta", lower=True, upper=True),
    "delta_ifd_lower": Filter("delta", lower=True),
    "delta_ifd_upper": Filter("delta", upper=True),
    "student_ifd": Filter("ifd_student", lower=True, upper=True),
    "teacher_ifd": Filter("ifd_teacher", lower=True, upper=True),
    "perplexity": Filter("delta", by_perplexity=True),
    "none": Filter("delta", undefined=True),
}


def measures(losses: Mapping[str, Floats]) -> dict[str, Floats]:
    """What filters decide by, float32 [N] each, NaN where it is undefined.

    Args:
        losses: ``teacher_loss``, ``student_loss`` and both with ``_unconditional``, float32 [N], in nats.
    """
    ifd_teacher_N = ifd(losses["teacher_loss"], losses["teacher_loss_unconditional"])
    ifd_student_N = ifd(losses["student_loss"], losses["student_loss_unconditional"])
    return {
        "ifd_teacher": ifd_teacher_N,
        "ifd_student": ifd_student_N,
        "delta": delta_ifd(ifd_teacher_N, ifd_student_N),
    }


def zones(measure_N: Floats, lower: float, tau: float | npt.NDArray[np.float64]) -> Zones:
    """The number of each sample's zone: degenerate below ``lower``, disconnect above ``tau``, else proximal.

    NaN is undefined. Where ``tau < lower``, what is below ``lower`` is degenerate. ``tau`` may differ by sample, [N].
    """
    conditions = [np.isnan(measure_N), measure_N < lower, measure_N > tau]
    return np.select(conditions, [UNDEFINED, DEGENERATE, DISCONNECT], default=PROXIMAL)


def histogram(measure_N: Floats, lower: float, tau: float, bins: int = 60) -> dict[str, Any]:
    """Counts in equal bins over the measure's middle 99 % and both bounds; outliers fall into the end bins.

    Returns:
        ``{"edges": [bins + 1], "counts": [bins]}``, ready for JSON; the counts sum to the samples where it is defined.
    """
    defined = measure_N[~np.isnan(measure_N)].astype(np.float64)
    if not defined.size:
        return {"edges": [], "counts": []}
    low, high = np.quantile(defined, [0.005, 0.995])
    low, high = min(low, lower, tau), max(high, lower, tau)
    counts, edges = np.histogram(np.clip(defined, low, high), bins=bins, range=(low, high))
    return {"edges": [round(float(edge), 6) for edge in edges], "counts": counts.tolist()}


def sample_weights(
    kept_N: npt.NDArray[np.bool_],
    lens_N: npt.NDArray[np.integer],
    *,
    copies_N: npt.NDArray[np.integer] | None = None,
    prompts_N: npt.NDArray[np.integer] | None = None,
    factor_N: npt.NDArray[np.floating] | None = None,
) -> Floats:
    """The weight of each kept sample's loss, 0 of the others; the mean over all kept response tokens is 1.

    Args:
        kept_N: Which samples train.
        lens_N: Response tokens.
        copies_N: Identical responses that a sample stands for; None: itself alone.
        prompts_N: Number of each sample's prompt: a prompt's kept responses share the weight of one. None: each has
            that weight.
        factor_N: Multiplies the weights, for a filter that weighs.
    """
    weights_N = kept_N * (1.0 if copies_N is None else copies_N.astype(np.float64))
    if prompts_N is not None:
        weights_N /= np.maximum(np.bincount(prompts_N, weights=weights_N)[prompts_N], 1)
    if factor_N is not None:
        weights_N = np.where(kept_N, weights_N * factor_N, 0.0)  # what is not kept may have no factor
    total = (weights_N * lens_N).sum()
    return (weights_N * ((kept_N * lens_N).sum() / total if total else 1.0)).astype(np.float32)
