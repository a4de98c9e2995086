"""Exact match: which part of a text is the answer, and how answers are counted."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_npd.config.run import EvalConfig
from megatron_npd.config.settings import RolloutConfig
from megatron_npd.errors import UserError
from megatron_npd.records import PROMPTS_FILE
from megatron_npd.rollout.evaluate import exact_match, find_answer
from megatron_npd.serving.pool import ServerPool
from tests.helpers import make_tiny_tokenizer
from tests.serving.fake import EOS, FakeServer, write_prompts

REGEX = EvalConfig().answer_regex
CFG = RolloutConfig(max_model_len=64, concurrency=4, request_timeout=5.0, server_patience=0.0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7 + 5 = 12 #### 12", "12"),
        ("#### 1 and then\n####   -1,234.50", "-1234.50"),
        ("#### 1,200.", "1200"),
        ("the answer is 12", None),
        ("", None),
    ],
)
def test_the_answer_of_a_text(text: str, answer: str | None) -> None:
    assert find_answer(text, re.compile(REGEX)) == answer


def test_answers_are_compared_with_the_references(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer(tmp_path / "tokenizer")
    prompts = write_prompts(tmp_path / "prompts", [10, 11, 12, 64])  # references #### 0, 1, 2, 3
    ids = pq.read_table(prompts / PROMPTS_FILE)["prompt_ids"].to_pylist()
    texts = ["so #### 0", "#### 1 no, #### 7", "nothing"]

    with FakeServer() as server:

        def answer(body: dict) -> dict | None:
            if body["token_ids"] not in ids:
                return None
            tokens = [*tokenizer(texts[ids.index(body["token_ids"])])["input_ids"], EOS]
            return {"token_ids": tokens, "logprobs": {"content": [{"logprob": -1.0}] * len(tokens)}}

        server.trouble = answer
        result = exact_match(
            ServerPool([server.url], CFG), prompts, answer_regex=REGEX, tokenizer=tokenizer, max_tokens=30
        )
        assert {body["sampling_params"]["temperature"] for body in server.asked} == {0.0}
    assert (result.correct, result.total, result.accuracy) == (1, 4, 25.0)
    got = [(wrong["prompt_id"], wrong["expected"], wrong["got"]) for wrong in result.wrong]
    assert got == [("p1", "1", "7"), ("p2", "2", None), ("p3", "3", None)]
    assert result.wrong[0]["response"] == "#### 1 no, #### 7"


def test_what_cannot_be_evaluated_is_told(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer(tmp_path / "tokenizer")
    prompts = write_prompts(tmp_path / "prompts", [10, 11])
    with FakeServer() as server:
        pool = ServerPool([server.url], CFG)
        for regex, message in (
            ("####", "must have a group"),
            ("(", "must be a regular expression"),
            (r"= (\d+)", "a response that answer_regex matches, got 'The answer is #### 0' for p0"),
        ):
            with pytest.raises(UserError, match=message):
                exact_match(pool, prompts, answer_regex=regex, tokenizer=tokenizer, max_tokens=30)
        server.trouble = lambda body: 400 if body["sampling_params"]["max_tokens"] > 1 else None
        with pytest.raises(UserError, match="every problem must be answered, got request_failed for p"):
            exact_match(pool, prompts, answer_regex=REGEX, tokenizer=tokenizer, max_tokens=30)
