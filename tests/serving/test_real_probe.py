"""The request that servers are compared by after a refresh, on the real server."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_npd.errors import UserError
from megatron_npd.serving.compared import Answer
from megatron_npd.serving.pool import ServerPool
from megatron_npd.serving.refresh import refresh
from megatron_npd.weights import read_weights
from tests.serving.test_real_server import ask

pytestmark = pytest.mark.server


def test_what_servers_are_compared_by_is_what_transformers_computes(
    restored_pool: ServerPool, tiny_model_dir: Path, other_model_dir: Path
) -> None:
    """After each load: from logits that differ in every token, far more than float32 may."""
    (url,) = restored_pool.urls
    ids = torch.tensor([[index * 304 // 16 for index in range(16)]])
    for version, model_dir in (("v0001", other_model_dir), ("v0002", tiny_model_dir)):
        refresh(restored_pool, model_dir, version)
        answer = Answer.of(restored_pool, url, restored_pool.call_worker(url, "npd_describe"))
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        with torch.no_grad():
            logprobs_TV = torch.log_softmax(model(ids).logits[0, :-1], dim=-1)
        expected_T = logprobs_TV.gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected_T, atol=1e-4, rtol=0)
        assert answer.tolerance == 0.01


def test_a_server_that_answers_with_other_weights_than_it_says_is_found(
    restored_pool: ServerPool, tiny_model_dir: Path, other_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash is right, what is computed with is not: all of it is taken back, and the server goes on."""
    call, loaded = restored_pool.call_worker, []

    def load_another(url: str, method: str, *args: str, **options: float) -> dict:
        if method == "npd_load" and not loaded:
            loaded.append(args)
            return call(url, method, str(other_model_dir), **options) | {
                "weights": read_weights(tiny_model_dir).content_hash()
            }
        return call(url, method, *args, **options)

    before = ask(restored_pool)
    with monkeypatch.context() as patch:
        patch.setattr(restored_pool, "call_worker", load_another)
        with pytest.raises(UserError, match=r"v0001-\w+ must give the log-probabilities of .* v0000-\w+, got .* apart"):
            refresh(restored_pool, tiny_model_dir, "v0001")
    assert loaded and not restored_pool.lost
    restored_pool.check(version="v0000")
    assert ask(restored_pool) == before
