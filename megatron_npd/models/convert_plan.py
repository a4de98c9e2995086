"""What a conversion would do, tensor by tensor, without doing it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_npd.models.convert import export_types, find_all, stored_type
from megatron_npd.models.dist_checkpoint import DistCheckpoint
from megatron_npd.models.families.config import load_spec
from megatron_npd.models.hf_checkpoint import open_checkpoint
from megatron_npd.models.mapping import Run, hf_shapes, parameter_rules, row_runs
from megatron_npd.paths import find_checkpoint

HEAD = ("Hugging Face tensor", "megatron-core parameter", "rows", "shape", "type")


def plan_to_megatron(hf_dir: str | Path, dtype: str = "") -> list[tuple[str, ...]]:
    """The lines of a table below ``HEAD`` for ``hf_to_megatron``; errors as there, but for numbers."""
    spec = load_spec(hf_dir)
    source = open_checkpoint(spec)
    to = stored_type(source, dtype)
    shapes, lines = hf_shapes(spec), {}
    for rule in parameter_rules(spec).values():
        for name in rule.hf:
            if name not in lines:  # else a tied output layer
                runs = [run for run in row_runs(rule, spec) if run.name == name]
                lines[name] = (name, rule.mcore, _rows(runs), _shape(shapes[name]), _types(source.dtypes[name], to))
    return list(lines.values())


def plan_to_hf(checkpoint_dir: str | Path, hf_dir: str | Path, dtype: str = "") -> list[tuple[str, ...]]:
    """The lines of a table below ``HEAD`` for ``megatron_to_hf``; errors as there, but for hashes and numbers."""
    spec = load_spec(hf_dir)
    places = find_all(DistCheckpoint.open(find_checkpoint(checkpoint_dir), verify=False), spec)
    shapes, dtypes = hf_shapes(spec), export_types(spec, dtype)
    return [
        (name, str(stored), _rows(runs), _shape(shapes[name]), _types(stored.dtype, dtypes[name]))
        for name, (stored, runs) in places.items()
    ]


def in_columns(lines: Iterable[tuple[str, ...]]) -> str:
    """A table as text."""
    rows = [HEAD, *lines]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    padded = (zip(row, widths, strict=True) for row in rows)
    return "\n".join("  ".join(cell.ljust(width) for cell, width in row).rstrip() for row in padded)


def _rows(runs: list[Run]) -> str:
    first = ", ".join(f"{run.target}:{run.target + run.rows}" for run in runs[:2])
    return first if len(runs) <= 2 else f"{first}, ... ({len(runs)} runs)"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _types(before: torch.dtype, after: torch.dtype) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in (before, after)]
    return names[0] if before == after else " -> ".join(names)
