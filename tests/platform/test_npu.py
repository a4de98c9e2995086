"""What of the Ascend platform can be looked at without a device."""

from __future__ import annotations

import pytest
from megatron.core.transformer import mlp
from megatron.core.transformer.moe import shared_experts

from megatron_npd.platform import npu


def test_the_mlps_of_megatron_core_call_the_npu_s_swiglu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (mlp, shared_experts):
        monkeypatch.setattr(module, "bias_swiglu_impl", module.bias_swiglu_impl)  # put back afterwards
    npu.install_swiglu()
    assert mlp.bias_swiglu_impl is shared_experts.bias_swiglu_impl is npu._swiglu
