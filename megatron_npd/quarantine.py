"""What a stage leaves out of its result, and why: lines of ``quarantine.jsonl``, counted by reason, and bounded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_npd.errors import UserError

QUARANTINE_FILE = "quarantine.jsonl"


def write_quarantine(directory: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write the entries, each with its ``reason`` and what it was, a line each."""
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (directory / QUARANTINE_FILE).write_text(lines, encoding="utf-8")


def in_words(reasons: Mapping[str, int]) -> str:
    """What was quarantined, by reason, as text; repeated records are no fault and stand apart."""
    faults = ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items()) if reason != "duplicate")
    merged = reasons.get("duplicate", 0)
    parts = (faults and f"quarantined: {faults}", merged and f"duplicates merged: {merged}")
    return "; ".join(part for part in parts if part) or "nothing quarantined"


def check_quarantined(reasons: Mapping[str, int], total: int, largest_share: float, where: str | Path) -> None:
    """Stop a stage that quarantines too much; repeated records are no fault and do not count.

    Args:
        reasons: What was quarantined, by reason.
        total: Of how many.
        largest_share: The share that may be.
        where: Names the input.

    Raises:
        UserError: More than that share was.
    """
    faults = {reason: count for reason, count in sorted(reasons.items()) if reason != "duplicate"}
    if (number := sum(faults.values())) > largest_share * total:
        listed = ", ".join(f"{count} {reason}" for reason, count in faults.items())
        raise UserError(
            f"{where} must be usable but for {100 * largest_share:g} %, got {number} of {total} quarantined "
            f"({listed}); mend the cause, or raise max_quarantined to go on without them"
        )
