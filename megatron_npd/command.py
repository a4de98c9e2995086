"""The command line of a configuration: a frozen dataclass from a recipe and flags, and back to another process's flags.

A recipe is a YAML file of the fields of ``config.py``; any of them can be overridden by a flag, with dashes or
underscores (``--tensor-model-parallel-size 2``).
"""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import TypeVar

from jsonargparse import ArgumentParser, set_parsing_settings

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Config = TypeVar("Config")


def parse_config(cls: type[Config], argv: Sequence[str] | None = None, *, description: str = "") -> Config:
    """Build a frozen configuration from ``--config recipe.yaml`` and overriding flags.

    Args:
        cls: A dataclass of ``config.py``, or a tool's own; its fields become flags, nested ones ``--train.lr``.
        argv: Arguments without the program name; default: the process's.
        description: First lines of ``--help``.

    Raises:
        UserError: A field breaks its rule.
    """
    parser = ArgumentParser(description=description or cls.__doc__, exit_on_error=True)
    parser.add_argument("--config", action="config", help="YAML recipe of the fields below; flags override it")
    parser.add_class_arguments(cls)
    arguments = _normalise(cls, list(sys.argv[1:] if argv is None else argv))
    namespace = parser.instantiate(parser.parse_args(arguments))
    fields = {name: value for name, value in vars(namespace).items() if name != "config"}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def command_flags(fields: Mapping[str, object]) -> list[str]:
    """The flags that give a flat configuration's fields to another process: ``--lr=0.001``."""
    return [
        f"--{name}={json.dumps(value) if isinstance(value, bool | tuple) else value}" for name, value in fields.items()
    ]


def _normalise(cls: type, argv: list[str]) -> list[str]:
    """Let flags be written as users write them.

    Dashes in names become underscores, bare boolean flags (``--bf16``) get their value, and lists need no brackets
    (``--urls http://a,http://b``).
    """
    flags = set(_fields_of(cls, bool))
    lists = {*_fields_of(cls, tuple[str, ...]), *_fields_of(cls, tuple[float, ...])}
    result: list[str] = []
    in_list = False
    for position, argument in enumerate(argv):
        if not argument.startswith("--"):
            result.append(f"[{argument}]" if in_list and not argument.startswith("[") else argument)
            in_list = False
            continue
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        in_list = name in lists and not equals
        if name in lists and equals and not value.startswith("["):
            value = f"[{value}]"
        result.append(f"--{name}{equals}{value}")
        following = argv[position + 1].lower() if position + 1 < len(argv) else ""
        if name in flags and not equals and following not in ("true", "false"):
            result.append("true")
    return result


def _fields_of(cls: type, wanted: object, prefix: str = "") -> typing.Iterator[str]:
    """Dotted names of the fields of one type, nested configurations included."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if hints[item.name] == wanted:
            yield prefix + item.name
        elif dataclasses.is_dataclass(hints[item.name]):
            yield from _fields_of(typing.cast(type, hints[item.name]), wanted, f"{prefix}{item.name}.")
