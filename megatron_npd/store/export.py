"""A store written as one Parquet file that any tool reads, and that ``store/preprocess.py`` reads back."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_npd.durable import fsync_path
from megatron_npd.errors import UserError
from megatron_npd.log import progress
from megatron_npd.manifest import is_sealed
from megatron_npd.records import SAMPLE_SCHEMA
from megatron_npd.store.annotation_store import AnnotationStore

_BATCH = 64  # samples of a row group


def export_schema(top_k: int) -> pa.Schema:
    """Columns of the file: those of ``records.SAMPLE_SCHEMA``, tokens, and the teacher's records as fp32 numbers.

    ``top_ids`` and ``top_logprobs`` hold a list of ``top_k`` for each response token, most probable first;
    ``log_tail`` the log of the mass outside them; ``generator_logprobs`` is null where the policy lag is not defined.
    """
    ids, floats = pa.list_(pa.int32()), pa.list_(pa.float32())
    fields = [field for field in SAMPLE_SCHEMA if field.name not in ("prompt_len", "response_len")]
    fields += [pa.field("prompt_ids", ids, nullable=False), pa.field("response_ids", ids, nullable=False)]
    fields += [pa.field("generator_logprobs", floats)]
    if top_k:
        fields += [
            pa.field("top_ids", pa.list_(pa.list_(pa.int32(), top_k)), nullable=False),
            pa.field("top_logprobs", pa.list_(pa.list_(pa.float32(), top_k)), nullable=False),
            pa.field("log_tail", floats, nullable=False),
        ]
    return pa.schema(fields)


def export_store(annotations_dir: str | Path, out_file: str | Path, samples: Iterable[int] | None = None) -> int:
    """Write samples of a sealed store to a Parquet file, which appears when it is whole.

    Args:
        annotations_dir: The store.
        out_file: A ``.parquet`` file; one that is there is replaced.
        samples: Indices into the store; None: all of them.

    Returns:
        Samples written.

    Raises:
        UserError: The store is damaged, or ``out_file`` has another ending.
    """
    out_file = Path(out_file)
    if out_file.suffix != ".parquet":
        raise UserError(f"the file to export to must end in .parquet, got {out_file}; rename it")
    store = AnnotationStore(annotations_dir)
    chosen = list(range(len(store)) if samples is None else samples)
    schema = export_schema(store.top_k)
    names = [name for name in SAMPLE_SCHEMA.names if name in schema.names]
    part = out_file.with_name(f".{out_file.name}.part")
    with pq.ParquetWriter(part, schema) as writer, progress(len(chosen), "export", "sample") as bar:
        for _, run in groupby(chosen, store.shard):  # all metadata at once could pass what a column can hold
            own = list(run)
            ((_, metadata),) = store.rows(np.array(own), *names)
            for start in range(0, len(own), _BATCH):
                batch = own[start : start + _BATCH]
                table = metadata.slice(start, len(batch))
                columns = {name: table[name] for name in names} | _columns(store, batch)
                writer.write_table(pa.table([columns[name] for name in schema.names], schema=schema))
                bar.update(len(batch))
    fsync_path(part)
    os.replace(part, out_file)
    return len(chosen)


def find_annotations(path: str | Path, round_index: int | None = None) -> Path:
    """The annotations directory that ``path`` is, or that of a run's round; None: the last that is annotated.

    Raises:
        UserError: There is none.
    """
    path = Path(path)
    if is_sealed(path) and round_index is None:
        return path
    name = "*" if round_index is None else f"{round_index:04d}"
    sealed = sorted(entry for entry in path.glob(f"rounds/{name}/annotations") if is_sealed(entry))
    if not sealed:
        wanted = "a round" if round_index is None else f"round {round_index}"
        raise UserError(f"{path} must hold annotations of {wanted}, got none that are sealed; check the path")
    return sealed[-1]


def _columns(store: AnnotationStore, batch: list[int]) -> dict[str, pa.Array]:
    tokens = [store.tokens(index) for index in batch]
    prompt_lens = [int(store.prompt_lens[index]) for index in batch]
    generator = [store.generator(index) for index in batch]
    undefined = np.array([bool(np.isnan(values).all()) for values in generator])
    columns = {
        "generator_logprobs": _lists(generator, undefined),
        "prompt_ids": _lists([ids[:length] for ids, length in zip(tokens, prompt_lens, strict=True)]),
        "response_ids": _lists([ids[length:] for ids, length in zip(tokens, prompt_lens, strict=True)]),
    }
    if not store.top_k:
        return columns
    records = [store.teacher(index) for index in batch]
    return columns | {
        "top_ids": _lists([part["ids"] for part in records]),
        "top_logprobs": _lists([part["logprobs"].astype(np.float32) for part in records]),
        "log_tail": _lists([part["log_tail"].astype(np.float32) for part in records]),
    }


def _lists(parts: list[np.ndarray], null: np.ndarray | None = None) -> pa.Array:
    """A column of one list a sample, of numbers or of fixed rows of numbers."""
    joined = np.concatenate(parts)
    values = pa.array(joined.reshape(-1))
    if joined.ndim == 2:
        values = pa.FixedSizeListArray.from_arrays(values, joined.shape[1])
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=None if null is None else pa.array(null))
