"""Each value of a call and of a tool is in the tokens, or its record is quarantined with where it stood."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.test_conversation import QWEN25, TOOL, assistant, prepare, tokenizer, tokenizer_dir, user
from tests.data.test_prompts import write_lines

__all__ = ["tokenizer", "tokenizer_dir"]

# As Hermes' and Qwen's older ones: undefined arguments are written as nothing.
PLAIN_CALLS = QWEN25.replace("call.arguments | tojson", "call.arguments")
# As Qwen3-Coder's: a line an argument.
XML_CALLS = QWEN25.replace(
    "{{- call.arguments | tojson }}",
    "{%- for key, item in call.arguments | items %}{{- '<parameter=' + key + '>\\n' }}"
    "{{- item | tojson if item is mapping or (item is sequence and item is not string) else item | string }}"
    "{{- '\\n</parameter>' }}{%- endfor %}",
)
# As MiniMax-M3's: null arguments are left out.
SKIPS_NULL = XML_CALLS.replace("| items %}", "| items if item is not none %}")
# As those that write keys and texts alone.
TEXTS_ALONE = XML_CALLS.replace("else item | string", "else (item if item is string else '')")
# As Command R's: a signature of names, types and descriptions.
SIGNATURES = QWEN25.replace(
    "{{- tool | tojson }}",
    "{%- set f = tool.function %}{{- f.name + ': ' + f.description }}"
    "{%- for key, item in f.parameters.properties | items %}{{- key + ' (' + (item.type | string) + '): ' }}"
    "{{- item.description }}{%- endfor %}",
)
# As gpt-oss': types become TypeScript's, values of an enum stand between bars.
TYPESCRIPT = SIGNATURES.replace(
    "{{- item.description }}",
    "{{- item.description }}{%- if item.enum %}{{- '\"' + item.enum | join('\" | \"') + '\"' }}{%- endif %}"
    "{%- if item.default is defined %}{{- ', default: ' ~ item.default }}{%- endif %}",
)
ARGUMENTS = {
    "city": "Rome",
    "days": 5,
    "height": -2.5,
    "exact": True,
    "brief": False,
    "unit": None,
    "list": [1, "x", False, None, True],
    "sub": {"a": None, "b": {"c": [[], {}]}, "": " "},
}


def called(arguments: Any, name: str = "arguments", **more: Any) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "get_time", name: arguments} | more}
    return {"messages": [user("q"), assistant("", tool_calls=[call]), user("r")]}


def with_schema(**schema: Any) -> dict[str, Any]:
    tool = copy.deepcopy(TOOL)
    tool["function"]["parameters"]["properties"]["city"] |= schema
    return {"prompt": "q", "tools": [tool]}


KEPT = {
    "every kind of argument": (QWEN25, called(ARGUMENTS)),
    "every kind of argument, a line each": (XML_CALLS, called(ARGUMENTS)),
    "arguments as JSON text": (PLAIN_CALLS, called(json.dumps(ARGUMENTS))),
    "no arguments": (QWEN25, called({})),
    "nested schemas": (
        QWEN25,
        with_schema(enum=["Rome", 5, None], default="Rome", minLength=3, items={"const": 7}, anyOf=[{"pattern": "R"}]),
    ),
    "what says nothing of its own": (TYPESCRIPT, with_schema(title="City", type=["string", "null"])),
    "enum and default between other words": (TYPESCRIPT, with_schema(enum=["Rome", "Oslo"], default=5)),
    "a truth in a schema": (SIGNATURES, with_schema(nullable=True)),
    "a property with a name of JSON Schema's": (
        QWEN25,
        with_schema(properties={"type": {"type": "string"}, "enum": {"type": "integer"}, "properties": {}}),
    ),
}
LOST = {
    "arguments under another name": (PLAIN_CALLS, called({"city": "Rome"}, "parameters"), "function.parameters.city"),
    "arguments under Anthropic's name": (PLAIN_CALLS, called({"n": 5}, "input"), "function.input.n"),
    "what stands beside the arguments": (QWEN25, called({}, result="noon"), "function.result"),
    "a number": (TEXTS_ALONE, called({"n": 5}), "arguments.n"),
    "a number in a list": (TEXTS_ALONE.replace("item | tojson", "''"), called({"n": [5]}), "arguments.n[0]"),
    "a truth": (TEXTS_ALONE, called({"n": True, "m": "true"}), "arguments.n"),
    "a null": (SKIPS_NULL, called({"n": None}), "arguments.n"),
    "a null's value": (TEXTS_ALONE, called({"n": None}), "arguments.n"),
    "an enum": (SIGNATURES, with_schema(enum=["Rome"]), "properties.city.enum[0]"),
    "a number in an enum": (SIGNATURES, with_schema(enum=[5]), "properties.city.enum[0]"),
    "a default": (SIGNATURES, with_schema(default=5), "properties.city.default"),
    "a bound": (SIGNATURES, with_schema(maxLength=5), "properties.city.maxLength"),
    "a nested constant": (SIGNATURES, with_schema(items={"const": "x"}), "properties.city.items.const"),
}


@pytest.mark.parametrize("name", KEPT)
def test_values_that_the_template_writes_are_kept_as_they_are(name: str, tmp_path: Path, tokenizer) -> None:
    tokenizer.chat_template, record = KEPT[name]
    (row,), bad = prepare(write_lines(tmp_path / "in.jsonl", record), tokenizer)
    assert not bad
    turns = record.get("messages") or [user(record["prompt"])]
    text = tokenizer.apply_chat_template(turns, tools=record.get("tools"), tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(row["prompt_ids"]) == text
    assert tokenizer.decode(row["prompt_ids"][-row["generation_prompt_len"] :]) == "<|im_start|>assistant\n"


@pytest.mark.parametrize("name", LOST)
def test_values_that_the_template_would_lose_are_named(name: str, tmp_path: Path, tokenizer) -> None:
    tokenizer.chat_template, record, where = LOST[name]
    rows, (bad,) = prepare(write_lines(tmp_path / "in.jsonl", record, {"prompt": "good"}), tokenizer)
    assert len(rows) == 1 and (bad["line"], bad["reason"]) == (1, "not_in_template")
    assert bad["detail"].startswith("the chat template does not write ") and f"{where} (roles" in bad["detail"]


@pytest.mark.parametrize("arguments", [5, True, ["Rome"]])
def test_arguments_are_an_object_or_its_text(tmp_path: Path, tokenizer, arguments: Any) -> None:
    rows, (bad,) = prepare(write_lines(tmp_path / "in.jsonl", called(arguments), {"prompt": "good"}), tokenizer)
    assert len(rows) == 1 and bad["reason"] == "wrong_type"
    assert bad["detail"].endswith("its arguments must be an object, or the JSON text of one")


def test_nulls_in_arguments_are_an_authors_in_jsonl_and_arrows_in_parquet(tmp_path: Path, tokenizer) -> None:
    tokenizer.chat_template = QWEN25
    records = [called({"city": "Rome", "unit": None}), called({"city": "Oslo", "unit": "C"})]
    lines, bad = prepare(write_lines(tmp_path / "in.jsonl", *records), tokenizer)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "in.parquet")
    rows, other_bad = prepare(tmp_path / "in.parquet", tokenizer)
    assert not bad and not other_bad
    assert '{"city": "Rome", "unit": null}' in tokenizer.decode(lines[0]["prompt_ids"])
    assert '{"city": "Rome"}' in tokenizer.decode(rows[0]["prompt_ids"])
    assert lines[1]["prompt_ids"] == rows[1]["prompt_ids"]
