"""What may be chosen by name, each list once: types and help texts take these, and a table has an entry for each.

``tests/test_choices.py`` compares them with the tables: ``ACCELERATORS``, ``DIVERGENCES``, ``FILTERS``, ``LAUNCHERS``,
``OBJECTIVES``, ``PLATFORMS``, ``REFRESH`` and those of the losses' modes.
"""

from __future__ import annotations

from typing import Literal

PlatformName = Literal["auto", "cpu", "cuda", "npu"]
LauncherName = Literal["torchrun", "ray"]
FilterName = Literal[
    "delta_ifd", "delta_ifd_lower", "delta_ifd_upper", "student_ifd", "teacher_ifd", "perplexity", "none"
]
ObjectiveName = Literal["sft", "distill"]
RefreshRule = Literal["never", "even", "every_n", "by_lag"]
Mode = Literal["tail", "truncated", "renorm_teacher", "renorm_both"]
DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"]
Impl = Literal["auto", "torch", "triton"]
GpuName = Literal[
    "a100-40g", "a100-80g", "l40s-48g", "h100-80g", "h20-96g", "h200-141g", "b200-180g", "ascend-910b-64g"
]
