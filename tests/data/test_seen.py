"""Ids of records in few bytes, with the line of the first."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from megatron_npd.data import seen as seen_module
from megatron_npd.data.seen import Seen
from megatron_npd.errors import UserError
from megatron_npd.manifest import config_hash
from tests.data.test_conversation import prepare, tokenizer, tokenizer_dir
from tests.data.test_prompts import write_lines

__all__ = ["tokenizer", "tokenizer_dir"]


def test_each_id_is_found_again_with_its_first_line_and_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen_module, "_FEWEST", 7)
    seen = Seen()
    contents = [config_hash(number) for number in range(300)] + ["f" * 16, "0" * 16]
    for line, content in enumerate(contents, start=1):
        assert seen.add(f"id {line}", content, line) is None
        assert seen.add(f"id {line}", content, line + 1000) == (True, line)
    for line, content in enumerate(contents, start=1):
        assert seen.add(f"id {line}", content, 2000) == (True, line)
        assert seen.add(f"id {line}", contents[line - 2], 2000) == (False, line)


def test_a_record_takes_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary of strings takes 270."""
    monkeypatch.setattr(seen_module, "_FEWEST", 512)
    count = 50_000
    tracemalloc.start()
    try:
        seen, before = Seen(), tracemalloc.get_traced_memory()[0]
        for line in range(1, count + 1):
            seen.add(f"prompt {line}", f"{line:016x}", line)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / count < 50 and (peak - before) / count < 100


def test_repeated_records_and_ids_are_found_across_the_table(
    tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen_module, "_FEWEST", 3)
    records = [{"prompt": f"q{number}", "id": number} for number in range(20)]
    source = write_lines(tmp_path / "in.jsonl", *records, records[1])
    rows, (bad,) = prepare(source, tokenizer)
    assert len(rows) == 20 and (bad["line"], bad["reason"]) == (21, "duplicate") and bad["detail"].endswith("line 2")
    source = write_lines(tmp_path / "other.jsonl", *records, {"prompt": "other", "id": "3"})
    with pytest.raises(UserError, match=r"got '3' with different content on lines 4 and 21"):
        prepare(source, tokenizer)
