"""Mistral: Llama's tensors; the sliding window of its first releases has to be off, or as long as the context."""

from __future__ import annotations

from megatron_npd.models.families.base import Family
from megatron_npd.models.families.llama import LAYER_RULES, OUTER_RULES

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    model_type="mistral",
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    windowed=True,
    outer_rules=OUTER_RULES,
    layer_rules=LAYER_RULES,
)
