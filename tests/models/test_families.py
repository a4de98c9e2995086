"""config.json -> ModelSpec: what is read, both spellings, and what is refused by name."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from megatron_npd.errors import UserError
from megatron_npd.models.families import FAMILIES, load_spec
from megatron_npd.models.families.config import load_sizes
from tests.helpers import present

# As published (transformers 4): Qwen2.5-7B-Instruct, Llama-3.2-1B, Qwen3-0.6B, Mistral-7B-v0.3, Phi-4, ...
QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
LLAMA32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
    "vocab_size": 32768,
}
QWEN3_30B = QWEN3_06B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}
PHI4 = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {},
    "bos_token_id": 100257,
    "embd_pdrop": 0.0,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 17920,
    "max_position_embeddings": 16384,
    "model_type": "phi3",
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 10,
    "original_max_position_embeddings": 16384,
    "pad_token_id": 100257,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 250000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.47.0",
    "use_cache": True,
    "vocab_size": 100352,
}
_PANGU_CODE = "modeling_openpangu_dense.PanguEmbedded"
PANGU_1B = {
    "architectures": ["PanguEmbeddedForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig",
        "AutoModel": f"{_PANGU_CODE}Model",
        "AutoModelForCausalLM": f"{_PANGU_CODE}ForCausalLM",
    },
    "bias": True,
    "bos_token_id": 1,
    "eos_token_id": 45892,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 32768,
    "model_type": "PanguEmbedded",
    "num_attention_heads": 12,
    "num_hidden_layers": 26,
    "num_key_value_heads": 6,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 4000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.53.2",
    "use_cache": True,
    "vocab_size": 153376,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2": QWEN25_7B,
    "llama": LLAMA32_1B,
    "qwen3": QWEN3_06B,
    "mistral": MISTRAL_7B,
    "openpangu": PANGU_1B,
    "phi3": PHI4,
    "qwen3_moe": QWEN3_30B,
}
LLAMA3_SCALING = LLAMA32_1B["rope_scaling"]
DROP = object()


def write(path: Path, config: object) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_published_qwen25_config(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, QWEN25_7B))
    assert spec.family is FAMILIES["Qwen2ForCausalLM"]
    assert (spec.num_layers, spec.hidden_size, spec.ffn_hidden_size, spec.vocab_size) == (28, 3584, 18944, 152064)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (28, 4, 128)
    assert (spec.tied, spec.dtype) == (False, torch.bfloat16)
    assert (spec.rope_theta, spec.rope_scaling, spec.rms_norm_eps) == (1e6, None, 1e-6)
    assert spec.max_position_embeddings == 32768
    assert spec.hf_config == QWEN25_7B


def test_published_llama32_config(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, LLAMA32_1B))
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (32, 8, 64)
    assert (spec.tied, spec.rope_theta) == (True, 5e5)
    assert spec.rope_scaling == LLAMA3_SCALING


def loadable(config: dict[str, Any]) -> dict[str, Any]:
    """A published configuration as transformers loads it without code that comes along."""
    export = FAMILIES[config["architectures"][0]].export
    return {key: value for key, value in {**config, **export}.items() if key != "auto_map"}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_config_json_leaves_out_is_what_transformers_takes(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    given = loadable(PUBLISHED[family.name]) | {"num_attention_heads": 32, "hidden_size": 4096}
    write(tmp_path, {key: value for key, value in given.items() if key not in ("head_dim", "num_key_value_heads")})
    spec, theirs = load_spec(tmp_path), AutoConfig.from_pretrained(tmp_path)
    head_dim = getattr(theirs, "head_dim", None) or 4096 // 32
    assert (spec.num_kv_heads, spec.head_dim) == (theirs.num_key_value_heads, head_dim)


def test_a_published_configuration_stands_here_for_each_family() -> None:
    assert set(PUBLISHED) == {family.name for family in FAMILIES.values()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_spelling_of_transformers_5_gives_the_same_spec(tmp_path: Path, name: str) -> None:
    old = loadable(PUBLISHED[name])
    before = load_spec(write(tmp_path, old))
    new_dir = tmp_path / "new"
    AutoConfig.from_pretrained(tmp_path).save_pretrained(new_dir)
    written = json.loads((new_dir / "config.json").read_text())
    assert "rope_parameters" in written and "dtype" in written  # else this test compares a file with itself
    after = load_spec(new_dir)
    for name in set(vars(before)) - {"path", "hf_config"}:
        assert getattr(before, name) == getattr(after, name), name


def test_openpangu_is_taken_as_published_and_exported_without_its_code(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, PANGU_1B))
    assert spec.has("self_attention.linear_qkv.bias") and spec.has("self_attention.linear_proj.bias")
    exported = load_spec(write(tmp_path, spec.export_config()))
    assert exported.export_config() == exported.hf_config == loadable(PANGU_1B)
    assert exported.layer_rules == spec.layer_rules
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, LlamaConfig) and theirs.attention_bias
    with pytest.raises(UserError, match="attention_bias"):
        load_spec(write(tmp_path, exported.hf_config | {"attention_bias": False}))


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_rope_types_the_newer_spelling_holds(tmp_path: Path, order: int) -> None:
    """As transformers has it, in either order of the keys."""
    scaling = dict(list({**LLAMA3_SCALING, "type": "linear"}.items())[::order])
    spec = load_spec(write(tmp_path, LLAMA32_1B | {"rope_scaling": scaling, "unk_token_id": 0}))
    assert spec.rope_scaling == LLAMA3_SCALING
    assert present(LlamaConfig.from_pretrained(tmp_path).rope_parameters)["rope_type"] == "llama3"


def test_padding_is_to_a_multiple_of_tp_only(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, QWEN25_7B | {"vocab_size": 301}))
    assert [spec.padded_vocab_size(size) for size in (1, 2, 4, 7)] == [301, 302, 304, 301]


@pytest.mark.parametrize(
    ("base", "changes", "named"),
    [
        (QWEN25_7B, {"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequenceClassification"),
        (LLAMA32_1B, {"architectures": ["PanguEmbeddedForCausalLM"]}, "model_type"),
        (PANGU_1B, {"bias": False}, "bias"),
        (QWEN3_30B, {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        (QWEN3_30B, {"mlp_only_layers": [0]}, "mlp_only_layers"),
        (QWEN3_30B, {"num_experts_per_tok": 129}, "num_experts_per_tok"),
        (QWEN3_30B, {"num_experts_per_tok": 1}, "norm_topk_prob"),
        (QWEN3_30B, {"num_experts": DROP}, "num_local_experts"),
        (QWEN3_30B, {"num_local_experts": 64}, "num_local_experts"),
        (QWEN3_30B, {"moe_intermediate_size": "768"}, "moe_intermediate_size"),
        (QWEN25_7B, {"architectures": DROP}, "architectures"),
        (QWEN25_7B, {"model_type": "qwen3"}, "model_type"),
        (QWEN25_7B, {"use_sliding_window": True}, "use_sliding_window"),
        (QWEN25_7B, {"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "layer_types"),
        (QWEN25_7B, {"hidden_act": "gelu"}, "hidden_act"),
        (QWEN25_7B, {"attention_dropout": 0.1}, "attention_dropout"),
        (QWEN25_7B, {"attention_bias": True}, "attention_bias"),
        (LLAMA32_1B, {"attention_bias": 1}, "attention_bias"),
        (LLAMA32_1B, {"mlp_bias": None}, "mlp_bias"),
        (LLAMA32_1B, {"pretraining_tp": 2}, "pretraining_tp"),
        (LLAMA32_1B, {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        (LLAMA32_1B, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        (LLAMA32_1B, {"rope_scaling": {"type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        (LLAMA32_1B, {"rope_scaling": LLAMA3_SCALING | {"attention_factor": 2.0}}, "attention_factor"),
        (LLAMA32_1B, {"rope_parameters": LLAMA3_SCALING | {"factor": 8.0}}, "rope_parameters"),
        (LLAMA32_1B, {"rope_parameters": LLAMA3_SCALING | {"rope_theta": 1e4}}, "rope_theta"),
        (QWEN25_7B, {"rope_scaling": {"type": "yarn"}}, "factor"),
        (QWEN25_7B, {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": 1}}, "truncate"),
        (QWEN25_7B, {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 2}}, "beta_slow"),
        (MISTRAL_7B, {"sliding_window": 4096}, "sliding_window"),
        (MISTRAL_7B, {"sliding_window": DROP}, "sliding_window"),
        (MISTRAL_7B, {"sliding_window": 32767.5}, "sliding_window"),
        (PHI4, {"sliding_window": 2047}, "sliding_window"),
        (PHI4, {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}, "longrope"),
        (PHI4, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),  # transformers would take it for longrope
        (PHI4, {"partial_rotary_factor": 0.75}, "partial_rotary_factor"),
        (PHI4, {"resid_pdrop": 0.1}, "resid_pdrop"),
        (PHI4, {"attention_bias": True}, "attention_bias"),
        (PHI4, {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}}, "auto_map"),
        (QWEN25_7B, {"dual_chunk_attention_config": {}}, "dual_chunk_attention_config.*annotate.backend vllm"),
        (QWEN25_7B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (QWEN25_7B, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (QWEN25_7B, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (QWEN25_7B, {"logit_scale": 0.5}, "logit_scale"),
        (QWEN25_7B, {"hidden_size": DROP}, "hidden_size"),
        (QWEN25_7B, {"num_hidden_layers": "28"}, "num_hidden_layers"),
        (QWEN25_7B, {"num_key_value_heads": 5}, "num_key_value_heads"),
        (QWEN25_7B, {"hidden_size": 3585}, "hidden_size"),
        (QWEN25_7B, {"head_dim": 33}, "head_dim"),
        (QWEN25_7B, {"rms_norm_eps": DROP}, "rms_norm_eps"),
        (QWEN25_7B, {"torch_dtype": "int8"}, "int8"),
    ],
)
def test_what_changes_the_maths_is_refused_by_name(tmp_path: Path, base: dict, changes: dict, named: str) -> None:
    config = {name: value for name, value in (base | changes).items() if value is not DROP}
    with pytest.raises(UserError, match=named):
        load_spec(write(tmp_path, config))


@pytest.mark.parametrize(
    "changes",
    [
        {"unk_token_id": 0, "mask_token_id": None, "pad_token_id": [1], "image_token_id": 7},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096, "repetition_penalty": 1.0},
        {"pruned_heads": {}, "tie_encoder_decoder": False, "use_bfloat16": False, "_commit_hash": None},
    ],
)
def test_keys_that_no_forward_pass_reads_are_passed_over(tmp_path: Path, changes: dict) -> None:
    plain = load_spec(write(tmp_path, LLAMA32_1B))
    spec = load_spec(write(tmp_path, LLAMA32_1B | changes))
    assert all(getattr(spec, name) == getattr(plain, name) for name in set(vars(plain)) - {"hf_config"})


WRONG = [None, "x", "", [], [[]], [{}], {}, {"a": 1}, {"rope_type": []}, {"type": {}}, {"rope_theta": "x"}, -1, 0, 3.5]
WRONG += [float("nan"), float("inf"), 2**70, True, LLAMA3_SCALING | {"factor": None}, LLAMA3_SCALING | {"factor": 0}]


@pytest.mark.parametrize("base", PUBLISHED.values(), ids=PUBLISHED)
def test_a_wrong_value_of_any_key_is_refused_in_words_or_harmless(tmp_path: Path, base: dict) -> None:
    keys = {*base, "dtype", "head_dim", "layer_types", "rope_scaling", "rope_parameters", "text_config"}
    for key in sorted(keys):
        for value in WRONG:
            write(tmp_path, base | {key: value})
            for load in (load_spec, load_sizes):
                with suppress(UserError):
                    load(tmp_path)
    for key in ("hidden_size", "vocab_size", "num_key_value_heads", "rope_theta", "head_dim", "rms_norm_eps"):
        for value in WRONG[1:]:
            if key != "rope_theta" or value not in (3.5, 2**70):
                with pytest.raises(UserError, match="must"):
                    load_spec(write(tmp_path, base | {key: value}))


def test_config_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        load_spec(tmp_path)
    for text in ("{", "", "[" * 10000, '{"a":'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="must be JSON"):
            load_spec(tmp_path)
    write(tmp_path, [])
    with pytest.raises(UserError, match="JSON object"):
        load_spec(tmp_path)
