"""Prints docs/map.md: what each file of the house is, by the first line of its docstring.

``python docs/make_map.py > docs/map.md``
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The floors of tests/test_floors.py, from the top: imports go downward only.
ROOMS = {
    "Commands": ("pretrain_npd.py", "tools/*.py", "megatron_npd/__main__.py", "megatron_npd/cli/*.py"),
    "A run looked at": ("megatron_npd/audit/*.py",),
    "The stages put together": ("megatron_npd/pipeline/*.py",),
    "A run planned": ("megatron_npd/planning/*.py",),
    "Stages": tuple(f"megatron_npd/{room}/*.py" for room in ("rollout", "teacher", "selection", "training")),
    "What stages are made of": ("megatron_npd/data/*.py", "megatron_npd/serving/*.py"),
    "Formats, losses, models": (
        *(f"megatron_npd/{room}/*.py" for room in ("store", "ops", "models")),
        "megatron_npd/models/families/*.py",
    ),
    "The ground": ("megatron_npd/config/*.py", "megatron_npd/platform/*.py", "megatron_npd/*.py"),
    "Beside the package": ("benchmarks/*.py", "examples/**/*.py", "docs/*.py"),
}


def summary(file: Path) -> str:
    """The first line of a module's docstring, which may be wrapped, without its full stop."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("``", "`").removesuffix(".")


def main() -> None:
    """Print the map."""
    print("# Where things live\n\nImports go downward only; `tests/test_floors.py` keeps that, and this file, which")
    print("`python docs/make_map.py > docs/map.md` writes from the docstrings. `tests/` mirrors the package.")
    seen: set[Path] = set()
    for title, patterns in ROOMS.items():
        files = [file for pattern in patterns for file in sorted(ROOT.glob(pattern)) if file not in seen]
        files = [file for file in files if summary(file)]
        seen.update(files)
        print(f"\n## {title}\n\n| file | what it is |\n|---|---|")
        for file in files:
            print(f"| [{file.relative_to(ROOT)}](../{file.relative_to(ROOT)}) | {summary(file)} |")


if __name__ == "__main__":
    main()
