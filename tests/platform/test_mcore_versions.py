"""The megatron-core that is here: the one that this Python's pins name, and silent where nobody could mend anything."""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_npd.platform.mcore_versions import MCORE
from tests.dist import run_distributed
from tests.helpers import make_tiny_model
from tests.models.common import make_trainer, restore, save

ROOT = Path(__file__).resolve().parents[2]
DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
PINS = [line for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("lines", [DEPENDENCIES, PINS], ids=["pyproject.toml", "requirements/cpu.txt"])
def test_the_pins_name_one_for_each_python(lines: list[str]) -> None:
    pins = [pin for pin in map(Requirement, lines) if pin.name == "megatron-core"]
    for python, version in {"3.11": "0.16.1", "3.12": "0.19.2", "3.13": "0.19.2"}.items():
        (pin,) = (pin for pin in pins if pin.marker is not None and pin.marker.evaluate({"python_version": python}))
        assert str(pin.specifier) == f"=={version}"
    assert any(pin.marker is not None and pin.marker.evaluate() and pin.specifier.contains(MCORE) for pin in pins)


def _warnings(rank: int, world: int, model: Path, root: Path) -> list[str]:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    trainer = make_trainer(model)
    trainer.step(0)
    restore(make_trainer(model, load=False), save(trainer, root, 1))
    logging.getLogger("megatron.core.models.gpt.gpt_model").warning("another one")
    return said


def test_it_warns_of_nothing_that_is_meant(tmp_path: Path) -> None:
    assert run_distributed(_warnings, 1, make_tiny_model(tmp_path / "model"), tmp_path / "run") == [["another one"]]
