"""Files of users: names that stand twice, and lists that take no room in a file but much in memory."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_npd.errors import UserError
from megatron_npd.store.preprocess import preprocess
from megatron_npd.user_files import open_parquet, read_rows
from tests.data.test_conversation import TOOL, prepare, tokenizer, tokenizer_dir
from tests.data.test_prompts import write_lines
from tests.store.test_preprocess import record

__all__ = ["tokenizer", "tokenizer_dir"]

OPTIONS: dict[str, Any] = {"top_k": 0, "vocab_size": 100, "max_quarantined": 1.0}


def zeros(lengths: list[int]) -> pa.Array:
    """Lists of zeros, which Parquet writes as their number."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.zeros(offsets[-1], np.int32)))


def test_columns_and_fields_of_one_name_are_refused(tmp_path: Path, tokenizer) -> None:
    two = pa.table([["a"], ["b"], ["c"]], names=["prompt", "id", "prompt"])
    fields = pa.StructArray.from_arrays(
        [pa.array(["user"]), pa.array(["q"]), pa.array(["r"])], ["role", "content", "content"]
    )
    nested = pa.table({"messages": pa.ListArray.from_arrays([0, 1], fields)})
    for table, name in ((two, "prompt"), (nested, r"messages\.element\.content")):
        pq.write_table(table, tmp_path / "in.parquet")
        with pytest.raises(UserError, match=f"columns of .*in.parquet must differ in name, got {name} twice"):
            prepare(tmp_path / "in.parquet", tokenizer)
        with pytest.raises(UserError, match=f"must differ in name, got {name} twice"):
            preprocess([tmp_path / "in.parquet"], tmp_path / "out", **OPTIONS)


def test_a_key_that_stands_twice_quarantines_its_record(tmp_path: Path, tokenizer) -> None:
    lines = [
        b'{"prompt": "a", "response": "b", "prompt": "c"}',
        b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        json.dumps({"prompt": "q", "tools": json.dumps([TOOL]).replace('"type"', '"name": "x", "name"', 1)}).encode(),
        b'{"prompt": "good"}',
    ]
    rows, bad = prepare(write_lines(tmp_path / "in.jsonl", *lines), tokenizer)
    assert len(rows) == 1 and [line["line"] for line in bad] == [1, 2, 3]
    assert [line["reason"] for line in bad] == ["repeated_key", "repeated_key", "wrong_type"]
    assert bad[0]["detail"] == "an object must hold a key once, got 'prompt' twice; take one of them out"
    assert "'content' twice" in bad[1]["detail"] and "'name' twice" in bad[2]["detail"]


def test_rows_of_which_python_has_no_value_are_quarantined(tmp_path: Path, tokenizer) -> None:
    cut = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(bytes(4) + b"\1\0\0\0"), pa.py_buffer(b"\xff")])
    prompts = pa.chunked_array([pa.array(["a"]), cut, pa.array(["c"])])
    times = pa.array([0, 0, 1], pa.timestamp("ns"))  # a nanosecond after 1970
    good = record(id="good")
    for name, column, left in (("prompt", prompts, [1, 3]), ("when", times, [1, 2])):
        columns = {"prompt": ["a", "b", "c"], "id": [1, 2, 3], name: column}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        rows, bad = prepare(tmp_path / f"{name}.parquet", tokenizer)
        assert [row["prompt_id"] for row in rows] == [str(line) for line in left]
        assert [line["line"] for line in bad] == [line for line in (1, 2, 3) if line not in left]
        assert bad[0]["reason"] == ("not_utf8" if name == "prompt" else "wrong_type")
        assert bad[0]["detail"].startswith(f"{name} must hold a value that Python has, got: ")

        columns = {key: [value] * 3 for key, value in good.items()} | {"id": ["a", "b", "c"], name: column}
        pq.write_table(pa.table(columns), tmp_path / "in.parquet")
        manifest = preprocess([tmp_path / "in.parquet"], tmp_path / f"out-{name}", **OPTIONS)
        assert manifest.counts["quarantined"] == {bad[0]["reason"]: 1} and manifest.counts["kept"] == 2


