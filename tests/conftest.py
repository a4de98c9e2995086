"""Fixtures that several areas share; builders of models are in ``tests/helpers.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_npd.config.settings import RolloutConfig
from megatron_npd.serving.pool import ServerPool
from tests.helpers import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2 model with its tokenizer, fp32, tied; do not write into it."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def served_pool(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerPool]:
    """One real vLLM server that serves the tiny model as policy v0000; a test that refreshes it must put that back.

    Tests that use it are marked ``server``; it starts with the first of them.
    """
    token = str(tmp_path_factory.mktemp("token") / "server.token")
    cfg = RolloutConfig(max_model_len=256, max_tokens=24, concurrency=32, start_timeout=550.0, token_file=token)
    with ServerPool.open(tiny_model_dir, cfg, version="v0000") as pool:
        yield pool


@pytest.fixture(scope="session")
def token_file(served_pool: ServerPool) -> Path:
    """The file that opens ``served_pool`` to other commands, kept by whoever started it."""
    return Path(served_pool.cfg.token_file)
