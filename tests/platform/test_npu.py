"""What of the Ascend platform can be looked at without a device."""

from __future__ import annotations

import pytest

from megatron_npd.platform import get_platform, npu

get_platform("cpu")  # before anything imports megatron.core

from megatron.core.transformer import mlp  # noqa: E402
from megatron.core.transformer.moe import shared_experts  # noqa: E402


def test_the_mlps_of_megatron_core_call_the_npu_s_swiglu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (mlp, shared_experts):
        monkeypatch.setattr(module, "bias_swiglu_impl", module.bias_swiglu_impl)  # put back afterwards
    npu.install_swiglu()
    assert mlp.bias_swiglu_impl is shared_experts.bias_swiglu_impl is npu._swiglu
