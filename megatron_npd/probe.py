"""The tokens whose log-probabilities tell whether a policy is computed with rightly, and what its export knows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_npd.errors import UserError
from megatron_npd.manifest import is_sealed, read_manifest

PROBED = 16  # tokens
PROBE = "probe"  # in the manifest of a policy: ``ids``, ``logprobs`` (of all but the first) and ``dtype``


def probe_ids(vocab_size: int) -> list[int]:
    """The tokens: spread over the vocabulary, so that each rank that shares it has some."""
    return [index * vocab_size // PROBED for index in range(PROBED)]


def known_probe(policy_dir: str | Path) -> tuple[str, dict[str, Any]] | None:
    """The hash of a policy's weights, and what they give for the tokens, as its export computed it; None: not known.

    Raises:
        UserError: The directory's manifest is damaged, or what it says of the tokens is malformed.
    """
    if not is_sealed(policy_dir):
        return None
    about = read_manifest(policy_dir, verify=False).provenance
    weights, known = about.get("weights"), about.get(PROBE)
    if weights is None or known is None:
        return None
    parts = [known.get(name) for name in ("ids", "logprobs", "dtype")] if isinstance(known, dict) else []
    if not parts or not _numbers(parts[0], PROBED) or not _numbers(parts[1], PROBED - 1):
        raise UserError(
            f"the manifest of {policy_dir} must give the log-probabilities of {PROBED} tokens, got {str(known)[:200]}; "
            "export it again"
        )
    return str(weights), known


def _numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    )
