"""Marks in the parts of a conversation, which nobody can guess: a part is written where its mark is.

A text gets a word at its end, a number becomes another number. ``true``, ``false`` and ``null`` cannot be marked: they
must follow the mark before them.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

_OF_CALLS = ("id", "type", "index")  # what servers number and templates leave out
# Words of JSON Schema that templates translate, match with names, or leave out because they say nothing of their own.
_WORDS = ("type", "required", "title", "$ref", "$schema", "$id", "$comment")
_VALUES = ("enum", "const", "default", "examples", "example")
_LITERALS = {True: r"\btrue\b", False: r"\bfalse\b", None: r"\b(null|none)\b"}


class Marks:
    """The marks of one rendering.

    Args:
        nonce: What no user's text holds, of letters and digits.
    """

    def __init__(self, nonce: str) -> None:
        self._nonce = nonce
        self._first = 10**14 + secrets.randbelow(8 * 10**14)  # 15 digits, which floats hold, too
        self._where: dict[str, str] = {}
        self._numbers: dict[str, str] = {}  # mark -> the number as JSON
        self._literals: list[tuple[str, str, str]] = []  # the mark before, what follows it, where

    def lost(self, text: str) -> str:
        """Where the first part stands that a text of the template does not hold; "" where it holds all."""
        if missing := next((where for mark, where in self._where.items() if mark not in text), ""):
            return missing
        for mark, literal, where in self._literals:
            if not re.search(literal, text.partition(mark)[2].split(self._nonce, 1)[0], re.IGNORECASE):
                return where
        return ""

    def removed(self, text: str) -> str:
        """The text without marks."""
        for mark, number in self._numbers.items():
            text = text.replace(mark, number)
        return re.sub(f"{self._nonce}m[0-9]+z", "", text)

    def calls(self, value: Any, where: str) -> Any:
        """A copy of calls, or of one, with marks in names and in all that is said beside them: the arguments."""
        if isinstance(value, list):
            return [self.calls(item, f"{where}[{n}]") for n, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        copy = {}
        for key, item in value.items():
            there = f"{where}.{key}"
            if key == "function":
                copy[key] = self.calls(item, there)
            else:
                copy[key] = item if key in _OF_CALLS else self.inside(item, there)
        return copy

    def tools(self, value: Any, where: str = "tools", *, names: bool = False) -> Any:
        """A copy of schemas of functions with marks in names, descriptions, values and bounds.

        ``names``: the keys of this object are a user's, too.
        """
        if isinstance(value, list):
            return [self.tools(item, f"{where}[{n}]") for n, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        copy = {}
        for key, item in value.items():
            there = f"{where}.{key}"
            if names:
                copy[self._mark(key, there)] = self.tools(item, there)
            elif key in _VALUES or (isinstance(item, str | int | float) and key not in _WORDS):
                copy[key] = self.inside(item, there, literals=False)
            else:
                copy[key] = self.tools(item, there, names=key == "properties")
        return copy

    def inside(self, value: Any, where: str, *, literals: bool = True) -> Any:
        """A copy with a mark in each text, number and key."""
        if value is None or isinstance(value, bool):
            if literals and self._where:
                self._literals.append((next(reversed(self._where)), _LITERALS[value], where))
            return value
        if isinstance(value, str):
            return self._mark(value, where) if value.strip() else value
        if isinstance(value, int | float):
            return self._number(value, where)
        if isinstance(value, list):
            return [self.inside(item, f"{where}[{n}]", literals=literals) for n, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        copy = {}
        for key, item in value.items():
            there = f"{where}.{key}"
            new_key = self._mark(key, there)
            copy[new_key] = self.inside(item, there, literals=literals)
        return copy

    def _mark(self, text: str, where: str) -> str:
        """The text with a mark at its end, before white space, which templates may strip."""
        mark = f"{self._nonce}m{len(self._where)}z"
        self._where[mark] = where
        end = len(text.rstrip())
        return text[:end] + mark + text[end:]

    def _number(self, value: float, where: str) -> int:
        number = self._first + len(self._where)
        self._where[str(number)] = where
        self._numbers[str(number)] = json.dumps(value)
        return number
