"""What a model's tables say of its size: parameters of each pipeline stage, FLOPs of a forward, cache of a token.

Legend: T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from megatron_npd.models.families import ModelSpec
from megatron_npd.models.mapping import hf_shapes, local_shape, parameter_rules


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
    stages = [0] * layout.pp
    for name, rule in parameter_rules(spec).items():
        size = prod(local_shape(rule, spec, layout.tp))
        if name.startswith("embedding."):
            stages[0] += size
        elif name.startswith("decoder.layers."):
            layer = int(name.split(".")[2])
            stages[layer * layout.pp // spec.num_layers] += size
        elif not (name.startswith("output_layer.") and spec.tied and layout.pp == 1):
            stages[-1] += size
    return stages


def head_parameters(spec: ModelSpec) -> int:
    """Parameters of the output layer."""
    return spec.vocab_size * spec.hidden_size


def layer_weights(spec: ModelSpec) -> int:
    """Parameters of all layers that a token is multiplied with: matrices, no norms and biases."""
    rules = [rule for name, rule in parameter_rules(spec).items() if name.startswith("decoder.layers.")]
    shapes = [local_shape(rule, spec, 1) for rule in rules]
    return sum(prod(shape) for shape in shapes if len(shape) == 2)


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
