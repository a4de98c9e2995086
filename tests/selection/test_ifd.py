"""IFD and Delta-IFD, and where they are undefined."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_npd.selection.ifd import delta_ifd, ifd


def test_ifd_is_the_ratio_of_the_losses() -> None:
    ratio = ifd(np.array([0.5, 2.0, 0.0], np.float32), np.array([1.0, 1.6, 3.0], np.float32))
    np.testing.assert_allclose(ratio, [0.5, 1.25, 0.0])
    assert ratio.dtype == np.float32


@pytest.mark.parametrize(
    ("loss", "alone", "defined"),
    [
        (0.5, 1e-6, True),
        (0.5, 9e-7, False),
        (0.5, 0.0, False),
        (0.5, -1.0, False),
        (0.5, np.inf, False),
        (0.5, np.nan, False),
        (np.nan, 1.0, False),
        (np.inf, 1.0, False),
    ],
)
def test_where_ifd_is_undefined(loss: float, alone: float, defined: bool) -> None:
    ratio = ifd(np.array([loss], np.float32), np.array([alone], np.float32))
    assert np.isnan(ratio[0]) != defined


def test_delta_is_undefined_where_one_side_is() -> None:
    delta = delta_ifd(np.array([0.7, np.nan, 0.1], np.float32), np.array([0.5, 0.5, np.nan], np.float32))
    np.testing.assert_allclose(delta, [0.2, np.nan, np.nan], rtol=1e-6)
