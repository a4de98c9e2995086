"""What the files of one sealed directory hold, counted and looked at by kind; ``verify.py`` compares it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_npd.data.row_schedule import PACKS_KIND
from megatron_npd.log import UserError
from megatron_npd.manifest import read_manifest
from megatron_npd.quarantine import QUARANTINE_FILE
from megatron_npd.records import PACKS_FILE, PROMPTS_FILE, ROLLOUTS_FILE, SAMPLES_FILE, SELECTION_FILE, defined_logprobs
from megatron_npd.store.annotation_store import SHARD_KIND, AnnotationStore, check_token_ids
from megatron_npd.store.streams import STREAMS, stream_items


@dataclass(kw_only=True)
class Books:
    """What was found of a stage: ids of kept samples, (id, reason) of those quarantined, and further sums."""

    kept: list[str] = field(default_factory=list)
    aside: list[tuple[str, str]] = field(default_factory=list)
    sums: Counter[str] = field(default_factory=Counter)

    def __iadd__(self, other: Books) -> Books:
        self.kept += other.kept
        self.aside += other.aside
        self.sums.update(other.sums)
        return self

    def reasons(self) -> dict[str, int]:
        """How many were quarantined, by reason."""
        return dict(sorted(Counter(reason for _, reason in self.aside).items()))


def set_aside(path: Path) -> list[tuple[str, str]]:
    """(id, reason) of each line of a quarantine file; "" where a record has no id yet."""
    file = path / QUARANTINE_FILE
    if not file.is_file():
        return []
    entries = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [(entry.get("sample_id", entry.get("prompt_id", "")), entry["reason"]) for entry in entries]


def _columns(file: Path, *names: str) -> list[pa.ChunkedArray]:
    return pq.read_table(file, columns=list(names)).columns


def _count_prompts(path: Path, books: Books) -> None:
    books.kept += _columns(path / PROMPTS_FILE, "prompt_id")[0].to_pylist()


def _count_rollouts(path: Path, books: Books) -> None:
    ids, responses, finish = _columns(path / ROLLOUTS_FILE, "sample_id", "response_ids", "finish_reason")
    books.kept += ids.to_pylist()
    books.sums["tokens"] += len(responses.combine_chunks().flatten())
    books.sums["stopped"] += finish.to_pylist().count("stop")


def _count_samples(path: Path, books: Books) -> None:
    ids, lengths = _columns(path / SAMPLES_FILE, "sample_id", "response_len")
    books.kept += ids.to_pylist()
    books.sums["response_tokens"] += int(lengths.to_numpy().sum())


def _count_selection(path: Path, books: Books) -> None:
    ids, kept, reasons = (
        column.to_pylist() for column in _columns(path / SELECTION_FILE, "sample_id", "kept", "reason")
    )
    books.kept += [identity for identity, keep in zip(ids, kept, strict=True) if keep]
    books.aside += [(identity, why) for identity, keep, why in zip(ids, kept, reasons, strict=True) if not keep]


def _count_packs(path: Path, books: Books) -> None:
    with pa.memory_map(str(path / PACKS_FILE)) as source:
        table = pa.ipc.open_file(source).read_all()
    store = AnnotationStore(path / read_manifest(path, verify=False).provenance["store"], verify=False)
    books.kept += store.metadata("sample_id")["sample_id"].take(table["sample_index"]).to_pylist()
    books.sums["rows"] += int(table["row"].to_numpy().max(initial=-1)) + 1
    books.sums["tokens"] += int(table["length"].to_numpy().sum())


# Kind of a directory -> what adds the samples of its own files to the books.
RECOUNTS: dict[str, Callable[[Path, Books], None]] = {
    "prompts": _count_prompts,
    "rollouts-shard": _count_rollouts,
    SHARD_KIND: _count_samples,
    "selection": _count_selection,
    PACKS_KIND: _count_packs,
}


def check_rollouts(path: Path) -> None:
    """Look at every number of a shard of rollouts; raise UserError for what no model gives."""
    responses, logprobs = _columns(path / ROLLOUTS_FILE, "response_ids", "logprobs")
    ids, values = (column.combine_chunks().flatten().to_numpy() for column in (responses, logprobs))
    lengths = [column.combine_chunks().value_lengths().to_numpy() for column in (responses, logprobs)]
    if not np.array_equal(*lengths) or not (lengths[0] > 0).all():
        raise UserError("responses without tokens, or with more or fewer log-probabilities than tokens")
    if ids.min(initial=0) < 0 or not defined_logprobs(values).all():
        raise UserError("token ids below 0, or log-probabilities that no model gives")


def check_store_shard(path: Path, store: AnnotationStore) -> None:
    """Look at every token and every item of a shard of a store; raise UserError for what no model gives."""
    for name, item in {"tokens": np.dtype("<i4"), **stream_items(store.top_k)}.items():
        if (file := path / f"{name}.bin").stat().st_size:
            check = check_token_ids if name == "tokens" else STREAMS[name].check
            check(np.memmap(file, dtype=item, mode="r"), store.vocab_size, str(file))
