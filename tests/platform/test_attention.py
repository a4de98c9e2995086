"""Packed attention on the CPU against attention over each segment alone, values and gradients."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from megatron_npd.platform.base import Segments, attention_by_segment
from megatron_npd.platform.cpu_attention import _plan, grouped_attention
from tests.helpers import present, triple


def _reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Softmax attention written out, in the tensors' own precision."""
    out = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        heads = q.shape[1] // k.shape[1]
        keys, values = (x[start:end].repeat_interleave(heads, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[start:end], keys) * scale
        future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), values))
    return torch.cat(out)


def _inputs(total: int, heads: int, kv_heads: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return triple(torch.randn(total, n, size, generator=generator) for n in (heads, kv_heads, kv_heads))


def _bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


# One segment; all equal; one-token and empty segments; mixed lengths in random order; a long padding tail.
LENGTHS = {
    "one": [37],
    "equal": [16] * 6,
    "tiny": [1, 5, 0, 1, 2],
    "mixed": random.Random(0).choices(range(1, 130), k=25),
    "tail": [48, 16, 32, 48, 700],
}


def by_segment(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, softmax_scale: float) -> Tensor:
    return attention_by_segment(q, k, v, Segments(cu_seqlens=bounds, longest=0), softmax_scale)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("attention", [grouped_attention, by_segment])
def test_equals_reference(attention, lengths: list[int], kv_heads: int) -> None:
    bounds = _bounds(lengths)
    inputs = _inputs(int(bounds[-1]), 4, kv_heads, 8)
    exact = triple(x.double().requires_grad_() for x in inputs)
    ours = triple(x.requires_grad_() for x in inputs)
    want, got = _reference(*exact, bounds, 0.3), attention(*ours, bounds, 0.3)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=0)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (want * weight).sum().backward()
    (got * weight.float()).sum().backward()
    for a, b in zip(ours, exact, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad.double(), b.grad, atol=2e-5, rtol=0)


def test_strided_inputs_and_no_grad() -> None:
    bounds = _bounds(LENGTHS["mixed"])
    mixed = torch.randn(int(bounds[-1]), 3, 4, 8)
    q, k, v = mixed.unbind(1)
    with torch.no_grad():
        got = grouped_attention(q, k, v, bounds, 0.3)
    torch.testing.assert_close(got, _reference(q, k, v, bounds, 0.3), atol=2e-6, rtol=0)


def test_padding_carries_no_gradient_even_from_bad_neighbours() -> None:
    """A segment's gradients are the same bits whatever the others hold."""
    bounds = _bounds([5, 9])
    inputs = _inputs(14, 2, 2, 8)
    grads = []
    for other in (1.0, 1e30):
        q, k, v = (torch.cat([x[:5], x[5:] * other]).requires_grad_() for x in inputs)
        grouped_attention(q, k, v, bounds, 0.3)[:5].sum().backward()
        grads.append([present(x.grad)[:5] for x in (q, k, v)])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_plan_groups_similar_lengths() -> None:
    bounds = _bounds([80, 16, 96, 80, 2000, 16] * 5)
    plan = _plan(tuple(bounds.tolist()))
    assert sum(segments for _, segments, _ in plan.groups) == 30
    assert 2 <= len(plan.groups) <= 4
    assert max(length for _, _, length in plan.groups) == 2000
    assert len(plan.padding) < 0.1 * bounds[-1]
