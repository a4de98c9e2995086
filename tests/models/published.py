"""Published models as their ``config.json`` has them: the facts that decide whether and how a model is reproduced.

docs/models.md says of the same names what is taken; ``scaled_down`` makes a small model of each.
"""

from __future__ import annotations

from typing import Any

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_COMMON = {"hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
_COMMON |= {"torch_dtype": "bfloat16", "tie_word_embeddings": False}


def _config(architecture: str, model_type: str, sizes: str, **facts: Any) -> dict[str, Any]:
    """Sizes: hidden, MLP, layers, heads, key-value heads, vocabulary, context."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    numbers = dict(zip((*names, "vocab_size", "max_position_embeddings"), map(int, sizes.split()), strict=True))
    return _COMMON | {"architectures": [architecture], "model_type": model_type} | numbers | facts


def llama(sizes: str, theta: float | None = None, **facts: Any) -> dict[str, Any]:
    given = {"rms_norm_eps": 1e-5, "pretraining_tp": 1, "rope_scaling": None} | facts
    return _config("LlamaForCausalLM", "llama", sizes, **given, **({} if theta is None else {"rope_theta": theta}))


def qwen2(sizes: str, theta: float, window: int | None, **facts: Any) -> dict[str, Any]:
    given = {"rms_norm_eps": 1e-6, "sliding_window": window, "use_sliding_window": False, "max_window_layers": 21}
    return _config("Qwen2ForCausalLM", "qwen2", sizes, rope_theta=theta, **given, **facts)


def openpangu(sizes: str, theta: float, **facts: Any) -> dict[str, Any]:
    code = {"AutoModelForCausalLM": "modeling_openpangu_dense.PanguEmbeddedForCausalLM"}
    given = {"rms_norm_eps": 1e-5, "bias": True, "auto_map": code, "bos_token_id": 1, "eos_token_id": 45892}
    return _config("PanguEmbeddedForCausalLM", "PanguEmbedded", sizes, rope_theta=theta, **given, **facts)


def phi3(sizes: str, **facts: Any) -> dict[str, Any]:
    given = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "rms_norm_eps": 1e-5, "attention_bias": False, "rope_theta": 1e4}
    given |= {"original_max_position_embeddings": 4096} | facts
    return _config("Phi3ForCausalLM", "phi3", sizes, **given)


TIED = {"tie_word_embeddings": True}
NO_BIAS = {"attention_bias": False, "mlp_bias": False}
_LLAMA31_8B = "4096 14336 32 32 8 128256 131072"
_QWEN3 = {"rms_norm_eps": 1e-6, "attention_bias": False, "use_sliding_window": False, "sliding_window": None}
_QWEN3 |= {"head_dim": 128, "rope_theta": 1e6, "rope_scaling": None, "max_window_layers": 28}
_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
_EXPERTS |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False}
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
_DUAL_CHUNKS = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
_LONGROPE = {"type": "longrope", "long_factor": [1.5] * 48, "short_factor": [1.0] * 48}
_MISTRAL = {"rms_norm_eps": 1e-5}

ACCEPTED: dict[str, dict[str, Any]] = {
    "Llama-2-7b": llama("4096 11008 32 32 32 32000 4096", torch_dtype="float16"),
    "Meta-Llama-3-8B": llama("4096 14336 32 32 8 128256 8192", 5e5, attention_bias=False),
    "Llama-3.1-8B": llama(_LLAMA31_8B, 5e5, rope_scaling=LLAMA31, **NO_BIAS),
    "Llama-3.1-8B-Instruct": llama(_LLAMA31_8B, 5e5, rope_scaling=LLAMA31, eos_token_id=[128001, 128008], **NO_BIAS),
    "DeepSeek-R1-Distill-Llama-8B": llama(_LLAMA31_8B, 5e5, rope_scaling=LLAMA31, **NO_BIAS),
    "Llama-3.1-Minitron-4B-Width": llama(
        "3072 9216 32 32 8 128256 131072", 5e5, rope_scaling=LLAMA31, head_dim=128, **NO_BIAS
    ),
    "Llama-3.2-1B": llama(
        "2048 8192 16 32 8 128256 131072", 5e5, rope_scaling=LLAMA31 | {"factor": 32.0}, head_dim=64, **TIED, **NO_BIAS
    ),
    "SmolLM2-135M": llama("576 1536 30 9 3 49152 8192", 1e5, is_llama_config=True, rope_interleaved=False, **TIED),
    "SmolLM2-1.7B-Instruct": llama(
        "2048 8192 24 32 32 49152 8192", 130000, **TIED, **NO_BIAS, **{"transformers.js_config": {"dtype": "q4f16"}}
    ),
    "TinyLlama-1.1B-Chat": llama("2048 5632 22 32 4 32000 2048", 1e4, attention_bias=False),
    "Yi-1.5-6B": llama("4096 11008 32 32 4 64000 4096", 5e6, rms_norm_eps=1e-6, use_cache=False, pad_token_id=0),
    "deepseek-llm-7b": llama("4096 11008 30 32 32 102400 4096", 1e4, rms_norm_eps=1e-6),
    "deepseek-coder-1.3b": llama(
        "2048 5504 24 16 16 32256 16384", 1e5, rms_norm_eps=1e-6, rope_scaling={"factor": 4.0, "type": "linear"}
    ),
    "Mistral-7B-v0.3": _config(
        "MistralForCausalLM",
        "mistral",
        "4096 14336 32 32 8 32768 32768",
        rope_theta=1e6,
        sliding_window=None,
        **_MISTRAL,
    ),
    "Phi-4": phi3(
        "5120 17920 40 40 10 100352 16384",
        rope_theta=250000,
        original_max_position_embeddings=16384,
        sliding_window=None,
        auto_map={},
    ),
    "Qwen1.5-0.5B": qwen2("1024 2816 24 16 16 151936 32768", 1e6, 32768, **TIED),
    "Qwen2.5-0.5B": qwen2("896 4864 24 14 2 151936 32768", 1e6, 32768, use_mrope=False, **TIED),
    "Qwen2.5-0.5B-Instruct": qwen2("896 4864 24 14 2 151936 32768", 1e6, 32768, **TIED),
    "Qwen2.5-1.5B-Instruct": qwen2("1536 8960 28 12 2 151936 32768", 1e6, 32768, **TIED),
    "Qwen2.5-7B-Instruct": qwen2("3584 18944 28 28 4 152064 32768", 1e6, 131072),
    "Qwen2.5-7B-Instruct with yarn": qwen2("3584 18944 28 28 4 152064 32768", 1e6, 131072, rope_scaling=_YARN),
    "Qwen2.5-72B-Instruct": qwen2("8192 29568 80 64 8 152064 32768", 1e6, 131072),
    "Qwen2.5-Coder-1.5B": qwen2("1536 8960 28 12 2 151936 32768", 1e6, 131072, use_mrope=False, **TIED),
    "Qwen2.5-Math-7B": qwen2("3584 18944 28 28 4 152064 4096", 1e4, 4096, use_mrope=False),
    "DeepSeek-R1-Distill-Qwen-1.5B": qwen2("1536 8960 28 12 2 151936 131072", 1e4, 4096, use_mrope=False),
    "QwQ-32B": qwen2("5120 27648 64 40 8 152064 40960", 1e6, 32768),
    "Qwen3-0.6B": _config("Qwen3ForCausalLM", "qwen3", "1024 3072 28 16 8 151936 40960", **_QWEN3 | TIED),
    "Qwen3-30B-A3B": _config(
        "Qwen3MoeForCausalLM", "qwen3_moe", "2048 6144 48 32 4 151936 40960", **_QWEN3, **_EXPERTS
    ),
    "openPangu-Embedded-1B": openpangu("1536 6144 26 12 6 153376 32768", 4e6, **TIED),
    "openPangu-Embedded-7B": openpangu("4096 12800 34 32 8 153376 32768", 16e6),
}
# With the key that the refusal names.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "Mistral-7B-v0.1": (
        "sliding_window",
        _config(
            "MistralForCausalLM",
            "mistral",
            "4096 14336 32 32 8 32000 32768",
            rope_theta=1e4,
            sliding_window=4096,
            **_MISTRAL,
        ),
    ),
    "Qwen2.5-7B-Instruct-1M": (
        "dual_chunk_attention_config",
        qwen2("3584 18944 28 28 4 152064 1010000", 1e7, 32768, dual_chunk_attention_config=_DUAL_CHUNKS),
    ),
    "Phi-3-mini-4k": ("sliding_window", phi3("3072 8192 32 32 32 32064 4096", sliding_window=2047)),
    "Phi-3.5-mini": (
        "rope_type",
        phi3("3072 8192 32 32 32 32064 131072", sliding_window=262144, rope_scaling=_LONGROPE),
    ),
    "Phi-4-mini": (
        "partial_rotary_factor",
        phi3("3072 8192 32 24 8 200064 131072", sliding_window=262144, partial_rotary_factor=0.75, **TIED),
    ),
    "any of them quantised": (
        "quantization_config",
        llama(_LLAMA31_8B, 5e5, quantization_config={"bits": 4, "quant_method": "awq"}),
    ),
    "any of them with code": ("auto_map", llama(_LLAMA31_8B, 5e5, auto_map={"AutoModelForCausalLM": "modeling_x.X"})),
}


def scaled_down(config: dict[str, Any]) -> dict[str, Any]:
    """What makes a model small, with its proportions, its embedding and its biases as they are."""
    groups = min(config["num_key_value_heads"], 2)
    heads = config["num_attention_heads"] // config["num_key_value_heads"] * groups
    small: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": groups}
    own = config.get("head_dim", 0) * config["num_attention_heads"] != config["hidden_size"] and "head_dim" in config
    small |= {"hidden_size": heads * 16, "intermediate_size": 48, "vocab_size": 97, "max_position_embeddings": 128}
    small |= {"head_dim": 24 if own else 16}
    theta, scaling = config.get("rope_theta", 1e4), dict(config.get("rope_scaling") or {})
    if "original_max_position_embeddings" in scaling:
        scaling["original_max_position_embeddings"] = 32
    kind = scaling.pop("type", scaling.pop("rope_type", "default"))
    small["rope_parameters"] = scaling | {"rope_type": kind, "rope_theta": theta}
    if "num_experts" in config:
        small |= {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 24}
    kept = ("norm_topk_prob", "tie_word_embeddings", "attention_bias", "mlp_bias", "rms_norm_eps", "sliding_window")
    return small | {name: config[name] for name in kept if name in config}
