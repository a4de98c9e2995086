"""What a platform is, and what the platforms share.

Legend: T packed tokens, S segments, H heads, D head size.
"""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

from megatron_npd.platform.mcore_versions import silence_meant_warnings

Tensors = list[Tensor]


class PlatformUnavailable(Exception):
    """Why a platform cannot be used here, in words."""


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Where the segments of a packed row start and end.

    Attributes:
        cu_seqlens: int32 [S + 1] on the CPU, from 0 to T.
        longest: Tokens of the longest.
        cu_seqlens_kv: int32 [S + 1] on the CPU, where a segment has at least as many keys as queries: the queries are
            its last tokens. None: as many.
        longest_kv: Keys of the longest, with ``cu_seqlens_kv``.
    """

    cu_seqlens: Tensor
    longest: int
    cu_seqlens_kv: Tensor | None = None
    longest_kv: int = 0

    @property
    def keys(self) -> Tensor:
        """Where each segment's keys start and end, int32 [S + 1] on the CPU."""
        return self.cu_seqlens if self.cu_seqlens_kv is None else self.cu_seqlens_kv


class Platform(Protocol):
    """A kind of device: everything in the code base that differs between CPU, GPU and NPU.

    Attributes:
        name: ``cpu``, ``cuda`` or ``npu``.
        distributed_backend: torch.distributed backend: ``gloo``, ``nccl`` or ``hccl``.
        visible_devices_env: Environment variable that limits the devices a process sees; "" where there is none.
        fuses_swiglu: Whether megatron-core's fused SwiGLU is used: its backward computes again what the others keep, 2
            of 5 MLP widths per token.
        vocab_multiple: A rank's slice of the vocabulary is padded to a multiple of it, for wide memory accesses.
        deterministic_environment: Values with which the device's libraries give the same bits each time, by variable of
            the environment; the first is the one that is set.
    """

    name: str
    distributed_backend: str
    visible_devices_env: str
    fuses_swiglu: bool
    vocab_multiple: int
    deterministic_environment: Mapping[str, tuple[str, ...]]

    def check_available(self) -> None:
        """Raise PlatformUnavailable where the platform cannot be used."""
        ...

    def prepare(self) -> None:
        """Make ``megatron.core`` usable, and import it; called once, before anything else imports it."""
        ...

    def device(self, local_rank: int) -> torch.device:
        """The device of a process by its rank on this machine."""
        ...

    def set_device(self, local_rank: int) -> None:
        """Make that device the process's current one."""
        ...

    def seed(self, seed: int) -> None:
        """Seed torch's generators on the host and on the device."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has finished its queued work."""
        ...

    def mark(self) -> Any:
        """The end of the work that is queued now, for ``seconds_between``."""
        ...

    def seconds_between(self, begin: Any, end: Any) -> float:
        """Time from one mark to a later one, both of which the device has passed."""
        ...

    def device_names(self) -> list[str]:
        """Product names of the accelerators that this process sees; none on the CPU."""
        ...

    def max_memory_bytes(self) -> int:
        """Highest memory use so far: allocated on the device, or resident on the CPU."""
        ...

    def release_memory(self) -> None:
        """Give memory that nothing holds any more back to the device, for other processes."""
        ...

    def packed_attention(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, softmax_scale: float) -> Tensor:
        """Causal attention inside each segment of a packed row.

        Args:
            q: [T, H, D].
            k, v: [T, H_kv, D], or as many tokens as ``segments`` has keys; H_kv divides H, and each key head serves H /
                H_kv neighbouring query heads.
            segments: Where they start and end.
            softmax_scale: Factor on the scores.

        Returns:
            [T, H, D] in q's dtype, differentiable.
        """
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x * weight / sqrt(mean(x^2) + eps) over the last dimension, in x's dtype, differentiable."""
        ...

    def adamw(self) -> type[torch.optim.Optimizer]:
        """The AdamW class that megatron-core's optimizers use here."""
        ...