@pytest.mark.parametrize("levels", [200, 600, 900, 100_000])
def test_a_record_of_too_many_levels_is_quarantined(tmp_path: Path, tokenizer, levels: int) -> None:
    deep = "[" * levels + "]" * levels
    lines = [
        f'{{"messages": {deep}}}',
        f'{{"messages": [{{"role": "user", "content": "a", "x": {deep}}}]}}',
        f'{{"prompt": "a", "tools": [{{"name": "f", "parameters": {{"x": {deep}}}}}]}}',
        '{"prompt": "good"}',
    ]
    rows, bad = prepare(write_lines(tmp_path / "in.jsonl", *(line.encode() for line in lines)), tokenizer)
    assert levels == 200 or (len(rows), [line["reason"] for line in bad]) == (1, ["bad_json"] * 3)
    assert len(rows) + len(bad) == 4


def test_a_key_that_stands_twice_in_a_record_for_the_store(tmp_path: Path) -> None:
    good = record(id="good", note={"id": "elsewhere, once more"})
    line = json.dumps(record(seed=1)).replace('"response_ids"', '"response_ids": [1], "response_ids"')
    source = write_lines(tmp_path / "in.jsonl", good, line.encode())
    manifest = preprocess([source], tmp_path / "out", **OPTIONS)
    assert manifest.counts["kept"] == 1 and manifest.counts["quarantined"] == {"repeated_key": 1}
    assert "'response_ids' twice" in (tmp_path / "out/shard-00000/quarantine.jsonl").read_text()


def test_lists_that_repeat_a_number_are_read_some_rows_at_a_time(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": zeros([2**16] * 40 + [1] * 1000)}), tmp_path / "in.parquet", row_group_size=40)
    assert (tmp_path / "in.parquet").stat().st_size < 50_000
    with open_parquet(tmp_path / "in.parquet") as file:
        options = {"most": 1000, "usual_bytes": 2**22, "most_bytes": 2**30}
        groups = range(file.num_row_groups)
        sizes = [len(batch) for batch in read_rows(tmp_path / "in.parquet", file, row_groups=groups, **options)]
    assert sizes[:10] == [3] * 10 and max(sizes) == 40 and sum(sizes) == 1040


def test_a_row_that_takes_gigabytes_is_an_error_in_words(
    tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of 2 G zeros takes 32 GiB, and 1 kB of a file."""

    def greedy(self: pq.ParquetFile, *args: Any, **options: Any) -> Iterator[pa.RecordBatch]:
        pa.allocate_buffer(2**35)
        yield from read(self, *args, **options)

    read: Any = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", greedy)
    columns = {"prompt": ["a", "b"], "id": ["a", "b"], "prompt_ids": zeros([2, 2]), "response_ids": zeros([2, 2])}
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    for most, run in (
        (1024, lambda: prepare(tmp_path / "in.parquet", tokenizer)),
        (4096, lambda: preprocess([tmp_path / "in.parquet"], tmp_path / "out", **OPTIONS)),
    ):
        with pytest.raises(
            UserError, match=rf"row 1 of .*in\.parquet \(row 1 of row group 0\) must take at most {most} MiB as it"
        ):
            run()
        assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_the_row_that_is_too_large_is_named_and_those_that_are_only_together_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limited(self: pq.ParquetFile, *args: Any, **options: Any) -> Iterator[pa.RecordBatch]:
        for batch in iter_batches(self, *args, **options):
            if len(batch["n"].flatten()) > 100:
                raise MemoryError("malloc")
            yield batch

    def read(lengths: list[int]) -> list[int]:
        path = tmp_path / "in.parquet"
        pq.write_table(pa.table({"n": zeros(lengths)}), path, row_group_size=40)
        with open_parquet(path) as file:
            options = {"most": 1000, "usual_bytes": 2**30, "most_bytes": 2**30}
            return [len(batch) for batch in read_rows(path, file, row_groups=range(file.num_row_groups), **options)]

    iter_batches: Any = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", limited)
    assert read([2] * 40 + [3] * 40 + [1] * 7) == [40] + [1] * 40 + [7]
    with pytest.raises(UserError, match=r"row 46 of .*in\.parquet \(row 6 of row group 1\) must take .*: malloc; "):
        read([1] * 45 + [101] + [1] * 34)
