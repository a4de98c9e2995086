"""The packed data set against a slow reference, its order, its streams, and what it refuses."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_npd.config.settings import PackConfig
from megatron_npd.data.batch import PackedBatch
from megatron_npd.data.packed_dataset import PackedDataset, PackedRows, Streams
from megatron_npd.data.packed_dataset import make_batch as make_host_batch
from megatron_npd.data.packing import pack_prompts, pack_selection
from megatron_npd.data.row_schedule import ScheduleEntry, load_schedule, schedule_text
from megatron_npd.errors import UserError
from megatron_npd.manifest import read_manifest
from megatron_npd.models.zigzag import ContextShare
from megatron_npd.records import PACKS_FILE, teacher_record_dtype
from megatron_npd.store.annotation_store import AnnotationStore
from tests.data.test_packing import make_prompts, make_selection
from tests.helpers import present
from tests.store.make_store import VOCAB_SIZE, decode_teacher, make_records, make_store

LENGTHS = [(5, 9), (3, 40), (10, 22), (2, 2), (4, 12), (1, 1), (30, 2), (6, 6), (1, 63), (7, 4), (2, 11)]
CFG = PackConfig(seq_length=64, segment_align=8)
ALL, NO_TEACHER = Streams(), Streams(teacher=False)


def make_batch(rows: list[tuple[PackedRows, int]]) -> PackedBatch:
    return make_host_batch(rows).to("cpu")


def make_packs(root: Path, *, top_k: int = 4, seed: int = 0, cfg: PackConfig = CFG, lengths=LENGTHS) -> Path:
    store = make_store(root / "annotations", lengths, top_k=top_k, seed=seed)
    selection = make_selection(root / "selection", store, [True] * len(lengths))
    pack_selection(store, selection, root / "packs", cfg)
    return root / "packs"


@pytest.mark.parametrize("top_k", [1, 3, 4, VOCAB_SIZE])
def test_a_batch_equals_a_reference_built_token_by_token(tmp_path: Path, top_k: int) -> None:
    packs = PackedRows(make_packs(tmp_path, top_k=top_k), streams=ALL)
    store = AnnotationStore(tmp_path / "annotations")
    seen = []
    for row in range(len(packs)):
        batch = make_batch([(packs, row)])
        assert batch.tokens is not None and batch.labels is not None and batch.loss_mask is not None
        assert batch.teacher_ids is not None and batch.teacher_logprobs is not None
        assert batch.teacher_log_tail is not None and batch.generator_logprobs is not None
        assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == batch.position_ids.shape == (1, 64)
        assert batch.teacher_ids.shape == batch.teacher_logprobs.shape == (64, top_k)
        assert (batch.tokens.dtype, batch.teacher_ids.dtype, batch.cu_seqlens.dtype) == (torch.int64,) + (
            torch.int32,
        ) * 2
        mask = torch.zeros(64)
        starts = []
        for offset, _, _, sample, _ in packs.segments(row):
            seen.append(sample)
            starts.append(offset)
            prompt_len, response_len = LENGTHS[sample]
            tokens, records = store.tokens(sample), store.teacher(sample)
            for place, token in enumerate(tokens):
                assert batch.tokens[0, offset + place] == token
                assert batch.position_ids[0, offset + place] == place
            for i in range(response_len):
                at = offset + prompt_len - 1 + i
                mask[at] = 1
                assert batch.labels[0, at] == tokens[prompt_len + i]
                assert batch.teacher_ids[at].tolist() == records["ids"][i].tolist()
                stored = torch.from_numpy(records["logprobs"][i].astype(np.float64)).softmax(0).log()
                kept = np.log(-np.expm1(np.float64(records["log_tail"][i])))
                torch.testing.assert_close(batch.teacher_logprobs[at].double(), stored + kept, atol=2e-6, rtol=1e-6)
                assert batch.teacher_log_tail[at] == np.float32(records["log_tail"][i])
                assert batch.generator_logprobs[at] == store.generator(sample)[i]
        assert torch.equal(batch.loss_mask[0], mask)
        _check_segments(batch.cu_seqlens, batch.max_seqlen, batch.position_ids, starts)
        unused = batch.loss_mask[0] == 0
        assert torch.all(batch.labels[0, unused] == 0) and torch.all(batch.generator_logprobs[unused].isnan())
        assert all(len(set(ids)) == top_k for ids in batch.teacher_ids.tolist())
        mass = batch.teacher_logprobs.double().exp().sum(1) + batch.teacher_log_tail.double().exp()
        torch.testing.assert_close(mass, torch.ones(64, dtype=torch.float64), atol=1e-5, rtol=0)
        assert packs.response_tokens(row) == int(mask.sum())
    assert sorted(seen) == list(range(len(LENGTHS)))


def test_weights_of_the_selection_stand_at_the_response(tmp_path: Path) -> None:
    weights = [0.5 * (index + 1) for index in range(len(LENGTHS))]
    store = make_store(tmp_path / "annotations", LENGTHS)
    selection = make_selection(tmp_path / "selection", store, [True] * len(LENGTHS), weights)
    pack_selection(store, selection, tmp_path / "packs", CFG)
    packs = PackedRows(tmp_path / "packs", streams=ALL)
    for row in range(len(packs)):
        batch = make_batch([(packs, row)])
        assert batch.weights is not None and batch.loss_mask is not None
        expected = torch.ones(64)
        for offset, length, _, sample, _ in packs.segments(row):
            first = offset + LENGTHS[sample][0] - 1
            expected[first : offset + length - 1] = weights[sample]
        assert torch.equal(batch.weights, expected)
    plain = PackedRows(make_packs(tmp_path / "plain"), streams=ALL)
    assert make_batch([(plain, 0)]).weights is None


def test_a_truncated_sample_is_the_beginning_of_the_whole_one(tmp_path: Path) -> None:
    lengths = [(5, 9), (10, 90), (64, 3), (63, 2), (70, 1)]  # the prompts of 64 and 70 fill a row
    packs_dir = make_packs(
        tmp_path, lengths=lengths, cfg=PackConfig(seq_length=64, segment_align=8, too_long="truncate")
    )
    counts = read_manifest(packs_dir).counts
    assert (counts["in"], counts["kept"], counts["truncated"], counts["quarantined"]) == (5, 3, 2, {"too_long": 2})
    packs = PackedRows(packs_dir, streams=ALL)
    rows = {sample: row for row in range(len(packs)) for _, _, _, sample, _ in packs.segments(row)}
    assert sorted(rows) == [0, 1, 3]
    for sample, answer in ((1, 54), (3, 1)):
        batch, prompt = make_batch([(packs, rows[sample])]), lengths[sample][0]
        store = AnnotationStore(tmp_path / "annotations")
        assert present(batch.tokens)[0].tolist() == store.tokens(sample)[:64].tolist()
        assert present(batch.labels)[0, prompt - 1 : 63].tolist() == store.tokens(sample)[prompt:64].tolist()
        assert present(batch.loss_mask)[0].nonzero().flatten().tolist() == list(range(prompt - 1, 63))
        teacher_ids = present(batch.teacher_ids)[prompt - 1 : 63]
        assert teacher_ids.tolist() == store.teacher(sample)["ids"][:answer].tolist()
        assert packs.response_tokens(rows[sample]) == answer


def _check_segments(cu_seqlens: torch.Tensor, max_seqlen: int, positions: torch.Tensor, starts: list[int]) -> None:
    """All T is covered, samples start segments at aligned places, positions count from 0 in each segment."""
    bounds = cu_seqlens.tolist()
    assert bounds[0] == 0 and bounds[-1] == positions.numel() and all(bound % 8 == 0 for bound in bounds)
    assert starts == bounds[: len(starts)] and len(bounds) - len(starts) in (1, 2)
    lengths = torch.diff(cu_seqlens)
    assert int(lengths.min()) > 0 and max_seqlen == int(lengths.max())
    expected = torch.cat([torch.arange(int(length)) for length in lengths])
    assert torch.equal(positions[0], expected)


def test_a_micro_batch_is_its_rows_end_to_end(tmp_path: Path) -> None:
    packs = PackedRows(make_packs(tmp_path), streams=ALL)
    one, two, both = make_batch([(packs, 1)]), make_batch([(packs, 0)]), make_batch([(packs, 1), (packs, 0)])

    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        assert torch.equal(getattr(both, name), torch.cat([getattr(one, name), getattr(two, name)], dim=1)), name
    for name in ("teacher_ids", "teacher_logprobs", "teacher_log_tail"):
        torch.testing.assert_close(getattr(both, name), torch.cat([getattr(one, name), getattr(two, name)]))
    assert both.cu_seqlens.tolist() == one.cu_seqlens.tolist() + (64 + two.cu_seqlens[1:]).tolist()
    assert both.max_seqlen == max(one.max_seqlen, two.max_seqlen)


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_ranks_read_their_shares_of_the_whole_batch(tmp_path: Path, size: int) -> None:
    weights = [0.5 * (index + 1) for index in range(len(LENGTHS))]
    store = make_store(tmp_path / "annotations", LENGTHS)
    selection = make_selection(tmp_path / "selection", store, [True] * len(LENGTHS), weights)
    pack_selection(store, selection, tmp_path / "packs", CFG)
    packs = PackedRows(tmp_path / "packs", streams=ALL)
    rows = [(packs, row) for row in range(len(packs))]
    whole = make_batch(rows)
    seen = 0
    for rank in range(size):
        share = ContextShare(rank=rank, size=size)
        part = make_host_batch(rows, share=share).to("cpu")
        bounds = whole.cu_seqlens.tolist()
        runs = [run for start, end in pairwise(bounds) for run in share.runs(start, end)]
        held = torch.cat([torch.arange(run.start, run.stop) for run in runs])
        assert torch.equal(part.cu_seqlens, whole.cu_seqlens) and part.max_seqlen == whole.max_seqlen
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[:, held]), name
        for name in ("weights", "teacher_ids", "teacher_logprobs", "teacher_log_tail", "generator_logprobs"):
            torch.testing.assert_close(getattr(part, name), getattr(whole, name)[held], rtol=0, atol=0, equal_nan=True)
        seen += int(present(part.loss_mask).sum())
    assert seen == sum(response for _, response in LENGTHS)


def test_packs_that_ranks_cannot_share_are_refused(tmp_path: Path) -> None:
    path = make_packs(tmp_path)
    PackedDataset(path, seed=0, streams=ALL, share=ContextShare(size=4))
    with pytest.raises(UserError, match=r"segment_align of .* of 2 x context_parallel_size = 16, got 8; pack"):
        PackedDataset(path, seed=0, streams=ALL, share=ContextShare(size=8))


def test_streams_leave_out_what_a_stage_does_not_need(tmp_path: Path) -> None:
    path = make_packs(tmp_path)
    full = make_batch([(PackedRows(path, streams=ALL), 0)])
    first = make_batch([(PackedRows(path, streams=Streams(targets=False, teacher=False)), 0)])
    nothing = Streams(tokens=False, targets=False, teacher=False, generator=False)
    middle = make_batch([(PackedRows(path, streams=nothing), 0)])
    last = make_batch([(PackedRows(path, streams=Streams(tokens=False)), 0)])

    for batch in (first, middle, last):
        assert torch.equal(batch.position_ids, full.position_ids) and torch.equal(batch.cu_seqlens, full.cu_seqlens)
    assert torch.equal(present(first.tokens), present(full.tokens))
    assert first.labels is first.loss_mask is first.teacher_ids is None
    assert middle.tokens is middle.labels is middle.teacher_logprobs is middle.generator_logprobs is None
    assert last.tokens is None and torch.equal(present(last.labels), present(full.labels))
    assert torch.equal(present(last.teacher_ids), present(full.teacher_ids))


def test_a_batch_moves_but_its_cu_seqlens_stay(tmp_path: Path) -> None:
    batch = make_batch([(PackedRows(make_packs(tmp_path), streams=NO_TEACHER), 0)]).to("meta")
    assert present(batch.tokens).device.type == present(batch.loss_mask).device.type == "meta"
    assert batch.cu_seqlens.device.type == "cpu" and batch.teacher_ids is None


def test_decoding_rescales_and_refuses_what_is_no_distribution() -> None:
    records = make_records(np.random.default_rng(0), 9000, 10)  # more than one chunk
    ids, logprobs, log_tail = decode_teacher(records, VOCAB_SIZE)
    mass = logprobs.double().exp().sum(1)
    torch.testing.assert_close(mass, -torch.expm1(log_tail.double()), atol=1e-6, rtol=1e-6)
    np.testing.assert_array_equal(ids.numpy(), records["ids"])
    np.testing.assert_allclose(logprobs.numpy(), records["logprobs"].astype(np.float32), atol=1e-2)
    allowed = records.copy()
    allowed["logprobs"][8000, 0] = 1e-7  # rounding leaves such
    decode_teacher(allowed, VOCAB_SIZE)
    refused = {
        "ids": (VOCAB_SIZE, -1),
        "logprobs": (np.nan, -np.nan, np.inf, -np.inf, 1e-3, 2.0),
        "log_tail": (0.0, -0.0, 0.5, -31.0, -np.inf, np.nan, -np.nan),
    }
    for field, values in refused.items():
        for value in values:
            broken = records.copy()
            broken[field][8000] = value
            with pytest.raises(UserError, match=r"annotate again|token ids"):
                decode_teacher(broken, VOCAB_SIZE)


def test_records_changed_behind_the_hashes_are_refused_when_first_read(tmp_path: Path) -> None:
    path = make_packs(tmp_path)
    for shard in sorted((tmp_path / "annotations").glob("shard-*")):
        records = np.memmap(shard / "teacher.bin", teacher_record_dtype(4), mode="r+")
        records["ids"][:, 1] = VOCAB_SIZE
        records.flush()
    packs = PackedRows(path, streams=ALL, verify=False)
    for row in (0, 0, len(packs) - 1):
        with pytest.raises(UserError, match="annotations must hold token ids"):
            make_batch([(packs, row)])
    assert make_batch([(PackedRows(path, streams=NO_TEACHER, verify=False), 0)]).teacher_ids is None


def test_tokens_only_stores_train_without_a_teacher(tmp_path: Path) -> None:
    prompts = make_prompts(tmp_path / "prompts", [([1, 2, 3], [4, 5]), ([7], [8, 9, 10])])
    pack_prompts(prompts, tmp_path, CFG, vocab_size=50)
    batch = PackedDataset(tmp_path / "packs", seed=0, streams=NO_TEACHER).batch([0]).to("cpu")
    assert present(batch.tokens)[0, :6].tolist() == [1, 2, 3, 4, 5, 0]
    assert present(batch.labels)[0, 2:4].tolist() == [4, 5]
    assert present(batch.loss_mask)[0].nonzero().flatten().tolist() == [2, 3, 8, 9, 10]
    with pytest.raises(UserError, match="distillation"):
        PackedDataset(tmp_path / "packs", seed=0, streams=ALL)


def entry(from_row: int, packs: str = "p", round_index: int = 0) -> ScheduleEntry:
    return ScheduleEntry(from_row=from_row, packs=packs, round=round_index, policy_version="v")


def write_schedule(path: Path, entries: list[ScheduleEntry]) -> Path:
    path.write_text(schedule_text(entries))
    return path


def test_a_schedule_switches_rounds_at_its_row_and_resumes_anywhere(tmp_path: Path) -> None:
    for index in range(2):
        make_packs(tmp_path / f"rounds/{index}", seed=index)
    path = write_schedule(tmp_path / "schedule.jsonl", [entry(0, "rounds/0/packs"), entry(7, "rounds/1/packs", 1)])
    dataset = PackedDataset(path, seed=3, streams=ALL)
    rows = [PackedRows(tmp_path / f"rounds/{index}/packs", streams=ALL) for index in range(2)]

    for start in (0, 5, 6, 8, 11):  # 6: the two rows come from different rounds
        batch = PackedDataset(path, seed=3, streams=ALL).batch([start, start + 1]).to("cpu")
        located = [dataset.schedule.locate(position) for position in (start, start + 1)]
        assert [place for place, _ in located] == [int(position >= 7) for position in (start, start + 1)]
        expected = make_batch([(rows[place], row) for place, row in located])
        assert torch.equal(present(batch.tokens), present(expected.tokens))
        assert torch.equal(present(batch.teacher_ids), present(expected.teacher_ids))
        trained = sum(rows[place].response_tokens(row) for place, row in located)
        assert trained == int(present(batch.loss_mask).sum())
        names = [
            rows[place].store.metadata("sample_id")["sample_id"][sample].as_py()
            for place, row in located
            for *_, sample, _ in rows[place].segments(row)
        ]
        assert dataset.sample_ids([start, start + 1]) == names


def test_a_packs_directory_is_a_schedule_of_its_own(tmp_path: Path) -> None:
    packs = make_packs(tmp_path)
    assert load_schedule(packs) == [ScheduleEntry(from_row=0, packs=".", round=0, policy_version="v0000")]
    dataset = PackedDataset(packs, seed=3, streams=ALL)
    assert (dataset.seq_length, dataset.top_k, dataset.vocab_size) == (64, 4, VOCAB_SIZE)
    assert dataset.batch([0, 9, 100]).to("cpu").position_ids.shape == (1, 192)


def test_rounds_of_different_shapes_are_refused(tmp_path: Path) -> None:
    make_packs(tmp_path / "0")
    make_packs(tmp_path / "1", top_k=3)
    path = write_schedule(tmp_path / "schedule.jsonl", [entry(0, "0/packs"), entry(1, "1/packs", 1)])
    with pytest.raises(UserError, match="all packs must have"):
        PackedDataset(path, seed=0, streams=ALL)


def test_nothing_outside_the_run_is_opened(tmp_path: Path) -> None:
    make_packs(tmp_path / "elsewhere")
    run = tmp_path / "run"
    make_packs(run / "0")
    (run / "link").symlink_to(tmp_path / "elsewhere")
    for packs in ("../elsewhere/packs", str(tmp_path / "elsewhere/packs"), "link/packs"):
        path = write_schedule(run / "schedule.jsonl", [entry(0, packs)])
        with pytest.raises(UserError, match="must name files inside"):
            PackedDataset(path, seed=0, streams=ALL)
    (run / "0/annotations").rename(tmp_path / "annotations")
    (run / "0/annotations").symlink_to(tmp_path / "annotations")
    with pytest.raises(UserError, match="must name files inside"):
        PackedDataset(write_schedule(path, [entry(0, "0/packs")]), seed=0, streams=ALL)


def test_damaged_packs_and_a_store_made_anew_are_refused(tmp_path: Path) -> None:
    packs = make_packs(tmp_path / "a")
    other = make_store(tmp_path / "b/annotations", LENGTHS, seed=9)
    (tmp_path / "a/annotations").rename(tmp_path / "a/old")
    other.rename(tmp_path / "a/annotations")
    with pytest.raises(UserError, match="pack again"):
        PackedRows(packs, streams=ALL)

    packs = make_packs(tmp_path / "c")
    content = bytearray((packs / PACKS_FILE).read_bytes())
    content[len(content) // 2] ^= 4
    (packs / PACKS_FILE).write_bytes(content)
    with pytest.raises(UserError, match="sha256"):
        PackedRows(packs, streams=ALL)


def test_a_moved_run_still_finds_its_store(tmp_path: Path) -> None:
    before = make_batch([(PackedRows(make_packs(tmp_path / "run"), streams=ALL), 0)])
    (tmp_path / "run").rename(tmp_path / "moved")
    after = make_batch([(PackedRows(tmp_path / "moved/packs", streams=ALL), 0)])
    assert torch.equal(present(before.tokens), present(after.tokens))
