"""A YAML recipe read for its mistakes: syntax, unknown and repeated fields, each with file and line."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from difflib import get_close_matches
from pathlib import Path

import yaml

from megatron_npd.errors import UserError


def recipe_lines(path: str | Path, known: Collection[str], groups: Collection[str] = ()) -> dict[str, str]:
    """Where each field of a recipe stands: dotted name -> ``recipe.yaml line 3``.

    Args:
        path: The YAML file.
        known: Dotted names of the fields that there are.
        groups: Dotted names of the groups of fields.

    Raises:
        UserError: No such file, no YAML, a field that is unknown or stands there twice, or a group without fields.
    """
    try:
        text = Path(path).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config must be a YAML file, got {path} ({error}); check the path") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{path}{where} must be YAML, got: {problem}; mend the line") from error
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path} must hold fields as 'name: value', got {'a list or text' if root else 'nothing'}")
    lines: dict[str, str] = {}
    for name, line, value in _fields(root, ""):
        where = f"{path} line {line}"
        if name in groups:
            if not isinstance(value, yaml.MappingNode):
                raise UserError(f"{where}: {name} must hold fields, indented below it, got none; write them or drop it")
        elif name not in known:
            raise UserError(f"{where}: {name} is unknown{did_you_mean(name, {*known, *groups})}")
        if name in lines:
            raise UserError(f"{where}: {name} must be given once, got it at {lines[name]} too; keep one")
        lines[name] = where
    return lines


def did_you_mean(name: str, known: Collection[str], prefix: str = "") -> str:
    """``; did you mean train.lr?`` for a misspelt name or one without its group; empty where nothing is near."""
    last_parts = {item: item.rpartition(".")[2] for item in known}
    near = get_close_matches(name.rpartition(".")[2], set(last_parts.values()), 1)
    meant = get_close_matches(name, [item for item, last in last_parts.items() if last in near], 1, cutoff=0.0)
    return f"; did you mean {prefix}{meant[0]}?" if meant else ""


def _fields(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, int, yaml.Node]]:
    """Every field and group below a mapping; what ``<<`` merges in is left to the parser."""
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        name = f"{prefix}{key.value}"
        yield name, key.start_mark.line + 1, value
        if isinstance(value, yaml.MappingNode):
            yield from _fields(value, f"{name}.")
