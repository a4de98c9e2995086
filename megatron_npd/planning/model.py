"""What a model's tables say of its size: parameters of each pipeline stage, cache of a token."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from megatron_npd.models.families import ModelSpec
from megatron_npd.models.flops import copies
from megatron_npd.models.mapping import hf_shapes, local_shape


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is cut: tensor-, pipeline- and data-parallel ranks."""

    tp: int
    pp: int
    dp: int

    def __str__(self) -> str:
        return f"TP {self.tp}, PP {self.pp}, DP {self.dp}"


def parameters(spec: ModelSpec) -> int:
    """Parameters of the whole model, as its checkpoint holds them."""
    return sum(map(prod, hf_shapes(spec).values()))


def rank_parameters(spec: ModelSpec, layout: Layout) -> list[int]:
    """Parameters on a rank of each pipeline stage, from the first. A tied output layer is a copy on a later one."""
    embedding, norm, head = (prod(local_shape(rule, spec, layout.tp)) for rule in spec.family.outer_rules)
    layer = sum(prod(local_shape(rule, spec, layout.tp)) * copies(rule, spec) for rule in spec.layer_rules)
    stages = [0] * layout.pp
    for index in range(spec.num_layers):
        stages[index * layout.pp // spec.num_layers] += layer
    stages[0] += embedding
    stages[-1] += norm + (0 if spec.tied and layout.pp == 1 else head)
    return stages


def cache_bytes(spec: ModelSpec, element: int) -> int:
    """Keys and values of one token in all layers, with elements of so many bytes."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * element
