"""The annotation store: round trip, megatron-core's own reader, checks at the door, damage."""

from __future__ import annotations

import errno
import gc
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_npd.errors import UserError
from megatron_npd.manifest import MANIFEST, seal, writing
from megatron_npd.records import LOG_TAIL_FLOOR, SAMPLES_FILE, teacher_record_dtype
from megatron_npd.store.annotation_store import AnnotationStore, StoreShardWriter
from megatron_npd.store.streams import undefined_logprobs
from megatron_npd.store.teacher_records import check_teacher_records
from tests.helpers import failing
from tests.store.make_store import VOCAB_SIZE, make_generator, make_records, make_store

LENGTHS = [(4, 3), (1, 1), (7, 12), (2, 5), (3, 1)]


def test_file_systems_without_mmap_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_store(tmp_path / "store", LENGTHS, shards=1)
    monkeypatch.setattr(pa, "memory_map", failing(errno.ENODEV))
    with pytest.raises(UserError, match=r"tokens\.idx must be on a file system with mmap, got .*No such device; copy"):
        AnnotationStore(path)


@pytest.mark.parametrize("top_k", [0, 1, 3, 10, VOCAB_SIZE])
def test_what_is_written_is_read(tmp_path: Path, top_k: int) -> None:
    written_tokens, written = [], []
    rng = np.random.default_rng(1)
    with writing(tmp_path / "store") as path:
        for shard in range(2):
            with writing(path / f"shard-{shard:05d}") as directory:
                writer = StoreShardWriter(directory, top_k, vocab_size=VOCAB_SIZE)
                for prompt_len, response_len in LENGTHS:
                    written_tokens.append(rng.integers(0, VOCAB_SIZE, prompt_len + response_len))
                    written.append({"generator": make_generator(rng, response_len)})
                    if top_k:
                        written[-1]["teacher"] = make_records(rng, response_len, top_k)
                    writer.add(written_tokens[-1], **written[-1])
                writer.finalize()
                rows = pq.read_table(
                    make_store(tmp_path / f"rows{shard}", LENGTHS, shards=1) / "shard-00000/samples.parquet"
                )
                pq.write_table(rows, directory / SAMPLES_FILE)
                seal(directory, kind="annotations-shard")
        meta = {"top_k": top_k, "vocab_size": VOCAB_SIZE, "round": 3, "policy_version": "v0003"}
        seal(path, kind="annotations", provenance=meta)

    store = AnnotationStore(tmp_path / "store")

    assert (len(store), store.top_k, store.vocab_size) == (10, top_k, VOCAB_SIZE)
    assert (store.round, store.policy_version) == (3, "v0003")
    assert store.prompt_lens.tolist() == 2 * [prompt for prompt, _ in LENGTHS]
    assert store.response_lens.tolist() == 2 * [response for _, response in LENGTHS]
    for index in range(10):
        np.testing.assert_array_equal(store.tokens(index), written_tokens[index])
        assert store.generator(index).tobytes() == written[index]["generator"].tobytes()
        if top_k:
            assert store.teacher(index).tobytes() == written[index]["teacher"].tobytes()
    assert (tmp_path / "store/shard-00000/generator.bin").exists()
    assert (tmp_path / "store/shard-00000/teacher.bin").exists() == (top_k > 0)


def test_megatron_reads_the_pairs_and_a_record_has_64_bytes(tmp_path: Path) -> None:
    path = make_store(tmp_path / "store", LENGTHS, top_k=10, shards=1)
    store = AnnotationStore(path)
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    names = ("tokens", "teacher", "generator")
    tokens, teacher, generator = (IndexedDataset(str(path / "shard-00000" / name)) for name in names)

    assert (tokens.index.dtype, teacher.index.dtype, generator.index.dtype) == (np.int32, np.uint16, np.float32)
    assert len(tokens.document_indices) == len(LENGTHS) + 1
    for index, (_, response_len) in enumerate(LENGTHS):
        np.testing.assert_array_equal(tokens[index], store.tokens(index))
        records = np.asarray(teacher[index])
        assert records.nbytes == 64 * response_len
        np.testing.assert_array_equal(records.view(teacher_record_dtype(10)), store.teacher(index))
        assert not store.teacher(index)["reserved"].any()
        np.testing.assert_array_equal(generator[index], store.generator(index))


