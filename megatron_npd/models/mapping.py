"""Where each number of a Hugging Face checkpoint lies in a megatron-core model, for any tensor-parallel size.

A rank's parameter is a set of rectangles, each cut out of one Hugging Face tensor (``Piece``). Loading copies the
pieces into the parameter, exporting copies them out of every rank's, so that one table serves both directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, cast

from torch import nn

from megatron_npd.models.families.base import ModelSpec, Rule

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A rectangle that a Hugging Face tensor and a rank's parameter share.

    Attributes:
        name: The Hugging Face tensor.
        source: Where it lies in that tensor.
        target: Where it lies in the rank's parameter.
    """

    name: str
    source: tuple[slice, ...]
    target: tuple[slice, ...]


def parameter_rules(spec: ModelSpec) -> dict[str, Rule]:
    """The rule of each parameter by its global megatron-core name, in the order of the network.

    A tied output layer, which the last pipeline stage holds as a copy, is made of the embedding's tensor.
    """
    embedding, norm, head = spec.family.outer_rules
    if spec.tied:
        head = replace(head, hf=embedding.hf)
    layers = (_of_layer(rule, index, spec) for index in range(spec.num_layers) for rule in spec.layer_rules)
    return {rule.mcore: rule for rule in (embedding, *chain.from_iterable(layers), norm, head)}


def _of_layer(rule: Rule, index: int, spec: ModelSpec) -> Iterator[Rule]:
    """A layer's parameter of this kind, or one for each of its experts."""
    if "{e}" not in rule.mcore:
        yield _named(rule, index, 0)
    elif spec.experts is not None:
        yield from (_named(rule, index, expert) for expert in range(spec.experts.number))


def _named(rule: Rule, layer: int, expert: int) -> Rule:
    def name(template: str) -> str:
        return template.replace("{i}", str(layer)).replace("{e}", str(expert))

    return replace(rule, mcore=name(rule.mcore), hf={name(hf): dims for hf, dims in rule.hf.items()})


def hf_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Shape of each tensor of the Hugging Face checkpoint, in the order of the network (no head where it is tied)."""
    return {name: shape for rule in parameter_rules(spec).values() for name, shape in rule_shapes(rule, spec).items()}


def rule_shapes(rule: Rule, spec: ModelSpec) -> dict[str, Shape]:
    """Shapes of the Hugging Face tensors of one rule."""
    sizes = {
        "vocab": spec.vocab_size,
        "hidden": spec.hidden_size,
        "head": spec.head_dim,
        "query": spec.num_heads * spec.head_dim,
        "kv": spec.num_kv_heads * spec.head_dim,
        "qkv": (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim,
        "ffn": spec.ffn_hidden_size,
        "gate_up": 2 * spec.ffn_hidden_size,
        "experts": spec.experts.number if spec.experts else 0,
        "moe_ffn": spec.experts.ffn_hidden_size if spec.experts else 0,
    }
    return {name: tuple(sizes[dim] for dim in dims) for name, dims in rule.hf.items()}


def local_shape(rule: Rule, spec: ModelSpec, tp_size: int) -> Shape:
    """Shape of one rank's parameter."""
    shapes = list(rule_shapes(rule, spec).values())
    if rule.kind == "replicated":
        return shapes[0]
    if rule.kind == "row":
        return (shapes[0][0], _share(shapes[0][1], tp_size, rule))
    rows = spec.padded_vocab_size(tp_size) if rule.kind == "vocab" else sum(shape[0] for shape in shapes)
    return (_share(rows, tp_size, rule), *shapes[0][1:])


