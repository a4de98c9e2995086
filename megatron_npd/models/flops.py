"""FLOPs of a model, from its tables."""

from __future__ import annotations

from math import prod

from megatron_npd.models.families import ModelSpec, Rule
from megatron_npd.models.mapping import local_shape

BACKWARD = 2  # of a forward's work: gradients of inputs and of weights


def copies(rule: Rule, spec: ModelSpec, *, active: bool = False) -> int:
    """Parameters of this kind in a layer, or those of them that a token meets."""
    if "{e}" not in rule.mcore or spec.experts is None:
        return 1
    return spec.experts.per_token if active else spec.experts.number


def head_parameters(spec: ModelSpec) -> int:
    """Parameters of the output layer."""
    return spec.vocab_size * spec.hidden_size


def layer_weights(spec: ModelSpec) -> int:
    """Parameters of all layers that a token is multiplied with: matrices, no norms and biases, its own experts."""
    return _matrices(spec, "")


def mlp_weights(spec: ModelSpec) -> int:
    """Those of them that are in the MLPs."""
    return _matrices(spec, ".mlp.")


def _matrices(spec: ModelSpec, within: str) -> int:
    rules = [rule for rule in spec.layer_rules if within in rule.mcore]
    shapes = [(local_shape(rule, spec, 1), copies(rule, spec, active=True)) for rule in rules]
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


def step_flops(spec: ModelSpec, tokens: int, attention_cost: float) -> float:
    """FLOPs of a training step over rows of so many tokens, padding and all; what is computed again is not counted.

    Args:
        spec: The model.
        tokens: Of all ranks.
        attention_cost: Sum of the squared lengths of the rows' segments.
    """
    context = attention_cost / 2 / tokens
    return (1 + BACKWARD) * forward_flops(spec, tokens, head_tokens=tokens, context=context)
