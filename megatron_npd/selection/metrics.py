"""Zones of Delta-IFD, the filters that decide by them, and the histogram that shows them (METHOD section 3).

A new filter is one function beside the others and one line in ``FILTERS``.

Legend: N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

# Zone -> why a sample in it is dropped, where the filter drops it.
ZONES = {
    "degenerate": "degenerate",
    "proximal": "",
    "disconnect": "cognitive_disconnect",
    "undefined": "ifd_undefined",
}

Zones = npt.NDArray[np.str_]
Kept = npt.NDArray[np.bool_]


def zones(delta_N: npt.NDArray[np.float32], lower: float, tau: float) -> Zones:
    """The zone of each sample: degenerate below ``lower``, disconnect above ``tau``, proximal between, both included.

    NaN is undefined. Where ``tau < lower``, what is below ``lower`` is degenerate.
    """
    conditions = [np.isnan(delta_N), delta_N < lower, delta_N > tau]
    return np.select(conditions, ["undefined", "degenerate", "disconnect"], default="proximal")


def keep_proximal(zones_N: Zones) -> Kept:
    """The paper's filter: the proximal zone alone trains."""
    return zones_N == "proximal"


def keep_defined(zones_N: Zones) -> Kept:
    """No filter: every sample whose IFD is defined trains."""
    return zones_N != "undefined"


FILTERS: Mapping[str, Callable[[Zones], Kept]] = {"delta_ifd": keep_proximal, "none": keep_defined}


def histogram(delta_N: npt.NDArray[np.float32], lower: float, tau: float, bins: int = 60) -> dict[str, Any]:
    """Counts of Delta-IFD in equal bins over its middle 99 % and both bounds; outliers fall into the end bins.

    Returns:
        ``{"edges": [bins + 1], "counts": [bins]}``, ready for JSON; the counts sum to the samples with a defined Delta.
    """
    defined = delta_N[~np.isnan(delta_N)].astype(np.float64)
    if not defined.size:
        return {"edges": [], "counts": []}
    low, high = np.quantile(defined, [0.005, 0.995])
    low, high = min(low, lower, tau), max(high, lower, tau)
    counts, edges = np.histogram(np.clip(defined, low, high), bins=bins, range=(low, high))
    return {"edges": [round(float(edge), 6) for edge in edges], "counts": counts.tolist()}
