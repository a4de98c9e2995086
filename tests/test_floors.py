"""The house rules of imports, read from the source: floors, and who may name which engine."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_npd"
FLOORS = {
    "platform": 0,
    "config": 0,
    "command": 0,
    "recipe": 0,
    "records": 0,
    "manifest": 0,
    "lifeline": 0,
    "links": 0,
    "limits": 0,
    "lock": 0,
    "weights": 0,
    "log": 0,
    "paths": 0,
    "torchrun": 0,
    "data": 1,
    "ops": 1,
    "models": 1,
    "rollout": 2,
    "teacher": 2,
    "selection": 2,
    "training": 2,
    "loop": 3,
}
MCORE_ALLOWED = ("platform/", "models/", "teacher/", "training/", "store/annotation_store.py", "data/packed_dataset.py")
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "megatron_npd" and len(parts) > 1 else ""


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_keep_the_floors(file: Path) -> None:
    name = str(file.relative_to(PACKAGE))
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own == "__init__" or own in FLOORS, f"{name}: give its room a floor in this test"
    for module in imports(ast.parse(file.read_text())):
        target = room(module)
        if target in FLOORS and own in FLOORS and target != own:
            ground = FLOORS[target] == FLOORS[own] == 0
            assert FLOORS[target] < FLOORS[own] or ground, f"{name} imports {module}: packages import downward only"
        if module.startswith("megatron.core"):
            assert name.startswith(MCORE_ALLOWED), f"{name} imports {module}"
        assert not module.startswith("megatron.training"), name
        if module.split(".")[0] == "vllm":
            assert name == "serving/worker_extension.py", f"{name} imports vllm: it is spoken to over HTTP"
        if module.split(".")[0] == "triton":
            assert name.endswith("_triton.py"), f"{name} imports triton"
        if module.split(".")[0] in ("torch_npu", "mindspeed"):
            assert name == "platform/npu.py", f"{name} imports {module}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_torch_cuda_stays_in_the_platform_layer(file: Path) -> None:
    if file.relative_to(PACKAGE).parts[0] == "platform":
        return
    for node in ast.walk(ast.parse(file.read_text())):
        named = isinstance(node, ast.Attribute) and node.attr == "cuda"
        assert not (named and getattr(node.value, "id", "") == "torch"), f"{file}:{node.lineno} names torch.cuda"


def test_every_room_has_its_line_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    missing = [
        str(path.relative_to(ROOT))
        for path in [*FILES, *sorted((ROOT / "tools").glob("*.py"))]
        if path.name != "__init__.py" and f"`{path.name}`" not in readme
    ]
    assert not missing, f"README.md must have a line for {missing}"
