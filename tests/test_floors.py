"""The house rules of imports, read from the source: floors, and who may name which engine."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_npd"
# docs/make_map.py lists them from the top.
FLOORS = {
    **dict.fromkeys(
        ("choices", "platform", "config", "errors", "lifeline", "limits", "links", "lock", "log", "manifest"), 0
    ),
    **dict.fromkeys(("durable", "paths", "probe", "quarantine", "records", "run_dir", "torchrun"), 0),
    **dict.fromkeys(("stoppable", "user_files", "weights"), 0),
    **dict.fromkeys(("store", "ops", "models"), 1),
    **dict.fromkeys(("data", "serving"), 2),
    **dict.fromkeys(("rollout", "teacher", "selection", "training"), 3),
    **dict.fromkeys(("pipeline", "planning"), 4),
    "audit": 5,
    **dict.fromkeys(("cli", "__main__"), 6),
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
        if module.split(".")[0] == "ray":
            assert name.startswith("pipeline/launch_ray"), f"{name} imports ray, which only launcher ray needs"
        if module.split(".")[0] in ("torch_npu", "mindspeed"):
            assert name == "platform/npu.py", f"{name} imports {module}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_torch_cuda_stays_in_the_platform_layer(file: Path) -> None:
    if file.relative_to(PACKAGE).parts[0] == "platform":
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and node.attr == "cuda":
            assert getattr(node.value, "id", "") != "torch", f"{file}:{node.lineno} names torch.cuda"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 400, f"{file} has more than 400 lines; part it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 80, f"{file}:{node.lineno} {node.name} has more than 80 lines"


def test_the_map_is_that_of_the_docstrings() -> None:
    made = subprocess.run([sys.executable, ROOT / "docs" / "make_map.py"], capture_output=True, text=True, check=True)
    assert (ROOT / "docs" / "map.md").read_text() == made.stdout, "write it anew: python docs/make_map.py > docs/map.md"
