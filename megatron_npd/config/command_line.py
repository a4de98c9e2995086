"""The command line of a configuration: a frozen dataclass from a recipe and flags, and back to another process's flags.

A recipe is a YAML file of the fields of a class in ``config/``; any of them can be overridden by a flag, with dashes or
underscores (``--tensor-model-parallel-size 2``).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import sys
import typing
from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, set_parsing_settings

from megatron_npd.config.recipe_file import OR_NULL, did_you_mean, recipe_lines
from megatron_npd.errors import UserError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Config = TypeVar("Config")


def parse_config(cls: type[Config], argv: Sequence[str] | None = None, *, description: str = "") -> Config:
    """Build a frozen configuration from ``--config recipe.yaml`` and overriding flags.

    Args:
        cls: A dataclass of ``config/``, or a tool's own; its fields become flags, nested ones
            ``--train.lr``.
        argv: Arguments without the program name; default: the process's.
        description: First lines of ``--help``.

    Raises:
        UserError: A flag or field is unknown or of another type, a recipe is no YAML, or a field breaks its rule; one
            line, with the recipe's line where the recipe is the cause.
    """
    parser = ArgumentParser(description=description or cls.__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML recipe of the fields below; flags override it")
    parser.add_class_arguments(cls)
    arguments = _normalise(cls, list(sys.argv[1:] if argv is None else argv))
    rules = _rules(cls)
    groups = {name.rpartition(".")[0] for name in rules} - {""}
    flags = _checked_flags(arguments, parser, rules, groups)
    places: dict[str, str] = {}
    for path in _values(arguments, "config"):
        places |= recipe_lines(path, rules, groups)
    places = {name: place for name, place in places.items() if name not in flags}
    try:
        namespace = parser.instantiate(parser.parse_args(arguments))
        fields = {name: value for name, value in vars(namespace).items() if name != "config"}
        config = cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
    except argparse.ArgumentError as error:
        raise UserError(_in_words(str(error), rules, places)) from error
    except UserError as error:  # a rule of config.py, which names the field alone
        field = str(error).partition(" ")[0]
        found = [place for name, place in places.items() if name.rpartition(".")[2] == field]
        if len(found) != 1:
            raise
        raise UserError(f"{found[0]}: {error}") from error
    for name, rule in rules.items():
        value: Any = attrgetter(name)(config)
        for number in value if isinstance(value, tuple) else (value,):
            if number != number:  # every comparison with it is false, so that few rules would find it
                raise UserError(f"{_named(name, places)} must be {rule}, got {number}; write another number")
    return config


def command_flags(fields: Mapping[str, object]) -> list[str]:
    """The flags that give a flat configuration's fields to another process: ``--lr=0.001``."""
    return [
        f"--{name}={json.dumps(value) if isinstance(value, bool | tuple) else value}" for name, value in fields.items()
    ]


def _normalise(cls: type, argv: list[str]) -> list[str]:
    """Let flags be written as users write them.

    A first word that is no flag is the field that ``cls.POSITIONAL`` names. Dashes in names become underscores, bare
    boolean flags (``--bf16``) get their value, and lists need no brackets: their items stand apart or with commas
    (``--input a.jsonl b.parquet``, ``--urls=http://a,http://b``). Other values may begin with a dash (``-1e-3``).
    """
    hints = dict(_hints(cls))
    flags = {name for name, hint in hints.items() if hint is bool}
    if argv and not argv[0].startswith("-") and (positional := getattr(cls, "POSITIONAL", "")):
        argv = [f"--{positional}={argv[0]}", *argv[1:]]
    lists = {name: typing.get_args(hint)[0] is str for name, hint in hints.items() if typing.get_origin(hint) is tuple}
    result: list[str] = []
    name = ""
    items: list[str] | None = None  # of the list whose flag came last
    waiting = False  # for the value of the flag before, which is one, and no list
    for position, argument in enumerate(argv):
        if not argument.startswith("--"):
            if waiting:
                result[-1] += f"={argument}"
                waiting = False
            elif items is None:
                result.append(argument)
            else:
                items.append(argument)
                result[-1] = f"--{name}={_list(items, texts=lists[name])}"
            continue
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        items = ([value] if equals else []) if name in lists else None
        result.append(f"--{name}={_list(items, texts=lists[name])}" if items else f"--{name}{equals}{value}")
        waiting = name in hints and name not in flags and name not in lists and not equals
        following = argv[position + 1].lower() if position + 1 < len(argv) else ""
        if name in flags and not equals and following not in ("true", "false"):
            result.append("true")
    return result


