"""How a model is cut, and what its tables say of its size: parameters of each pipeline stage, cache of a token."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from megatron_npd.models.families import ModelSpec
from megatron_npd.models.flops import copies
from megatron_npd.models.mapping import hf_shapes, local_shape


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is cut, and what of it is computed again.

    Attributes:
        tp: Tensor-parallel ranks.
        pp: Pipeline stages.
        dp: Data-parallel ranks.
        cp: Context-parallel ranks.
        first: Layers of the first stage; 0: as many as the stages between.
        last: Layers of the last stage, likewise.
        virtual: Parts of each stage, of the interleaved schedule.
        recompute: Whether the backward computes every layer again, where the settings ask for nothing.
    """

    tp: int
    pp: int
    dp: int
    cp: int = 1
    first: int = 0
    last: int = 0
    virtual: int = 1
    recompute: bool = False

    def __str__(self) -> str:
        names = {"TP": self.tp, "PP": self.pp, "VPP": self.virtual, "CP": self.cp, "DP": self.dp}
        sizes = ", ".join(f"{name} {size}" for name, size in names.items() if size > 1 or name not in ("VPP", "CP"))
        return f"{sizes}{', recompute' * self.recompute}"

    @property
    def sizes(self) -> str:
        """Without the data-parallel ranks, in the order TP, PP, CP."""
        return f"{self.tp} x {self.pp}{f' x {self.cp}' * (self.cp > 1)}"

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.tp * self.pp * self.cp * self.dp

    def stage_layers(self, layers: int) -> list[int]:
        """Layers of each pipeline stage, from the first."""
        if self.first == self.last == 0:
            return [layers // self.pp] * self.pp
        between = self.pp - bool(self.first) - bool(self.last)
        each = (layers - self.first - self.last) // between if between else 0
        return [self.first] * bool(self.first) + [each] * between + [self.last] * bool(self.last)


def parameters(spec: ModelSpec) -> int:
    """Parameters of the whole model, as its checkpoint holds them."""
    return sum(map(prod, hf_shapes(spec).values()))


def rank_parameters(spec: ModelSpec, layout: Layout) -> list[int]:
    """Parameters on a rank of each pipeline stage, from the first. A tied output layer is a copy on a later one."""
    embedding, norm, head = (prod(local_shape(rule, spec, layout.tp)) for rule in spec.family.outer_rules)
    layer = sum(prod(local_shape(rule, spec, layout.tp)) * copies(rule, spec) for rule in spec.layer_rules)
    stages = [number * layer for number in layout.stage_layers(spec.num_layers)]
    stages[0] += embedding
    stages[-1] += norm + (0 if spec.tied and layout.pp == 1 else head)
    return stages


def cache_bytes(spec: ModelSpec, element: int) -> int:
    """Keys and values of one token in all layers, with elements of so many bytes."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * element
