"""The loss fused with the head against fp64 autograd through the whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_npd.errors import UserError
from megatron_npd.ops import fused_linear
from megatron_npd.ops.arguments import MODES
from megatron_npd.ops.distill_loss import DistillLoss, distill_loss
from megatron_npd.ops.fused_linear import distill_linear_loss
from tests.dist import run_distributed
from tests.helpers import pair, present
from tests.ops.reference import Case, Collectives, make_case, reference

T, V, H = 12, 203, 16
MASKS = {"all": None, "runs": torch.tensor([0.0] * 2 + [1.0] * 5 + [0.0] * 2 + [1.0] * 3), "none": torch.zeros(T)}


def make_head(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Case]:
    """Hidden states and a head, and a case with their logits."""
    generator = torch.Generator().manual_seed(5)
    hidden_TH = torch.randn(T, H, generator=generator).to(dtype)
    weight_VH = torch.randn(V, H, generator=generator).to(dtype) * 0.5
    return hidden_TH, weight_VH, make_case(T, V, 10)._replace(logits_TV=hidden_TH.double() @ weight_VH.double().t())


def check(
    loss: Tensor,
    parts: DistillLoss,
    grads: list[Tensor],
    head: tuple[Tensor, Tensor, Case],
    tolerance: float,
    **options: Any,
) -> None:
    """Compare with fp64 through the whole logits; ``grads`` are those of 0.5 x the loss."""
    hidden_TH, weight_VH, case = head
    expected = reference(case.logits_TV, case.labels_T, case.teacher, **options)
    grad_TV = expected["grad_TV"] * 0.5
    close: dict[str, Any] = {"atol": tolerance, "rtol": tolerance, "check_dtype": False}
    torch.testing.assert_close(loss, expected["loss_T"].sum(), **close)
    for name, tensor in vars(parts).items():
        assert not tensor.requires_grad
        torch.testing.assert_close(tensor, expected[name], **close)
    torch.testing.assert_close(grads[0], grad_TV @ weight_VH.double(), **close)
    torch.testing.assert_close(grads[1], grad_TV.t() @ hidden_TH.double(), **close)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_equals_the_formula(rows: int, mode: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_linear, "CPU_CHUNK_ELEMENTS", rows * V)
    head = make_head()
    weights_T = torch.rand(T, generator=torch.Generator().manual_seed(3))
    leaves = pair(tensor.clone().requires_grad_() for tensor in head[:2])
    options: dict[str, Any] = {"mode": mode, "mask_T": MASKS[mask], "weights_T": weights_T}
    loss, parts = distill_linear_loss(*leaves, head[2].labels_T, **head[2].teacher, **options)
    (loss * 0.5).backward()
    check(loss, parts, [present(leaf.grad) for leaf in leaves], head, 1e-5, **options)


def test_bf16_is_the_unfused_loss_with_a_better_weight_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits, so the same losses to the bit; the weight's gradient is added up in fp32."""
    monkeypatch.setattr(fused_linear, "CPU_CHUNK_ELEMENTS", 5 * V)
    monkeypatch.setattr(fused_linear, "WEIGHT_BLOCK", 64)
    hidden_TH, weight_VH, case = make_head(torch.bfloat16)
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden_TH, weight_VH)]
    unfused = distill_loss(torch.nn.functional.linear(*leaves), case.labels_T, **case.teacher)
    unfused.loss_T.sum().backward()
    fused_leaves = pair(tensor.clone().requires_grad_() for tensor in (hidden_TH, weight_VH))
    loss, parts = distill_linear_loss(*fused_leaves, case.labels_T, **case.teacher)
    loss.backward()
    for name, tensor in vars(parts).items():
        assert torch.equal(tensor, getattr(unfused, name).detach())
    for leaf, fused in zip(leaves, fused_leaves, strict=True):
        torch.testing.assert_close(fused.grad, leaf.grad, atol=2e-2, rtol=2e-2)


class MegatronWeight(torch.nn.Parameter):
    """A parameter with what Megatron's data-parallel wrapper hangs on it."""

    main_grad: Tensor
    grad_added_to_main_grad: bool
    zero_out_wgrad: bool


