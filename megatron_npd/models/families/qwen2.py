"""Qwen2 and Qwen2.5: Llama's names with a bias on q, k and v; small models tie the output layer to the embedding."""

from __future__ import annotations

from megatron_npd.models.families.base import Family, Rule
from megatron_npd.models.families.llama import LAYER_RULES, OUTER_RULES

_QKV_BIAS = Rule(
    mcore="decoder.layers.{i}.self_attention.linear_qkv.bias",
    hf={
        "model.layers.{i}.self_attn.q_proj.bias": ("query",),
        "model.layers.{i}.self_attn.k_proj.bias": ("kv",),
        "model.layers.{i}.self_attn.v_proj.bias": ("kv",),
    },
    kind="qkv",
)

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    transformer_config={"add_qkv_bias": True},
    defaults={"num_key_value_heads": 32},
    rope_types=("default",),
    neutral={"use_sliding_window": (False,), "use_mrope": (False,)},
    harmless=("sliding_window", "max_window_layers"),  # without effect where use_sliding_window is false
    outer_rules=OUTER_RULES,
    layer_rules=(*LAYER_RULES, _QKV_BIAS),
)
