"""The distillation loss as a node of autograd: memory, evaluation, recomputation, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from megatron_npd.choices import Impl
from megatron_npd.ops import distill_loss_torch
from megatron_npd.ops.distill_loss import distill_loss
from tests.ops.reference import T, device_of, make_case, reference, run


def test_gradient_takes_the_logits_place_and_reaches_the_weights(impl: Impl) -> None:
    """The logits as a model makes them, a linear layer's output: right gradients, in the same storage."""
    case = make_case(T, 203, 10).to(device_of(impl))
    torch.manual_seed(0)
    hidden_TH, weight_VH = torch.randn(2, 203, 16, dtype=torch.float64, device=device_of(impl)).unbind(0)
    exact = [tensor.clone().requires_grad_() for tensor in (hidden_TH[:T], weight_VH)]
    logits_TV = torch.nn.functional.linear(*exact)
    expected = reference(logits_TV, case.labels_T, case.teacher)
    logits_TV.backward(expected["grad_TV"])
    ours = [tensor.float().requires_grad_() for tensor in (hidden_TH[:T], weight_VH)]
    logits_1TV = torch.nn.functional.linear(*ours)[None]
    seen: list[Tensor] = []
    logits_1TV.register_hook(seen.append)
    distill_loss(logits_1TV.view(T, -1), case.labels_T, **case.teacher, impl=impl).loss_T.sum().backward()
    assert seen[0].data_ptr() == logits_1TV.data_ptr()
    for tensor, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(tensor.grad, other.grad, atol=1e-5, rtol=1e-5, check_dtype=False)


class _Largest(TorchDispatchMode):
    """Records the largest storage that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.known |= {x.untyped_storage().data_ptr() for x in inputs}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scaled", [False, True])
def test_no_memory_of_the_logits_size(
    dtype: torch.dtype, scaled: bool, impl: Impl, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(T, 4001, 10).to(device_of(impl))
    monkeypatch.setattr(distill_loss_torch, "CHUNK_ELEMENTS", 4096)
    logits_TV = case.logits_TV.to(dtype).requires_grad_()
    with _Largest() as memory:
        result = distill_loss(logits_TV, case.labels_T, **case.teacher, impl=impl)
        (result.loss_T.sum() * (0.5 if scaled else 1.0)).backward()
    assert memory.largest <= 4001 * 4, "one row in fp32"


def test_evaluation_leaves_the_logits_alone(impl: Impl) -> None:
    case = make_case(T, 203, 10).to(device_of(impl))
    logits_TV = case.logits_TV.clone().requires_grad_()
    with torch.no_grad():
        result = distill_loss(logits_TV, case.labels_T, **case.teacher, impl=impl)
    assert torch.equal(logits_TV, case.logits_TV) and not result.loss_T.requires_grad
    trained = distill_loss(logits_TV, case.labels_T, **case.teacher, impl=impl)
    assert torch.equal(trained.loss_T, result.loss_T)
    assert trained.loss_T.requires_grad and not any(
        tensor.requires_grad for name, tensor in vars(trained).items() if name != "loss_T"
    )


def test_recomputation_gives_the_same_gradient(impl: Impl) -> None:
    case = make_case(T, 203, 10).to(device_of(impl))
    _, expected_TV = run(case, case.logits_TV, impl=impl)
    leaf_TV = case.logits_TV.clone().requires_grad_()

    def step(x_TV: Tensor) -> Tensor:
        return distill_loss(x_TV * 1.0, case.labels_T, **case.teacher, impl=impl).loss_T.sum()

    loss = checkpoint(step, leaf_TV, use_reentrant=False)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert leaf_TV.grad is not None and torch.equal(leaf_TV.grad.cpu(), expected_TV)


def test_autograd_refuses_what_the_overwritten_logits_would_make_wrong(impl: Impl) -> None:
    """tanh's backward needs its output, a second backward the unscaled gradient: errors, not wrong numbers."""
    case = make_case(T, 37, 10).to(device_of(impl))
    for inplace in (True, False):
        leaf_TV = (case.logits_TV * 0.1).requires_grad_()
        loss_T = distill_loss(torch.tanh(leaf_TV), case.labels_T, **case.teacher, impl=impl, inplace=inplace).loss_T
        if inplace:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss_T.sum().backward()
        else:
            loss_T.sum().backward()
    loss_T = distill_loss(
        case.logits_TV.clone().requires_grad_() * 1.0, case.labels_T, **case.teacher, impl=impl
    ).loss_T
    (loss_T * 0.5).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss_T * 0.5).sum().backward()
    logits_TV = case.logits_TV.clone().requires_grad_() * 1.0
    loss_T = distill_loss(logits_TV, case.labels_T, **case.teacher, impl=impl).loss_T
    logits_TV.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_T.sum().backward()
