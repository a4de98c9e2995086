"""The CUDA platform on a GPU: its packed attention against attention over each segment in float32."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from megatron_npd.platform.base import PlatformUnavailable, Segments, attention_by_segment
from megatron_npd.platform.cuda import Device
from tests.helpers import triple


@pytest.fixture
def device() -> Device:
    device = Device()
    try:
        device.check_available()
    except PlatformUnavailable as error:
        pytest.skip(str(error))
    return device


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("earlier", [[0, 0, 0, 0], [0, 80, 48, 40]], ids=["whole", "last"])
def test_packed_attention(device: Device, dtype: torch.dtype, kv_heads: int, earlier: list[int]) -> None:
    """``earlier``: keys before a segment's first query, as a context-parallel rank's chunks have them."""
    lengths = [1, 80, 16, 300]
    keys = [before + length for before, length in zip(earlier, lengths, strict=True)]
    bounds, bounds_kv = (torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (lengths, keys))
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), 8, 64), (sum(keys), kv_heads, 64), (sum(keys), kv_heads, 64)]
    exact = triple(torch.randn(shape, generator=generator).to(dtype).double().requires_grad_() for shape in shapes)
    ours = triple(x.detach().to("cuda", dtype).requires_grad_() for x in exact)
    upstream = torch.randn(shapes[0], generator=generator)
    prefixed: dict[str, Any] = {"cu_seqlens_kv": bounds_kv, "longest_kv": max(keys)} if any(earlier) else {}
    segments = Segments(cu_seqlens=bounds, longest=300, **prefixed)
    want = attention_by_segment(*exact, segments, 0.125)
    got = device.packed_attention(*ours, segments, 0.125)
    want.backward(upstream.double())
    got.backward(upstream.to("cuda", dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for a, b in [(got, want), *((x.grad, y.grad) for x, y in zip(ours, exact, strict=True))]:
        assert a is not None and b is not None
        torch.testing.assert_close(a.detach().cpu().double(), b.detach(), atol=tolerance, rtol=tolerance)
