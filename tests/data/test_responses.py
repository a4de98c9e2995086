"""Given responses: those to a prompt that opens a tag, those far too long."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_npd.data.conversation import Codec
from tests.data.test_conversation import CHAT_TEMPLATE, prepare, tokenizer, tokenizer_dir, user
from tests.data.test_prompts import write_lines

__all__ = ["tokenizer", "tokenizer_dir"]

# As Qwen3-Thinking's: the generation prompt opens the reasoning, the last turn is written with its own.
THINKING = """
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}
{%- set parts = message.content.split('</think>') %}
{%- if message.role == 'assistant' and loop.last %}
{{- '<think>\\n' + (parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '') + '\\n</think>\\n\\n' }}
{%- endif %}{{- parts[-1].lstrip('\\n') + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}
"""
# As DeepSeek-R1's: the generation prompt opens the reasoning, written turns have none.
R1 = """
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}
{{- message.content.split('</think>')[-1] + '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}
"""
WHOLE = "<think>\n2 + 3\n</think>\n\n5"
OPENED = [
    # template, response, the text of prompt and response from the header on
    (THINKING, WHOLE, WHOLE),
    (THINKING, "<think>2 + 3</think>5", WHOLE),
    (THINKING, "2 + 3</think>5", WHOLE),
    (THINKING, "5", "<think>\n\n</think>\n\n5"),
    (R1, WHOLE, WHOLE),
    (R1, "\n<think>2 + 3</think>5", "<think>\n2 + 3</think>5"),
    (R1, "2 + 3\n</think>\n\n5", WHOLE),
    (R1, "<think>\n\n</think>5", "<think>\n\n</think>5"),
    (R1, "5", "<think>\n5"),
    (R1.replace("<think>\\n' }}", "<think>' }}"), WHOLE, WHOLE),
    (R1.replace("<think>", "<seed:think>"), "<seed:think>x</seed:think>5", "<seed:think>\nx</seed:think>5"),
    (CHAT_TEMPLATE, WHOLE, WHOLE),
]


@pytest.mark.parametrize("as_message", [False, True])
@pytest.mark.parametrize(("template", "response", "expected"), OPENED)
def test_a_tag_that_the_generation_prompt_opens_is_not_opened_again(
    tmp_path: Path, tokenizer, template: str, response: str, expected: str, as_message: bool
) -> None:
    """What the template writes for the whole conversation where it goes on from the prompt, else one tag."""
    tokenizer.chat_template = template
    messages = [user("2 + 3?"), {"role": "assistant", "content": response}]
    record = {"messages": messages} if as_message else {"messages": messages[:1], "response": response}
    (row,), bad = prepare(write_lines(tmp_path / "in.jsonl", record), tokenizer)
    assert not bad and row["response"] == response
    text = tokenizer.decode(row["prompt_ids"] + row["response_ids"])
    assert text.endswith(f"assistant\n{expected}<|im_end|>")
    if template == THINKING:
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        assert text == whole.rstrip("\n")


def test_a_prompt_of_a_user_opens_no_tag(tmp_path: Path, tokenizer) -> None:
    for chat_template in (None, "{% for message in messages %}{{ message['content'] }}{% endfor %}"):
        tokenizer.chat_template = chat_template
        (tmp_path / str(chat_template)[:4]).mkdir()
        source = tmp_path / str(chat_template)[:4] / "in.jsonl"
        (row,), _ = prepare(write_lines(source, {"prompt": "a <b>", "response": "<b> c"}), tokenizer)
        assert tokenizer.decode(row["response_ids"]) == "<b> c<|im_end|>"


def test_special_tokens_that_a_response_to_an_opened_tag_spells_are_text(tmp_path: Path, tokenizer) -> None:
    for number, template in enumerate((THINKING, R1)):
        tokenizer.chat_template = template
        source = tmp_path / str(number) / "in.jsonl"
        source.parent.mkdir()
        record = {"prompt": "q", "response": "<think>\na <|im_start|> b\n</think>\n\n5"}
        (row,), bad = prepare(write_lines(source, record), tokenizer)
        assert not bad and [i for i in row["response_ids"] if i < 3] == [2]
        assert tokenizer.decode(row["response_ids"]) == "a <|im_start|> b\n</think>\n\n5<|im_end|>"


def count_calls(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, note: Callable[[Any], None]) -> None:
    """Show ``note`` what the tokenizer is given."""
    encode: Any = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, texts, **o: note(texts) or encode(self, texts, **o))


@pytest.mark.parametrize("side", ["prompt", "response"])
def test_texts_far_too_long_are_not_encoded_whole(
    tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    """Encoding takes some hundred bytes a character."""
    encoded: list[int] = []
    encode: Any = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer),
        "__call__",
        lambda self, texts, **o: encoded.extend(map(len, texts)) or encode(self, texts, **o),
    )
    records = [
        {"prompt": "q", "response": "a", "id": n} | {side: "x" * size} for n, size in enumerate((10**6, 2500, 5))
    ]
    bounds = {"max_prompt_len": 100, "max_response_len": 100}
    rows, bad = prepare(write_lines(tmp_path / "in.jsonl", *records), tokenizer, **bounds)
    assert [row["prompt_id"] for row in rows] == ["2"] and max(encoded) <= 800
    assert [(line["line"], line["reason"]) for line in bad] == [(1, f"{side}_too_long"), (2, f"{side}_too_long")]
    assert f"max_{side}_len is 100" in bad[0]["detail"] and f"max_{side}_len is 100" in bad[1]["detail"]


def test_a_response_is_bounded_by_its_tokens(tmp_path: Path, tokenizer) -> None:
    text = "x y" * 20
    length = len(tokenizer(text)["input_ids"]) + 1
    for number, (bound, kept) in enumerate(((length, 1), (length - 1, 0), (None, 1))):
        (tmp_path / str(number)).mkdir()
        source = write_lines(tmp_path / str(number) / "in.jsonl", {"prompt": "q", "response": text}, {"prompt": "r"})
        rows, bad = prepare(source, tokenizer, max_response_len=bound)
        assert len(rows) == 1 + kept and [line["reason"] for line in bad] == ["response_too_long"] * (1 - kept)


def test_texts_are_encoded_some_at_a_time(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Codec(tokenizer, (2,))
    texts = [f"{n} apples" * n for n in range(50)]
    whole = codec.encode(texts)
    monkeypatch.setattr("megatron_npd.data.conversation._ENCODED", 200)
    sizes: list[int] = []
    count_calls(monkeypatch, tokenizer, lambda texts: sizes.append(len(texts)))
    assert codec.encode(texts) == whole and len(sizes) > 10 and sum(sizes) == len(texts)
