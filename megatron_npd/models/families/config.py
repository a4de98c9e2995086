"""How a Hugging Face directory's ``config.json`` becomes a checked ``ModelSpec``.

A key that may change the maths and is not in the tables is refused by name: no model is ever silently a different one.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_npd.errors import UserError
from megatron_npd.models.families.base import Experts, Family, ModelSpec
from megatron_npd.models.families.rope import parse_rope
from megatron_npd.models.families.values import ELSEWHERE, expect, is_size
from megatron_npd.weights import language_config, read_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
_READ = frozenset(
    [
        "architectures",
        "model_type",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        "layer_types",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "dtype",
        "torch_dtype",
    ]
).union(_SIZES)
_EXPERTS = ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
# Values under which a key of any family leaves the maths as it is.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
}
# transformers reads these, and whatever ends in _token_id, for other things than a forward pass, or not at all; the
# second part are settings of generation, which older releases wrote here.
_HARMLESS_KEYS = """
    transformers_version _name_or_path name_or_path _model_name_or_path _commit_hash initializer_range use_cache
    return_dict is_decoder
    tokenizer_class model_max_length output_attentions output_hidden_states chunk_size_feed_forward problem_type
    id2label label2id finetuning_task prefix task_specific_params gradient_checkpointing torchscript use_bfloat16
    tf_legacy_loss _attn_implementation _attn_implementation_autoset attn_implementation _flash_attn_2_enabled
    transformers.js_config is_llama_config unsloth_fixed unsloth_version

    max_length min_length do_sample early_stopping num_beams num_beam_groups num_return_sequences temperature top_k
    top_p typical_p diversity_penalty repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids suppress_tokens begin_suppress_tokens remove_invalid_values
    exponential_decay_length_penalty output_scores return_dict_in_generate
