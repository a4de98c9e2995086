"""openPangu-Embedded: Llama with a bias on q, k, v and o_proj, published with code of its own, which is never run."""

from __future__ import annotations

from megatron_npd.models.families.base import Family
from megatron_npd.models.families.llama import ATTENTION_BIAS, LAYER_RULES, OUTER_RULES

OPENPANGU = Family(
    name="openpangu",
    architecture="PanguEmbeddedForCausalLM",
    model_type="PanguEmbedded",
    # transformers then loads it as Llama, and vLLM as its own class of the architecture's name.
    export={"model_type": "llama", "attention_bias": True},
    neutral={"bias": (True,), "attention_bias": (True,), "mlp_bias": (False,), "pretraining_tp": (1,)},
    harmless=("auto_map",),  # the code that this table stands for
    outer_rules=OUTER_RULES,
    layer_rules=(*LAYER_RULES, *ATTENTION_BIAS),
)
