"""Settings of a resumed run: free while nothing depends on them, else refused with what does, or made anew."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_npd.config.command_line import parse_config
from megatron_npd.config.run import NPDConfig
from megatron_npd.errors import UserError
from megatron_npd.manifest import seal
from megatron_npd.pipeline.resume import HARMLESS, ORDER, keep_config, recorded, stage_of
from megatron_npd.run_dir import RunDir

DIRECTORIES = (
    "prompts",
    *(
        f"rounds/{index}/{stage}"
        for index in ("0000", "0001")
        for stage in ("rollouts", "annotations", "selection", "packs")
    ),
    *("checkpoints/iter_0000002", "checkpoints/iter_0000004", "policies/v0001", "policies/v0002"),
)


def config(run: Path, *flags: str) -> NPDConfig:
    return parse_config(NPDConfig, [f"--run-dir={run}", "--teacher=t", "--student=s", "--prompts=p.jsonl", *flags])


def made(run: Path, *directories: str) -> Path:
    """A run with some of its directories sealed."""
    run.mkdir(exist_ok=True)
    keep_config(RunDir(run), config(run))
    for name in directories:
        (run / name).mkdir(parents=True)
        seal(run / name, kind="test")
    if directories:
        (run / "schedule.jsonl").write_text("lines")
        (run / "report").mkdir()
        (run / "report" / "accuracy.json").write_text('{"start": 1.0, "rounds": [2.0], "teacher": 9.0}')
    return run


def left(run: Path) -> list[str]:
    return [name for name in DIRECTORIES if (run / name).exists()]


def accuracy(run: Path) -> Any:
    return json.loads((run / "report" / "accuracy.json").read_text())


def test_every_setting_belongs_to_a_stage_or_is_harmless() -> None:
    flat = recorded(NPDConfig())
    assert {stage_of(name, flat, flat) for name in flat} == {*ORDER[:6], "evaluation", ""}
    assert flat.keys() >= HARMLESS, HARMLESS - flat.keys()


@pytest.mark.parametrize(
    "flag",
    [
        "--train.save-interval=5",
        "--train.tensorboard-dir=x",
        "--rollout.concurrency=3",
        "--nproc-per-node=2",
        "--train.recompute-granularity=selective",
        "--eval.answer-regex=(a)",
        "--teacher=../{cwd}/t",  # the same path in other words
    ],
)
def test_harmless_changes_are_taken_over(tmp_path: Path, flag: str) -> None:
    run = made(tmp_path / "run", *DIRECTORIES)
    changed = config(run, flag.format(cwd=Path.cwd().name))
    keep_config(RunDir(run), changed)
    assert left(run) == list(DIRECTORIES)
    kept = json.dumps(dataclasses.asdict(changed.train))  # a list of choices has no tuple there
    assert json.loads((run / "config.json").read_text())["train"] == json.loads(kept)


@pytest.mark.parametrize(
    ("flag", "sealed", "first"),
    [
        ("--train.lr=3e-5", DIRECTORIES, "checkpoints/iter_0000002"),
        ("--train.lr=3e-5", DIRECTORIES[:5], ""),
        ("--updates=3", DIRECTORIES, "checkpoints/iter_0000002"),
        ("--pack.seq-length=512", DIRECTORIES, "rounds/0000/packs"),
        ("--pack.seq-length=512", DIRECTORIES[:4], ""),
        ("--select.filter=none", DIRECTORIES, "rounds/0000/selection"),
        ("--annotate.top-k=4", DIRECTORIES, "rounds/0000/annotations"),
        ("--annotate.top-k=4", DIRECTORIES[:2], ""),
        ("--rollout.temperature=0.5", DIRECTORIES[:2], "rounds/0000/rollouts"),
        ("--rollout.temperature=0.5", DIRECTORIES[:1], ""),
        ("--student=other", DIRECTORIES, "prompts"),
        ("--student=other", (), ""),
        ("--eval.prompts=other", DIRECTORIES, "prompts"),  # those to measure on were taken from the others
    ],
)
def test_a_setting_may_change_until_a_result_depends_on_it(
    tmp_path: Path, flag: str, sealed: tuple[str, ...], first: str
) -> None:
    run = made(tmp_path / "run", *sealed)
    changed = config(run, flag)
    if not first:
        keep_config(RunDir(run), changed)
    else:
        kept = [name for name in sealed[: sealed.index(first)] if not name.startswith("rounds/0001")]
        repeated = [name for name in sealed if name not in kept]
        name = flag[2:].partition("=")[0].replace("-", "_")
        with pytest.raises(UserError, match=f"got {name}: .*depend: {', '.join(repeated)}; .*--redo"):
            keep_config(RunDir(run), changed)
        assert left(run) == list(sealed), "nothing is removed unasked"
        assert recorded(config(run)) == recorded_in(run)
        keep_config(RunDir(run), dataclasses.replace(changed, redo=True))
        assert left(run) == kept and not (run / "schedule.jsonl").exists()
        keeps_start = ORDER.index(stage_of(name, recorded(config(run)), recorded(changed))) > 2
        expected = {"start": 1.0, "teacher": 9.0} if keeps_start else {"start": None}
        assert accuracy(run) == expected | {"rounds": []}
    assert recorded_in(run) == recorded(changed)
    history = [json.loads(line) for line in (run / "config_changes.jsonl").read_text().splitlines()]
    assert [list(line["changed"]) for line in history] == [[flag[2:].partition("=")[0].replace("-", "_")]]
    assert history[0]["results_before"] == left(run)


def recorded_in(run: Path) -> dict[str, Any]:
    saved = json.loads((run / "config.json").read_text())
    flat = {name: value for name, value in saved.items() if not isinstance(value, dict)}
    for group, fields in saved.items():
        if isinstance(fields, dict):
            flat |= {f"{group}.{name}": value for name, value in fields.items()}
    return flat


def test_other_problems_are_measured_anew_without_asking(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    keep_config(RunDir(run), config(run, "--eval.prompts=a"))
    for name in (*DIRECTORIES, "eval_prompts", "held_out/rounds/0000/annotations"):
        (run / name).mkdir(parents=True)
        seal(run / name, kind="test")
    (run / "report").mkdir()
    (run / "report" / "accuracy.json").write_text('{"start": 1.0, "rounds": [2.0]}')
    keep_config(RunDir(run), config(run, "--eval.prompts=b"))
    assert left(run) == list(DIRECTORIES)
    assert not (run / "eval_prompts").exists() and not (run / "held_out").exists()
    assert accuracy(run) == {"start": None, "rounds": []}


def test_parts_of_a_stage_are_results_where_a_rerun_would_go_on_from_them(tmp_path: Path) -> None:
    run = made(tmp_path / "run", "prompts")
    rollouts = run / "rounds" / "0000" / "rollouts"
    rollouts.mkdir(parents=True)
    (rollouts / "answers.journal").write_text("the settings\n")
    keep_config(RunDir(run), config(run, "--rollout.temperature=0.5"))  # no response came
    assert not rollouts.exists(), "its journal is of other settings"
    rollouts.mkdir()
    (rollouts / "answers.journal").write_text("the settings\na response\n")
    with pytest.raises(UserError, match="rounds/0000/rollouts; take the change back"):
        keep_config(RunDir(run), config(run, "--rollout.temperature=0.7"))
    (rollouts / "answers.journal").unlink()
    (rollouts / "shard-00000").mkdir()
    seal(rollouts / "shard-00000", kind="test")
    with pytest.raises(UserError, match="rounds/0000/rollouts; take the change back"):
        keep_config(RunDir(run), config(run, "--rollout.temperature=0.7"))


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    run = made(tmp_path / "run", "prompts")
    for text in ("{", "[]", ""):
        (run / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json must be the configuration that began the run"):
            keep_config(RunDir(run), config(run))


def test_another_release_s_run_is_refused_as_one(tmp_path: Path) -> None:
    """Not by a list of settings that it did not have, and of its results."""
    run = made(tmp_path / "run", "prompts", "rounds/0000/rollouts")
    manifest = run / "prompts" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema_version": 1}))
    then = json.loads((run / "config.json").read_text())
    del then["max_lead"]
    (run / "config.json").write_text(json.dumps(then))
    with pytest.raises(UserError, match=r"must have schema version .*, got 1; use the release that wrote it"):
        keep_config(RunDir(run), config(run))