def attention_by_segment(q: Tensor, k: Tensor, v: Tensor, segments: Segments, softmax_scale: float) -> Tensor:
    """``Platform.packed_attention``, one SDPA call a segment: right everywhere, slow for many short segments."""
    q_HTD, k_HTD, v_HTD = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    queries_S, keys_S = (itertools.pairwise(x.tolist()) for x in (segments.cu_seqlens, segments.keys))
    out = []
    for (start, end), (start_kv, end_kv) in zip(queries_S, keys_S, strict=True):
        queries, mask = end - start, None
        if earlier := end_kv - start_kv - queries:  # keys before the first query's own
            mask = torch.ones(queries, queries + earlier, dtype=torch.bool, device=q.device).tril(earlier)
        if queries:
            out.append(
                F.scaled_dot_product_attention(
                    q_HTD[:, :, start:end],
                    k_HTD[:, :, start_kv:end_kv],
                    v_HTD[:, :, start_kv:end_kv],
                    attn_mask=mask,
                    is_causal=mask is None,
                    scale=softmax_scale,
                    enable_gqa=q.shape[1] != k.shape[1],
                )
            )
    return torch.cat(out, dim=2).squeeze(0).transpose(0, 1)


class GroupStepAdamW(torch.optim.Optimizer):
    """Torch's fused AdamW with Apex's interface: the step count is kept in the parameter group.

    megatron-core's distributed optimizer can neither load nor reshard the per-parameter ``step`` tensors of
    ``torch.optim.AdamW``; with Apex's and Transformer Engine's FusedAdam the count is the group's.
    """

    # Without the decorators, which import torch's compiler at their first call: most of a second, in every process.
    add_param_group, zero_grad, state_dict, load_state_dict = (
        getattr(torch.optim.Optimizer, name).__wrapped__
        for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode, "decoupled_weight_decay must stay on"
        assert not capturable, "optimizer_cuda_graph must stay off"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            group["step"] = int(group["step"]) + 1
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            self.update(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                group,
            )

    def update(
        self, params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, group: dict[str, Any]
    ) -> None:
        """Update lists of tensors in place; ``group['step']`` counts from 1."""
        before = torch.full((len(params),), float(group["step"] - 1), device=params[0].device)
        adamw(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs=[],
            state_steps=list(before.unbind()),
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def install_adamw(optimizer_class: type[torch.optim.Optimizer]) -> None:
    """Tell megatron-core to use ``optimizer_class``, which has Apex's interface, where it would look for Apex."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam = optimizer_class
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = optimizer_class
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


def has_fused_adam() -> bool:
    """Whether megatron-core found Transformer Engine's or Apex's FusedAdam."""
    from megatron.core.optimizer import distrib_optimizer

    return distrib_optimizer.USING_TE_OPTIMIZER or distrib_optimizer.USING_APEX_OPTIMIZER


def alias_tensor_type(names: dict[str, str]) -> None:
    """Let ``Tensor.type()`` answer with CUDA's names, which megatron-core's optimizers compare as strings."""
    original = torch.Tensor.type

    def tensor_type(self: Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        result = original(self, dtype, **kwargs)
        return names.get(result, result) if isinstance(result, str) else result

    setattr(torch.Tensor, "type", tensor_type)  # noqa: B010  (a type checker knows the attribute as overloaded)


def silence_library_warnings() -> None:
    """Drop what megatron-core says at import (Apex and Transformer Engine are missing) and its deprecation notes."""
    silence_meant_warnings()
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


@contextmanager
def without_wandb() -> Iterator[None]:
    """Let megatron-core be imported without wandb, which it takes where it is there, for inference servers.

    It costs each process 0.6 s and makes directories in /tmp that a killed process leaves behind.
    """
    before = sys.modules.pop("wandb", None)
    sys.modules["wandb"] = None  # pyright: ignore[reportArgumentType]  (how an import is made to fail)
    try:
        yield
    finally:
        del sys.modules["wandb"]
        if before is not None:
            sys.modules["wandb"] = before


def assert_megatron_not_imported() -> None:
    """The platform's changes to torch must come before ``import megatron.core``."""
    assert "megatron.core" not in sys.modules, "call get_platform() before importing megatron.core"


def resident_bytes(*, ended: bool = False) -> int:
    """Highest resident memory of this process, in bytes; ``ended``: of the largest that it started and that ended."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_CHILDREN if ended else resource.RUSAGE_SELF).ru_maxrss * unit


def local_rank() -> int:
    """The process's rank on its machine, from torchrun's environment; 0 without it."""
    return int(os.environ.get("LOCAL_RANK", "0"))
