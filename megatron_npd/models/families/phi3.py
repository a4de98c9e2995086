"""Phi-3 and Phi-4: Llama's tensors, but for q, k and v, which are one, and gate and up, which are another."""

from __future__ import annotations

from dataclasses import replace

from megatron_npd.models.families.base import Family
from megatron_npd.models.families.llama import LAYER_RULES, OUTER_RULES

_FUSED = {
    "qkv": {"model.layers.{i}.self_attn.qkv_proj.weight": ("qkv", "hidden")},
    "gate_up": {"model.layers.{i}.mlp.gate_up_proj.weight": ("gate_up", "hidden")},
}

PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    rope_types=("default",),  # transformers takes none but longrope beside it, whose factors depend on the length
    windowed=True,
    neutral={"attention_bias": (False,), "embd_pdrop": (0, None), "resid_pdrop": (0, None), "auto_map": ({},)},
    harmless=("original_max_position_embeddings",),  # read for longrope alone
    outer_rules=OUTER_RULES,
    layer_rules=tuple(replace(rule, hf=_FUSED.get(rule.kind, rule.hf)) for rule in LAYER_RULES),
)
