"""What a model family is, and how a Hugging Face directory's ``config.json`` becomes a checked ``ModelSpec``.

A family is a table: which names its tensors have on either side and by which rule they correspond
(``models/mapping.py`` interprets the rules), and which configuration values the megatron-core model reproduces. A key
that may change the maths and is not in the tables is refused by name: no model is ever silently a different one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_npd.errors import UserError
from megatron_npd.weights import language_config, read_config

RuleKind = Literal["vocab", "qkv", "gate_up", "row", "replicated"]
Dim = Literal["vocab", "hidden", "head", "query", "kv", "ffn"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one megatron-core parameter is made of Hugging Face tensors.

    Attributes:
        mcore: Name of the megatron-core parameter; ``{i}`` stands for the layer's global index.
        hf: Names and dimensions of the Hugging Face tensors, in the order that the kind expects.
        kind: ``vocab`` (rows split over TP, padded), ``qkv`` (q, k, v interleaved by query group, rows split),
            ``gate_up`` (each rank holds its rows of gate, then its rows of up), ``row`` (columns split),
            ``replicated``.
    """

    mcore: str
    hf: Mapping[str, tuple[Dim, ...]]
    kind: RuleKind


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture as tables.

    Attributes:
        name: Short name, for messages.
        architecture: The entry in ``architectures`` of ``config.json``.
        model_type: Its ``model_type``.
        transformer_config: Fields of megatron-core's ``TransformerConfig`` that its models have beside the common ones
            (``models/build.py``).
        defaults: What transformers takes where ``config.json`` has no such key: num_key_value_heads (else
            num_attention_heads), head_dim (else hidden_size / num_attention_heads).
        rope_types: Kinds of rotary embedding that are reproduced.
        neutral: Keys that change the maths unless they have one of these values.
        harmless: Further keys that do not change the maths.
        outer_rules: Rules of the parameters outside the layers.
        layer_rules: Rules of one layer.
    """

    name: str
    architecture: str
    model_type: str
    transformer_config: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, int] = field(default_factory=dict)
    rope_types: tuple[str, ...]
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless: tuple[str, ...] = ()
    outer_rules: tuple[Rule, ...]
    layer_rules: tuple[Rule, ...]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The shape of one model, read from its ``config.json`` and checked.

    Attributes:
        path: The Hugging Face directory.
        family: Its family's tables.
        architecture: ``family.architecture``.
        hf_config: ``config.json`` as it stands.
        num_layers: Transformer layers.
        hidden_size: Width of the residual stream.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Size of a head.
        ffn_hidden_size: Width of the gated MLP.
        vocab_size: Rows of the embedding, without padding.
        tied: Whether the output layer is the embedding.
        rms_norm_eps: Epsilon of the norms.
        rope_theta: Base of the rotary embedding.
        rope_scaling: None for the plain rotary embedding, else its parameters with ``rope_type`` (``llama3``).
        max_position_embeddings: Context, in tokens.
        dtype: Type that the configuration gives the weights (float32 where it says nothing, as transformers has it).
    """

    path: str
    family: Family
    architecture: str
    hf_config: dict[str, Any]
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    tied: bool
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_position_embeddings: int
    dtype: torch.dtype

    def padded_vocab_size(self, tensor_parallel_size: int) -> int:
        """Rows of the embedding with the padding that ``tensor_parallel_size`` ranks need to own equal shares."""
        return -(-self.vocab_size // tensor_parallel_size) * tensor_parallel_size


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
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


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
        raise UserError(
            f"architectures in {config_file} must be one of {supported}, got {names}; this model is not supported"
        )
    family = FAMILIES[names[0]]
    _expect(config.get("model_type") == family.model_type, config_file, "model_type", family.model_type, config)
    for key in _SIZES:
        _expect(_is_size(config.get(key)), config_file, key, "a positive integer", config)
    _check_keys(config, config_file, family)

    hf_config, config = config, {**family.defaults, **config}
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kv_heads = heads if config.get("num_key_value_heads") is None else config["num_key_value_heads"]
    _expect(
        _is_size(kv_heads) and heads % kv_heads == 0,
        config_file,
        "num_key_value_heads",
        f"a divisor of num_attention_heads ({heads})",
        config,
    )
    head_dim = config.get("head_dim")
    if head_dim is None:
        _expect(hidden % heads == 0, config_file, "hidden_size", f"a multiple of num_attention_heads ({heads})", config)
        head_dim = hidden // heads
    _expect(_is_size(head_dim) and head_dim % 2 == 0, config_file, "head_dim", "even", config)
    eps = config.get("rms_norm_eps", 0.0)
    _expect(isinstance(eps, float) and 0 < eps < 1, config_file, "rms_norm_eps", "between 0 and 1", config)
    tied = config.get("tie_word_embeddings", False)
    _expect(isinstance(tied, bool), config_file, "tie_word_embeddings", "true or false", config)
    rope_theta, rope_scaling = _parse_rope(config, config_file, family)
    return ModelSpec(
        path=str(path),
        family=family,
        architecture=family.architecture,
        hf_config=hf_config,
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_hidden_size=config["intermediate_size"],
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
        _expect(_is_size(config.get(name)), path / "config.json", name, "a positive integer", config)
    return config[names[0]], config[names[1]]


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _expect(holds: bool, file: Path, key: str, rule: object, config: Mapping[str, Any]) -> None:
    if not holds:
        raise UserError(
            f"{key} in {file} must be {rule}, got {json.dumps(config.get(key))[:200]}; this model is not supported"
        )


def _check_keys(config: Mapping[str, Any], file: Path, family: Family) -> None:
    """Refuse, by name, each key whose value changes the maths and each key that nobody has looked at."""
    neutral = {**_NEUTRAL, **family.neutral}
    for key, value in config.items():
        if key in neutral:
            allowed = " or ".join(json.dumps(item) for item in neutral[key])
            # bool is compared by type: JSON's 1 is not true and 0 is not false.
            same = any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral[key])
            _expect(same, file, key, f"{allowed} for {family.name} models", config)
        elif key == "layer_types":
            full = ["full_attention"] * config["num_hidden_layers"]
            _expect(value is None or value == full, file, key, "full_attention in every layer", config)
        elif key not in _READ | _HARMLESS and key not in family.harmless and not key.endswith("_token_id"):
            raise UserError(
                f"{file} must hold known keys only, got {key} = {json.dumps(value)[:200]}, which may change the maths "
                f"of a {family.name} model; remove the key if it does not"
            )


def _parse_rope(config: Mapping[str, Any], file: Path, family: Family) -> tuple[float, dict[str, Any] | None]:
    """``rope_parameters`` (transformers 5) or ``rope_theta`` + ``rope_scaling`` -> theta and scaling or None."""
    found: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        given = config.get(key)
        if given is None:
            continue
        _expect(isinstance(given, dict), file, key, "an object or null", config)
        given = dict(given)
        if (older_name := given.pop("type", None)) is not None:
            given.setdefault("rope_type", older_name)  # transformers takes the newer one where both are there
        if any(found.get(name, value) != value for name, value in given.items()):
            raise UserError(
                f"rope_scaling and rope_parameters in {file} must agree, got {found} and {given}; keep one of them"
            )
        found.update(given)
    theta = found.pop("rope_theta", config.get("rope_theta"))
    if config.get("rope_theta", theta) != theta:
        raise UserError(
            f"rope_theta in {file} must agree with rope_parameters, got {config['rope_theta']} and {theta}; keep one"
        )
    theta = 10000.0 if theta is None else theta  # what transformers takes for either family
    if not _is_positive(theta):
        raise UserError(f"rope_theta in {file} must be a positive number, got {theta}; this model is not supported")
    kind = found.pop("rope_type", "default")
    if str(kind) not in family.rope_types:
        raise UserError(
            f"rope_type in {file} must be {' or '.join(family.rope_types)} for {family.name} models, got {kind}; this "
            "rotary embedding is not supported"
        )
    if found.get("partial_rotary_factor") in (1, None):
        found.pop("partial_rotary_factor", None)
    wanted = _LLAMA3_KEYS if kind == "llama3" else ()
    if sorted(found) != sorted(wanted) or not all(map(_is_positive, found.values())):
        raise UserError(
            f"rotary parameters of type {kind} in {file} must be the positive numbers {sorted(wanted)}, got {found}; "
            "this rotary embedding is not supported"
        )
    if wanted and found["low_freq_factor"] >= found["high_freq_factor"]:
        raise UserError(f"low_freq_factor in {file} must be below high_freq_factor, got {found}; restore the file")
    return float(theta), {"rope_type": kind, **found} if wanted else None


def _parse_dtype(config: Mapping[str, Any], file: Path) -> torch.dtype:
    given = {str(config[key]) for key in ("dtype", "torch_dtype") if config.get(key) is not None}
    if len(given) > 1 or not given <= set(DTYPES):
        got = " and ".join(sorted(given))
        raise UserError(f"dtype in {file} must be one of {', '.join(DTYPES)}, got {got}; convert the weights")
    return DTYPES[given.pop()] if given else torch.float32
