"""The distillation loss over a vocabulary sharded into 2 and 4 slices: values, gradients, bits and collectives."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_npd.choices import Impl
from megatron_npd.ops import distill_loss_torch
from megatron_npd.ops.arguments import MODES
from megatron_npd.ops.distill_loss import distill_loss
from megatron_npd.ops.vocab_parallel import vocab_shard
from tests.dist import run_distributed
from tests.ops.reference import INTERPRETED, Case, Collectives, compare, make_case, reference

T = 12
# The vocabularies give every rank columns, the last rank fewer, and the last rank none (5 over 4).
SIZES = [(*size, torch.float32) for size in ((5, 1), (5, 5), (37, 10), (203, 1), (203, 10))]
SIZES += [(37, 37, torch.bfloat16), (203, 10, torch.bfloat16)]
MASKS = (None, torch.tensor([0, 1] * 6), torch.zeros(T))


def _slice(logits_TV: Tensor, rank: int, world_size: int) -> Tensor:
    """This rank's columns; the padding that makes them even has logits that would be seen."""
    width = -(-logits_TV.shape[1] // world_size)
    padding = width * world_size - logits_TV.shape[1]
    return torch.nn.functional.pad(logits_TV, (0, padding), value=30.0)[:, rank * width : (rank + 1) * width]


def _check(rank: int, world_size: int, case: Case, logits_TV: Tensor, inplace: bool, **options: Any) -> None:
    grad_T = torch.rand(T, generator=torch.Generator().manual_seed(3))
    impl = options.pop("impl")
    expected = reference(logits_TV, case.labels_T, case.teacher, grad_T=grad_T, **options)
    leaf_TV = _slice(logits_TV, rank, world_size).clone().requires_grad_()
    options |= {"vocab_size": case.vocab_size, "group": dist.group.WORLD, "inplace": inplace, "impl": impl}
    with Collectives() as forward:
        result = distill_loss(leaf_TV * 1.0, case.labels_T, **case.teacher, **options)
    with Collectives() as backward:
        (result.loss_T * grad_T).sum().backward()
    mask_T = options.get("mask_T")
    count = T if mask_T is None else int(mask_T.count_nonzero())
    top_k = case.teacher["teacher_ids_TK"].shape[1] if case.teacher else 0
    second = options.get("temperature", 1.0) != 1.0 and options["mode"] == "renorm_teacher"
    exchange = [] if count == 0 else [("allgather_", (count, top_k + 2 + second + options.get("entropy", False)))]
    assert forward.seen == exchange and backward.seen == []

    grad_TV = torch.nn.functional.pad(expected["grad_TV"], (0, leaf_TV.shape[1] * world_size - case.vocab_size))
    mine = slice(rank * leaf_TV.shape[1], (rank + 1) * leaf_TV.shape[1])
    assert leaf_TV.grad is not None
    compare(result, leaf_TV.grad, expected | {"grad_TV": grad_TV[:, mine]})
    parts_PT = torch.stack([tensor.detach() for tensor in vars(result).values()])
    others = [torch.empty_like(parts_PT) for _ in range(world_size)]
    dist.all_gather(others, parts_PT)
    assert all(torch.equal(other, others[0]) for other in others), "other bits on another rank"


def _variants() -> Iterator[tuple[Case, Tensor, bool, dict[str, Any]]]:
    some = itertools.cycle(itertools.product(MASKS, (0.9, 1.0), (True, False)))
    for vocab_size, top_k, dtype in SIZES:
        case = make_case(T, vocab_size, top_k)
        logits_TV = case.logits_TV.to(dtype)
        for mode in MODES:
            for mask_T, alpha, inplace in itertools.islice(some, 4):
                yield case, logits_TV, inplace, {"mode": mode, "mask_T": mask_T, "alpha": alpha, "entropy": inplace}
        for mode in ("renorm_teacher", "renorm_both"):
            yield case, logits_TV, True, {"mode": mode, "temperature": 2.0, "entropy": True}
        for divergence in ("reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"):
            yield case, logits_TV, True, {"mode": "tail", "divergence": divergence}
        for mask_T in MASKS:
            yield Case(logits_TV, case.labels_T, {}), logits_TV, True, {"alpha": 0.0, "mask_T": mask_T}


def _all_cases(rank: int, world_size: int, impl: Impl) -> int:
    variants = list(_variants())
    if impl == "triton":  # the interpreter is slow
        variants = random.Random(world_size).sample(variants, 48 // world_size)
    for case, logits_TV, inplace, options in variants:
        _check(rank, world_size, case, logits_TV, inplace, impl=impl, **options)
    return len(variants)


@pytest.mark.parametrize("impl", ["torch", INTERPRETED])
@pytest.mark.parametrize("world_size", [2, 4])
def test_equals_the_formula(world_size: int, impl: Impl) -> None:
    """fp64 values and gradients, one all-gather of [tokens, K + 2] forward, none backward, the same bits everywhere."""
    counts = run_distributed(_all_cases, world_size, impl)
    assert counts[0] == (48 // world_size if impl == "triton" else 25 * len(SIZES))


def _extreme() -> Case:
    case = make_case(T, 203, 10)
    logits_TV = case.logits_TV.clone()
    logits_TV[1], logits_TV[2] = torch.nan, logits_TV[2] * 1e4
    logits_TV[4:6].masked_fill_(torch.arange(203) % 3 > 0, -torch.inf)
    logits_TV[4:6].scatter_(1, case.teacher["teacher_ids_TK"][4:6], 1.0)
    return case._replace(logits_TV=logits_TV)


def _run_extreme(rank: int, world_size: int, impl: Impl) -> list[Tensor]:
    case = _extreme()
    group = dist.group.WORLD if world_size > 1 else None
    mine_TV = _slice(case.logits_TV, rank, world_size)
    leaf_TV = mine_TV.clone().requires_grad_()
    distill_loss_torch.CHUNK_ELEMENTS = 5 * 103  # several chunks
    options = {"vocab_size": 203, "group": group, "impl": impl}
    with torch.no_grad():
        before = distill_loss(leaf_TV, case.labels_T, **case.teacher, **options)
    torch.testing.assert_close(leaf_TV.detach(), mine_TV, rtol=0, atol=0, equal_nan=True)  # evaluation writes nothing
    result = distill_loss(leaf_TV, case.labels_T, **case.teacher, **options)
    torch.testing.assert_close(result.loss_T.detach(), before.loss_T, rtol=0, atol=0, equal_nan=True)
    result.loss_T.nansum().backward()
    assert leaf_TV.grad is not None
    return [result.loss_T.detach(), result.top1_agreement_T, leaf_TV.grad]


@pytest.mark.parametrize("impl", ["torch", INTERPRETED])
@pytest.mark.parametrize("world_size", [2, 4])
def test_extreme_rows(world_size: int, impl: Impl) -> None:
    """NaN, 1e4 and -inf rows: the same as on one slice, and NaN stays in its row."""
    (whole,) = run_distributed(_run_extreme, 1, "torch")
    results = run_distributed(_run_extreme, world_size, impl)
    grad_TV = torch.cat([grad for _, _, grad in results], dim=1)
    assert not grad_TV[:, 203:].any()
    good_T = torch.arange(T) != 1
    for loss_T, top1_T, _ in results:
        torch.testing.assert_close(loss_T[good_T], whole[0][good_T], atol=1e-5, rtol=1e-5)
        assert torch.equal(top1_T[good_T], whole[1][good_T]) and loss_T[1].isnan()
    torch.testing.assert_close(grad_TV[good_T, :203], whole[2][good_T], atol=1e-6, rtol=1e-5)


def test_ids_of_another_rank_meet_the_spare_column() -> None:
    shard = vocab_shard(10, None, None)
    assert torch.equal(shard.local(torch.tensor([0, 9])), torch.tensor([0, 9]))
    second = type(shard)(width=10, columns=7, rank=1, size=2)
    assert second.local(torch.tensor([0, 9, 10, 16, 17, 19])).tolist() == [7, 7, 0, 6, 7, 7]
