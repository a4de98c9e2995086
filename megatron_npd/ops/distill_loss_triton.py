"""The distillation loss as two Triton kernels: the statistics in one read of the logits, the gradient in one more.

``distill_loss_torch`` has the mathematics. Each kernel runs one program a row. More than a thousand rows of 300 kB are
on their way at once, so that nothing of a row is left in the L2 cache for a second look: one kernel with both passes
would move as many bytes as two. What lies between them are small operations on ``[N, B]``, which stay in torch and
serve every objective.

Legend: T tokens, N unmasked tokens (mask 1), V columns of this rank's slice, K teacher ids, B = K + 1 buckets.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from megatron_npd.ops.arguments import Problem
from megatron_npd.ops.divergences import GradientRule
from megatron_npd.ops.vocab_parallel import Stats

INTERPRETED = knobs.runtime.interpret
"""The kernels were defined for Triton's interpreter, on the CPU."""
BLOCK = 2048
"""Columns of a tile: 4 KiB of bf16, and 16 elements a thread, which leave registers for 9 programs a multiprocessor."""
NUM_WARPS = 4
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction that flushes denormals, exp four


@triton.jit
def statistics_kernel(
    logits,
    stride_t,
    stride_v,
    columns,
    index,
    picked,
    sorted_ids,
    top_k,
    scale,
    out,
    TEMPERED: tl.constexpr,
    ENTROPY: tl.constexpr,
    BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: logits at S and at the label, and the online log-sum-exp over the columns off S.

    ``sorted_ids`` are S in ascending order: a tile meets those of its columns as they come, and a tile without any
    costs one comparison.
    """
    n = tl.program_id(0).to(tl.int64)
    row = n if index is None else tl.load(index + n)
    logits += row * stride_t
    picked += n * (top_k + 1)
    sorted_ids += n * top_k
    out += n * (top_k + 5)

    bucket = tl.arange(0, BUCKETS)
    column = tl.load(picked + bucket, mask=bucket <= top_k, other=columns).to(tl.int64)
    z_B = tl.load(logits + column * stride_v, mask=column < columns, other=-float("inf"))
    # The label, last of the picked, goes behind the log-sum-exp, which is the last bucket.
    tl.store(out + bucket + (bucket == top_k).to(tl.int32), z_B.to(tl.float32), mask=bucket <= top_k)

    lane = tl.arange(0, BLOCK)
    largest = tl.full([], _LOWEST, tl.float32)
    sums = tl.zeros([BLOCK // 4], tl.float32)  # of four neighbours, which one thread holds
    tempered = tl.zeros([BLOCK // 4], tl.float32)
    moment = tl.zeros([BLOCK // 4], tl.float32)  # sums of e * (z - largest)
    met = 0
    next_id = tl.load(sorted_ids, mask=top_k > 0, other=columns)
    tile = tl.load(logits + lane.to(tl.int64) * stride_v, mask=lane < columns, other=-float("inf"))
    for start in range(0, columns, BLOCK):
        z = tile.to(tl.float32)
        ahead = start + BLOCK + lane
        tile = tl.load(logits + ahead.to(tl.int64) * stride_v, mask=ahead < columns, other=-float("inf"))
        end = tl.minimum(start + BLOCK, columns)
        while next_id < end:
            z = tl.where(lane == next_id - start, -float("inf"), z)
            met += 1
            next_id = tl.load(sorted_ids + met, mask=met < top_k, other=columns)
        raised = tl.maximum(largest, tl.max(z, 0))
        e = tl.exp2((z - raised) * _LOG2E)
        shrunk = tl.exp2((largest - raised) * _LOG2E)
        if ENTROPY:
            terms = tl.where(e > 0, e * (z - raised), 0.0)
            moment = (moment + sums * tl.maximum(largest - raised, -1e30)) * shrunk
            moment += tl.sum(tl.reshape(terms, [BLOCK // 4, 4]), 1)
        sums = sums * shrunk + tl.sum(tl.reshape(e, [BLOCK // 4, 4]), 1)
        if TEMPERED:
            e = tl.exp2((z - raised) * (scale * _LOG2E))
            tempered = tempered * tl.exp2((largest - raised) * (scale * _LOG2E))
            tempered += tl.sum(tl.reshape(e, [BLOCK // 4, 4]), 1)
        largest = raised
    total = tl.sum(sums, 0)
    tl.store(out + top_k, largest + tl.log(total))
    tl.store(out + top_k + 2, tl.where(total == 0, -float("inf"), largest))
    if TEMPERED:
        tl.store(out + top_k + 3, largest * scale + tl.log(tl.sum(tempered, 0)))
    if ENTROPY:
        tl.store(out + top_k + 4, tl.where(total == 0, 0.0, largest + tl.sum(moment, 0) / total))


@triton.jit
def gradient_kernel(
    logits,
    stride_t,
    stride_v,
    out,
    out_stride_t,
    out_stride_v,
    width,
    columns,
    slots,
    factors,
    picked,
    values,
    top_k,
    scale,
    TEMPERED: tl.constexpr,
    BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: ``factor * exp(z - shift)`` in all columns, then ``values`` in the picked ones."""
    # Last rows first: the pass before this one left them in the cache.
    row = tl.num_programs(0).to(tl.int64) - 1 - tl.program_id(0)
    slot = row if slots is None else tl.load(slots + row)
    counts = slot >= 0
    readable = tl.where(counts, columns, 0)
    logits += row * stride_t
    out += row * out_stride_t
    factors += slot * (4 if TEMPERED else 2)
    shift = tl.load(factors, mask=counts, other=0.0)
    factor = tl.load(factors + 1, mask=counts, other=0.0)
    tempered_shift, tempered_factor = shift, factor  # read if TEMPERED only
    if TEMPERED:
        tempered_shift = tl.load(factors + 2, mask=counts, other=0.0)
        tempered_factor = tl.load(factors + 3, mask=counts, other=0.0)

    lane = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        here = start + lane
        z = tl.load(logits + here.to(tl.int64) * stride_v, mask=here < readable, other=-float("inf")).to(tl.float32)
        grad = factor * tl.exp2((z - shift) * _LOG2E)
        if TEMPERED:
            grad += tempered_factor * tl.exp2((z * scale - tempered_shift) * _LOG2E)
        grad = tl.where(here < readable, grad, 0.0).to(out.dtype.element_ty)
        tl.store(out + here.to(tl.int64) * out_stride_v, grad, mask=here < width)

    # The barrier orders these stores behind the program's others to the same columns.
    tl.debug_barrier()
    bucket = tl.arange(0, BUCKETS)
    column = tl.load(picked + slot * (top_k + 1) + bucket, mask=counts & (bucket <= top_k), other=columns).to(tl.int64)
    value = tl.load(values + slot * (top_k + 1) + bucket, mask=counts & (bucket <= top_k), other=0.0)
    tl.store(out + column * out_stride_v, value.to(out.dtype.element_ty), mask=column < readable)


def _local_columns(problem: Problem) -> tuple[Tensor, Tensor]:
    """Columns of S and of the label in this slice, int32 ``[N, K]`` and ``[N, 1]``; ``columns`` where not owned."""
    rows, shard = problem.rows, problem.shard
    return shard.local(rows.ids_NK).int(), shard.local(rows.labels_N)[:, None].int()


def statistics(
    logits_TV: Tensor, problem: Problem, rule: GradientRule | None = None, out_TV: Tensor | None = None
) -> Stats:
    """As ``distill_loss_torch.statistics``."""
    objective = problem.objective
    ids_NK, label_N1 = _local_columns(problem)
    num_rows, top_k = ids_NK.shape
    out = torch.empty(num_rows, top_k + 5, dtype=torch.float32, device=logits_TV.device)
    launch: Any = statistics_kernel[(num_rows,)]
    with torch.accelerator.device_index(logits_TV.device.index):
        launch(
            logits_TV,
            *logits_TV.stride(),
            problem.shard.columns,
            problem.rows.index_N,
            torch.cat([ids_NK, label_N1], dim=1),
            ids_NK.sort(dim=1).values,
            top_k,
            1 / objective.temperature,
            out,
            TEMPERED=objective.second_lse,
            ENTROPY=objective.entropy,
            BUCKETS=triton.next_power_of_2(top_k + 1),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    tempered_N = out[:, top_k + 3] if objective.second_lse else None
    mean_off_N = out[:, top_k + 4] if objective.entropy else None
    stats = Stats(out[:, : top_k + 1], out[:, top_k + 1], out[:, top_k + 2], tempered_N, mean_off_N)
    if rule is not None and out_TV is not None:
        gradient(logits_TV, problem, stats, rule, out_TV)
    return stats


def gradient(logits_TV: Tensor, problem: Problem, merged: Stats, rule: GradientRule, out_TV: Tensor) -> None:
    """As ``distill_loss_torch.gradient``."""
    rows, objective, shard = problem.rows, problem.objective, problem.shard
    ids_NK, label_N1 = _local_columns(problem)
    top_k = ids_NK.shape[1]
    grad_NB, tempered_N1 = rule.apply(merged, objective)
    lowest = torch.finfo(torch.float32).min
    shift_N1 = merged.buckets_TB[:, -1:].clamp(min=lowest)
    factors = [shift_N1, grad_NB[:, -1:]]
    label_grad_N1 = rule.label_N1 + grad_NB[:, -1:] * (merged.label_T[:, None] - shift_N1).exp()
    if tempered_N1 is not None and merged.lse_off_tempered_T is not None:
        shift_N1 = merged.lse_off_tempered_T[:, None].clamp(min=lowest)
        factors += [shift_N1, tempered_N1]
        label_grad_N1 += tempered_N1 * (merged.label_T[:, None] / objective.temperature - shift_N1).exp()
    # The share of a label in S is in grad_NB and 0 in the rule: its column is not stored twice.
    label_N1 = torch.where(rule.label_N1 != 0, label_N1, shard.columns)
    slots_T = None
    if rows.index_N is not None:
        slots_T = torch.full((len(out_TV),), -1, dtype=torch.int64, device=out_TV.device)
        slots_T[rows.index_N] = torch.arange(len(rows.index_N), device=out_TV.device)
    launch: Any = gradient_kernel[(len(out_TV),)]
    with torch.accelerator.device_index(logits_TV.device.index):
        launch(
            logits_TV,
            *logits_TV.stride(),
            out_TV,
            *out_TV.stride(),
            shard.width,
            shard.columns,
            slots_T,
            torch.cat(factors, dim=1),
            torch.cat([ids_NK, label_N1], dim=1),
            torch.cat([grad_NB[:, :-1], label_grad_N1], dim=1),
            top_k,
            1 / objective.temperature,
            TEMPERED=len(factors) > 2,
            BUCKETS=triton.next_power_of_2(top_k + 1),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    torch.autograd.graph.increment_version(out_TV)  # autograd does not see what a kernel writes
