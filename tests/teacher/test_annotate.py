"""The annotation stage: what the store holds, what is quarantined, layouts, and a stage killed and run again."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from megatron_npd.cli.annotate import main as command
from megatron_npd.config.settings import AnnotateConfig, AnnotateOrder
from megatron_npd.errors import UserError
from megatron_npd.manifest import MANIFEST, PART, is_sealed, read_manifest, seal
from tests.dist import run_distributed
from tests.helpers import VOCAB_SIZE, make_tiny_model, present
from tests.teacher.reference import HEADER, TransformersModel, check_top_k, make_rollouts

CFG = AnnotateConfig(top_k=4, seq_length=128)
FOLLOWING = AnnotateConfig(top_k=4, seq_length=128, follow_seconds=60.0)
LENGTHS = [(20, 12), (8, 30), (3, 1), (30, 40), (2, 7), (15, 15), (9, 9), (40, 3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher with more embedding rows than the student, and a student."""
    path = tmp_path_factory.mktemp("models")
    return {
        "teacher_dir": make_tiny_model(path / "teacher", seed=1, vocab_size=320, num_key_value_heads=2),
        "student_dir": make_tiny_model(path / "student", seed=2),
    }


def annotate(rollouts: Path, out: Path, models: dict[str, Any], cfg: AnnotateConfig = CFG) -> Any:
    from megatron_npd.teacher.annotate import annotate_round

    return annotate_round(rollouts, out, **models, cfg=cfg)


def samples(out: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(out.glob("shard-*/samples.parquet")) for row in pq.read_table(file).to_pylist()]


def assert_samples_close(out: Path, expected: Path) -> None:
    for one, two in zip(samples(expected), samples(out), strict=True):
        for name, value in one.items():
            if isinstance(value, float | list):
                np.testing.assert_allclose(two[name], value, atol=1e-4)
            else:
                assert two[name] == value


def rollout_rows(rollouts: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(rollouts.glob("*/rollouts.parquet")) for row in pq.read_table(file).to_pylist()]


