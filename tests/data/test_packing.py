"""Packing: best-fit decreasing against a naive one, the books, bytes as a function of the inputs, supervised data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_npd.audit.verify import verify_run
from megatron_npd.cli import pack as pack_tool
from megatron_npd.config.settings import PackConfig
from megatron_npd.data.packing import pack_lengths, pack_prompts, pack_rollouts, pack_selection
from megatron_npd.errors import UserError
from megatron_npd.manifest import MANIFEST, file_sha256, is_sealed, read_manifest, seal, writing
from megatron_npd.quarantine import QUARANTINE_FILE
from megatron_npd.records import PACKS_FILE, PROMPT_SCHEMA, PROMPTS_FILE, SELECTION_FILE, SELECTION_SCHEMA
from megatron_npd.store.annotation_store import AnnotationStore
from tests.helpers import VOCAB_SIZE
from tests.store.make_store import make_store
from tests.teacher.reference import make_rollouts

LENGTHS = [(5, 9), (3, 40), (10, 22), (2, 2), (8, 60), (4, 12), (1, 1), (30, 2), (6, 6)]
CFG = PackConfig(seq_length=64, segment_align=8)


def naive_best_fit(sizes: list[int], capacity: int) -> list[int]:
    """Space left in each row, sorted; one sample at a time."""
    space: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [row for row, left in enumerate(space) if left >= size]
        row = min(fitting, key=lambda row: space[row]) if fitting else len(space)
        if row == len(space):
            space.append(capacity)
        space[row] -= size
    return sorted(space)


def check_layout(lengths: np.ndarray, rows: np.ndarray, offsets: np.ndarray, seq_length: int, align: int) -> None:
    """Segments are aligned, inside their row and apart."""
    assert np.all(offsets % align == 0) and np.all(offsets + lengths <= seq_length)
    assert set(rows.tolist()) == set(range(int(rows.max()) + 1))
    order = np.lexsort((offsets, rows))
    same_row = np.diff(rows[order]) == 0
    ends = (offsets + lengths)[order]
    assert np.all(offsets[order][1:][same_row] >= ends[:-1][same_row])


@pytest.mark.parametrize("align", [1, 4])
def test_rows_are_those_of_a_naive_best_fit(align: int) -> None:
    rng = np.random.default_rng(align)
    for _ in range(150):
        capacity = int(rng.integers(1, 40))
        lengths = rng.integers(1, capacity * align + 1, rng.integers(1, 70))
        rows, offsets = pack_lengths(lengths, capacity * align, align)
        check_layout(lengths, rows, offsets, capacity * align, align)
        sizes = -(-lengths // align)
        space = np.full(int(rows.max()) + 1, capacity)
        np.subtract.at(space, rows, sizes)
        assert sorted(space.tolist()) == naive_best_fit(sizes.tolist(), capacity)


def test_a_million_lengths_fill_the_rows() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(1500) - 0.32, 0.8, 1_200_000).astype(int), 2, 32768)
    rows, offsets = pack_lengths(lengths, 32768, 16)
    check_layout(lengths, rows, offsets, 32768, 16)
    bound = -(-int((-(-lengths // 16) * 16).sum()) // 32768)
    assert int(rows.max()) + 1 <= bound * 1.0002


def test_nothing_and_whole_rows() -> None:
    rows, offsets = pack_lengths([], 64, 16)
    assert len(rows) == len(offsets) == 0
    rows, offsets = pack_lengths([64, 64, 50], 64, 16)  # 50 takes four units of 16: a row
    assert rows.tolist() == [0, 1, 2] and offsets.tolist() == [0, 0, 0]


def make_selection(path: Path, store: Path, kept: list[bool], weights: Sequence[float] | None = None) -> Path:
    ids = AnnotationStore(store).metadata("sample_id")["sample_id"].to_pylist()
    rows = [
        {
            "sample_id": name,
            "source": "student",
            "policy_version": "v0000",
            "zone": "proximal" if keep else "degenerate",
            "cut": False,
            "kept": keep,
            "reason": "" if keep else "x",
            "weight": keep * weight,
        }
        for name, keep, weight in zip(ids, kept, weights or [1.0] * len(ids), strict=True)
    ]
    with writing(path):
        pq.write_table(pa.Table.from_pylist(rows, schema=SELECTION_SCHEMA), path / SELECTION_FILE)
        seal(path, kind="selection", provenance={"annotations_sha256": file_sha256(store / MANIFEST)})
    return path


def read_packs(packs: Path) -> dict[str, list[Any]]:
    with pa.memory_map(str(packs / PACKS_FILE)) as source:
        return pa.ipc.open_file(source).read_all().to_pydict()


@pytest.fixture
def stages(tmp_path: Path) -> tuple[Path, Path]:
    store = make_store(tmp_path / "run/annotations", LENGTHS)
    kept = [True] * len(LENGTHS)
    kept[3] = False
    return store, make_selection(tmp_path / "run/selection", store, kept)


def test_kept_samples_are_packed_and_the_books_agree(stages: tuple[Path, Path], tmp_path: Path) -> None:
    manifest = pack_selection(*stages, tmp_path / "run/packs", CFG)

    table = read_packs(tmp_path / "run/packs")
    assert sorted(table["sample_index"]) == [0, 1, 2, 5, 6, 7, 8]  # 3 is not selected, 4 has 68 tokens
    assert table["prompt_len"] == [LENGTHS[index][0] for index in table["sample_index"]]
    assert table["length"] == [sum(LENGTHS[index]) for index in table["sample_index"]]
    assert list(zip(table["row"], table["offset"], strict=True)) == sorted(
        zip(table["row"], table["offset"], strict=True)
    )
    rows, offsets, lengths = (np.array(table[name]) for name in ("row", "offset", "length"))
    check_layout(lengths, rows, offsets, 64, 8)
    counts = manifest.counts
    assert counts["in"] == 8 and counts["kept"] == 7 and counts["quarantined"] == {"too_long": 1}
    assert counts["tokens"] == sum(table["length"]) and counts["rows"] == max(table["row"]) + 1
    quarantine = (tmp_path / "run/packs" / QUARANTINE_FILE).read_text().splitlines()
    assert [json.loads(line) for line in quarantine] == [{"sample_id": "s000004", "reason": "too_long"}]
    assert manifest.provenance["store"] == "../annotations"
    assert manifest.provenance["policy_version"] == "v0000" and manifest.provenance["top_k"] == 4


def test_bytes_are_a_function_of_the_inputs(stages: tuple[Path, Path], tmp_path: Path) -> None:
    pack_selection(*stages, tmp_path / "run/packs", CFG)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/packs")
    pack_selection(tmp_path / "copy/annotations", tmp_path / "copy/selection", tmp_path / "copy/packs", CFG)

    for name in (PACKS_FILE, MANIFEST, QUARANTINE_FILE):
        assert (tmp_path / "run/packs" / name).read_bytes() == (tmp_path / "copy/packs" / name).read_bytes()


def test_a_second_call_changes_nothing_and_another_shape_is_refused(stages: tuple[Path, Path], tmp_path: Path) -> None:
    first = pack_selection(*stages, tmp_path / "packs", CFG)
    stamp = (tmp_path / "packs" / PACKS_FILE).stat().st_mtime_ns
    assert pack_selection(*stages, tmp_path / "packs", CFG) == first
    assert (tmp_path / "packs" / PACKS_FILE).stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="seq_length"):
        pack_selection(*stages, tmp_path / "packs", PackConfig(seq_length=128, segment_align=8))


def test_a_selection_of_another_store_or_of_nothing_is_refused(stages: tuple[Path, Path], tmp_path: Path) -> None:
    store, _ = stages
    other = make_store(tmp_path / "other", LENGTHS[:-1])
    with pytest.raises(UserError, match=r"must be selected from .* as it is now, got another"):
        pack_selection(store, make_selection(tmp_path / "sel_other", other, [True] * 8), tmp_path / "p", CFG)
    with pytest.raises(UserError, match="leave samples to pack"):
        pack_selection(store, make_selection(tmp_path / "sel_none", store, [False] * 9), tmp_path / "p", CFG)
    assert not is_sealed(tmp_path / "p")


def test_without_a_selection_all_samples_are_packed(stages: tuple[Path, Path], tmp_path: Path) -> None:
    annotations, _ = stages
    out = tmp_path / "run/packs"
    pack_tool.main(["--annotations", str(annotations), "--out", str(out), "--seq-length", "64", "--segment-align", "8"])
    assert read_manifest(out).counts["kept"] == 8 and read_manifest(out).counts["quarantined"] == {"too_long": 1}


def make_prompts(path: Path, prompts: list[tuple[list[int], list[int] | None]]) -> Path:
    rows: list[dict[str, Any]] = [
        {
            "prompt_id": f"p{index}",
            "prompt_ids": prompt,
            "generation_prompt_len": 0,
            "response_ids": response,
            "extras": "{}",
        }
        for index, (prompt, response) in enumerate(prompts)
    ]
    with writing(path):
        pq.write_table(pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA), path / PROMPTS_FILE)
        seal(path, kind="prompts")
    return path


def test_supervised_data_becomes_a_store_of_tokens_and_packs(tmp_path: Path) -> None:
    data = [([1, 2, 3], [4, 5]), ([6], None), ([7], [8] * 70), ([9], [10]), ([9], [50])]
    prompts = make_prompts(tmp_path / "prompts", data)

    manifest = pack_prompts(prompts, tmp_path / "out", CFG, vocab_size=50)

    store = AnnotationStore(tmp_path / "out/store")
    assert store.top_k == 0
    assert store.manifest.counts["quarantined"] == {"no_response": 1, "token_outside_vocabulary": 1}
    assert "token 50, but the embedding" in (tmp_path / "out/store" / QUARANTINE_FILE).read_text()
    assert [store.tokens(index).tolist() for index in (0, 2)] == [[1, 2, 3, 4, 5], [9, 10]]
    assert np.isnan(store.metadata("teacher_loss")["teacher_loss"].to_numpy()).all()
    assert '"p1"' in (tmp_path / "out/store" / QUARANTINE_FILE).read_text()
    assert manifest.counts["in"] == 3 and manifest.counts["quarantined"] == {"too_long": 1}
    assert manifest.provenance["store"] == "../store" and manifest.provenance["policy_version"] == "data"

    shutil.rmtree(tmp_path / "out/packs")  # killed between the two directories: the store is not made again
    stamp = (tmp_path / "out/store" / MANIFEST).stat().st_mtime_ns
    assert pack_prompts(prompts, tmp_path / "out", CFG, vocab_size=50) == manifest
    assert (tmp_path / "out/store" / MANIFEST).stat().st_mtime_ns == stamp


def test_prompts_without_responses_or_with_foreign_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prompts with responses"):
        pack_prompts(make_prompts(tmp_path / "none", [([1], None)]), tmp_path / "a", CFG, vocab_size=50)
    with pytest.raises(UserError, match="got none, but quarantined: 1 token_outside_vocabulary"):
        pack_prompts(make_prompts(tmp_path / "ids", [([1], [50])]), tmp_path / "b", CFG, vocab_size=50)
    assert not is_sealed(tmp_path / "a/store") and not is_sealed(tmp_path / "b/store")


def test_the_tool_packs_a_file_of_prompts(tmp_path: Path, tiny_model_dir: Path) -> None:
    source = tmp_path / "problems.jsonl"
    records = [{"prompt": "How many apples?", "response": "#### 3"}, {"prompt": "And pens?"}]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = [
        "--prompts",
        str(source),
        "--hf-model",
        str(tiny_model_dir),
        "--out",
        str(tmp_path / "out"),
        "--seq-length",
        "128",
    ]

    pack_tool.main(arguments)
    pack_tool.main(arguments)  # rerunning is fine

    manifest = read_manifest(tmp_path / "out/packs", kind="packs")
    assert (manifest.counts["kept"], manifest.provenance["vocab_size"]) == (1, VOCAB_SIZE)
    assert AnnotationStore(tmp_path / "out/store").tokens(0)[-1] == 2  # the answer's stop token


def test_the_tool_wants_one_pair_of_inputs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one pair"):
        pack_tool.main(["--out", str(tmp_path), "--annotations", "a", "--prompts", "p"])


def test_rollouts_that_nobody_scores_are_packed_and_every_book_balances(tmp_path: Path) -> None:
    lengths = [(5, 9), (3, 20), (10, 22), (2, 2), (4, 12), (1, 1)]
    finish = ["stop", "length", "stop", "stop", "stop", "stop"]
    sources = ["student"] * 4 + ["teacher"] * 2
    columns = {"finish_reason": finish, "copies": [1, 2, 1, 1, 1, 1], "source": sources}
    make_rollouts(tmp_path / "rollouts", lengths, **columns)
    cfg = PackConfig(seq_length=32, segment_align=8)
    manifest = pack_rollouts(tmp_path / "rollouts", tmp_path, cfg, vocab_size=300)
    assert manifest.counts["kept"] == 6 and manifest.provenance["policy_version"] == "v0003"
    assert manifest == pack_rollouts(tmp_path / "rollouts", tmp_path, cfg, vocab_size=300)
    pack_rollouts(tmp_path / "rollouts", tmp_path / "again", cfg, vocab_size=300)
    for file in (tmp_path / "packs/packs.arrow", *sorted((tmp_path / "store").rglob("*.*"))):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(tmp_path)).read_bytes()

    store = AnnotationStore(tmp_path / "store")
    assert (store.top_k, store.round, store.vocab_size) == (0, 3, 300)
    rows = pa.concat_tables(pq.read_table(shard) for shard in sorted((tmp_path / "rollouts").glob("*/*.parquet")))
    for index, row in enumerate(rows.to_pylist()):
        assert store.tokens(index).tolist() == row["prompt_ids"] + row["response_ids"]
        on_distribution = index % 2 == 0 and row["source"] == "student"  # odd samples are greedy
        expected = row["logprobs"] if on_distribution else [np.nan] * len(row["logprobs"])
        np.testing.assert_array_equal(store.generator(index), np.array(expected, np.float32))
    samples = store.metadata("source", "policy_version", "finish_reason", "copies", "student_loss").to_pydict()
    assert samples["source"] == sources and samples["finish_reason"] == finish
    assert samples["student_loss"][0] == pytest.approx(-np.mean(rows["logprobs"][0].as_py()))
    packs = read_packs(tmp_path / "packs")
    weights = dict(zip(packs["sample_index"], packs["weight"], strict=True))
    assert weights[1] == pytest.approx(2 * weights[0])  # it stands for two identical responses
    lens = [length for _, length in lengths]
    assert sum(weights[i] * lens[i] for i in range(6)) == pytest.approx(sum(lens))

    result = verify_run(tmp_path, full=True)
    assert not result.problems and "store" in {row[0] for row in result.rows}


def test_rollouts_with_ids_that_the_model_does_not_know_are_set_aside_or_refused(tmp_path: Path) -> None:
    responses = [[3, 4], [5, 350], [6]]
    columns = {"response_ids": responses, "logprobs": [[-1.0] * len(ids) for ids in responses]}
    make_rollouts(tmp_path / "rollouts", [(5, 2), (5, 2), (5, 1)], **columns)
    cfg = PackConfig(seq_length=32, segment_align=8)
    with pytest.raises(UserError, match="1 token_outside_vocabulary"):
        pack_rollouts(tmp_path / "rollouts", tmp_path, cfg, vocab_size=300)
    pack_rollouts(tmp_path / "rollouts", tmp_path, cfg, vocab_size=300, max_quarantined=0.5)
    assert read_manifest(tmp_path / "store").counts["quarantined"] == {"token_outside_vocabulary": 1}
    assert not verify_run(tmp_path).problems
    with pytest.raises(UserError, match="got none of 3"):
        pack_rollouts(tmp_path / "rollouts", tmp_path / "none", cfg, vocab_size=3)
