"""Prompts: chat templates, headers, stop tokens, what is quarantined and why, and the vocabulary check."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from megatron_npd.data import prompt_files
from megatron_npd.data.prompts import check_vocabularies, prepare_prompts
from megatron_npd.data.tokenizer import (
    ModelTokens,
    document_start,
    generation_prompt,
    load_model_tokens,
    load_tokenizer,
    stop_ids,
    turn_end,
)
from megatron_npd.errors import UserError
from megatron_npd.manifest import read_manifest
from megatron_npd.records import PROMPT_SCHEMA
from tests.helpers import make_tiny_tokenizer

HEADER = "<|im_start|>assistant\n"
OTHER_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
STRICT_TEMPLATE = "{{ raise_exception('roles must alternate') }}"


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    return make_tiny_tokenizer(tmp_path / "tokenizer")


def write_lines(path: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def prepare(source: Path, tokenizer: Any, **options: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Any]:
    """Rows, quarantine and manifest of a prepared file."""
    out = source.parent / "prompts"
    stop = tokenizer.eos_token_id if tokenizer.chat_template is None else turn_end(tokenizer)
    model = ModelTokens(tokenizer=tokenizer, stop_ids=(stop,), vocab_size=300)
    manifest = prepare_prompts(source, out, model=model, **({"max_prompt_len": 200, "max_quarantined": 1.0} | options))
    assert read_manifest(out, kind="prompts") == manifest
    counts = manifest.counts
    assert counts["in"] == counts["kept"] + sum(counts["quarantined"].values())
    table = pq.read_table(out / "prompts.parquet")
    assert table.schema == PROMPT_SCHEMA and len(table) == counts["kept"]
    quarantine = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert len(quarantine) == sum(counts["quarantined"].values())
    return table.to_pylist(), quarantine, manifest


def test_chat_and_plain_prompts_give_the_template_and_its_header(tmp_path: Path, tokenizer) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3?"}]
    source = write_lines(
        tmp_path / "in.jsonl",
        {"messages": turns, "response": "5", "id": "a", "level": 3, "tags": ["x"]},
        {"prompt": "How many apples?"},
        {"messages": [*turns, {"role": "assistant", "content": "5"}], "id": 7},
    )
    (chat, plain, answered), quarantine, _ = prepare(source, tokenizer)
    assert not quarantine
    assert (
        tokenizer.decode(chat["prompt_ids"])
        == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 3?<|im_end|>\n" + HEADER
    )
    assert tokenizer.decode(plain["prompt_ids"]) == "<|im_start|>user\nHow many apples?<|im_end|>\n" + HEADER
    for row in (chat, plain, answered):
        assert tokenizer.decode(row["prompt_ids"][-row["generation_prompt_len"] :]) == HEADER
        assert row["teacher_prompt_ids"] is None
    assert tokenizer.decode(chat["response_ids"]) == "5<|im_end|>" and chat["response_ids"][-1] == 2
    assert json.loads(chat["extras"]) == {"level": 3, "tags": ["x"]}
    assert plain["response_ids"] is None and plain["response"] is None and len(plain["prompt_id"]) == 16
    assert answered == chat | {"prompt_id": "7", "extras": "{}"}
    assert generation_prompt(tokenizer) == chat["prompt_ids"][-chat["generation_prompt_len"] :]
    assert turn_end(tokenizer) == 2


def test_without_chat_template_the_text_is_the_prompt(tmp_path: Path, tokenizer) -> None:
    tokenizer.chat_template = None
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "2 + 3 =", "response": "5"}, {"messages": [{"role": "u"}]})
    (row,), (bad,), _ = prepare(source, tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "2 + 3 =" and row["generation_prompt_len"] == 0
    assert row["response_ids"] == [*tokenizer("5")["input_ids"], tokenizer.eos_token_id]
    assert bad["line"] == 2 and bad["reason"] == "wrong_type"
    assert document_start(tokenizer) == tokenizer.eos_token_id == 2 and generation_prompt(tokenizer) == [2]
    tokenizer.bos_token = "<|endoftext|>"
    assert generation_prompt(tokenizer) == [0]
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(UserError, match="must say what ends a response"):
        generation_prompt(tokenizer)


def test_stop_ids_are_the_turn_end_then_the_tokenizers_and_the_models(tmp_path: Path) -> None:
    """A published base model: its EOS ends documents, the ChatML template ends turns with another token."""
    tokenizer = make_tiny_tokenizer(tmp_path)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 304, "eos_token_id": 5}))
    model = load_model_tokens(tmp_path)
    assert (model.stop_ids, model.vocab_size) == ((2, 0, 5), 304)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 0]}))
    assert load_model_tokens(tmp_path).stop_ids == (2, 0, 7)
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "2 + 3?", "response": "5"})
    manifest = prepare_prompts(source, tmp_path / "prompts", model=load_model_tokens(tmp_path), max_prompt_len=200)
    assert manifest.provenance["stop_ids"] == [2, 0, 7]
    (row,) = pq.read_table(tmp_path / "prompts" / "prompts.parquet").to_pylist()
    assert row["response_ids"] == [*tokenizer("5")["input_ids"], 2]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(UserError, match=r"eos_token_id in .*generation_config.json must be an integer or a list"):
        load_model_tokens(tmp_path)


def test_a_model_that_reads_images_too_has_the_tokens_of_its_language_model(tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path)
    text = {"vocab_size": 304, "eos_token_id": 5}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text, "eos_token_id": None}))
    model = load_model_tokens(tmp_path)
    assert (model.stop_ids, model.vocab_size) == ((2, 5), 304)
    for wrong in (None, 0, True, 3.0, "304"):
        (tmp_path / "config.json").write_text(json.dumps({"text_config": text | {"vocab_size": wrong}}))
        with pytest.raises(UserError, match=r"vocab_size in .*config\.json must be a positive integer, got"):
            load_model_tokens(tmp_path)


def test_a_template_alone_says_what_opens_and_ends_a_response(tmp_path: Path, tokenizer) -> None:
    tokenizer.bos_token = tokenizer.eos_token = None
    (tmp_path / "config.json").write_text("{}")
    assert stop_ids(tokenizer, tmp_path) == (2,) and document_start(tokenizer) == 2
    assert tokenizer.decode(generation_prompt(tokenizer)) == HEADER


def test_messages_need_a_chat_template(tmp_path: Path, tokenizer) -> None:
    tokenizer.chat_template = None
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "a"}, {"messages": [{"role": "user", "content": "b"}]})
    _, (bad,), _ = prepare(source, tokenizer)
    assert bad["reason"] == "no_chat_template"


def test_bad_records_are_set_aside_with_line_and_offset(tmp_path: Path, tokenizer) -> None:
    records = [
        b"\xef\xbb\xbf" + json.dumps({"prompt": "good"}).encode(),
        b'{"prompt": "cut',
        b'{"prompt": "\xff"}',
        b"",
        b'{"prompt": "\\ud800"}',
        b"[1]",
        {"response": "an answer to nothing"},
        {"prompt": ""},
        {"prompt": 3},
        {"messages": "hello"},
        {"messages": [{"role": "user", "content": ["parts"]}]},
        {"prompt": "p", "response": 5},
        {"prompt": "p", "response": ""},
        {"prompt": "p", "id": 1.5},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "response": "b"},
        {"prompt": "x" * 300},
        {"prompt": "good", "note": "again"},
        b"[" * 100_000,
        {"prompt": "good too"},
    ]
    source = write_lines(tmp_path / "in.jsonl", *records)
    rows, quarantine, manifest = prepare(source, tokenizer)
    assert [tokenizer.decode(row["prompt_ids"]).split("\n")[1] for row in rows] == [
        "good<|im_end|>",
        "good too<|im_end|>",
    ]
    assert [(bad["line"], bad["reason"]) for bad in quarantine] == [
        (2, "bad_json"),
        (3, "not_utf8"),
        (5, "not_utf8"),
        (6, "wrong_type"),
        (7, "no_prompt"),
        (8, "no_prompt"),
        (9, "wrong_type"),
        (10, "wrong_type"),
        (11, "wrong_type"),
        (12, "wrong_type"),
        (13, "empty_response"),
        (14, "wrong_type"),
        (15, "two_responses"),
        (16, "prompt_too_long"),
        (17, "duplicate"),
        (18, "bad_json"),
    ]
    raw = source.read_bytes()
    for bad in quarantine:
        assert raw[: bad["byte_offset"]].count(b"\n") == bad["line"] - 1
        assert bad["byte_offset"] == 0 or raw[bad["byte_offset"] - 1 : bad["byte_offset"]] == b"\n"
    assert manifest.counts["in"] == 18  # the blank line is no record


def test_a_line_that_never_ends_is_passed_over(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_files, "_LONGEST", 64)
    good = {"prompt": "good"}
    source = write_lines(tmp_path / "in.jsonl", good, b"x" * 1000, good | {"id": 1}, b"y" * 64, good | {"id": 2})
    rows, quarantine, _ = prepare(source, tokenizer)
    assert [row["prompt_id"] for row in rows][1:] == ["1", "2"]
    assert [(bad["line"], bad["reason"]) for bad in quarantine] == [(2, "line_too_long"), (4, "line_too_long")]
    assert "1001 bytes" in quarantine[0]["detail"]
    assert source.read_bytes()[quarantine[1]["byte_offset"] :].startswith(b"yyy")


def test_more_bad_records_than_allowed_stop_the_stage(tmp_path: Path, tokenizer) -> None:
    records = [{"prompt": f"good {index}"} for index in range(8)]
    source = write_lines(tmp_path / "in.jsonl", *records, records[0], b"{", b"\xff")
    with pytest.raises(UserError, match=r"but for 10 %, got 2 of 11 quarantined \(1 bad_json, 1 not_utf8\)"):
        prepare(source, tokenizer, max_quarantined=0.1)
    prepare(source, tokenizer, max_quarantined=0.2)


def test_one_id_for_two_contents_is_an_error(tmp_path: Path, tokenizer) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"})
    with pytest.raises(UserError, match=r"'x' with different content on lines 1 and 2"):
        prepare(source, tokenizer)


def test_a_template_that_refuses_a_conversation_quarantines_it(tmp_path: Path, tokenizer) -> None:
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'b' %}" + STRICT_TEMPLATE + "{% endif %}" + (tokenizer.chat_template)
    )
    rows, (bad,), _ = prepare(
        write_lines(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}), tokenizer
    )
    assert len(rows) == 2 and bad["line"] == 2 and bad["reason"] == "chat_template"
    assert "roles must alternate" in bad["detail"]


def test_parquet_gives_the_rows_of_jsonl(tmp_path: Path, tokenizer) -> None:
    records = [
        {"messages": [{"role": "user", "content": "q"}], "response": "a", "id": "1", "level": 3},
        {"messages": None, "response": None, "id": "2", "level": None},
        {"messages": [{"role": "user", "content": "r"}], "response": None, "id": "3", "level": 4},
    ]
    lines, _, _ = prepare(write_lines(tmp_path / "in.jsonl", *records), tokenizer)
    (tmp_path / "other").mkdir()
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "other" / "in.parquet")
    rows, (bad,), _ = prepare(tmp_path / "other" / "in.parquet", tokenizer)
    assert rows == lines
    assert bad["line"] == 2 and bad["reason"] == "no_prompt" and bad["byte_offset"] is None


def test_teacher_ids_only_where_its_template_differs(tmp_path: Path, tokenizer) -> None:
    teacher = make_tiny_tokenizer(tmp_path / "teacher")
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "hello"})
    assert prepare(source, tokenizer, teacher_tokenizer=teacher)[0][0]["teacher_prompt_ids"] is None
    teacher.chat_template = OTHER_TEMPLATE
    source = write_lines(tmp_path / "teacher" / "in.jsonl", {"prompt": "hello"}, {"prompt": "b" * 50})
    rows, _, _ = prepare(source, tokenizer, teacher_tokenizer=teacher)
    assert teacher.decode(rows[0]["teacher_prompt_ids"]) == "[user] hello<|im_end|>[assistant] "
    assert tokenizer.decode(rows[0]["prompt_ids"]).endswith(HEADER)
    assert teacher.decode(generation_prompt(teacher)) == "[assistant] "


def test_a_second_call_keeps_the_sealed_prompts_and_refuses_others(tmp_path: Path, tokenizer) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "hello"})
    _, _, first = prepare(source, tokenizer)
    before = (tmp_path / "prompts" / "manifest.json").stat().st_mtime_ns
    assert prepare(source, tokenizer)[2] == first
    assert (tmp_path / "prompts" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other max_prompt_len"):
        prepare(source, tokenizer, max_prompt_len=100)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no file at"),
        ("in.csv", b"prompt\na\n", "must end in .jsonl or .parquet"),
        ("in.parquet", b"not parquet at all", "readable Parquet file"),
        ("in.jsonl", b"", "must hold a usable prompt"),
        ("in.jsonl", b"{]\n", "1 bad_json"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, tokenizer, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / name, tokenizer)


def test_vocabularies_are_compared_token_by_token(tmp_path: Path, tokenizer) -> None:
    check_vocabularies(tokenizer, make_tiny_tokenizer(tmp_path / "same"))
    longer = make_tiny_tokenizer(tmp_path / "longer")
    longer.add_tokens(["<extra>"])
    check_vocabularies(tokenizer, longer)  # an id that the student has no token for is no contradiction
    check_vocabularies(longer, tokenizer)
    data = json.loads((tmp_path / "same" / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (tmp_path / "same" / "tokenizer.json").write_text(json.dumps(data))
    swapped = load_tokenizer(tmp_path / "same")
    with pytest.raises(UserError, match=r"got 2 that differ: id \d+ is 'A' for the student and 'B' for the teacher"):
        check_vocabularies(tokenizer, swapped)


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing there"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(UserError, match="must hold a tokenizer"):
        load_tokenizer(tmp_path)
    make_tiny_tokenizer(tmp_path / "damaged")
    (tmp_path / "damaged" / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(UserError, match="must hold a tokenizer"):
        load_tokenizer(tmp_path / "damaged")


def test_code_of_a_tokenizer_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where somebody, or a pipe, answers the question whether to run it with yes."""
    make_tiny_tokenizer(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        f"open({str(ran)!r}, 'w').close()\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "vocab_size": 300}))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))
    with pytest.raises(UserError, match="must hold a tokenizer that transformers loads"):
        load_tokenizer(tmp_path)
    assert not ran.exists()
