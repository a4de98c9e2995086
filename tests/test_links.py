"""One rule for links: a run may be reached through one, its parts are none, and all who read or write it say so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_npd.audit.report import write_report
from megatron_npd.audit.verify import verify_run
from megatron_npd.config.run import NPDConfig
from megatron_npd.data.packed_dataset import PackedDataset, Streams
from megatron_npd.errors import UserError
from megatron_npd.links import PARTS, refuse_links
from megatron_npd.manifest import seal, writing
from megatron_npd.pipeline.runner import run_npd
from tests.audit.test_verify import whole  # noqa: F401  (a fixture)

LINKS = ["rounds", "rounds/0000", "rounds/0000/annotations", "rounds/0000/packs/packs.arrow", "schedule.jsonl"]


def move_and_link(run: Path, name: str, target: Path) -> None:
    shutil.move(run / name, target)
    (run / name).symlink_to(target)


@pytest.mark.parametrize("name", LINKS)
def test_a_link_in_a_run_is_refused_by_all_at_their_start(
    whole: Path,  # noqa: F811
    tmp_path: Path,
    name: str,
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    move_and_link(run, name, tmp_path / "elsewhere")
    words = f"{name} must lie in the run, got a link to {tmp_path / 'elsewhere'}; put the whole run there"
    assert any(words in problem for problem in verify_run(run).problems)
    with pytest.raises(UserError, match=words):
        PackedDataset(run / "schedule.jsonl", seed=0, streams=Streams())
    for model in ("teacher", "student"):
        (tmp_path / model).mkdir()
        (tmp_path / model / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    teacher, student, prompts = (str(tmp_path / name) for name in ("teacher", "student", "prompts.jsonl"))
    with pytest.raises(UserError, match=words):
        run_npd(NPDConfig(run_dir=str(run), teacher=teacher, student=student, prompts=prompts), write_report)
    assert not (run / "config.json").exists()


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("stage", ["prompts", "rounds/0000/rollouts", "checkpoints/iter_0000002"])
def test_the_first_stage_of_a_run_refuses_links_for_all(tmp_path: Path, stage: str, name: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(tmp_path / "elsewhere")  # which need not be there yet
    with pytest.raises(UserError, match=f"{name} must lie in the run"), writing(run / stage):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_run_reached_through_a_link_and_links_beside_its_parts_are_fine(
    whole: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    shutil.copytree(whole, tmp_path / "disk/run")
    (tmp_path / "run").symlink_to(tmp_path / "disk/run")
    (tmp_path / "run/notes").symlink_to(tmp_path)
    refuse_links(tmp_path / "run")
    assert verify_run(tmp_path / "run").problems == []
    assert len(PackedDataset(tmp_path / "run/schedule.jsonl", seed=0, streams=Streams()).entries) == 1


def test_a_link_is_not_sealed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    with writing(tmp_path / "out") as directory:
        (directory / "a").symlink_to(tmp_path / "a")
        with pytest.raises(UserError, match=r"a must lie in the run, got a link"):
            seal(directory, kind="things")
