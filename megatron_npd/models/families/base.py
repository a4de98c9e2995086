"""What a model family is: a table of its tensors' names and of the configuration values that are reproduced.

``models/mapping.py`` interprets the rules of the names, ``families/config.py`` reads a ``config.json`` by the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from megatron_npd.platform import get_platform

RuleKind = Literal["vocab", "qkv", "gate_up", "row", "replicated"]
Dim = Literal["vocab", "hidden", "head", "query", "kv", "qkv", "ffn", "gate_up", "experts", "moe_ffn"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one megatron-core parameter is made of Hugging Face tensors.

    Attributes:
        mcore: Name of the megatron-core parameter; ``{i}`` stands for the layer's global index, ``{e}`` for the
            expert's, where a layer has a parameter of this kind for each.
        hf: Names and dimensions of the Hugging Face tensors, in the order that the kind expects; or of one that has
            them below one another, in that order.
        kind: ``vocab`` (rows split over TP, padded), ``qkv`` (q, k, v interleaved by query group, rows split),
            ``gate_up`` (each rank holds its rows of gate, then its rows of up), ``row`` (columns split),
            ``replicated``.
    """

    mcore: str
    hf: Mapping[str, tuple[Dim, ...]]
    kind: RuleKind


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture as tables.

    Attributes:
        name: Short name, for messages.
        architecture: The entry in ``architectures`` of ``config.json``.
        model_type: Its ``model_type``.
        export: What ``config.json`` has, in place of an ``auto_map``, where vLLM and transformers load the model
            without code that it brings along: exports get it, and models that have it are taken.
        defaults: What transformers takes where ``config.json`` has no such key: num_key_value_heads (else
            num_attention_heads), head_dim (else hidden_size / num_attention_heads), those in ``switches`` (else
            false), sliding_window.
        rope_types: Kinds of rotary embedding that are reproduced (``families/rope.py``).
        switches: Keys that are true or false, each with the rules of the parameters that a layer has where it is true.
        windowed: Whether sliding_window holds for every layer; it must then leave the whole context visible.
        neutral: Keys that change the maths unless they have one of these values.
        harmless: Further keys that do not change the maths.
        outer_rules: Rules of the parameters outside the layers.
        layer_rules: Rules of one layer, beside those of ``switches``.
    """

    name: str
    architecture: str
    model_type: str
    export: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    switches: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)
    windowed: bool = False
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless: tuple[str, ...] = ()
    outer_rules: tuple[Rule, ...]
    layer_rules: tuple[Rule, ...]

    @property
    def has_experts(self) -> bool:
        """Whether layers have experts in place of an MLP."""
        return any("{e}" in rule.mcore for rule in self.layer_rules)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """What a layer has in place of one MLP.

    Attributes:
        number: Experts of a layer.
        per_token: Of them, those that a token goes through.
        ffn_hidden_size: Width of an expert.
        normalised: Whether the probabilities of a token's experts are scaled to add up to 1.
    """

    number: int
    per_token: int
    ffn_hidden_size: int
    normalised: bool


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The shape of one model, read from its ``config.json`` and checked.

    Attributes:
        path: The Hugging Face directory.
        family: Its family's tables.
        architecture: ``family.architecture``.
        layer_rules: Rules of one layer, those of the switches that are on among them.
        hf_config: ``config.json`` as it stands.
        num_layers: Transformer layers.
        hidden_size: Width of the residual stream.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Size of a head.
        ffn_hidden_size: Width of the gated MLP; with experts, of what a token goes through in a layer.
        experts: None: layers have an MLP each.
        vocab_size: Rows of the embedding, without padding.
        tied: Whether the output layer is the embedding.
        rms_norm_eps: Epsilon of the norms.
        rope_theta: Base of the rotary embedding.
        rope_scaling: None for the plain rotary embedding, else its parameters with ``rope_type`` (``yarn``).
        max_position_embeddings: Context, in tokens.
        dtype: Type that the configuration gives the weights (float32 where it says nothing, as transformers has it).
    """

    path: str
    family: Family
    architecture: str
    layer_rules: tuple[Rule, ...]
    hf_config: dict[str, Any]
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    experts: Experts | None
    vocab_size: int
    tied: bool
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_position_embeddings: int
    dtype: torch.dtype

    def padded_vocab_size(self, tensor_parallel_size: int) -> int:
        """Rows of the embedding with the padding that ``tensor_parallel_size`` ranks need to own equal shares.

        Each is a multiple of what the platform's kernels like. Exports hold the rows without padding; a checkpoint is
        read under another padding.
        """
        multiple = tensor_parallel_size * get_platform().vocab_multiple
        return -(-self.vocab_size // multiple) * multiple

    def export_config(self) -> dict[str, Any]:
        """``config.json`` of an export: as it stands, but for a family that is published with code of its own."""
        config = {**self.hf_config, **self.family.export}
        return {key: value for key, value in config.items() if key != "auto_map" or not self.family.export}

    def has(self, parameter: str) -> bool:
        """Whether a layer has the megatron-core parameter of this name (``self_attention.linear_qkv.bias``)."""
        return any(rule.mcore == f"decoder.layers.{{i}}.{parameter}" for rule in self.layer_rules)
