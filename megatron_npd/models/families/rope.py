"""Rotary embeddings: what ``config.json`` says of them, and their frequencies as transformers computes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_npd.errors import UserError
from megatron_npd.models.families.base import Family, ModelSpec
from megatron_npd.models.families.values import ELSEWHERE, expect, is_positive

# What each kind must be given, and what it may be; transformers' ROPE_INIT_FUNCTIONS read these.
_KEYS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset(["factor"]), frozenset()),
    "llama3": (
        frozenset(["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]),
        frozenset(),
    ),
    "yarn": (
        frozenset(["factor", "original_max_position_embeddings"]),
        frozenset(["attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"]),
    ),
}
_OTHER_VALUES: Mapping[str, Callable[[Any], bool]] = {"truncate": lambda value: isinstance(value, bool)}


def parse_rope(config: Mapping[str, Any], file: Path, family: Family) -> tuple[float, dict[str, Any] | None]:
    """``rope_parameters`` (transformers 5) or ``rope_theta`` + ``rope_scaling`` -> theta, and scaling or None.

    Args:
        config: ``config.json``, whose max_position_embeddings has been checked.
        file: Where it lies, for messages.
        family: What the model is.

    Raises:
        UserError: Two spellings differ, or the embedding is not reproduced.
    """
    found = _spellings(config, file)
    theta = found.pop("rope_theta", config.get("rope_theta"))
    if config.get("rope_theta", theta) != theta:
        raise UserError(
            f"rope_theta in {file} must agree with rope_parameters, got {config['rope_theta']} and {theta}; keep one"
        )
    theta = 10000.0 if theta is None else theta  # what transformers takes for every family
    if not is_positive(theta):
        raise UserError(f"rope_theta in {file} must be a positive number, got {theta}; restore the file")
    kind = found.pop("rope_type", "default")
    if str(kind) not in family.rope_types:
        raise UserError(
            f"rope_type in {file} must be {' or '.join(family.rope_types)} for {family.name} models, got {kind}; "
            f"{ELSEWHERE}"
        )
    if found.get("partial_rotary_factor") in (1, None):
        found.pop("partial_rotary_factor", None)
    required, optional = _KEYS[kind]
    if "original_max_position_embeddings" in required:
        found.setdefault("original_max_position_embeddings", config["max_position_embeddings"])  # as transformers
    found = {name: value for name, value in found.items() if name not in optional or value is not None}
    fit = all(_OTHER_VALUES.get(name, is_positive)(value) for name, value in found.items())
    if not (required <= found.keys() <= required | optional and fit):
        may = f" and may have {sorted(optional)}" if optional else ""
        raise UserError(
            f"rotary parameters of type {kind} in {file} must be the positive numbers {sorted(required)}{may}, got "
            f"{found}; {ELSEWHERE}"
        )
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if low in found and high in found and found[low] >= found[high]:
            raise UserError(f"{low} in {file} must be below {high}, got {found}; restore the file")
    return float(theta), {"rope_type": kind, **found} if kind != "default" else None


def _spellings(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What the old key and the new one say together."""
    found: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        given = config.get(key)
        if given is None:
            continue
        expect(isinstance(given, dict), file, key, "an object or null", config)
        given = dict(given)
        if (older_name := given.pop("type", None)) is not None:
            given.setdefault("rope_type", older_name)  # transformers takes the newer one where both are there
        if any(found.get(name, value) != value for name, value in given.items()):
            raise UserError(
                f"rope_scaling and rope_parameters in {file} must agree, got {found} and {given}; keep one of them"
            )
        found.update(given)
    return found


def inverse_frequencies(spec: ModelSpec) -> tuple[Tensor, float]:
    """float32 [head_dim / 2] and the factor on cos and sin."""
    if spec.rope_scaling is None:
        exponents = torch.arange(0, spec.head_dim, 2).float() / spec.head_dim
        return 1.0 / spec.rope_theta**exponents, 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = SimpleNamespace(
        rope_parameters={"rope_theta": spec.rope_theta, **spec.rope_scaling},
        head_dim=spec.head_dim,
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_heads,
        max_position_embeddings=spec.max_position_embeddings,
        standardize_rope_params=lambda: None,
    )
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[spec.rope_scaling["rope_type"]](config, torch.device("cpu"))
    return inv_freq.float(), scaling
