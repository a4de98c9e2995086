"""What a model's tables say of its size: parameters of each pipeline stage, FLOPs of a forward, cache of a token.

Legend: T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from megatron_npd.models.families import ModelSpec, Rule
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
    layer = sum(prod(local_shape(rule, spec, layout.tp)) * _count(rule, spec) for rule in spec.layer_rules)
    stages = [0] * layout.pp
    for index in range(spec.num_layers):
        stages[index * layout.pp // spec.num_layers] += layer
    stages[0] += embedding
    stages[-1] += norm + (0 if spec.tied and layout.pp == 1 else head)
    return stages


def _count(rule: Rule, spec: ModelSpec, *, active: bool = False) -> int:
    """Parameters of this kind in a layer, or those of them that a token meets."""
    if "{e}" not in rule.mcore or spec.experts is None:
        return 1
    return spec.experts.per_token if active else spec.experts.number


def head_parameters(spec: ModelSpec) -> int:
    """Parameters of the output layer."""
    return spec.vocab_size * spec.hidden_size


def layer_weights(spec: ModelSpec) -> int:
    """Parameters of all layers that a token is multiplied with: matrices, no norms and biases, its own experts."""
    shapes = [(local_shape(rule, spec, 1), _count(rule, spec, active=True)) for rule in spec.layer_rules]
    return spec.num_layers * sum(prod(shape) * count for shape, count in shapes if len(shape) == 2)


def forward_flops(spec: ModelSpec, tokens: float, *, head_tokens: float, context: float) -> float:
    """FLOPs of a forward over ``tokens``: two per weight and token, and the attention's two products.

    Args:
        spec: The model.
        tokens: Tokens that go through the layers.
        head_tokens: Tokens of which logits are made.
        context: Tokens that a token attends to, on average: half the length of a segment that is read whole.
    """
    attention = 4 * spec.num_layers * spec.num_heads * spec.head_dim * context
    return tokens * (2 * layer_weights(spec) + attention) + head_tokens * 2 * head_parameters(spec)


def cache_bytes(spec: ModelSpec, element: int) -> int:
    """Keys and values of one token in all layers, with elements of so many bytes."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * element
