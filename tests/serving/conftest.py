"""Fixtures of the tests that refresh the real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_npd.serving.pool import ServerPool
from megatron_npd.serving.refresh import refresh
from tests.helpers import make_tiny_model


@pytest.fixture
def restored_pool(served_pool: ServerPool, tiny_model_dir: Path) -> Iterator[ServerPool]:
    """The shared server for a test that refreshes it."""
    yield served_pool
    refresh(served_pool, tiny_model_dir, "v0000")


@pytest.fixture(scope="session")
def other_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as ``tiny_model_dir`` with other weights; do not write into it."""
    return make_tiny_model(tmp_path_factory.mktemp("other") / "model", seed=1)
