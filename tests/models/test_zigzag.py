"""What a context-parallel rank holds of a row, and attention over its queries against attention over the whole row."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megatron_npd.errors import UserError
from megatron_npd.models.zigzag import ContextShare, check_alignment
from megatron_npd.platform.base import Segments, attention_by_segment
from tests.helpers import present, triple

UNITS = [2, 5, 1, 4]  # lengths of a row's segments, in 2 x CP tokens; the last is its padding


def _bounds(size: int) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(2 * size * n for n in UNITS)], dtype=torch.int32)


def _held(share: ContextShare, bounds: Tensor) -> Tensor:
    """The row's tokens that a rank holds, in its order."""
    runs = [run for a, b in itertools.pairwise(bounds.tolist()) for run in share.runs(a, b)]
    return torch.cat([torch.arange(run.start, run.stop) for run in runs])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_share_the_row_and_the_work(size: int) -> None:
    bounds = _bounds(size)
    shares = [ContextShare(rank=rank, size=size) for rank in range(size)]
    held = [_held(share, bounds) for share in shares]
    assert torch.equal(torch.cat(held).sort().values, torch.arange(int(bounds[-1])))
    place = torch.cat([torch.arange(int(n)) for n in bounds.diff()])
    for share, tokens in zip(shares, held, strict=True):
        assert torch.equal(share.positions(bounds, len(tokens)), place[tokens])
        chunks, keys = share.chunk_lengths(bounds), share.key_lengths(bounds)
        assert len(tokens) == int(bounds[-1]) // size
        # Pairs of a query and a key that it sees: each rank has its part of all.
        assert int((keys * chunks - chunks * (chunks - 1) // 2).sum()) * size == int((place + 1).sum())


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("size", [2, 3])
def test_attention_of_all_shares_is_that_of_the_row(size: int, kv_heads: int) -> None:
    bounds = _bounds(size)
    generator = torch.Generator().manual_seed(0)
    inputs = triple(
        torch.randn(int(bounds[-1]), heads, 8, dtype=torch.float64, generator=generator)
        for heads in (4, kv_heads, kv_heads)
    )
    whole, shared = (triple(x.clone().requires_grad_() for x in inputs) for _ in range(2))
    want = attention_by_segment(*whole, Segments(cu_seqlens=bounds, longest=0), 0.3)

    shares = [ContextShare(rank=rank, size=size) for rank in range(size)]
    order = torch.cat([_held(share, bounds) for share in shares])
    queries, keys, values = (x[order] for x in shared)  # as they lie on the ranks, one after another
    got = torch.zeros_like(want)
    for share, query in zip(shares, queries.chunk(size), strict=True):
        lengths = share.chunk_lengths(bounds), share.key_lengths(bounds)
        cu_q, cu_kv = (torch.cat([torch.zeros(1), x.cumsum(0)]).int() for x in lengths)
        index = share.keys(bounds)
        segments = Segments(cu_seqlens=cu_q, longest=0, cu_seqlens_kv=cu_kv)
        out = attention_by_segment(query, keys[index], values[index], segments, 0.3)
        got = got.index_copy(0, _held(share, bounds), out)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    weight = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    (want * weight).sum().backward()
    (got * weight).sum().backward()
    for a, b in zip(shared, whole, strict=True):
        torch.testing.assert_close(present(a.grad), present(b.grad), atol=1e-12, rtol=0)


def test_segments_that_ranks_cannot_share_are_refused() -> None:
    check_alignment(1, 1, "pack.segment_align")
    check_alignment(16, 4, "pack.segment_align")
    with pytest.raises(UserError, match=r"pack.segment_align must be .* 2 x context_parallel_size = 8, got 4"):
        check_alignment(4, 4, "pack.segment_align")