@pytest.mark.parametrize("tied", [False, True])
def test_main_grad(tied: bool) -> None:
    """Added in fp32 by the backward alone, on top of what is there, and Megatron's hook is told."""
    hidden_TH, weight_VH, case = make_head()
    weight = MegatronWeight(weight_VH.clone())
    loss, _ = distill_linear_loss(hidden_TH, weight, case.labels_T, **case.teacher)
    (loss * 0.5).backward()
    expected_VH = weight.grad
    weight.grad = None
    weight.main_grad = torch.ones(V, H)
    weight.grad_added_to_main_grad = False
    weight.zero_out_wgrad = tied
    with torch.no_grad():
        distill_linear_loss(hidden_TH, weight, case.labels_T, **case.teacher)
    leaf_TH = hidden_TH.clone().requires_grad_()

    def step(x_TH: Tensor) -> Tensor:
        return distill_linear_loss(x_TH, weight, case.labels_T, **case.teacher)[0]

    again = checkpoint(step, leaf_TH, use_reentrant=False)
    assert isinstance(again, Tensor)
    assert torch.equal(weight.main_grad, torch.ones(V, H)) and not weight.grad_added_to_main_grad
    (again * 0.5).backward()
    torch.testing.assert_close(weight.main_grad - 1, expected_VH, atol=1e-6, rtol=1e-5)
    assert weight.grad_added_to_main_grad and weight.grad is not None
    assert not tied or not weight.grad.any()
    del weight.grad_added_to_main_grad
    weight.grad, weight.main_grad = None, torch.zeros(V, H)
    (step(hidden_TH) * 0.5).backward()
    torch.testing.assert_close(weight.main_grad, expected_VH, atol=1e-6, rtol=1e-5)
    assert weight.grad is None


def test_frozen_parts_cost_nothing() -> None:
    hidden_TH, weight_VH, case = make_head()
    weight_VH.requires_grad_()
    distill_linear_loss(hidden_TH, weight_VH, case.labels_T, **case.teacher)[0].backward()
    leaf_TH = hidden_TH.clone().requires_grad_()
    distill_linear_loss(leaf_TH, weight_VH.detach(), case.labels_T, **case.teacher)[0].backward()
    assert weight_VH.grad is not None and leaf_TH.grad is not None and hidden_TH.grad is None


def _parallel(rank: int, world_size: int, sequence_parallel: bool) -> int:
    fused_linear.CPU_CHUNK_ELEMENTS = 5 * V // world_size
    head = make_head()
    hidden_TH, weight_VH, case = head
    width = -(-V // world_size)
    padded_VH = torch.nn.functional.pad(weight_VH, (0, 0, 0, width * world_size - V), value=3.0)
    count = 0
    for mask_T in MASKS.values():
        for mode in MODES:
            mine_TH = hidden_TH.chunk(world_size)[rank] if sequence_parallel else hidden_TH
            mine_VH = padded_VH[rank * width : (rank + 1) * width]
            leaves = pair(tensor.clone().requires_grad_() for tensor in (mine_TH, mine_VH))
            with Collectives() as forward:
                loss, parts = distill_linear_loss(
                    *leaves,
                    case.labels_T,
                    **case.teacher,
                    mode=mode,
                    mask_T=mask_T,
                    vocab_size=V,
                    group=dist.group.WORLD,
                    sequence_parallel=sequence_parallel,
                )
            with Collectives() as backward:
                (loss * 0.5).backward()
            chunks = -(-(T if mask_T is None else int(mask_T.count_nonzero())) // 5)
            kinds = [[kind for kind, _ in collectives.seen] for collectives in (forward, backward)]
            assert kinds[0] == ["allgather_"] * (chunks + sequence_parallel), "one a chunk, and the hidden states"
            assert kinds[1] == ["reduce_scatter_" if sequence_parallel else "allreduce_"]
            grads = [present(leaf.grad) for leaf in leaves]
            pieces = [[torch.empty_like(grad) for _ in range(world_size)] for grad in grads]
            for grad, piece in zip(grads, pieces, strict=True):
                dist.all_gather(piece, grad)
            whole_TH = torch.cat(pieces[0]) if sequence_parallel else grads[0]
            weight_grad_VH = torch.cat(pieces[1])
            assert not weight_grad_VH[V:].any()
            check(loss, parts, [whole_TH, weight_grad_VH[:V]], head, 1e-5, mode=mode, mask_T=mask_T)
            count += 1
    return count


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_vocabulary_parallel(world_size: int, sequence_parallel: bool) -> None:
    assert min(run_distributed(_parallel, world_size, sequence_parallel)) == 12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_TH": torch.zeros(1, T, H)}, "hidden_TH must be float32, bfloat16 or float16 of shape"),
        ({"hidden_TH": torch.zeros(T, H, dtype=torch.float64)}, "hidden_TH must be float32"),
        ({"weight_VH": torch.zeros(V, H + 1)}, r"weight_VH must be torch.float32 of shape \[V, 16\]"),
        ({"weight_VH": torch.zeros(V, H).bfloat16()}, "weight_VH must be torch.float32"),
        ({"labels_T": torch.zeros(T + 1, dtype=torch.int64)}, r"labels_T must be of shape \[12\]"),
        ({"alpha": 2.0}, "alpha must be in"),
        ({"vocab_size": V + 1}, "vocab_size must be in"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], words: str) -> None:
    hidden_TH, weight_VH, case = make_head()
    arguments: dict[str, Any] = {
        "hidden_TH": hidden_TH,
        "weight_VH": weight_VH,
        "labels_T": case.labels_T,
        **case.teacher,
    } | change
    with pytest.raises(UserError, match=words):
        distill_linear_loss(**arguments)
