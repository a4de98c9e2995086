"""Held-out prompts: which, that nothing of them trains, and that the books say so."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_npd.audit.verify import verify_run
from megatron_npd.data.held_out import HELD_OUT_FILE, prepare_held_out
from megatron_npd.data.prompts import prepare_prompts
from megatron_npd.data.tokenizer import ModelTokens
from megatron_npd.manifest import read_manifest
from megatron_npd.quarantine import QUARANTINE_FILE
from megatron_npd.records import PROMPTS_FILE
from tests.helpers import make_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def prepare(root: Path, tokenizer, texts: list[str], *, held_out: int) -> Path:
    root.mkdir(exist_ok=True)
    lines = [{"id": f"{root.name}-{i}", "prompt": text, "response": f"#### {i}"} for i, text in enumerate(texts)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = root / "prompts"
    model = ModelTokens(tokenizer=tokenizer, stop_ids=(2,), vocab_size=300)
    prepare_prompts(root / "prompts.jsonl", out, model=model, max_prompt_len=100, held_out=held_out)
    return out


def prompts_of(file: Path) -> list[tuple[int, ...]]:
    return [tuple(ids) for ids in pq.read_table(file)["prompt_ids"].to_pylist()]


def test_no_record_of_a_held_out_prompt_trains(tmp_path: Path, tokenizer) -> None:
    """Every prompt stands there under two ids, one of them with another response; a tenth of the records leaves."""
    texts = [f"What is {n} + 1?" for n in range(100)]
    out = prepare(tmp_path / "run", tokenizer, texts * 2, held_out=12)
    kept, held = prompts_of(out / PROMPTS_FILE), prompts_of(out / HELD_OUT_FILE)
    assert len(held) == len(set(held)) == 10 and len(kept) == 180
    assert not set(kept) & set(held) and len(set(kept) | set(held)) == 100
    counts = read_manifest(out).counts
    assert counts["in"] == 200 and counts["kept"] == 180 and counts["quarantined"] == {"held_out": 20}
    lines = [json.loads(line) for line in (out / QUARANTINE_FILE).read_text().splitlines()]
    assert len(lines) == 20 and {line["reason"] for line in lines} == {"held_out"}
    assert verify_run(out).problems == []
    prepare_held_out(out / HELD_OUT_FILE, tmp_path / "measure", 10, training=out / PROMPTS_FILE)
    assert prompts_of(tmp_path / "measure" / PROMPTS_FILE) == held


@pytest.mark.parametrize(("prompts", "responses", "held"), [(40, 5, 0), (100, 10, 10), (1, 200, 0), (700, 1, 64)])
def test_a_tenth_of_the_records_leaves_at_most(
    tmp_path: Path, tokenizer, prompts: int, responses: int, held: int
) -> None:
    """All records of a prompt leave together: prompts with many of them stay."""
    texts = [f"What is {n} + 1?" for n in range(prompts)]
    counts = read_manifest(prepare(tmp_path / "run", tokenizer, texts * responses, held_out=64)).counts
    assert counts["kept"] == prompts * responses - held * responses


def test_the_choice_depends_on_the_prompts_alone(tmp_path: Path, tokenizer) -> None:
    """Neither on their order nor on their ids; from prompts that do not train the same ones are taken."""
    texts = [f"What is {n} + 1?" for n in range(100)]
    one = prepare(tmp_path / "one", tokenizer, texts, held_out=10)
    other = prepare(tmp_path / "other", tokenizer, texts[::-1], held_out=10)
    held = prompts_of(one / HELD_OUT_FILE)
    assert prompts_of(other / HELD_OUT_FILE) == held[::-1]
    whole = prepare(tmp_path / "whole", tokenizer, texts, held_out=0)
    assert not (whole / HELD_OUT_FILE).exists() and len(prompts_of(whole / PROMPTS_FILE)) == 100
    training = prepare(tmp_path / "training", tokenizer, ["What is 2 * 3?"], held_out=0) / PROMPTS_FILE
    manifest = prepare_held_out(whole / PROMPTS_FILE, tmp_path / "measure", 10, training=training)
    assert manifest is not None
    assert manifest.counts == {"in": 10, "kept": 10, "quarantined": {}, "also_training": 0}
    assert prompts_of(tmp_path / "measure" / PROMPTS_FILE) == held


@pytest.mark.parametrize(("number", "held"), [(79, 0), (80, 8), (99, 9)])
def test_at_most_a_tenth_is_held_out(tmp_path: Path, tokenizer, number: int, held: int) -> None:
    out = prepare(tmp_path / "run", tokenizer, [f"What is {n} + 1?" for n in range(number)], held_out=64)
    assert len(prompts_of(out / PROMPTS_FILE)) == number - held
    assert read_manifest(out).counts["quarantined"] == ({"held_out": held} if held else {})


def test_problems_that_train_too_are_passed_over(tmp_path: Path, tokenizer) -> None:
    texts = [f"What is {n} + 1?" for n in range(40)]
    problems = prepare(tmp_path / "problems", tokenizer, texts, held_out=0) / PROMPTS_FILE
    training = prepare(tmp_path / "training", tokenizer, texts[10:], held_out=0) / PROMPTS_FILE
    manifest = prepare_held_out(problems, tmp_path / "measure", 64, training=training)
    assert manifest is not None and manifest.counts["kept"] == 10 and manifest.counts["also_training"] == 30
    assert prompts_of(tmp_path / "measure" / PROMPTS_FILE) == prompts_of(problems)[:10]
    assert prepare_held_out(training, tmp_path / "none", 64, training=problems) is None
