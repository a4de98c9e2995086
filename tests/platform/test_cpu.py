"""The CPU platform's redirections, which must leave everything but requests for CUDA as it was."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from megatron_npd.errors import UserError
from megatron_npd.platform import get_platform
from tests.dist import run_distributed
from tests.helpers import pair


def _redirections(rank: int, world_size: int) -> None:
    platform = get_platform("cpu")
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.tensor([1.0], device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.empty_like(torch.ones(2), device="cuda").device.type == "cpu"
    assert torch.ones(2, device="meta").device.type == "meta"
    with torch.device("meta"):
        assert all(x.device.type == "meta" for x in (torch.zeros(2), torch.empty(2), torch.ones(2), torch.tensor(1)))
    assert torch.ones(1).cuda().device.type == "cpu"
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).type(torch.int64).dtype == torch.int64
    assert not torch.cuda.is_available()

    torch.cuda.manual_seed(5)
    saved = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), first)
    torch.set_rng_state(saved)
    assert torch.equal(torch.rand(3), first)

    assert platform.name == "cpu" and platform.max_memory_bytes() > 2**20
    assert get_platform() is platform and get_platform("auto") is platform


def test_redirections() -> None:
    run_distributed(_redirections, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_torch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, upstream = (torch.randn(shape, generator=generator) for shape in ((5, 1, 64), (64,), (5, 1, 64)))
    x[2] *= 1e-4  # eps matters
    results = []
    for norm, kind in (
        (get_platform("cpu").rms_norm, dtype),
        (lambda x, w, e: F.rms_norm(x, w.shape, w, e), torch.float64),
    ):
        inputs = pair(y.detach().to(kind, copy=True).requires_grad_() for y in (x, weight))
        out = norm(*inputs, 1e-6)
        out.backward(upstream.to(kind))
        results.append([out.detach(), *(y.grad for y in inputs)])
    for got, want in zip(*results, strict=True):
        assert got.dtype == dtype
        rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (0.02, 0.05)
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)


def test_one_platform_a_process() -> None:
    get_platform("cpu")
    with pytest.raises(UserError, match="start another process"):
        get_platform("cuda")


@pytest.mark.parametrize(
    ("name", "words"),
    [("npu", "torch_npu is not installed"), ("cuda", "CUDA"), ("tpu", "must be one of cuda, npu, cpu or auto")],
)
def test_platform_that_cannot_be_had(name: str, words: str) -> None:
    if name == "cuda" and shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU")
    code = f"from megatron_npd.platform import get_platform; get_platform({name!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert words in result.stderr.splitlines()[-1] and "UserError" in result.stderr
