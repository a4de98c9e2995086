"""Qwen1.5, 2 and 2.5: Llama's names with a bias on q, k and v; small models tie the output layer to the embedding."""

from __future__ import annotations

from megatron_npd.models.families.base import Family
from megatron_npd.models.families.llama import LAYER_RULES, OUTER_RULES, QKV_BIAS

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    defaults={"num_key_value_heads": 32},
    neutral={"use_sliding_window": (False,), "use_mrope": (False,)},
    harmless=("sliding_window", "max_window_layers"),  # without effect where use_sliding_window is false
    outer_rules=OUTER_RULES,
    layer_rules=(*LAYER_RULES, QKV_BIAS),
)