def _list(items: Sequence[str], *, texts: bool) -> str:
    """A list as YAML reads it; in one of texts, 2 is a text too. One with quotes in it stands for itself."""
    if items[0].startswith("[") and any(mark in item for item in items for mark in "\"'"):
        return " ".join(items)
    parts = [part.strip() for item in items for part in item.strip("[]").split(",") if part.strip()]
    return json.dumps(parts) if texts else f"[{','.join(parts)}]"


def _checked_flags(
    argv: Sequence[str], parser: argparse.ArgumentParser, rules: Mapping[str, str], groups: Collection[str]
) -> list[str]:
    """Names of the flags that are given, without their dashes.

    The parser must know all of them by their full names; a group is given by its fields, and a list once: the parser
    would take the last in silence.
    """
    known = [option[2:] for option in parser._option_string_actions if option.startswith("--")]
    given = [argument[2:].partition("=")[0] for argument in argv if argument.startswith("--")]
    for name in given:
        if name not in known:
            guess = did_you_mean(name, set(known) - {"help"}, "--")
            raise UserError(f"unknown option --{name}{guess} ({sys.argv[0]} --help lists all)")
        if name in groups:
            raise UserError(f"--{name} must be given by its fields (--{name}.NAME), got it whole; name the field")
        if rules.get(name, "").startswith("a list") and given.count(name) > 1:
            times = f"{given.count(name)} times"
            raise UserError(f"--{name} must be given once, with all its items, got it {times}; join them")
    return given


def _values(argv: Sequence[str], name: str) -> list[str]:
    """What a flag is given, each time it is."""
    values = [argument.partition("=")[2] for argument in argv if argument.startswith(f"--{name}=")]
    return values + [value for flag, value in itertools.pairwise(argv) if flag == f"--{name}"]


def _rules(cls: type) -> dict[str, str]:
    """Dotted name of each field and what it must be."""
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    rules = {}
    for name, hint in _hints(cls):
        origin, choices = typing.get_origin(hint), typing.get_args(hint)
        if origin is typing.Literal:
            rules[name] = f"one of {', '.join(choices)}"
        elif origin is tuple:
            rules[name] = "a list of texts, numbers in quotes" if choices[0] is str else "a list of numbers"
        else:
            rules[name] = f"{words[choices[0]]}{OR_NULL}" if choices else words[hint]  # "float | None"
    return rules


def _in_words(message: str, rules: Mapping[str, str], places: Mapping[str, str]) -> str:
    """What a parser says, as one line of ours."""
    remedy = f"{sys.argv[0]} --help explains it"
    refused = r"(?:Expected a .*Got value|Does not validate against any .*Given value): (.*)"
    if match := re.match(rf'Parser key "([\w.]+)":\s+{refused}', message, re.DOTALL):
        name, value = match.groups()
        return f"{_named(name, places)} must be {rules[name]}, got {' '.join(value.split())}; {remedy}"
    if match := re.match(r"argument (--[\w.-]+)[^:]*: expected one argument", message):
        return f"{match[1]} must have a value, got none; {remedy}"
    if match := re.match(r"the following arguments are required: (.*)", message):
        names = ", ".join(f"--{name}" if name in rules else name for name in match[1].split(", "))
        return f"{names} must be given, got no value; {remedy}"
    if match := re.match(r"unrecognized arguments: (.*)", message):
        return f"arguments must be flags with their values, got {match[1]}; {sys.argv[0]} --help lists all"
    return f"{' '.join(message.split())}; {remedy}"


def _named(name: str, places: Mapping[str, str]) -> str:
    """A field as its recipe's line has it, else as a flag."""
    return f"{places[name]}: {name}" if name in places else f"--{name}"


def _hints(cls: type, prefix: str = "") -> typing.Iterator[tuple[str, typing.Any]]:
    """Dotted name and type of each field, those of nested configurations included."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _hints(typing.cast(type, hints[item.name]), f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, hints[item.name]
