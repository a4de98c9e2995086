"""Attention over packed rows: rotary positions that restart in each segment, then the platform's causal attention.

megatron-core's own rotary embedding for packed rows loops over segments in every layer. Here the angles of a row are
computed once, on its first layer, and applied to all of its tokens at once.

Under context parallelism a rank has its share of each segment's queries (``models/zigzag.py``). The keys, rotated where
they are, and the values of all ranks are gathered; the backward sums what the ranks' queries say of them and gives each
rank its own.

Legend: T packed tokens of this rank, S segments, C chunks of them, K keys that the chunks attend to, H heads, D head
size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_npd.models.zigzag import ContextShare
from megatron_npd.platform import get_platform
from megatron_npd.platform.base import Segments


@dataclass(kw_only=True)
class PackedRow(PackedSeqParams):
    """megatron-core's description of a packed row, with what its layers share.

    ``cu_seqlens_q`` [C + 1] are the bounds of this rank's chunks, ``cu_seqlens_kv`` those of the keys that each attends
    to; without context parallelism both are the segments'.

    Attributes:
        positions_T: int64 on the CPU, place of each token in its segment.
        keys_K: int64, where the keys are among those of all context-parallel ranks, laid rank after rank; None where
            this rank's are all there are.
        rotary: (cos, sin) [T, 1, D / 2] by (rotary embedding, dtype, device), filled by the first layer.
    """

    positions_T: Tensor
    keys_K: Tensor | None
    rotary: dict[tuple[Rotary, torch.dtype, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict)


def packed_params(cu_seqlens: Tensor) -> PackedRow:
    """What the model needs to know of a packed row, or of this rank's share of it; make it anew for each row.

    Args:
        cu_seqlens: int32 [S + 1] on the CPU, from 0 to CP * T: where segments start and end (a padding tail is one).
    """
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.device.type == "cpu", "cu_seqlens is int32 on the CPU"
    share = context_share()
    queries, keys = share.chunk_lengths(cu_seqlens), share.key_lengths(cu_seqlens)
    bounds = [torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int() for lengths in (queries, keys)]
    return PackedRow(
        qkv_format="thd",
        cu_seqlens_q=bounds[0],
        cu_seqlens_kv=bounds[1],
        max_seqlen_q=int(queries.max()),
        max_seqlen_kv=int(keys.max()),
        positions_T=share.positions(cu_seqlens, int(bounds[0][-1])),
        keys_K=share.keys(cu_seqlens) if share.size > 1 else None,
    )


def context_share() -> ContextShare:
    """This rank's share of packed rows."""
    if not parallel_state.model_parallel_is_initialized():
        return ContextShare()
    rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    return ContextShare(rank=rank, size=size)


class Rotary:
    """A rotary embedding: its inverse frequencies, and the factor that some kinds put on cos and sin."""

    def __init__(self, inv_freq: Tensor, scaling: float) -> None:
        """Args: inv_freq: float32 [D / 2]; scaling: factor on cos and sin."""
        self.inv_freq = inv_freq
        self.scaling = scaling

    def of_row(self, row: PackedRow, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, D / 2] of a row's tokens, whose positions count from 0 in each segment."""
        key = (self, dtype, device)
        if key not in row.rotary:
            angles = torch.outer(row.positions_T.float(), self.inv_freq).unsqueeze(1)
            cos, sin = angles.cos() * self.scaling, angles.sin() * self.scaling
            row.rotary[key] = (cos.to(device, dtype), sin.to(device, dtype))
        return row.rotary[key]


class _Rotate(torch.autograd.Function):
    """Rotate the pairs (i, i + D / 2) of each head; the backward turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grad_outputs
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1.0), None, None


def _rotate(x_THD: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    first, second = x_THD.chunk(2, dim=-1)
    out = torch.empty(x_THD.shape, dtype=x_THD.dtype, device=x_THD.device)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=sign)
    return out


class PackedAttention(MegatronModule):
    """The core attention of a layer; it has no parameters.

    megatron-core gives it this rank's heads and, with ``qkv_format`` "thd", takes back [T, H * D].
    """

    def __init__(self, config: TransformerConfig, *, rotary: Rotary, **_: Any) -> None:
        """Args: config: of the model; rotary: its rotary embedding; the rest of what megatron-core passes is unused."""
        super().__init__(config=config)
        assert config.kv_channels is not None
        self.rotary = rotary
        self.softmax_scale = config.kv_channels**-0.5
        self.platform = get_platform()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedRow,
        **_: Any,
    ) -> Tensor:
        """query [T, H, D], key and value [T, H_kv, D] -> [T, H, D]."""
        row = packed_seq_params
        assert isinstance(row, PackedRow), "call the model with packed_seq_params=packed_params(cu_seqlens)"
        cos, sin = self.rotary.of_row(row, query.dtype, query.device)
        query, key = _Rotate.apply(query, cos, sin), _Rotate.apply(key, cos, sin)
        if row.keys_K is None:
            segments = Segments(cu_seqlens=row.cu_seqlens_q, longest=row.max_seqlen_q)
            return self.platform.packed_attention(query, key, value, segments, self.softmax_scale)
        row.keys_K = row.keys_K.to(query.device, non_blocking=True)  # once a row: the layers share it
        group = parallel_state.get_context_parallel_group()
        gathered = gather_from_sequence_parallel_region(torch.stack([key, value], dim=1), group=group)
        key, value = (gathered[:, index].index_select(0, row.keys_K) for index in (0, 1))
        segments = Segments(
            cu_seqlens=row.cu_seqlens_q,
            longest=row.max_seqlen_q,
            cu_seqlens_kv=row.cu_seqlens_kv,
            longest_kv=row.max_seqlen_kv,
        )
        return self.platform.packed_attention(query, key, value, segments, self.softmax_scale)
