"""The quickstart's tokenizer and models, loaded as the library and vLLM load them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_npd.data.prompts import prepare_prompts
from megatron_npd.data.tokenizer import check_vocabularies, load_model_tokens
from megatron_npd.models.families import load_spec
from megatron_npd.records import PROMPTS_FILE
from models import HEAD_DIM, build_tokenizer, write_models
from problems import make_splits, write_splits

SIZES = {"teacher": 300, "test": 100}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"), seed=3)


def test_saved_tokenizer_is_the_built_one(paths: dict[str, Path]) -> None:
    loaded, built = AutoTokenizer.from_pretrained(paths["student"]), build_tokenizer()
    text = "Mia has 14 shells.\n#### 42"
    assert loaded.encode(text) == built.encode(text)
    assert loaded.chat_template == built.chat_template
    check_vocabularies(loaded, AutoTokenizer.from_pretrained(paths["teacher"]))


def test_words_and_numbers_are_single_tokens_and_any_text_survives(paths: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(paths["teacher"])
    problems = make_splits(3, SIZES)["teacher"]
    for problem in problems:
        for text in (problem.question, problem.response):
            pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))
            letters = [piece for piece in pieces if piece.isalpha()]
            assert all(len(piece) > 1 or piece in "ĠĊ" for piece in letters), pieces
            assert [piece for piece in pieces if piece.isdigit()] == re.findall(r"\d+", text)
    for text in (problems[-1].response, "Grüße: x = 3.14\n\n 漢字\t<tag>", "apples12and34"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_prompts_of_the_problems(paths: dict[str, Path], tmp_path: Path) -> None:
    """The generation prompt is the assistant's token; the stop token closes the response."""
    import pyarrow.parquet as pq

    tokenizer = AutoTokenizer.from_pretrained(paths["student"])
    source = write_splits(tmp_path / "data", 3, SIZES)["test"]
    prepare_prompts(source, tmp_path / "prompts", model=load_model_tokens(paths["student"]), max_prompt_len=60)
    rows = pq.read_table(tmp_path / "prompts" / PROMPTS_FILE).to_pylist()
    assert len(rows) == SIZES["test"]
    header = tokenizer.convert_tokens_to_ids("<|assistant|>")
    for row in rows:
        assert row["generation_prompt_len"] == 1 and row["prompt_ids"][-1] == header
        assert row["prompt_ids"][0] == tokenizer.bos_token_id
        assert row["response_ids"][-1] == tokenizer.eos_token_id
        assert row["prompt_ids"].count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_models_load(paths: dict[str, Path], name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(paths[name])
    tokenizer = AutoTokenizer.from_pretrained(paths[name])
    assert model.dtype == torch.float32 and model.config.head_dim == HEAD_DIM
    assert load_spec(paths[name]).vocab_size == len(tokenizer) == model.config.vocab_size
    with torch.no_grad():
        loss = model(input_ids=(ids := torch.arange(6, 60)[None]), labels=ids).loss
    assert abs(loss.item() - torch.tensor(float(len(tokenizer))).log().item()) < 1.5  # it knows nothing yet


def test_weights_follow_the_seed(paths: dict[str, Path], tmp_path: Path) -> None:
    def weights(root: Path) -> torch.Tensor:
        return load_file(root / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]

    same, other = write_models(tmp_path / "same", seed=3), write_models(tmp_path / "other", seed=4)
    assert torch.equal(weights(same["student"]), weights(paths["student"]))
    assert not torch.equal(weights(other["student"]), weights(paths["student"]))