"""
_HARMLESS = frozenset(_HARMLESS_KEYS.split())


def load_spec(hf_dir: str | Path) -> ModelSpec:
    """Read and check ``config.json`` of a Hugging Face directory (weights are not looked at).

    Args:
        hf_dir: Directory with ``config.json``.

    Raises:
        UserError: The directory or file is missing or malformed, the architecture is not supported, or a key changes
            the maths (or might: an unknown one); the message names it.
    """
    from megatron_npd.models.families import FAMILIES  # the tables import this file

    path = Path(hf_dir)
    config_file = path / "config.json"
    config = read_config(path)
    names = config.get("architectures")
    supported = ", ".join(sorted(FAMILIES))
    if not isinstance(names, list) or len(names) != 1 or str(names[0]) not in FAMILIES:
        raise UserError(f"architectures in {config_file} must be one of {supported}, got {names}; {ELSEWHERE}")
    family = FAMILIES[names[0]]
    loadable = bool(family.export) and family.export.items() <= config.items()
    either = f"{family.model_type} (or with {json.dumps(family.export)})" if family.export else family.model_type
    expect(config.get("model_type") == family.model_type or loadable, config_file, "model_type", either, config)
    for key in _SIZES:
        expect(is_size(config.get(key)), config_file, key, "a positive integer", config)
    hf_config, config = config, {**family.defaults, **config}
    _check_keys(config, config_file, family)
    rules = [rules for key, rules in family.switches.items() if config.get(key)]
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kv_heads = heads if config.get("num_key_value_heads") is None else config["num_key_value_heads"]
    expect(
        is_size(kv_heads) and heads % kv_heads == 0,
        config_file,
        "num_key_value_heads",
        f"a divisor of num_attention_heads ({heads})",
        config,
    )
    head_dim = config.get("head_dim")
    if head_dim is None:
        expect(hidden % heads == 0, config_file, "hidden_size", f"a multiple of num_attention_heads ({heads})", config)
        head_dim = hidden // heads
    expect(is_size(head_dim) and head_dim % 2 == 0, config_file, "head_dim", "even", config)
    eps = config.get("rms_norm_eps", 0.0)
    expect(isinstance(eps, float) and 0 < eps < 1, config_file, "rms_norm_eps", "between 0 and 1", config)
    tied = config.get("tie_word_embeddings", False)
    expect(isinstance(tied, bool), config_file, "tie_word_embeddings", "true or false", config)
    experts = _parse_experts(config, config_file) if family.has_experts else None
    rope_theta, rope_scaling = parse_rope(config, config_file, family)
    return ModelSpec(
        path=str(path),
        family=family,
        architecture=family.architecture,
        layer_rules=(*family.layer_rules, *itertools.chain.from_iterable(rules)),
        hf_config=hf_config,
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_hidden_size=experts.per_token * experts.ffn_hidden_size if experts else config["intermediate_size"],
        experts=experts,
        vocab_size=config["vocab_size"],
        tied=tied,
        rms_norm_eps=eps,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=config["max_position_embeddings"],
        dtype=_parse_dtype(config, config_file),
    )


def load_sizes(hf_dir: str | Path) -> tuple[int, int]:
    """Vocabulary size and longest context, in tokens, of a model of any family, supported here or not.

    Raises:
        UserError: ``config.json`` is missing, malformed or does not give them.
    """
    path = Path(hf_dir)
    config = language_config(read_config(path))
    names = ("vocab_size", "max_position_embeddings")
    for name in names:
        expect(is_size(config.get(name)), path / "config.json", name, "a positive integer", config)
    return config[names[0]], config[names[1]]


def _check_keys(config: Mapping[str, Any], file: Path, family: Family) -> None:
    """Refuse, by name, each key whose value changes the maths and each key that nobody has looked at."""
    neutral = {**_NEUTRAL, **dict.fromkeys(family.switches, (True, False)), **family.neutral}
    known = _READ | _HARMLESS | set(family.harmless)
    known |= set(_EXPERTS) if family.has_experts else set()
    for key, value in config.items():
        if key in neutral:
            allowed = " or ".join(json.dumps(item) for item in neutral[key])
            # bool is compared by type: JSON's 1 is not true and 0 is not false.
            same = any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral[key])
            expect(same, file, key, f"{allowed} for {family.name} models", config, ELSEWHERE)
        elif key == "layer_types":
            full = ["full_attention"] * config["num_hidden_layers"]
            expect(value is None or value == full, file, key, "full_attention in every layer", config, ELSEWHERE)
        elif key == "sliding_window" and family.windowed:
            context = config["max_position_embeddings"]
            whole = value is None or (is_size(value) and value >= context)
            rule = f"null or at least max_position_embeddings ({context})"
            expect(whole, file, key, rule, config, f"{ELSEWHERE}; or lower max_position_embeddings to it")
        elif key not in known and not key.endswith("_token_id"):
            raise UserError(
                f"{file} must hold known keys only, got {key} = {json.dumps(value)[:200]}, which may change the maths "
                f"of a {family.name} model; remove the key if it does not ({ELSEWHERE})"
            )


def _parse_experts(config: Mapping[str, Any], file: Path) -> Experts:
    key = "num_experts" if "num_experts" in config else "num_local_experts"  # the latter in transformers 5
    number = config.get(key)
    for name in (key, "num_experts_per_tok", "moe_intermediate_size"):
        expect(is_size(config.get(name)), file, name, "a positive integer", config)
    expect(config.get("num_local_experts", number) == number, file, "num_local_experts", f"{number} too", config)
    per_token, width, normalised = (config[name] for name in _EXPERTS[2:])
    expect(per_token <= config[key], file, "num_experts_per_tok", f"at most {key} ({number})", config)
    expect(isinstance(normalised, bool), file, "norm_topk_prob", "true or false", config)
    # A single expert's probability would always be 1, and its router never learn.
    learns = per_token > 1 or not normalised
    expect(learns, file, "norm_topk_prob", "false with one expert per token", config, ELSEWHERE)
    return Experts(number=config[key], per_token=per_token, ffn_hidden_size=width, normalised=normalised)


def _parse_dtype(config: Mapping[str, Any], file: Path) -> torch.dtype:
    given = {str(config[key]) for key in ("dtype", "torch_dtype") if config.get(key) is not None}
    if len(given) > 1 or not given <= set(DTYPES):
        got = " and ".join(sorted(given))
        raise UserError(f"dtype in {file} must be one of {', '.join(DTYPES)}, got {got}; convert the weights")
    return DTYPES[given.pop()] if given else torch.float32