def test_metadata_covers_all_shards_and_empty_ones(tmp_path: Path) -> None:
    store = AnnotationStore(make_store(tmp_path / "store", LENGTHS, shards=7))

    assert store.metadata("sample_id", "path").column_names == ["sample_id", "path"]
    assert store.metadata("sample_id")["sample_id"].to_pylist() == [f"s{index:06d}" for index in range(5)]
    assert len(store.tokens(4)) == 4


def test_an_open_store_holds_no_file_and_no_memory_by_the_sample(tmp_path: Path) -> None:
    """The ranks of a machine share what is mapped, and file descriptors are fewer than shards may be."""
    path = make_store(tmp_path / "store", [(1, 1)] * 4000, shards=4)
    AnnotationStore(path)  # imports, caches
    gc.collect()  # an earlier test's files are not to be closed in between
    before = len(os.listdir("/proc/self/fd"))
    tracemalloc.start()
    store = AnnotationStore(path, verify=False)
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(store) == 4000 and len(os.listdir("/proc/self/fd")) == before
    assert held < 10 * 4000  # a few kB per shard; lengths and starts alone would be 24 bytes per sample


def test_slices_stay_valid_after_the_store_is_gone(tmp_path: Path) -> None:
    store = AnnotationStore(make_store(tmp_path / "store", LENGTHS))
    tokens, records = store.tokens(2), store.teacher(2)
    before = tokens.copy(), records.copy()
    del store
    gc.collect()

    np.testing.assert_array_equal(tokens, before[0])
    np.testing.assert_array_equal(records, before[1])


def _set(field: str, where: tuple[int, ...] | int, value: float) -> Callable[[np.ndarray], None]:
    def change(records: np.ndarray) -> None:
        records[field][where] = value

    return change


def _swap(records: np.ndarray) -> None:
    records["logprobs"][1] = records["logprobs"][1, ::-1]


