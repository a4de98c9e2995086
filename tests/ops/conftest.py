"""The implementations that the tests of the loss run through."""

from __future__ import annotations

import pytest
import torch

from megatron_npd.choices import Impl
from megatron_npd.ops import distill_loss_triton


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.gpu if torch.cuda.is_available() else ())])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Impl:
    """``torch``, or ``triton`` with tiles so small that the tests' wider vocabularies have several."""
    monkeypatch.setattr(distill_loss_triton, "BLOCK", 512)
    return request.param
