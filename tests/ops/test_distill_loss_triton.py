"""What is Triton's alone: tensors beyond 2^31 elements, the fused head's use of it, and what the compiler says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_npd.ops import distill_loss_triton
from megatron_npd.ops.arguments import MODES
from megatron_npd.ops.distill_loss import DistillLoss, distill_loss
from megatron_npd.ops.fused_linear import distill_linear_loss
from megatron_npd.ops.topk import topk_logprobs
from tests.helpers import pair
from tests.ops.reference import MASKS, T, compare, device_of, make_case, reference, run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("strides", [(2**30 + 8, 1), (1, 2**26)], ids=["rows", "columns"])
def test_elements_beyond_2_31(strides: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets are 64-bit: the last row, or the last columns, lie behind 2^31 elements, most of which nobody touches."""
    monkeypatch.setattr(distill_loss_triton, "BLOCK", 32)
    case = make_case(3, 37, 10).to(device_of("triton"))
    assert 2 * strides[0] + 36 * strides[1] > 2**31
    memory = torch.empty(2 * strides[0] + 36 * strides[1] + 1, dtype=torch.bfloat16, device=device_of("triton"))
    logits_TV = memory.as_strided((3, 37), strides).copy_(case.logits_TV)
    top = topk_logprobs(logits_TV, 10, vocab_size=37, impl="triton")
    assert torch.equal(top.ids_TK, topk_logprobs(logits_TV.contiguous(), 10, vocab_size=37, impl="torch").ids_TK)
    expected = reference(logits_TV.cpu(), case.labels_T.cpu(), case.to("cpu").teacher)
    result = distill_loss(logits_TV.requires_grad_(), case.labels_T, **case.teacher, impl="triton")
    result.loss_T.sum().backward()
    result = DistillLoss(**{name: tensor.cpu() for name, tensor in vars(result).items()})
    compare(result, logits_TV.detach().cpu(), expected)  # the gradient is where the logits were


@pytest.mark.parametrize("mode", MODES)
def test_the_fused_head_uses_it(mode: str) -> None:
    """Losses and gradients as with torch, through the gradient that the forward writes."""
    device = device_of("triton")
    case = make_case(T, 203, 10).to(device)
    generator = torch.Generator().manual_seed(5)
    hidden_TH, weight_VH = (torch.randn(n, 16, generator=generator).to(device) * 0.5 for n in (T, 203))
    mask_T = MASKS["runs"]
    assert mask_T is not None
    results = []
    for impl in ("torch", "triton"):
        leaves = pair(tensor.clone().requires_grad_() for tensor in (hidden_TH, weight_VH))
        options: dict[str, Any] = {"mode": mode, "mask_T": mask_T.to(device), "impl": impl}
        loss, parts = distill_linear_loss(*leaves, case.labels_T, **case.teacher, **options)
        (loss * 0.5).backward()
        results.append([loss.detach(), *vars(parts).values(), *(leaf.grad for leaf in leaves)])
    for tensor, other in zip(*results, strict=True):
        torch.testing.assert_close(tensor, other, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("top_k", [10, 128])
def test_whole_rows(top_k: int) -> None:
    """The width and tiles of real use."""
    assert not distill_loss_triton.INTERPRETED
    case = make_case(T, 152064, top_k)
    logits_TV = case.logits_TV.bfloat16()
    for mask_T in MASKS.values():
        expected = reference(logits_TV, case.labels_T, case.teacher, mask_T=mask_T)
        compare(*run(case, logits_TV, impl="triton", mask_T=mask_T), expected)


def test_kernels_compile_without_spills() -> None:
    """For a GPU that is not there, in a process of its own, as kernels here may be interpreted."""
    command = [sys.executable, "benchmarks/ptx.py", "--top-k", "128"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 9 and all(row[3] == "0" for row in rows), done.stdout
