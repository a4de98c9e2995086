"""The whole loop on real engines, small: stop it anywhere, start it again, and the result is the same."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_npd.config.run import EvalConfig, NPDConfig
from megatron_npd.data.row_schedule import load_schedule
from megatron_npd.errors import UserError
from megatron_npd.manifest import is_sealed, read_manifest
from megatron_npd.platform import get_platform
from megatron_npd.records import ROLLOUTS_FILE
from tests.helpers import make_tiny_model

get_platform("cpu")

pytestmark = pytest.mark.server

from megatron_npd.audit.report import write_report  # noqa: E402
from megatron_npd.audit.verify import verify_run  # noqa: E402
from megatron_npd.pipeline import (  # noqa: E402
    environment,
    evaluation,
    runner,
    work,
)
from megatron_npd.pipeline.stages import STAGES  # noqa: E402
from megatron_npd.run_dir import RunDir  # noqa: E402

NOT_MEASURED = EvalConfig(held_out=0)


def run_npd(cfg: NPDConfig) -> str:
    return runner.run_npd(cfg, write_report)


def with_function(patch: pytest.MonkeyPatch, stage: str, function: Callable[..., None]) -> None:
    """Have another function do a stage of the table."""
    patch.setitem(STAGES, stage, dataclasses.replace(STAGES[stage], function=function))


def weights(run: Path, version: str) -> dict[str, torch.Tensor]:
    return load_file(run / "policies" / version / "model.safetensors")


def test_two_rounds_and_a_report(recipe: NPDConfig) -> None:
    table = run_npd(recipe)
    run = Path(recipe.run_dir)
    for line, name in zip(runner.results(recipe).splitlines(), ("policy", "report"), strict=True):
        assert line.split()[0] == name and Path(line.split()[1]).exists()
    for index in (0, 1):
        for stage in ("rollouts", "annotations", "selection", "packs"):
            manifest = read_manifest(run / "rounds" / f"{index:04d}" / stage)
            books = manifest.counts
            assert books["in"] == books["kept"] + sum(books["quarantined"].values()) + books.get("pending", 0), stage
        rollouts = read_manifest(run / "rounds" / f"{index:04d}" / "rollouts")
        assert rollouts.provenance["policy_version"] == f"v{index:04d}"
    assert [entry.from_row for entry in load_schedule(run / "schedule.jsonl")] == [0, 4]
    metrics = [json.loads(line) for line in (run / "report" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in metrics] == [1, 2, 3, 4]
    assert [line["round"] for line in metrics] == [0, 0, 1, 1]
    assert all(line["lag_k3"] is not None for line in metrics)
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert summary["accuracy"]["start"] is not None and len(summary["accuracy"]["rounds"]) == 2
    assert (run / "report" / "report.html").stat().st_size > 10_000
    assert table.strip()
    checked = verify_run(run)
    assert checked.problems == [] and "held_out/rounds/0002/annotations" in {row[0] for row in checked.rows}
    assert not torch.equal(
        weights(run, "v0001")["model.norm.weight"],
        load_file(Path(recipe.student) / "model.safetensors")["model.norm.weight"],
    )


def test_a_finished_run_repeats_nothing(recipe: NPDConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished stage was repeated")

    for name in STAGES.keys() - {"prompts"}:
        with_function(monkeypatch, name, forbidden)
    monkeypatch.setattr(evaluation, "exact_match", forbidden)
    monkeypatch.setattr(environment, "record_environment", forbidden)  # with what it was computed stays as it was
    run_npd(recipe)


def test_the_distance_from_the_teacher_is_that_of_transformers(recipe: NPDConfig) -> None:
    """Before the run and after each round: KL(student || teacher) and agreement, from the two models' own logits."""
    run = Path(recipe.run_dir)
    measures = evaluation.read_measures(RunDir(run))
    assert [entry["policy"] for entry in measures] == [0, 1, 2]
    policies = [Path(recipe.student), *(run / "policies" / f"v000{index}" for index in (1, 2))]
    for entry, policy in zip(measures, policies, strict=True):
        models = [AutoModelForCausalLM.from_pretrained(path) for path in (policy, recipe.teacher)]
        (shard,) = (run / "held_out" / "rounds" / f"{entry['policy']:04d}" / "rollouts").glob("shard-*")
        rows = pq.read_table(shard / ROLLOUTS_FILE).to_pylist()
        assert len(rows) == 8 and entry["prompts"] == 4
        kl: list[float] = []
        agreed: list[bool] = []
        for row in rows:
            ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
            first, response = len(row["prompt_ids"]), ids[0, len(row["prompt_ids"]) :]
            with torch.no_grad():
                own, teachers = (model(ids).logits[0, first - 1 : -1].log_softmax(-1) for model in models)
            if row["path"]:
                kl += (own - teachers).gather(1, response[:, None]).flatten().tolist()
            else:
                agreed += (own.argmax(-1) == teachers.argmax(-1)).tolist()
        assert entry["kl"] == pytest.approx(sum(kl) / len(kl), abs=1e-4)
        assert entry["top1_agreement"] == pytest.approx(sum(agreed) / len(agreed))
        assert entry["response_tokens"] == pytest.approx(sum(len(row["response_ids"]) for row in rows) / 8)
        assert entry["cut"] == sum(row["finish_reason"] == "length" for row in rows) / 8
        assert 0 < entry["kl_error"] < entry["kl"]