BROKEN = {
    "id too large": (_set("ids", (0, 1), VOCAB_SIZE), "token ids"),
    "id negative": (_set("ids", (0, 1), -1), "token ids"),
    "id twice": (lambda records: records["ids"].__setitem__((1, 0), records["ids"][1, 1]), "distinct"),
    "nan": (_set("logprobs", (1, 2), np.nan), "finite"),
    "-inf": (_set("logprobs", (1, 3), -np.inf), "finite"),
    "above 0": (_set("logprobs", (1, 0), 0.01), "<= 0"),
    "rising": (_swap, "descending"),
    "tail 0": (_set("log_tail", 1, 0.0), "log_tail"),
    "tail nan": (_set("log_tail", 1, np.nan), "log_tail"),
    "tail below its floor": (_set("log_tail", 1, LOG_TAIL_FLOOR - 1), "log_tail"),
    "mass above 1": (_set("log_tail", 1, -1e-3), "mass"),
    "mass below 1": (_set("log_tail", 1, LOG_TAIL_FLOOR), "mass"),
    "vLLM's word for -inf": (_set("logprobs", (1, 3), -9999.0), "above -9999"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record_is_refused_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    change, message = BROKEN[name]
    writer = StoreShardWriter(tmp_path, 4, vocab_size=VOCAB_SIZE)
    records, generator = make_records(np.random.default_rng(0), 3, 4), np.full(3, -1.0, np.float32)
    writer.add(np.arange(5), teacher=records, generator=generator)
    broken = records.copy()
    change(broken)

    with pytest.raises(UserError, match=message):
        writer.add(np.arange(5), teacher=broken, generator=generator)
    writer.finalize()

    assert writer.num_samples == 1
    assert (tmp_path / "tokens.bin").stat().st_size == 5 * 4
    assert (tmp_path / "teacher.bin").stat().st_size == records.nbytes


@pytest.mark.parametrize("value", [0.5, -9999.0, -np.inf, np.inf])
def test_a_generator_log_prob_that_no_model_gives_is_refused_and_leaves_nothing(tmp_path: Path, value: float) -> None:
    writer = StoreShardWriter(tmp_path, 0, vocab_size=VOCAB_SIZE)
    writer.add(np.arange(5), generator=np.array([-1.0, np.nan, 0.0], np.float32))  # NaN: no lag is defined
    with pytest.raises(UserError, match=r"generator log-probs must be above -9999"):
        writer.add(np.arange(5), generator=np.array([-1.0, value, 0.0], np.float32))
    writer.finalize()

    assert writer.num_samples == 1
    assert (tmp_path / "tokens.bin").stat().st_size == 5 * 4
    assert (tmp_path / "generator.bin").stat().st_size == 3 * 4


def test_every_stream_has_an_item_per_response_token(tmp_path: Path) -> None:
    writer = StoreShardWriter(tmp_path, 4, vocab_size=VOCAB_SIZE)
    records = make_records(np.random.default_rng(0), 3, 4)
    with pytest.raises(UserError, match="2 records of the generator"):
        writer.add(np.arange(5), teacher=records, generator=np.full(2, -1.0, np.float32))
    assert writer.num_samples == 0


def test_a_store_opened_for_some_streams_maps_no_other_file(tmp_path: Path) -> None:
    path = make_store(tmp_path / "store", LENGTHS)
    maps = Path("/proc/self/maps").read_text
    store = AnnotationStore(path, streams=("generator",))
    assert store.generator(0).shape == (3,) and str(path / "shard-00000/generator.bin") in maps()
    assert str(path / "shard-00000/teacher") not in maps()
    store = AnnotationStore(path)
    assert str(path / "shard-00000/teacher.bin") in maps()


def test_fp16_rounding_of_a_wide_uniform_teacher_is_no_error() -> None:
    records = np.zeros(1, teacher_record_dtype(3000))
    records["ids"], records["logprobs"], records["log_tail"] = np.arange(3000), -np.log(3000), LOG_TAIL_FLOOR
    mass = np.exp(records["logprobs"].astype(np.float64)).sum()
    assert abs(mass - 1) > 1e-3  # the rounding of -8.006 alone

    check_teacher_records(records, 3000, "here")


@pytest.mark.parametrize(
    ("tokens", "records", "message"),
    [
        ([1, VOCAB_SIZE], 1, "token ids"),
        ([1, -1], 1, "token ids"),
        ([1], 1, "prompt and a response"),
        ([1, 2], 2, "record per response token"),
        ([1, 2], 0, "record per response token"),
    ],
)
def test_a_sample_of_the_wrong_shape_is_refused(tmp_path: Path, tokens: list[int], records: int, message: str) -> None:
    writer = StoreShardWriter(tmp_path, 4, vocab_size=VOCAB_SIZE)
    with pytest.raises(UserError, match=message):
        streams: dict[str, Any] = {
            "teacher": make_records(np.random.default_rng(0), records, 4),
            "generator": undefined_logprobs(records),
        }
        writer.add(np.array(tokens), **streams)
    assert writer.num_samples == 0


def test_top_k_is_at_most_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="top_k must be in"):
        StoreShardWriter(tmp_path, VOCAB_SIZE + 1, vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize(
    "file",
    ["tokens.bin", "teacher.bin", "generator.bin", "tokens.idx", "teacher.idx", "generator.idx", "samples.parquet"],
)
def test_a_flipped_bit_or_a_cut_file_is_refused(tmp_path: Path, file: str) -> None:
    for name in ("flipped", "cut"):
        path = make_store(tmp_path / name, LENGTHS)
        target = path / "shard-00001" / file
        content = bytearray(target.read_bytes())
        if name == "flipped":
            content[len(content) // 2] ^= 1
        else:
            content = content[:-2]
        target.write_bytes(content)

        with pytest.raises(UserError, match=file):
            AnnotationStore(path)


def test_samples_of_another_shard_are_refused(tmp_path: Path) -> None:
    path = make_store(tmp_path / "store", LENGTHS, shards=1)
    other = make_store(tmp_path / "other", [(4, 3), (1, 1), (7, 11), (2, 6), (3, 1)], shards=1)
    shard = path / "shard-00000"
    (shard / SAMPLES_FILE).write_bytes((other / "shard-00000" / SAMPLES_FILE).read_bytes())
    (shard / MANIFEST).unlink()
    seal(shard, kind="annotations-shard")
    meta = json.loads((path / MANIFEST).read_text())["provenance"]
    (path / MANIFEST).unlink()
    seal(path, kind="annotations", provenance=meta)

    with pytest.raises(UserError, match="agree"):
        AnnotationStore(path)


def test_an_unsealed_or_foreign_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sealed"):
        AnnotationStore(tmp_path)
    with pytest.raises(UserError, match="must hold annotations"):
        AnnotationStore(make_store(tmp_path / "store", LENGTHS) / "shard-00000")
    with pytest.raises(UserError, match="vocab_size"):
        AnnotationStore(make_store(tmp_path / "no_vocab", LENGTHS, provenance={"vocab_size": None}))
