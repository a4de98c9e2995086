"""Qwen3-MoE: Qwen3's attention, and in every layer a router and experts in place of the MLP; no shared expert."""

from __future__ import annotations

from megatron_npd.models.families.base import Family, Rule
from megatron_npd.models.families.llama import ATTENTION_BIAS, LAYER_RULES, OUTER_RULES
from megatron_npd.models.families.qwen3 import QK_NORMS

_MCORE, _HF = "decoder.layers.{i}.mlp", "model.layers.{i}.mlp"
_MCORE_EXPERT, _HF_EXPERT = f"{_MCORE}.experts.local_experts.{{e}}", f"{_HF}.experts.{{e}}"
_EXPERTS = (
    Rule(mcore=f"{_MCORE}.router.weight", hf={f"{_HF}.gate.weight": ("experts", "hidden")}, kind="replicated"),
    Rule(
        mcore=f"{_MCORE_EXPERT}.linear_fc1.weight",
        hf={f"{_HF_EXPERT}.{name}_proj.weight": ("moe_ffn", "hidden") for name in ("gate", "up")},
        kind="gate_up",
    ),
    Rule(
        mcore=f"{_MCORE_EXPERT}.linear_fc2.weight",
        hf={f"{_HF_EXPERT}.down_proj.weight": ("hidden", "moe_ffn")},
        kind="row",
    ),
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    defaults={"num_key_value_heads": 4, "norm_topk_prob": False},
    switches={"attention_bias": ATTENTION_BIAS},
    neutral={
        "use_sliding_window": (False,),
        "decoder_sparse_step": (1,),  # else some layers have an MLP
        "mlp_only_layers": ([], None),
    },
    # The sliding window is off; the auxiliary loss is not part of a distillation.
    harmless=("sliding_window", "max_window_layers", "output_router_logits", "router_aux_loss_coef"),
    outer_rules=OUTER_RULES,
    layer_rules=(*(rule for rule in LAYER_RULES if ".mlp." not in rule.mcore), *QK_NORMS, *_EXPERTS),
)
