"""A YAML recipe read for its mistakes: syntax, unknown and repeated fields, each with file and line."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

import yaml

from megatron_npd.errors import UserError

OR_NULL = " or null"  # ends the rule of a field that may be null
_NULL = "tag:yaml.org,2002:null"
_MERGE = "tag:yaml.org,2002:merge"


def recipe_lines(path: str | Path, known: Mapping[str, str], groups: Collection[str] = ()) -> dict[str, str]:
    """Where each field of a recipe stands: dotted name -> ``recipe.yaml line 3``.

    Args:
        path: The YAML file.
        known: Dotted names of the fields that there are, and what each must be.
        groups: Dotted names of the groups of fields.

    Raises:
        UserError: No such file, no YAML, a field that is unknown, stands there twice or is null, or a group without
            fields.
    """
    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        raise UserError(f"--config must be a YAML file, got {path} ({error}); check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be UTF-8, got: {error}; save it as UTF-8") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path} must hold fields as 'name: value', got {'a list or text' if root else 'nothing'}")
        return _checked_lines(path, root, known, groups)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{path}{where} must be YAML, got: {problem}; mend the line") from error
    except RecursionError as error:
        raise UserError(f"{path} must be YAML with a few levels, got far too many; mend its brackets") from error


def _checked_lines(
    path: str | Path, root: yaml.MappingNode, known: Mapping[str, str], groups: Collection[str]
) -> dict[str, str]:
    """``recipe_lines`` of what a file holds."""
    lines: dict[str, str] = {}
    for name, line, value, merged in _fields(root, ""):
        where = f"{path} line {line}"
        if value.tag not in yaml.SafeLoader.yaml_constructors:
            raise UserError(f"{where}: {name} must be plain YAML, got {value.tag}; write the value without a tag")
        if name in groups:
            if not isinstance(value, yaml.MappingNode):
                raise UserError(f"{where}: {name} must hold fields, indented below it, got none; write them or drop it")
        elif name not in known:
            raise UserError(f"{where}: {name} is unknown{did_you_mean(name, {*known, *groups})}")
        elif value.tag == _NULL and not known[name].endswith(OR_NULL):
            raise UserError(f"{where}: {name} must be {known[name]}, got null; write a value or drop the line")
        if name in lines and not merged:
            raise UserError(f"{where}: {name} must be given once, got it at {lines[name]} too; keep one")
        lines.setdefault(name, where)
    return lines


def did_you_mean(name: str, known: Collection[str], prefix: str = "") -> str:
    """``; did you mean train.lr?`` for a misspelt name or one without its group; empty where nothing is near."""
    last_parts = {item: item.rpartition(".")[2] for item in known}
    near = get_close_matches(name.rpartition(".")[2], set(last_parts.values()), 1)
    meant = get_close_matches(name, [item for item, last in last_parts.items() if last in near], 1, cutoff=0.0)
    return f"; did you mean {prefix}{meant[0]}?" if meant else ""


def _fields(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, int, yaml.Node, bool]]:
    """Every field and group below a mapping: name, line, value, and whether ``<<`` merges it in, with that one's line.

    Raises:
        yaml.MarkedYAMLError: A name is no text, or ``<<`` is given something else than fields.
    """
    own = {key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a name that is a list or has fields", problem_mark=key.start_mark)
        line = key.start_mark.line + 1
        if key.tag != _MERGE:
            yield f"{prefix}{key.value}", line, value, False
            if isinstance(value, yaml.MappingNode):
                yield from _fields(value, f"{prefix}{key.value}.")
            continue
        for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if not isinstance(part, yaml.MappingNode):
                raise yaml.MarkedYAMLError(problem="<< without fields to merge", problem_mark=key.start_mark)
            for name, _, item, _ in _fields(part, prefix):
                if name.removeprefix(prefix).partition(".")[0] not in own:  # what stands there itself goes before it
                    yield name, line, item, True