def test_samples_are_the_greedy_responses_of_each_policy(recipe: NPDConfig) -> None:
    samples = evaluation.read_samples(RunDir(Path(recipe.run_dir)), recipe.student, number=2)
    assert len(samples) == 2 and "buys 7 more" in samples[0]["prompt"]
    for sample in samples:
        assert [response["policy"] for response in sample["responses"]] == [0, 1, 2]
        assert all(response["tokens"] <= 12 for response in sample["responses"])


def test_annotation_follows_the_rollouts(recipe: NPDConfig) -> None:
    """Another process annotates shards while this one generates; the store is the undisturbed run's."""
    undisturbed = Path(recipe.run_dir)
    cfg = dataclasses.replace(
        recipe,
        run_dir=str(undisturbed.with_name("followed")),
        updates=0,
        eval=NOT_MEASURED,
        annotate=dataclasses.replace(recipe.annotate, follow_seconds=120.0),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_npd.teacher.annotate.Annotator", None)  # this process has no part in it
        run_npd(cfg)
    for file in sorted((undisturbed / "rounds/0000/annotations").rglob("[!.]*.*")):
        other = Path(cfg.run_dir) / file.relative_to(undisturbed)
        assert other.read_bytes() == file.read_bytes(), file
    stages = [json.loads(line)["stage"] for line in (Path(cfg.run_dir) / "report/seconds.jsonl").open()]
    assert stages.index("rollout") < stages.index("annotate") < stages.index("select")


def test_stages_take_turns_on_a_device(recipe: NPDConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of server, annotator and trainer one runs at a time, each as often as it must, and the results are the same."""
    ours = psutil.Process()
    before = set(ours.children())  # the session's server
    present: list[tuple[str, set[str]]] = []
    words = {"vllm.entrypoints": "servers", "megatron_npd annotate": "ranks", "megatron_npd train": "trainer"}

    def starting(ctx: work.Context, task: runner.Task, ended: Any) -> None:
        lines = [" ".join(child.cmdline()) for child in set(ours.children()) - before]
        present.append((task.stage.occupies, {who for word, who in words.items() if any(word in x for x in lines)}))
        begin(ctx, task, ended)

    begin = runner._start
    monkeypatch.setattr(runner, "_start", starting)
    rollout = dataclasses.replace(recipe.rollout, urls=(), token_file="", concurrency=8)
    cfg = dataclasses.replace(recipe, run_dir=str(tmp_path / "turns"), take_turns=True, rollout=rollout)
    run_npd(cfg)
    for turn, there in present:
        assert turn in ("prompts", "select", "pack", "export") or there <= {turn}, present
    order = [turn for turn, _ in present if turn in words.values()]
    changes = [turn for turn, before in zip(order, ["", *order], strict=False) if turn != before]
    assert changes == ["servers", "ranks", "trainer"] * 2 + ["servers", "ranks"]
    undisturbed = RunDir(Path(recipe.run_dir))
    for index in (0, 1):
        files = sorted(undisturbed.round(index).rglob("[!.]*.*"))
        assert any(file.name == "rollouts.parquet" for file in files)
        for file in files:
            assert (Path(cfg.run_dir) / file.relative_to(undisturbed.root)).read_bytes() == file.read_bytes(), file
    expected, got = weights(undisturbed.root, "v0002"), weights(Path(cfg.run_dir), "v0002")
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("stage", "rule"),  # each of the rules marks the second step of four, as ``even`` does
    [
        ("annotate", {"refresh": "every_n", "refresh_interval": 2}),
        ("train", {"refresh": "by_lag", "refresh_interval": 2, "refresh_lag": 1e-6}),
        ("export", {}),
        ("measure", {}),
    ],
)
def test_a_run_stopped_in_its_second_round_ends_the_same(
    recipe: NPDConfig, stage: str, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = Path(recipe.run_dir)
    train = dataclasses.replace(recipe.train, **rule)
    cfg = dataclasses.replace(recipe, run_dir=str(undisturbed.with_name(f"stopped_{stage}")), train=train)
    if stage != "measure":
        cfg = dataclasses.replace(cfg, eval=NOT_MEASURED)
    original = STAGES[stage].function
    calls = []

    def stopped(ctx: work.Context, index: int) -> None:
        calls.append(index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(ctx, index)

    with monkeypatch.context() as patch:
        with_function(patch, stage, stopped)
        with pytest.raises(KeyboardInterrupt):
            run_npd(cfg)
    assert not is_sealed(Path(cfg.run_dir) / "policies" / "v0002")
    if stage != "measure":  # the first round's report is there when the second one begins
        assert "in the first of 2 rounds" in (Path(cfg.run_dir) / "report" / "report.html").read_text()
    run_npd(cfg)
    expected, got = weights(undisturbed, "v0002"), weights(Path(cfg.run_dir), "v0002")
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6)
    if stage == "measure":
        for entry, other in zip(
            *(evaluation.read_measures(RunDir(path)) for path in (undisturbed, Path(cfg.run_dir))), strict=True
        ):
            assert other == pytest.approx(entry, abs=1e-4)


def test_another_configuration_is_refused(recipe: NPDConfig) -> None:
    changed = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, lr=2e-3))
    with pytest.raises(UserError, match=r"train\.lr: 0\.001 -> 0\.002"):
        run_npd(changed)


def test_a_lower_learning_rate_after_the_teacher_s_work(recipe: NPDConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before its first step, a run takes another rate; once steps were made with it, only when asked to."""
    run = Path(recipe.run_dir).with_name("lower")
    cfg = dataclasses.replace(recipe, run_dir=str(run), updates=0, eval=dataclasses.replace(recipe.eval, prompts=""))

    def lower(lr: float, **fields: Any) -> NPDConfig:
        return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, lr=lr), **fields)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    def rates() -> list[float]:
        return [json.loads(line)["lr"] for line in (run / "report" / "metrics.jsonl").read_text().splitlines()]

    with monkeypatch.context() as patch:
        with_function(patch, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_npd(cfg)
    run_npd(lower(5e-4))
    assert len(rates()) == 4 and max(rates()) == 5e-4
    first = weights(run, "v0001")
    with pytest.raises(UserError, match=r"checkpoints/iter_0000004, policies/v0001; .*--redo"):
        run_npd(lower(2e-4))
    made = (run / "rounds/0000/packs/manifest.json").stat().st_mtime_ns
    run_npd(lower(2e-4, redo=True))
    assert len(rates()) == 4 and max(rates()) == 2e-4
    assert (run / "rounds/0000/packs/manifest.json").stat().st_mtime_ns == made, "what does not depend on it stays"
    assert not torch.equal(weights(run, "v0001")["model.norm.weight"], first["model.norm.weight"])


def test_seconds_go_on_behind_a_line_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "report" / "seconds.jsonl"
    with environment.timed(RunDir(tmp_path), "rollout", 0) as measured:
        measured["pause_s"] = 0.5
    assert json.loads(path.read_text())["pause_s"] == 0.5
    path.write_text(path.read_text() + '{"stage": "tr')
    with environment.timed(RunDir(tmp_path), "train", 0):
        pass
    assert [json.loads(line)["stage"] for line in path.read_text().splitlines()] == ["rollout", "train"]


@pytest.mark.parametrize(("field", "match"), [("teacher", "--teacher must be"), ("prompts", "--prompts must be")])
def test_missing_inputs_are_named(recipe: NPDConfig, field: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        run_npd(dataclasses.replace(recipe, **{field: "/nowhere"}))


def test_models_of_other_vocabularies_are_refused(recipe: NPDConfig, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="must share their token ids, got 2 that differ"):
        run_npd(dataclasses.replace(recipe, teacher=str(other), run_dir=str(tmp_path / "run")))
