"""The books of a run, counted again: what is lost, doubled, foreign or pending is said, and where."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_npd.audit.verify import verify_run
from megatron_npd.cli.verify import main as tool
from megatron_npd.errors import UserError
from megatron_npd.manifest import MANIFEST, read_manifest, seal
from megatron_npd.records import PACKS_FILE, ROLLOUTS_FILE, SELECTION_FILE, teacher_record_dtype
from tests.faults import world
from tests.serving.fake import FakeServer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run up to its packs, made by the stages themselves."""
    root = tmp_path_factory.mktemp("whole")
    with FakeServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv(world.INPUTS, str(world.make_inputs(root)))
        patch.setenv(world.SERVER, server.url)
        from megatron_npd.teacher import annotate

        patch.setattr(annotate, "Scorer", world.StandInScorer)
        (root / "run").mkdir()
        for stage in ("prompts", "rollouts", "annotations", "selection", "packs", "schedule"):
            world.STAGES[stage](root / "run")
        yield root / "run"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def here(run: Path) -> Path:
    return run / "rounds/0000"


def reseal(path: Path, change: Callable[[dict[str, Any]], None] = lambda counts: None) -> None:
    """Seal a changed directory anew, as a stage with a mistake would have: every hash is right."""
    manifest = read_manifest(path, verify=False)
    counts = json.loads(json.dumps(manifest.counts))
    change(counts)
    (path / MANIFEST).unlink()
    seal(path, kind=manifest.kind, provenance=manifest.provenance, counts=counts)


def edit(file: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(file)), file)


def test_a_whole_run_balances(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool([str(whole), "--full"]) == 0
    table = capsys.readouterr().out
    assert "every book balances" in table
    rows = {row[0]: row for row in verify_run(whole).rows}
    stages = [f"rounds/0000/{stage}" for stage in ("rollouts", "annotations", "selection", "packs")]
    assert list(rows) == ["prompts", *stages, "schedule.jsonl"]
    assert rows["prompts"][2:6] == (16, 14, {"bad_json": 1, "duplicate": 1}, 0)
    assert rows["rounds/0000/rollouts"][2:6] == (42, 42, {}, 0)
    for before, after in (("rollouts", "annotations"), ("annotations", "selection"), ("selection", "packs")):
        assert rows[f"rounds/0000/{after}"][2] == rows[f"rounds/0000/{before}"][3]


def drop_rollout(run: Path) -> None:
    shard = here(run) / "rollouts/shard-00001"
    edit(shard / ROLLOUTS_FILE, lambda table: table.slice(1))
    reseal(shard)
    reseal(here(run) / "rollouts")


def drop_rollout_from_the_books_too(run: Path) -> None:
    shard = here(run) / "rollouts/shard-00001"
    table = pq.read_table(shard / ROLLOUTS_FILE)
    first = table.slice(0, 1).to_pylist()[0]

    def less(counts: dict[str, Any]) -> None:
        counts["in"], counts["kept"] = counts["in"] - 1, counts["kept"] - 1
        counts["tokens"] -= len(first["response_ids"])
        counts["stopped"] -= first["finish_reason"] == "stop"

    edit(shard / ROLLOUTS_FILE, lambda table: table.slice(1))
    reseal(shard, less)
    reseal(here(run) / "rollouts", less)


def unbalance(run: Path) -> None:
    def more(counts: dict[str, Any]) -> None:
        counts["in"] += 1

    reseal(here(run) / "packs", more)


def double_pack(run: Path) -> None:
    file = here(run) / "packs" / PACKS_FILE
    with pa.memory_map(str(file)) as source:
        table = pa.ipc.open_file(source).read_all()
    twice = pa.concat_tables([table, table.slice(0, 1)]).combine_chunks()
    file.unlink()
    with open(file, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(twice)
    reseal(here(run) / "packs")


def other_reason(run: Path) -> None:
    file = here(run) / "selection" / SELECTION_FILE
    column = pq.read_schema(file).get_field_index("reason")
    edit(
        file,
        lambda table: table.set_column(
            column, table.schema.field(column), [["other" if reason else "" for reason in table["reason"].to_pylist()]]
        ),
    )
    reseal(here(run) / "selection")


def flip(run: Path) -> None:
    file = here(run) / "annotations/shard-00001/teacher.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)


def lose_shard(run: Path) -> None:
    shutil.rmtree(here(run) / "annotations/shard-00001")


def stray(run: Path) -> None:
    (here(run) / "packs" / "notes.txt").write_text("mine")


def remake_selection(run: Path) -> None:
    reseal(here(run) / "selection", lambda counts: counts.update(extra=1))


def remake_rollout_shard(run: Path) -> None:
    """While its round is not sealed: the annotation that followed it is another shard's."""
    reseal(here(run) / "rollouts/shard-00001", lambda counts: counts.update(extra=1))
    (here(run) / "rollouts" / MANIFEST).unlink()


def other_schedule(run: Path) -> None:
    from megatron_npd.data.row_schedule import ScheduleEntry, schedule_text

    entry = ScheduleEntry(from_row=0, packs="rounds/0000/packs", round=0, policy_version="v0009")
    (run / "schedule.jsonl").write_text(schedule_text([entry]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_rollout, "shard-00001/manifest.json must count kept as the files do, got 15, not 14"),
        (drop_rollout_from_the_books_too, "must account for every sample of .*prompts, got 1 lost"),
        (unbalance, "the books of .*packs must balance, got in"),
        (double_pack, "packs must hold each sample once, got .* 2 times"),
        (other_reason, "selection/manifest.json must count quarantined as the files do"),
        (flip, "teacher.bin must have sha256"),
        (lose_shard, "shard-00001/manifest.json must exist"),
        (stray, "got notes.txt too"),
        (remake_selection, "packs must come from .*selection as it is now, got another selection_sha256"),
        (remake_rollout_shard, "annotations/shard-00001 must come from .*rollouts/shard-00001 as it is now"),
        (other_schedule, "must name packs of the same round and policy"),
    ],
)
def test_every_gap_is_named(
    run: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], words: str
) -> None:
    change(run)
    assert tool([str(run)]) == 1
    output = capsys.readouterr().out
    assert "problem(s)" in output
    assert re.search(f"PROBLEM .*{words}", output), output


