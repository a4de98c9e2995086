"""Fixtures that several areas share; builders of models are in ``tests/helpers.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2 model with its tokenizer, fp32, tied; do not write into it."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
