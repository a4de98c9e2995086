"""Qwen3 (dense): Llama's names, with a norm on each head's queries and on its keys, and a head size of its own."""

from __future__ import annotations

from megatron_npd.models.families.base import Family, Rule
from megatron_npd.models.families.llama import ATTENTION_BIAS, LAYER_RULES, OUTER_RULES

QK_NORMS = tuple(
    Rule(
        mcore=f"decoder.layers.{{i}}.self_attention.{name}_layernorm.weight",
        hf={f"model.layers.{{i}}.self_attn.{name}_norm.weight": ("head",)},
        kind="replicated",
    )
    for name in "qk"
)

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    defaults={"num_key_value_heads": 32, "head_dim": 128},
    switches={"attention_bias": ATTENTION_BIAS},
    neutral={"use_sliding_window": (False,)},
    harmless=("sliding_window", "max_window_layers"),  # without effect where use_sliding_window is false
    outer_rules=OUTER_RULES,
    layer_rules=(*LAYER_RULES, *QK_NORMS),
)
