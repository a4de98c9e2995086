"""The recipe of the tests that run the loop on real engines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_npd.config.command_line import parse_config
from megatron_npd.config.run import NPDConfig
from megatron_npd.serving.pool import ServerPool
from megatron_npd.serving.refresh import refresh
from tests.helpers import make_tiny_model


@pytest.fixture(scope="module")
def recipe(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, served_pool: ServerPool, token_file: Path
) -> Iterator[NPDConfig]:
    """A small run of two rounds on the session's server."""
    root = tmp_path_factory.mktemp("loop")
    teacher = make_tiny_model(root / "teacher", seed=1, num_hidden_layers=3)
    for name, count, first in (("prompts", 12, 0), ("test", 4, 50)):
        lines = [
            {"prompt": f"Tom has {n} apples and buys 7 more. How many?", "response": f"#### {n + 7}"}
            for n in range(first, first + count)
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = {
        "run_dir": root / "undisturbed",
        "teacher": teacher,
        "student": tiny_model_dir,
        "prompts": root / "prompts.jsonl",
        "eval.prompts": root / "test.jsonl",
        "eval.max_tokens": 8,
        "rollout.urls": json.dumps(served_pool.urls),
        "rollout.token_file": token_file,
        "rollout.max_tokens": 12,
        "rollout.max_model_len": 128,
        "rollout.shard_size": 16,
        "annotate.seq_length": 256,
        "annotate.top_k": 4,
        "select.filter": "none",
        "pack.seq_length": 256,
        "train.train_iters": 4,
        "train.global_batch_size": 2,
        "train.lr": 1e-3,
        "platform": "cpu",
    }
    yield parse_config(NPDConfig, [f"--{name}={value}" for name, value in flags.items()])
    refresh(served_pool, tiny_model_dir, "v0000")  # as other tests expect to find it