def test_only_full_looks_at_every_number(run: Path) -> None:
    """A number that no model gives, under hashes that are right."""
    annotations = here(run) / "annotations"
    file = annotations / "shard-00001/teacher.bin"
    records = np.fromfile(file, teacher_record_dtype(4))
    records["log_tail"][3] = 1
    records.tofile(file)
    reseal(annotations / "shard-00001")
    reseal(annotations)
    for name in ("selection", "packs"):
        shutil.rmtree(here(run) / name)
    os.unlink(run / "schedule.jsonl")
    assert verify_run(run).problems == []
    (problem,) = verify_run(run, full=True).problems
    assert "shard-00001/teacher.bin: log" in problem and "at response token 3" in problem


def test_responses_of_other_weights_than_the_policys_are_named(run: Path) -> None:
    """The policy was made anew after its responses, under the same version."""
    rollouts = here(run) / "rollouts"
    about = read_manifest(rollouts, verify=False).provenance
    policy = run / "policies" / about["policy_version"]
    policy.mkdir(parents=True)
    seal(policy, kind="policy", provenance={"weights": about["weights"]})
    assert verify_run(run).problems == []
    (policy / MANIFEST).unlink()
    seal(policy, kind="policy", provenance={"weights": "fedcba9876543210"})
    problems = verify_run(run).problems
    assert len(problems) == 1 + len(list(rollouts.glob("shard-*")))
    words = f"must hold responses of {policy} as it is now, got weights {about['weights']} for fedcba9876543210"
    assert all(words in problem for problem in problems)


def test_what_is_not_done_yet_is_pending(run: Path) -> None:
    rollouts = here(run) / "rollouts"
    for name in ("annotations", "selection", "packs"):
        shutil.rmtree(here(run) / name)
    os.unlink(run / "schedule.jsonl")
    os.unlink(rollouts / MANIFEST)
    shutil.rmtree(rollouts / "shard-00002")
    result = verify_run(run)
    assert result.problems == []
    row = {row[0]: row for row in result.rows}["rounds/0000/rollouts"]
    assert row[1:6] == ("rollouts, not sealed", 42, 30, {}, 12)


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must hold sealed directories"):
        verify_run(tmp_path)
