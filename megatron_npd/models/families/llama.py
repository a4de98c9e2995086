"""Llama 2 and 3, and models of its form (SmolLM2, TinyLlama, Yi): with biases where the configuration says so."""

from __future__ import annotations

from megatron_npd.models.families.base import Family, Rule

OUTER_RULES = (
    Rule(mcore="embedding.word_embeddings.weight", hf={"model.embed_tokens.weight": ("vocab", "hidden")}, kind="vocab"),
    Rule(mcore="decoder.final_layernorm.weight", hf={"model.norm.weight": ("hidden",)}, kind="replicated"),
    Rule(mcore="output_layer.weight", hf={"lm_head.weight": ("vocab", "hidden")}, kind="vocab"),
)
_MCORE, _HF = "decoder.layers.{i}", "model.layers.{i}"
LAYER_RULES = (
    Rule(
        mcore=f"{_MCORE}.input_layernorm.weight", hf={f"{_HF}.input_layernorm.weight": ("hidden",)}, kind="replicated"
    ),
    Rule(
        mcore=f"{_MCORE}.self_attention.linear_qkv.weight",
        hf={
            f"{_HF}.self_attn.q_proj.weight": ("query", "hidden"),
            f"{_HF}.self_attn.k_proj.weight": ("kv", "hidden"),
            f"{_HF}.self_attn.v_proj.weight": ("kv", "hidden"),
        },
        kind="qkv",
    ),
    Rule(
        mcore=f"{_MCORE}.self_attention.linear_proj.weight",
        hf={f"{_HF}.self_attn.o_proj.weight": ("hidden", "query")},
        kind="row",
    ),
    Rule(
        mcore=f"{_MCORE}.pre_mlp_layernorm.weight",
        hf={f"{_HF}.post_attention_layernorm.weight": ("hidden",)},
        kind="replicated",
    ),
    Rule(
        mcore=f"{_MCORE}.mlp.linear_fc1.weight",
        hf={f"{_HF}.mlp.gate_proj.weight": ("ffn", "hidden"), f"{_HF}.mlp.up_proj.weight": ("ffn", "hidden")},
        kind="gate_up",
    ),
    Rule(mcore=f"{_MCORE}.mlp.linear_fc2.weight", hf={f"{_HF}.mlp.down_proj.weight": ("hidden", "ffn")}, kind="row"),
)
QKV_BIAS = Rule(
    mcore=f"{_MCORE}.self_attention.linear_qkv.bias",
    hf={
        f"{_HF}.self_attn.q_proj.bias": ("query",),
        f"{_HF}.self_attn.k_proj.bias": ("kv",),
        f"{_HF}.self_attn.v_proj.bias": ("kv",),
    },
    kind="qkv",
)
ATTENTION_BIAS = (
    QKV_BIAS,
    Rule(
        mcore=f"{_MCORE}.self_attention.linear_proj.bias",
        hf={f"{_HF}.self_attn.o_proj.bias": ("hidden",)},
        kind="replicated",
    ),
)
_MLP_BIAS = (
    Rule(
        mcore=f"{_MCORE}.mlp.linear_fc1.bias",
        hf={f"{_HF}.mlp.gate_proj.bias": ("ffn",), f"{_HF}.mlp.up_proj.bias": ("ffn",)},
        kind="gate_up",
    ),
    Rule(mcore=f"{_MCORE}.mlp.linear_fc2.bias", hf={f"{_HF}.mlp.down_proj.bias": ("hidden",)}, kind="replicated"),
)

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    switches={"attention_bias": ATTENTION_BIAS, "mlp_bias": _MLP_BIAS},
    neutral={"pretraining_tp": (1,)},
    outer_rules=OUTER_RULES,
    layer_rules=LAYER_RULES,
)
