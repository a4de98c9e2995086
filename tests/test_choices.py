"""Each list of choices stands once, and its table has an entry for each name."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from megatron_npd import choices
from megatron_npd.ops.divergences import DIVERGENCES
from megatron_npd.pipeline.launch import LAUNCHERS
from megatron_npd.platform import PLATFORMS, get_platform
from megatron_npd.platform.accelerators import ACCELERATORS
from megatron_npd.selection.metrics import FILTERS

get_platform("cpu")

from megatron_npd.training.objectives import OBJECTIVES  # noqa: E402
from megatron_npd.training.refresh_schedule import REFRESH  # noqa: E402


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (choices.DivergenceName, DIVERGENCES),
        (choices.FilterName, FILTERS),
        (choices.RefreshRule, REFRESH),
        (choices.ObjectiveName, OBJECTIVES),
        (choices.PlatformName, ["auto", *PLATFORMS]),
        (choices.GpuName, ACCELERATORS),
        (choices.LauncherName, LAUNCHERS),
    ],
    ids=["divergences", "filters", "refresh rules", "objectives", "platforms", "accelerators", "launchers"],
)
def test_a_table_has_an_entry_for_each_choice(names: Any, table: Any) -> None:
    assert sorted(get_args(names)) == sorted(table)