def pieces(rule: Rule, spec: ModelSpec, tp_rank: int, tp_size: int) -> list[Piece]:
    """What one rank's parameter is made of; rows that no piece covers are vocabulary padding.

    Args:
        rule: One of ``parameter_rules``.
        spec: The model's shape.
        tp_rank: Rank in the tensor-parallel group.
        tp_size: Size of that group; it may exceed the number of key-value heads: megatron-core then splits the
            interleaved rows evenly, across the query groups' borders, and gathers them in the forward pass.
    """
    shapes = rule_shapes(rule, spec)
    if rule.kind == "row":
        [(name, shape)] = shapes.items()
        share = _share(shape[1], tp_size, rule)
        columns = slice(tp_rank * share, (tp_rank + 1) * share)
        return [Piece(name=name, source=(slice(None), columns), target=(slice(None), slice(0, share)))]
    whole = [(name, 0, shape[0]) for name, shape in shapes.items()]  # below one another, be they fused or not
    if rule.kind == "gate_up":
        rows = local_shape(rule, spec, 1)[0] // 2
        share = _share(rows, tp_size, rule)
        starts = (first + tp_rank * share for first in (0, rows))
        return _stack(run for start in starts for run in _clip(whole, start, start + share))
    runs = _query_groups(whole, spec) if rule.kind == "qkv" else whole
    if rule.kind == "replicated":
        return _stack(runs)
    share = local_shape(rule, spec, tp_size)[0]
    return _stack(_clip(runs, tp_rank * share, (tp_rank + 1) * share))


@dataclass(frozen=True, kw_only=True)
class Run:
    """Rows that a Hugging Face tensor and a parameter that is not cut share.

    Attributes:
        name: The Hugging Face tensor.
        source: The first of them in that tensor.
        target: The first of them in the parameter.
        rows: How many.
    """

    name: str
    source: int
    target: int
    rows: int


def row_runs(rule: Rule, spec: ModelSpec) -> list[Run]:
    """What a parameter is made of where it is not cut, in the order of its rows."""
    shapes, runs = rule_shapes(rule, spec), []
    for piece in pieces(rule, spec, 0, 1):
        source, target = piece.source[0], piece.target[0]
        stop = shapes[piece.name][0] if source.stop is None else source.stop  # columns alone are cut: all rows
        first = source.start or 0
        runs.append(Run(name=piece.name, source=first, target=target.start or 0, rows=stop - first))
    return runs


def _share(size: int, tp_size: int, rule: Rule) -> int:
    assert size % tp_size == 0, f"{rule.mcore}: {size} does not divide by TP {tp_size}; building the model checks this"
    return size // tp_size


def _query_groups(whole: list[tuple[str, int, int]], spec: ModelSpec) -> Iterator[tuple[str, int, int]]:
    """megatron-core's order of the q, k and v rows: for each key-value head its queries, its key, its value."""
    query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    for group in range(spec.num_kv_heads):
        for first, rows in ((0, query), (query, key), (query + key, key)):
            width = rows // spec.num_kv_heads
            yield from _clip(whole, first + group * width, first + (group + 1) * width)


def _clip(runs: Iterable[tuple[str, int, int]], start: int, stop: int) -> Iterator[tuple[str, int, int]]:
    """The part of concatenated row runs between rows ``start`` and ``stop`` of the whole."""
    position = 0
    for name, first, last in runs:
        low, high = max(start - position, 0), min(stop - position, last - first)
        if low < high:
            yield name, first + low, first + high
        position += last - first


def _stack(runs: Iterable[tuple[str, int, int]]) -> list[Piece]:
    """Row runs one below the other."""
    result: list[Piece] = []
    row = 0
    for name, start, stop in runs:
        result.append(Piece(name=name, source=(slice(start, stop),), target=(slice(row, row + stop - start),)))
        row += stop - start
    return result


def global_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters by their global name: layers and experts are counted over all ranks.

    Args:
        model: A megatron-core GPTModel, bare or wrapped (DDP, Float16Module).
    """
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    for name, parameter in model.named_parameters():
        prefix, _, rest = name.partition("decoder.layers.")
        if rest and not prefix:
            local, _, rest = rest.partition(".")
            module = model.get_submodule(f"decoder.layers.{local}")
            number = module.layer_number
            assert isinstance(number, int)  # megatron-core counts layers from 1, over all pipeline stages
            first, here, rest = rest.partition("local_experts.")
            if here:
                expert, _, rest = rest.partition(".")
                rest = f"{here}{cast(Any, module.mlp).local_expert_indices[int(expert)]}.{rest}"
            name = f"decoder.layers.{number - 1}.{first}{rest}"
        yield name, parameter
