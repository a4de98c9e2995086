"""The optimizer class with Apex's interface against torch's AdamW."""

from __future__ import annotations

import torch

from megatron_npd.platform.base import GroupStepAdamW


def test_equals_torch_adamw() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((5, 3), (7,), (4,))]
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizers = [
        cls([{"params": p[:2], "weight_decay": 0.1}, {"params": p[2:], "weight_decay": 0.0}], **options)
        for cls, p in ((GroupStepAdamW, ours), (torch.optim.AdamW, theirs))
    ]
    for step in range(5):
        if step == 3:  # a state dict carries everything over
            fresh = GroupStepAdamW([{"params": ours[:2]}, {"params": ours[2:]}], **options)
            fresh.load_state_dict(optimizers[0].state_dict())
            optimizers[0] = fresh
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert [group["step"] for group in optimizers[0].param_groups] == [5, 5]
    assert set(optimizers[0].state[ours[0]]) == {"exp_avg", "exp_avg_sq"}
