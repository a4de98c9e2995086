"""Packed causal attention for many short segments on a CPU.

One SDPA call a segment costs more in calls than in arithmetic when segments have some 80 tokens, so segments of
similar length share a call, padded on the right: under a causal mask no real token sees the padding.

Legend: T packed tokens, N padded tokens, S segments of a group, L its padded length, H heads, D head size.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# A group costs CALL + S * (TOKEN * L + L * L), in query-key pairs; the ratios are those of forward + backward with
# 4 heads of 32 on one core. They only decide where to cut the sorted lengths, so they need not be exact.
_CALL_COST = 50_000
_TOKEN_COST = 50


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How one row's segments are arranged into padded groups.

    Attributes:
        groups: (first padded token, segments S, padded length L) of each group; their S * L add up to N.
        in_order: Whether both orders are the same, so that nothing needs to move.
        slots_T: int64: the padded token of each packed one.
        sources_N: int64: the packed token of each padded one; the segment's first token stands in for padding.
        padding: int64: the padded tokens that are padding.
    """

    groups: tuple[tuple[int, int, int], ...]
    in_order: bool
    slots_T: Tensor
    sources_N: Tensor
    padding: Tensor


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, softmax_scale: float) -> Tensor:
    """``Platform.packed_attention``, one SDPA call for each group of segments of similar length."""
    plan = _plan(tuple(cu_seqlens.tolist()))
    if not plan.in_order:
        q, k, v = (_Arrange.apply(x, plan) for x in (q, k, v))
    parts = []
    for start, segments, length in plan.groups:
        q_SHLD, k_SHLD, v_SHLD = (
            x[start : start + segments * length].view(segments, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)
        )
        out_SHLD = F.scaled_dot_product_attention(
            q_SHLD,
            k_SHLD,
            v_SHLD,
            is_causal=True,
            scale=softmax_scale,
            enable_gqa=q_SHLD.shape[1] != k_SHLD.shape[1],
        )
        parts.append(out_SHLD.transpose(1, 2).reshape(segments * length, *q.shape[1:]))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out if plan.in_order else _Restore.apply(out, plan)


class _Arrange(torch.autograd.Function):
    """[T, ...] -> [N, ...]: packed tokens to padded groups."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.sources_N)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        # No gradient flows into padding: see _Restore.
        return grad.index_select(0, ctx.plan.slots_T), None


class _Restore(torch.autograd.Function):
    """[N, ...] -> [T, ...]: padded groups to packed tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.slots_T)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        # Zero at the padded queries, whose scores then add exact zeros to the gradients of keys and values.
        return grad.index_select(0, ctx.plan.sources_N).index_fill_(0, ctx.plan.padding, 0.0), None


@functools.lru_cache(maxsize=32)
def _plan(bounds: tuple[int, ...]) -> _Plan:
    """Group the segments; once a row, however many layers and micro-batches use it."""
    assert bounds[0] == 0, "cu_seqlens starts at 0"
    lengths = torch.tensor(bounds).diff()
    padded_length = _padded_lengths(tuple(lengths[lengths > 0].tolist()))
    # Groups by padded length, longest first; inside a group the segments keep their order.
    padded_S = torch.tensor([padded_length.get(n, 0) for n in lengths.tolist()])
    order = torch.sort(padded_S, descending=True, stable=True).indices
    starts = torch.empty_like(padded_S)  # first padded token of each segment
    starts[order] = padded_S[order].cumsum(0) - padded_S[order]
    segment_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    slots_T = torch.arange(bounds[-1]) - torch.tensor(bounds[:-1])[segment_T] + starts[segment_T]

    padded_total = int(padded_S.sum())
    first_token = torch.repeat_interleave(torch.tensor(bounds[:-1])[order], padded_S[order])
    sources_N = first_token.index_copy(0, slots_T, torch.arange(bounds[-1]))
    is_padding = torch.ones(padded_total, dtype=torch.bool).index_fill_(0, slots_T, False)
    groups, position = [], 0
    for length, segments in sorted(Counter(padded_S.tolist()).items(), reverse=True):
        if length:
            groups.append((position, segments, length))
            position += segments * length
    return _Plan(
        groups=tuple(groups),
        in_order=padded_total == bounds[-1] and bool((slots_T == torch.arange(bounds[-1])).all()),
        slots_T=slots_T,
        sources_N=sources_N,
        padding=is_padding.nonzero().squeeze(1),
    )


def _padded_lengths(lengths: tuple[int, ...]) -> dict[int, int]:
    """The padded length of each length that occurs, at least total cost (dynamic programme over distinct lengths)."""
    counts = Counter(lengths)
    distinct = sorted(counts)
    best: list[tuple[float, int]] = [(0.0, 0)]  # cost of the i shortest lengths, and where their last group begins
    for end in range(1, len(distinct) + 1):
        longest, segments, candidates = distinct[end - 1], 0, []
        for begin in range(end - 1, -1, -1):
            segments += counts[distinct[begin]]
            cost = _CALL_COST + segments * longest * (longest + _TOKEN_COST)
            candidates.append((best[begin][0] + cost, begin))
        best.append(min(candidates))
    padded: dict[int, int] = {}
    end = len(distinct)
    while end:
        begin = best[end][1]
        padded.update(dict.fromkeys(distinct[begin:end], distinct[end - 1]))
        end = begin
    return padded
