"""Answers of a live vLLM server, saved as they came, become a store through ``tools/preprocess_data.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_npd.cli.preprocess import main as command
from megatron_npd.records import SAMPLES_FILE
from megatron_npd.serving.access import bearer
from megatron_npd.serving.pool import ServerPool
from megatron_npd.serving.server import GENERATE
from tests.helpers import VOCAB_SIZE
from tests.teacher.reference import TransformersModel, check_top_k

pytestmark = pytest.mark.server

TOP_K = 4
LENGTHS = [(5, 7), (1, 3), (30, 20), (9, 1)]
COMPLETIONS = "/v1/completions"
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "token_ids_in_and_out": (GENERATE, {"sampling_params": {"max_tokens": 1, "prompt_logprobs": TOP_K}}),
    "prompt_logprobs": (COMPLETIONS, {"max_tokens": 1, "prompt_logprobs": TOP_K, "return_token_ids": True}),
    "echo": (COMPLETIONS, {"max_tokens": 1, "echo": True, "logprobs": TOP_K, "return_tokens_as_token_ids": True}),
    "echo_alone": (COMPLETIONS, {"max_tokens": 0, "echo": True, "logprobs": TOP_K, "return_tokens_as_token_ids": True}),
}


@pytest.mark.parametrize("form", REQUESTS)
def test_a_live_servers_answers_become_the_records_of_transformers(
    served_pool: ServerPool, tiny_model_dir: Path, tmp_path: Path, form: str
) -> None:
    from megatron_npd.store.annotation_store import AnnotationStore

    path, body = REQUESTS[form]
    rng = np.random.default_rng(7)
    samples = [(rng.integers(3, 300, prompt).tolist(), rng.integers(3, 300, n).tolist()) for prompt, n in LENGTHS]
    with open(tmp_path / "answers.jsonl", "w") as file:
        for number, (prompt, response) in enumerate(samples):
            tokens = "token_ids" if path == GENERATE else "prompt"
            request = {tokens: prompt + response, "temperature": 0.0, **body}
            reply = httpx.post(served_pool.urls[0] + path, json=request, headers=bearer(served_pool.token), timeout=60)
            assert reply.status_code == 200, reply.text
            saved = {"id": f"p{number}", "prompt_len": len(prompt), "response": reply.json()}
            if path == GENERATE:  # which does not send them back
                saved["token_ids"] = prompt + response
            file.write(json.dumps(saved) + "\n")
    flags = {"input": tmp_path / "answers.jsonl", "out": tmp_path / "store", "top-k": TOP_K, "vocab-size": VOCAB_SIZE}
    command([f"--{name}={value}" for name, value in flags.items()])
    store, teacher = AnnotationStore(tmp_path / "store"), TransformersModel(tiny_model_dir)
    (shard,) = (tmp_path / "store").glob("shard-*")
    rows = pq.read_table(shard / SAMPLES_FILE).to_pylist()
    for number, (prompt, response) in enumerate(samples):
        index, row = next((i, row) for i, row in enumerate(rows) if row["prompt_id"] == f"p{number}")
        expected, records = teacher(prompt, response), store.teacher(index)
        assert store.tokens(index).tolist() == prompt + response
        check_top_k(records["ids"], records["logprobs"], expected.logprobs, 4e-3)  # fp16
        np.testing.assert_allclose(row["teacher_logprobs"], expected.sampled, atol=1e-4)
        assert abs(row["teacher_loss"] - expected.loss) < 1e-4
