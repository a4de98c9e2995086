"""Checks of single values of a ``config.json``, and what their refusal says."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_npd.errors import UserError

ELSEWHERE = "a teacher of this kind runs with --annotate.backend vllm"


def is_size(value: Any) -> bool:
    """Whether a value is a positive integer that megatron-core takes for a size."""
    return type(value) is int and 0 < value < 2**31


def is_positive(value: Any) -> bool:
    """Whether a value is a positive finite number."""
    return type(value) in (int, float) and 0 < value < math.inf


def expect(
    holds: bool, file: Path, key: str, rule: object, config: Mapping[str, Any], remedy: str = "restore the file"
) -> None:
    """Raise UserError, which names the key and its value, unless something holds of them."""
    if not holds:
        raise UserError(f"{key} in {file} must be {rule}, got {json.dumps(config.get(key))[:200]}; {remedy}")