def contents(path: Path) -> dict[str, bytes]:
    files = (file for file in path.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def test_the_store_holds_what_transformers_says(tmp_path: Path, models: dict[str, Path]) -> None:
    from megatron_npd.store.annotation_store import AnnotationStore

    make_rollouts(tmp_path / "rollouts", LENGTHS)
    manifest = annotate(tmp_path / "rollouts", tmp_path / "out", models)
    rows, store = rollout_rows(tmp_path / "rollouts"), AnnotationStore(tmp_path / "out")
    own = [np.array(row["response_ids"])[:, None] == store.teacher(index)["ids"] for index, row in enumerate(rows)]
    assert manifest.counts == {
        "in": 8,
        "kept": 8,
        "quarantined": {},
        "pending": 0,
        "response_tokens": sum(response for _, response in LENGTHS),
        "in_top_k": int(sum(hits.any(axis=1).sum() for hits in own)),
    }
    assert manifest.provenance["vocab_size"] == VOCAB_SIZE and manifest.provenance["top_k"] == 4
    assert manifest.provenance["round"] == 3 and manifest.provenance["policy_version"] == "v0003"
    teacher = TransformersModel(models["teacher_dir"], VOCAB_SIZE)
    student = TransformersModel(models["student_dir"])
    for index, (rollout, sample) in enumerate(zip(rows, samples(tmp_path / "out"), strict=True)):
        prompt, response = rollout["prompt_ids"], rollout["response_ids"]
        expected = teacher(prompt, response)
        header = prompt[-3:] if len(prompt) > 3 else [2]  # the tiny tokenizer's end of sequence where there is none
        assert header in (HEADER, [2])
        assert store.tokens(index).tolist() == prompt + response
        records = store.teacher(index)
        check_top_k(records["ids"], records["logprobs"], expected.logprobs, 4e-3)  # fp16
        np.testing.assert_allclose(sample["teacher_logprobs"], expected.sampled, atol=1e-4)
        tail = torch.log1p(-expected.logprobs.topk(4).values.exp().sum(1))
        np.testing.assert_allclose(records["log_tail"].astype(np.float64), tail, atol=4e-3)
        assert sample["on_distribution"] == (rollout["temperature"] == 1)
        if sample["on_distribution"]:
            np.testing.assert_array_equal(store.generator(index), np.array(rollout["logprobs"], np.float32))
        else:
            assert np.isnan(store.generator(index)).all()
        losses = {
            "teacher_loss": expected.loss,
            "teacher_loss_unconditional": teacher(header, response).loss,
            "student_loss": -np.mean(rollout["logprobs"]),
            "student_loss_unconditional": student(header, response).loss,
        }
        for name, value in losses.items():
            assert abs(sample[name] - value) < 1e-4, (index, name)
        for name in ("sample_id", "prompt_id", "path", "finish_reason", "policy_version"):
            assert sample[name] == rollout[name]
        assert (sample["prompt_len"], sample["response_len"]) == LENGTHS[index]


def test_prompts_alone_give_the_same_records(tmp_path: Path, models: dict[str, Path]) -> None:
    make_rollouts(tmp_path / "rollouts", LENGTHS)
    annotate(tmp_path / "rollouts", tmp_path / "whole", models)
    cfg = dataclasses.replace(CFG, unconditional=False)
    manifest = annotate(tmp_path / "rollouts", tmp_path / "out", models, cfg)
    assert manifest.provenance["unconditional"] is False
    whole, found = contents(tmp_path / "whole"), contents(tmp_path / "out")
    streams = [name for name in whole if name.endswith((".bin", ".idx"))]
    assert streams and all(whole[name] == found[name] for name in streams)
    for sample, other in zip(samples(tmp_path / "out"), samples(tmp_path / "whole"), strict=True):
        for name, value in sample.items():
            assert math.isnan(value) if name.endswith("_unconditional") else value == other[name], name


def test_the_teacher_reads_its_own_prompt(tmp_path: Path, models: dict[str, Path]) -> None:
    from megatron_npd.data.tokenizer import generation_prompt, load_tokenizer

    own = [None, [5, 6, 7, 8], None, [9] * 60]
    make_rollouts(tmp_path / "rollouts", LENGTHS[:4], teacher_prompt_ids=own)
    annotate(tmp_path / "rollouts", tmp_path / "out", models)
    teacher = TransformersModel(models["teacher_dir"], VOCAB_SIZE)
    student = TransformersModel(models["student_dir"])
    header = generation_prompt(load_tokenizer(models["teacher_dir"]))
    rows = rollout_rows(tmp_path / "rollouts")
    for index, (rollout, sample) in enumerate(zip(rows, samples(tmp_path / "out"), strict=True)):
        if own[index] is None:
            continue
        response = rollout["response_ids"]
        assert abs(sample["teacher_loss"] - teacher(own[index], response).loss) < 1e-4
        assert abs(sample["teacher_loss_unconditional"] - teacher(header, response).loss) < 1e-4
        assert abs(sample["student_loss_unconditional"] - student(HEADER, response).loss) < 1e-4
        assert sample["prompt_len"] == len(rollout["prompt_ids"])


def test_samples_that_cannot_be_scored_are_counted(tmp_path: Path, models: dict[str, Path]) -> None:
    lengths = [(10, 5), (10, 0), (100, 29), (100, 28), *7 * [(6, 6)], (0, 4)]
    make_rollouts(tmp_path / "plain", lengths)
    rows = rollout_rows(tmp_path / "plain")
    prompts, responses = [row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows]
    logprobs = [row["logprobs"] for row in rows]
    prompts[4][0] = VOCAB_SIZE
    responses[5][2] = -1
    logprobs[6][3] = float("-inf")
    logprobs[7][0] = 0.1
    logprobs[8] = logprobs[8][1:]
    logprobs[10][1] = -9999.0  # what vLLM writes in place of -inf
    columns: dict[str, Any] = {"prompt_ids": prompts, "response_ids": responses, "logprobs": logprobs}
    columns["policy_version"] = ["v0003"] * 9 + ["v0002", "v0003", "v0003"]
    make_rollouts(tmp_path / "rollouts", lengths, **columns)
    with pytest.raises(UserError, match=r"usable but for 10 %, got 4 of 12 quarantined \(.*max_quarantined"):
        annotate(tmp_path / "rollouts", tmp_path / "strict", models)
    assert not is_sealed(tmp_path / "strict")
    cfg = dataclasses.replace(CFG, max_quarantined=0.85)
    manifest = annotate(tmp_path / "rollouts", tmp_path / "out", models, cfg)
    assert annotate(tmp_path / "rollouts", tmp_path / "strict", models, cfg).counts == manifest.counts
    assert manifest.counts["in"] == 12 and manifest.counts["kept"] == 2
    assert manifest.counts["quarantined"] == {
        "empty_prompt": 1,
        "empty_response": 1,
        "lengths_differ": 1,
        "other_policy": 1,
        "too_long": 1,
        "token_outside_vocabulary": 2,
        "undefined_logprob": 3,
    }
    assert [row["sample_id"] for row in samples(tmp_path / "out")] == [f"{0:016x}", f"{3:016x}"]
    lines = "".join(file.read_text() for file in sorted((tmp_path / "out").glob("*/quarantine.jsonl"))).splitlines()
    assert [int(json.loads(line)["sample_id"], 16) for line in lines] == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11]


