"""Parquet files in parts."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_npd.records import parquet_batches


def test_a_file_of_many_row_groups_is_not_kept_while_it_is_read(tmp_path: Path) -> None:
    table = pa.table({"number": range(640), "text": [f"{n:5d}" * 4000 for n in range(640)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=16, use_dictionary=False)  # 40 of 320 kB
    numbers, most, before = [], 0, pa.total_allocated_bytes()
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        for batch in parquet_batches(file, 10):
            numbers += batch["number"].to_pylist()
            most = max(most, pa.total_allocated_bytes() - before)
        assert numbers == list(range(640)) and most < 3_000_000
        some = list(parquet_batches(file, 10, columns=["number"], row_groups=[1, 3]))
    assert [batch.num_rows for batch in some] == [10, 6, 10, 6] and some[0].schema.names == ["number"]
    assert some[2]["number"][0].as_py() == 48
