"""Hands the standard library's module to whoever imports a name that a tool here has too.

Python puts the directory of a script first on its path, so that every script beside ``inspect.py`` and ``select.py``
finds these where the standard library itself imports ``inspect`` or ``select`` (dataclasses and subprocess do). Such a
file calls ``stand_back(__name__)`` when it is imported under its bare name, and is a tool otherwise.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys


def stand_back(name: str) -> None:
    """Put the module that ``name`` means elsewhere on the path in place of the tool of that name."""
    here = os.path.dirname(os.path.abspath(__file__))
    elsewhere = [path for path in sys.path if os.path.abspath(path) != here]
    spec = importlib.machinery.PathFinder.find_spec(name, elsewhere)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