def test_scores_that_no_model_gives_set_their_sample_aside(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher that overflows leaves NaN; the other samples' records are as they would have been."""
    from megatron_npd.teacher import annotate as stage

    make_rollouts(tmp_path / "rollouts", LENGTHS, shards=1)
    annotate(tmp_path / "rollouts", tmp_path / "whole", models)
    real = stage.Scorer.score

    def score(scorer: Any, *args: Any, **options: Any) -> Any:
        scores = present(real(scorer, *args, **options))
        if scores.logprobs_RK is not None and scores.ids_RK is not None:
            scores.logprobs_RK[int(scores.starts_N[1]) + 2, 1] = np.nan  # a token of sample 1
            scores.ids_RK[int(scores.starts_N[3]), 0] = VOCAB_SIZE
            scores.sampled_logprobs_R[int(scores.starts_N[6]) - 1] = -np.inf  # the last of sample 5
        return scores

    monkeypatch.setattr(stage.Scorer, "score", score)
    with pytest.raises(UserError, match="got 3 of 8 quarantined"):
        annotate(tmp_path / "rollouts", tmp_path / "strict", models)
    cfg = dataclasses.replace(CFG, max_quarantined=0.5)
    counts = annotate(tmp_path / "rollouts", tmp_path / "out", models, cfg).counts
    assert counts["quarantined"] == {
        "sampled_logprob_undefined": 1,
        "teacher_id_outside_vocabulary": 1,
        "teacher_logprob_undefined": 1,
    }
    assert (counts["in"], counts["kept"]) == (8, 5)
    from megatron_npd.store.annotation_store import AnnotationStore

    whole, out = AnnotationStore(tmp_path / "whole"), AnnotationStore(tmp_path / "out")
    rows = samples(tmp_path / "whole")
    kept = [0, 2, 4, 6, 7]
    assert samples(tmp_path / "out") == [rows[index] for index in kept]
    assert counts["response_tokens"] == sum(LENGTHS[index][1] for index in kept)
    for place, index in enumerate(kept):
        assert out.tokens(place).tolist() == whole.tokens(index).tolist()
        assert out.teacher(place).tobytes() == whole.teacher(index).tobytes()


def test_refusals(tmp_path: Path, models: dict[str, Path]) -> None:
    make_rollouts(tmp_path / "rollouts", LENGTHS)
    with pytest.raises(UserError, match=f"top_k must be at most the vocabulary \\({VOCAB_SIZE}\\), got 305"):
        annotate(tmp_path / "rollouts", tmp_path / "out", models, AnnotateConfig(top_k=305))
    with pytest.raises(UserError, match="must hold a scored sample"):
        annotate(
            tmp_path / "rollouts",
            tmp_path / "short",
            models,
            AnnotateConfig(top_k=4, seq_length=2, max_quarantined=1.0),
        )
    other = make_tiny_model(tmp_path / "other")
    data = json.loads((other / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (other / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="must share their token ids"):
        annotate(tmp_path / "rollouts", tmp_path / "out", models | {"teacher_dir": other})


def test_a_sealed_round_is_kept_and_another_input_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    make_rollouts(tmp_path / "rollouts", LENGTHS)
    first = annotate(tmp_path / "rollouts", tmp_path / "out", models)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.*")}
    assert annotate(tmp_path / "rollouts", tmp_path / "out", models) == first
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.*")}
    with pytest.raises(UserError, match="got other top_k"):
        annotate(tmp_path / "rollouts", tmp_path / "out", models, AnnotateConfig(top_k=5, seq_length=128))


def _killed_at(rank: int, world_size: int, shard: str, rollouts: Path, out: Path, models: dict[str, Path]) -> None:
    """Annotate, and be killed when all files of ``shard`` are written and it is about to be sealed."""
    from megatron_npd.teacher import shard as stage

    def seal_or_die(path: Path, **options: Any) -> Any:
        if path.parent.name == shard:
            os.kill(os.getpid(), signal.SIGKILL)
        return seal(path, **options)

    stage.seal = seal_or_die
    annotate(rollouts, out, models)


def test_a_killed_stage_goes_on_and_leaves_the_same_bytes(tmp_path: Path, models: dict[str, Path]) -> None:
    make_rollouts(tmp_path / "rollouts", LENGTHS, shards=3)
    annotate(tmp_path / "rollouts", tmp_path / "whole", models)
    out = tmp_path / "killed"
    with pytest.raises(AssertionError, match="-9"):
        run_distributed(_killed_at, 1, "shard-00001", tmp_path / "rollouts", out, models)
    assert is_sealed(out / "shard-00000") and (out / "shard-00001" / PART / "samples.parquet").exists()
    assert not is_sealed(out / "shard-00001") and not (out / "shard-00002").exists()
    kept = (out / "shard-00000" / "tokens.bin").stat().st_mtime_ns
    flags = {"rollouts": tmp_path / "rollouts", "out": out, "teacher": models["teacher_dir"], "platform": "cpu"}
    flags |= {"student": models["student_dir"], "top-k": CFG.top_k, "seq-length": CFG.seq_length}
    command([f"--{name}={value}" for name, value in flags.items()])
    assert (out / "shard-00000" / "tokens.bin").stat().st_mtime_ns == kept
    assert contents(out) == contents(tmp_path / "whole")


def unseal_and_give_back(rollouts: Path, out: Path) -> threading.Thread:
    """Hide a round, and seal it again shard by shard, the last first, each once the one before is annotated."""
    hidden = rollouts.with_name("hidden")
    rollouts.rename(hidden)
    rollouts.mkdir()

    def give_back() -> None:
        deadline = time.monotonic() + 300
        for shard in sorted(hidden.glob("shard-*"), reverse=True):
            shard.rename(rollouts / shard.name)
            while not is_sealed(out / shard.name) and time.monotonic() < deadline:
                time.sleep(0.05)
        (hidden / MANIFEST).rename(rollouts / MANIFEST)

    thread = threading.Thread(target=give_back)
    thread.start()
    return thread


def test_a_round_is_annotated_while_it_is_generated(tmp_path: Path, models: dict[str, Path]) -> None:
    """In a wave for each shard; the bytes are those of a round annotated afterwards."""
    from megatron_npd.teacher import annotate as stage

    make_rollouts(tmp_path / "rollouts", LENGTHS, shards=3)
    annotate(tmp_path / "rollouts", tmp_path / "whole", models)
    waves = []
    real = stage.Annotator._annotate_wave
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            stage.Annotator, "_annotate_wave", lambda *args: (waves.append(list(args[2].shards)), real(*args))
        )
        thread = unseal_and_give_back(tmp_path / "rollouts", tmp_path / "out")
        annotate(tmp_path / "rollouts", tmp_path / "out", models, FOLLOWING)
    thread.join()
    assert waves == [["shard-00002"], ["shard-00001"], ["shard-00000"]]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_wait_for_a_round_ends_once_no_answer_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers show in the journal of the rollout stage, long before they fill a shard."""
    from megatron_npd.teacher import shard_follower as module

    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    waves = module.ShardFollower(tmp_path, tmp_path / "out", FOLLOWING, {})
    journal = tmp_path / "answers.journal"
    for second in range(0, 200, 40):
        now[0] = float(second)
        assert waves.next() == module.Wave(shards={}, round_size=None)
        journal.write_text("x" * second)
    with pytest.raises(UserError, match=r"must be sealed or get responses, got none in 60 s \(follow_seconds\)"):
        for second in range(200, 400, 40):
            now[0] = float(second)
            waves.next()


def test_a_round_in_the_making_is_refused_but_for_followers(tmp_path: Path, models: dict[str, Path]) -> None:
    make_rollouts(tmp_path / "rollouts", LENGTHS, shards=2)
    (tmp_path / "rollouts" / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"must be a sealed directory"):
        annotate(tmp_path / "rollouts", tmp_path / "out", models)
    cfg = dataclasses.replace(CFG, follow_seconds=0.1)
    with pytest.raises(UserError, match=r"must be sealed or get responses"):
        annotate(tmp_path / "rollouts", tmp_path / "out", models, cfg)
    assert is_sealed(tmp_path / "out" / "shard-00001") and not is_sealed(tmp_path / "out")  # what was there is kept


def test_data_parallel_ranks_follow_a_round_together(tmp_path: Path, models: dict[str, Path]) -> None:
    make_rollouts(tmp_path / "rollouts", LENGTHS, shards=3)
    alone = annotate(tmp_path / "rollouts", tmp_path / "alone", models)
    thread = unseal_and_give_back(tmp_path / "rollouts", tmp_path / "two")
    results = run_distributed(_annotate_rank, 2, tmp_path / "rollouts", tmp_path / "two", models, FOLLOWING)
    thread.join()
    assert results == [dict(alone.counts), None]
    assert contents(tmp_path / "two") == contents(tmp_path / "alone")


@pytest.mark.parametrize("layout", ["one", "TP2", "DP2", "one model at a time"])
def test_round_after_round_with_the_models_loaded(tmp_path: Path, models: dict[str, Path], layout: str) -> None:
    """What orders leave is what a command for each round does, another student's too; one that may be empty is."""
    rounds = {"0": (LENGTHS, 2), "1": (LENGTHS[:5], 3), "2": ([(200, 9)], 3), "3": (LENGTHS[3:], 2)}
    students = {2: models["student_dir"], 3: make_tiny_model(tmp_path / "other", seed=3)}
    orders = []
    for name, (lengths, seed) in rounds.items():
        make_rollouts(tmp_path / name / "rollouts", lengths, shards=min(2, len(lengths)))
        order = {"rollouts": tmp_path / name / "rollouts", "out": tmp_path / name / "out", "student": students[seed]}
        orders.append(json.dumps({k: str(v) for k, v in order.items()} | {"max_quarantined": 1.0} | NOTHING) + "\n")
        if name != "2":
            annotate(order["rollouts"], tmp_path / name / "alone", models | {"student_dir": students[seed]})
    cfg = dataclasses.replace(CFG, tensor_model_parallel_size=1 + (layout == "TP2"), keep_loaded=" " not in layout)
    run_distributed(_annotate_orders, 1 + (layout in ("TP2", "DP2")), orders, models["teacher_dir"], cfg)
    assert not is_sealed(tmp_path / "2" / "out")
    for name in ("0", "1", "3"):
        if layout == "TP2":
            assert_samples_close(tmp_path / name / "out", tmp_path / name / "alone")
        else:
            assert contents(tmp_path / name / "out") == contents(tmp_path / name / "alone")


NOTHING = {"may_keep_nothing": True}


def _annotate_orders(rank: int, world_size: int, orders: list[str], teacher: Path, cfg: AnnotateConfig) -> int:
    from megatron_npd.teacher import annotate as stage
    from megatron_npd.teacher.orders import annotate_orders

    loaded, models, held = [], weakref.WeakSet(), []
    real = stage.Scorer

    def load(path: Path, **settings: Any) -> Any:
        models.add(scorer := real(path, **settings))
        loaded.append(path)
        return scorer

    stage.Scorer = load
    stage.get_platform().release_memory = lambda: held.append(len(models))
    annotate_orders(stage.Annotator(teacher, cfg), orders if rank == 0 else [])
    assert loaded.count(teacher) == (1 if cfg.keep_loaded else 4)
    assert cfg.keep_loaded or (set(held) <= {0, 1} and held[-1] == 0)  # the teacher's own, while the student goes
    return len(loaded)


def test_orders_by_the_command(tmp_path: Path, models: dict[str, Path]) -> None:
    """A process that reads them ends with its standard input, and by the first error."""
    make_rollouts(tmp_path / "rollouts", LENGTHS)
    line = [sys.executable, "-m", "megatron_npd", "annotate", "--orders", f"--teacher={models['teacher_dir']}"]
    line += ["--top-k=4", "--seq-length=128", "--platform=cpu"]
    student = str(models["student_dir"])
    order = AnnotateOrder(
        rollouts=str(tmp_path / "rollouts"), out=str(tmp_path / "out"), student=student, max_quarantined=0.1
    )
    missing = dataclasses.replace(order, rollouts=str(tmp_path / "nowhere"), out=str(tmp_path / "none"))
    for orders, code in (([order], 0), ([order, missing, order], 2)):
        told = "".join(json.dumps(dataclasses.asdict(order)) + "\n" for order in orders)
        result = subprocess.run(line, input=told, text=True, capture_output=True)
        assert result.returncode == code, result.stderr
        assert is_sealed(tmp_path / "out")
    assert "nowhere must be a sealed directory" in result.stderr and "Traceback" not in result.stderr
    annotate(tmp_path / "rollouts", tmp_path / "alone", models)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def _annotate_rank(rank: int, world_size: int, rollouts: Path, out: Path, models: Any, cfg: AnnotateConfig) -> Any:
    manifest = annotate(rollouts, out, models, cfg)
    return manifest and dict(manifest.counts)


def test_data_parallel_ranks_share_the_shards(tmp_path: Path, models: dict[str, Path]) -> None:
    make_rollouts(tmp_path / "rollouts", LENGTHS, shards=3)
    alone = annotate(tmp_path / "rollouts", tmp_path / "alone", models)
    results = run_distributed(_annotate_rank, 2, tmp_path / "rollouts", tmp_path / "two", models, CFG)
    assert results == [dict(alone.counts), None]
    assert contents(tmp_path / "two") == contents(tmp_path / "alone")


def _count_groups(rank: int, world_size: int, *args: Any) -> list[int]:
    """How many process groups there are after each wave."""
    from torch.distributed import distributed_c10d

    from megatron_npd.teacher import annotate as stage

    counts = []
    real = stage.Annotator._annotate_wave
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            stage.Annotator,
            "_annotate_wave",
            lambda *wave: (real(*wave), counts.append(len(distributed_c10d._world.pg_map))),
        )
        annotate(*args)
    return counts


def test_ranks_that_share_experts_score_the_same_shards(tmp_path: Path, models: dict[str, Path]) -> None:
    """Of three shards two copies of the teacher, on two ranks each, have two and one; the student is on all four."""
    teacher = make_tiny_model(tmp_path / "teacher", family="qwen3_moe", seed=3, vocab_size=320)
    models = models | {"teacher_dir": teacher}
    make_rollouts(tmp_path / "rollouts", LENGTHS, shards=3)
    alone = annotate(tmp_path / "rollouts", tmp_path / "alone", models)
    cfg = dataclasses.replace(CFG, expert_model_parallel_size=2)
    results = run_distributed(_annotate_rank, 4, tmp_path / "rollouts", tmp_path / "four", models, cfg)
    assert results == [dict(alone.counts), None, None, None]
    assert_samples_close(tmp_path / "four", tmp_path / "alone")


@pytest.mark.parametrize("layout", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_model_parallel_layouts_leave_the_same_store(tmp_path: Path, models: dict[str, Path], layout: str) -> None:
    """The student has one kv head: under tensor parallelism it runs data-parallel, in a layout of its own.

    A round in three waves takes up the groups of both layouts again and again, and makes none anew.
    """
    make_rollouts(tmp_path / "rollouts", LENGTHS, shards=3)
    annotate(tmp_path / "rollouts", tmp_path / "alone", models)
    cfg = dataclasses.replace(FOLLOWING, **{layout: 2})
    thread = unseal_and_give_back(tmp_path / "rollouts", tmp_path / "two")
    counts = run_distributed(_count_groups, 2, tmp_path / "rollouts", tmp_path / "two", models, cfg)
    thread.join()
    assert all(of_rank == 3 * of_rank[:1] for of_rank in counts)
    read_manifest(tmp_path / "two", kind="annotations")
    assert_samples_close(tmp_path / "two", tmp_path / "alone")


def test_a_tokenizer_without_bos_and_eos_is_scored_where_its_template_says_what_ends_a_turn(tmp_path: Path) -> None:
    from megatron_npd.teacher.annotate import check_setting

    model = make_tiny_model(tmp_path / "model", eos_token_id=None)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    setting = check_setting(model, model, AnnotateConfig(top_k=4))
    assert setting.teacher_start.tolist() == setting.student_start.tolist() == [2]
    assert setting.teacher_generation_prompt[0] == 1
