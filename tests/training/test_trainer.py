"""The training run in one process: resume, segments, objectives, number formats, and what it refuses."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest

from megatron_npd.audit.verify import verify_run
from megatron_npd.choices import Mode
from megatron_npd.cli import train as train_command
from megatron_npd.config.settings import PackConfig
from megatron_npd.config.training import TrainConfig
from megatron_npd.data.packing import pack_rollouts
from megatron_npd.data.row_schedule import ScheduleEntry, schedule_text
from megatron_npd.errors import UserError
from megatron_npd.lock import hold_lock
from megatron_npd.models.convert import hf_to_megatron
from megatron_npd.ops import distill_loss_triton
from megatron_npd.training import trainer
from megatron_npd.training.metrics import is_time
from megatron_npd.training.step import TrainStep
from megatron_npd.training.trainer import train
from tests.helpers import VOCAB_SIZE, make_tiny_model
from tests.teacher.reference import make_rollouts
from tests.training.make_run import column, config, make_packs, make_sft_packs, read_metrics, sample_lengths


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_packs(tmp_path_factory.mktemp("packs"))


@pytest.fixture(scope="module")
def sft_packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sft_packs(tmp_path_factory.mktemp("sft"))


def exact(path: Path | None) -> list[dict[str, Any]]:
    """The metrics' lines without the times."""
    return [{name: value for name, value in line.items() if not is_time(name)} for line in read_metrics(path)]


@pytest.mark.parametrize("fields", [{}, {"bf16": True}, {"use_distributed_optimizer": False}], ids=str)
def test_an_interrupted_run_goes_on_bit_by_bit(
    tmp_path: Path, tiny_model_dir: Path, packs: Path, fields: dict[str, Any]
) -> None:
    def run(name: str, **more: Any) -> TrainConfig:
        return config(tiny_model_dir, packs, tmp_path / name, train_iters=12, save_interval=5, **fields, **more)

    whole = train(run("whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")  # killed after step 12, with its last checkpoint half done
    (tmp_path / "killed/iter_0000012/manifest.json").unlink()
    resumed = train(run("killed"))

    assert exact(resumed.metrics_path) == exact(whole.metrics_path)
    assert resumed.finished and resumed.rows_consumed == 48
    weights = {path.name: path.read_bytes() for path in (tmp_path / "whole/iter_0000012").glob("*.distcp")}
    assert weights == {path.name: path.read_bytes() for path in (tmp_path / "killed/iter_0000012").glob("*.distcp")}


def test_between_kept_checkpoints_one_by_time_stays_until_the_next_is_whole(
    tmp_path: Path, tiny_model_dir: Path, packs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, **more: Any) -> TrainConfig:
        return config(tiny_model_dir, packs, tmp_path / name, train_iters=7, save_interval=4, **more)

    def saved() -> list[str]:
        return sorted(path.name for path in (tmp_path / "timed").iterdir() if path.is_dir())

    whole = train(run("whole"))
    seen: list[list[str]] = []
    step = TrainStep.run

    def observed(self: TrainStep, batches: Any, iteration: int, ask: Any) -> Any:
        if iteration > 1:
            seen.append(saved())
        if iteration == 7 and len(seen) == 6:
            raise KeyboardInterrupt
        return step(self, batches, iteration, ask)

    monkeypatch.setattr(TrainStep, "run", observed)
    timed = run("timed", save_interval_in_mins=1e-9)  # each step takes longer
    (tmp_path / "timed/iter_0000000").mkdir(parents=True)  # a killed attempt's, and one whose removal was killed
    (tmp_path / "timed/.iter_0000002").mkdir()
    with pytest.raises(KeyboardInterrupt):
        train(timed)
    kept = "iter_0000004"
    assert seen == [[f"iter_000000{i}"] for i in (1, 2, 3, 4)] + [[kept, "iter_0000005"], [kept, "iter_0000006"]]
    assert exact(train(timed).metrics_path) == exact(whole.metrics_path)
    assert saved() == [kept, "iter_0000007"]
    assert not verify_run(tmp_path / "timed").problems


def test_segments_make_one_run_and_a_done_one_returns_at_once(
    tmp_path: Path, tiny_model_dir: Path, packs: Path
) -> None:
    whole = train(config(tiny_model_dir, packs, tmp_path / "whole", train_iters=9))
    for stop in (4, 9):
        cfg = config(tiny_model_dir, packs, tmp_path / "parts", train_iters=9, exit_at_iteration=stop)
        result = train(cfg)
        assert (result.iteration, result.rows_consumed, result.finished) == (stop, 4 * stop, stop == 9)
        assert (tmp_path / f"parts/iter_{stop:07d}/manifest.json").exists()
    assert exact(result.metrics_path) == exact(whole.metrics_path)

    shutil.rmtree(tmp_path / "parts/iter_0000004")
    before = (tmp_path / "parts/metrics.jsonl").read_bytes()
    early = config(tiny_model_dir, packs, tmp_path / "parts", train_iters=9, exit_at_iteration=4)
    assert train(early).iteration == 9  # the newest checkpoint is past the goal
    assert (tmp_path / "parts/metrics.jsonl").read_bytes() == before


def test_load_starts_a_run_from_another_ones_checkpoint_and_new_settings_hold(
    tmp_path: Path, tiny_model_dir: Path, packs: Path
) -> None:
    train(config(tiny_model_dir, packs, tmp_path / "first", train_iters=4))
    fields = {"load": str(tmp_path / "first"), "train_iters": 8, "lr": 2e-3, "min_lr": 2e-3, "lr_warmup_iters": 0}
    result = train(config(tiny_model_dir, packs, tmp_path / "second", **fields))
    assert column(result.metrics_path, "iteration") == [5, 6, 7, 8]
    assert column(result.metrics_path, "lr") == [2e-3] * 4
    with pytest.raises(UserError, match=r"seed must be 1234, .* got 7"):
        train(config(tiny_model_dir, packs, tmp_path / "third", **fields, seed=7))


def test_a_run_starts_from_converted_weights(tmp_path: Path, tiny_model_dir: Path, packs: Path) -> None:
    hf_to_megatron(tiny_model_dir, tmp_path / "converted")
    whole = train(config(tiny_model_dir, packs, tmp_path / "whole", train_iters=4))
    loaded = train(config(tiny_model_dir, packs, tmp_path / "run", train_iters=4, load=str(tmp_path / "converted")))
    assert exact(loaded.metrics_path) == exact(whole.metrics_path)


def test_rounds_follow_the_schedule(tmp_path: Path, tiny_model_dir: Path) -> None:
    entries = []
    for index, from_row in enumerate((0, 8)):
        make_packs(tmp_path / f"{index}", samples=30 + index)
        entry = ScheduleEntry(from_row=from_row, packs=f"{index}/packs", round=index, policy_version=f"v{index:04d}")
        entries.append(entry)
    schedule = tmp_path / "schedule.jsonl"
    schedule.write_text(schedule_text(entries))

    result = train(config(tiny_model_dir, schedule, tmp_path / "run", train_iters=4, lr_warmup_iters=0))

    assert column(result.metrics_path, "round") == [0, 0, 1, 1]
    assert column(result.metrics_path, "policy_version") == ["v0000", "v0000", "v0001", "v0001"]


def test_micro_batches_change_nothing(tmp_path: Path, tiny_model_dir: Path, packs: Path) -> None:
    def losses(name: str, **fields: Any) -> list[float]:
        path = tmp_path / name
        cfg = config(tiny_model_dir, packs, metrics_path=str(path), train_iters=5, lr_warmup_iters=0, **fields)
        return column(train(cfg).metrics_path, "loss")

    expected = losses("a")
    assert losses("b", micro_batch_size=4) == pytest.approx(expected, rel=1e-5)
    assert losses("c", global_batch_size=1, global_batch_tokens=4 * 64) == expected


def test_sft_learns_its_data(tmp_path: Path, tiny_model_dir: Path, sft_packs: Path) -> None:
    cfg = config(tiny_model_dir, sft_packs, metrics_path=str(tmp_path / "m"), objective="sft", lr=5e-3, train_iters=30)
    lines = read_metrics(train(cfg).metrics_path)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    for line in lines:
        assert line["loss"] == pytest.approx(line["ce"])
        assert line["policy_version"] == "data"
        assert not line.keys() & {"kd", "teacher_mass", "student_mass"}
        assert line["lag_k1"] is line["lag_k3"] is None and line["lag_tokens"] == 0  # nobody generated it


@pytest.mark.parametrize("mode", get_args(Mode))
def test_every_mode_brings_the_student_nearer_to_the_teacher(
    tmp_path: Path, tiny_model_dir: Path, packs: Path, mode: Mode
) -> None:
    cfg = config(
        tiny_model_dir,
        packs,
        metrics_path=str(tmp_path / "m"),
        kd_mode=mode,
        kd_alpha=1.0,
        lr=5e-3,
        train_iters=25,
        lr_decay_style="linear",
    )
    lines = read_metrics(train(cfg).metrics_path)
    assert lines[-1]["kd"] < 0.9 * lines[0]["kd"]
    assert lines[0]["loss"] == pytest.approx(lines[0]["kd"]) and 0 < lines[0]["teacher_mass"] < 1
    if mode != "renorm_both":  # which does not look at the mass outside
        assert lines[-1]["student_mass"] > lines[0]["student_mass"]


def test_bf16_stays_near_fp32(tmp_path: Path, tiny_model_dir: Path, packs: Path) -> None:
    losses = [
        column(
            train(config(tiny_model_dir, packs, metrics_path=str(tmp_path / str(bf16)), bf16=bf16)).metrics_path, "loss"
        )
        for bf16 in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2) and losses[0] != losses[1]


@pytest.mark.parametrize(
    ("fields", "tolerance"),
    [
        ({}, 1e-5),
        ({"kd_divergence": "jsd"}, 1e-5),
        ({"kd_mode": "renorm_both", "kd_temperature": 2.0}, 1e-5),
        ({"kd_alpha": 0.0}, 1e-5),
        ({"bf16": True}, 2e-3),  # the output layer's gradient is added up in fp32 rather than in bf16
    ],
    ids=str,
)
def test_the_loss_fused_with_the_output_layer_gives_the_same_curve(
    tmp_path: Path, packs: Path, fields: dict[str, Any], tolerance: float
) -> None:
    model = make_tiny_model(tmp_path / "model", tie_word_embeddings=False)  # the layouts' tests have a tied one
    curves = []
    for fused in (False, True):
        cfg = config(model, packs, metrics_path=str(tmp_path / str(fused)), fused_linear_loss=fused, **fields)
        path = train(cfg).metrics_path
        curves.append(column(path, "loss") + column(path, "grad_norm") + column(path, "ce"))
    assert curves[1] == pytest.approx(curves[0], rel=tolerance, abs=tolerance)
    assert curves[0][19] < curves[0][0] - 0.05


def test_settings_of_the_objective_that_do_not_go_together_are_refused_at_once(
    tmp_path: Path, tiny_model_dir: Path, packs: Path
) -> None:
    for fields, words in (
        ({"kd_temperature": 2.0}, "temperature must be 1 for mode tail"),
        ({"kd_divergence": "reverse_kl", "kd_mode": "truncated"}, "mode must be tail or renorm_both"),
        ({"kd_divergence": "jsd", "kd_beta": 1.0}, "beta must be in"),
    ):
        with pytest.raises(UserError, match=words):
            train(config(tiny_model_dir, packs, tmp_path / "run", **fields))


def test_constant_rate_without_clipping_reports_the_norm(tmp_path: Path, tiny_model_dir: Path, packs: Path) -> None:
    fields = {"lr_decay_style": "constant", "lr_warmup_iters": 0, "clip_grad": 0.0, "train_iters": 3}
    lines = read_metrics(train(config(tiny_model_dir, packs, metrics_path=str(tmp_path / "m"), **fields)).metrics_path)
    assert [line["lr"] for line in lines] == [1e-3] * 3 and all(line["grad_norm"] > 0.5 for line in lines)


def test_a_second_trainer_is_kept_out_and_touches_no_metrics(tmp_path: Path, tiny_model_dir: Path, packs: Path) -> None:
    cfg = config(tiny_model_dir, packs, tmp_path / "run", train_iters=2, lr_warmup_iters=0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("of the first\n")
    with (
        hold_lock(cfg.save),
        pytest.raises(UserError, match=f"one writer, got a second one beside process {os.getpid()}"),
    ):
        train(cfg)
    assert (tmp_path / "run/metrics.jsonl").read_text() == "of the first\n"
    assert train(cfg).finished and len(exact(tmp_path / "run/metrics.jsonl")) == 2
    verified = verify_run(tmp_path)
    assert [row[0] for row in verified.rows] == ["run/iter_0000002"] and not verified.problems


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(
    tmp_path: Path, tiny_model_dir: Path, packs: Path
) -> None:
    cfg = config(tiny_model_dir, packs, tmp_path / "run", lr=1e30, min_lr=0.0, lr_warmup_iters=0, clip_grad=0.0)
    with pytest.raises(UserError, match=r"finite in one of max_skipped_steps \(3\) steps, got (nan|inf) in step 4 and"):
        train(cfg)
    assert not list((tmp_path / "run").glob("iter_*"))
    assert column(tmp_path / "run/metrics.jsonl", "skipped") == [0, 1, 1]


def test_the_command_line_trains_and_takes_a_recipe(tmp_path: Path, tiny_model_dir: Path, packs: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"hf_model: {tiny_model_dir}\ndata_path: {packs}\nplatform: cpu\ntrain_iters: 5\n")
    arguments = [
        "--config",
        str(recipe),
        "--global-batch-size",
        "2",
        "--train_iters=2",
        "--save",
        str(tmp_path / "run"),
    ]
    assert not train_command.main(arguments)
    assert column(tmp_path / "run/metrics.jsonl", "rows_consumed") == [2, 4]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hf_model": ""}, "hf_model must be a Hugging Face model directory, got ''"),
        ({"hf_model": "nowhere"}, "hf_model must be"),
        ({"data_path": "nowhere"}, "data_path must be"),
        ({"data_path": ""}, "data_path must be"),
        ({"save": __file__}, "save must be a directory, got '.*test_trainer.py', where .* is a file"),
        ({"metrics_path": f"{__file__}/m.jsonl"}, "the directory of metrics_path must be a directory"),
        ({"load": "nowhere"}, "load must hold a checkpoint, got none in nowhere"),
        ({"exit_at_iteration": 2}, "save must be given with exit_at_iteration"),
        ({"micro_batch_size": 3}, "global_batch_size must be a multiple of .* 3 x 1, got 4"),
        ({"global_batch_tokens": 100}, "multiple of the packs' row length 64, got 100; give 64"),
        ({"tensor_model_parallel_size": 2}, "number of processes must be a multiple"),
        ({"platform": "npu"}, "platform must be the one"),
    ],
)
def test_bad_input_is_refused(tiny_model_dir: Path, packs: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(config(**{"model": tiny_model_dir, "packs": packs} | fields))


def test_a_loss_that_cannot_run_here_is_refused(
    tiny_model_dir: Path, packs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is built and a batch is read."""
    monkeypatch.setattr(distill_loss_triton, "INTERPRETED", False)
    monkeypatch.setattr(trainer, "build_chunks", None)
    with pytest.raises(UserError, match=r"^loss_impl must be one that can run, got 'triton' with tensors on cpu"):
        train(config(tiny_model_dir, packs, loss_impl="triton"))


def test_packs_that_do_not_fit_are_refused(tmp_path: Path, tiny_model_dir: Path, packs: Path, sft_packs: Path) -> None:
    with pytest.raises(UserError, match="teacher records for distillation, got none; train with --objective sft"):
        train(config(tiny_model_dir, sft_packs))
    other = make_packs(tmp_path, vocab_size=VOCAB_SIZE - 4)
    with pytest.raises(UserError, match=f"vocabulary of {VOCAB_SIZE} tokens, got {VOCAB_SIZE - 4}"):
        train(config(tiny_model_dir, other))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, tiny_model_dir: Path, packs: Path) -> None:
    train(config(tiny_model_dir, packs, tmp_path / "run", train_iters=1, lr_warmup_iters=0))
    wider = make_tiny_model(tmp_path / "wider", hidden_size=128, num_attention_heads=4)
    with pytest.raises(UserError, match="must hold this model"):
        train(config(wider, packs, tmp_path / "run"))


def test_responses_that_nobody_scored_train_and_tell_their_lag(tmp_path: Path, tiny_model_dir: Path) -> None:
    lengths = sample_lengths(40)
    make_rollouts(tmp_path / "rollouts", lengths)
    cfg = PackConfig(seq_length=64, segment_align=8)
    pack_rollouts(tmp_path / "rollouts", tmp_path, cfg, vocab_size=VOCAB_SIZE)
    result = train(
        config(tiny_model_dir, tmp_path / "packs", tmp_path / "save", train_iters=3, lr_warmup_iters=0, objective="sft")
    )
    lines = read_metrics(result.metrics_path)
    assert all(0 < line["lag_tokens"] < line["response_tokens"] for line in lines)  # odd samples are greedy
    assert all(line["lag_k3"] > 0 and "kd" not in line and line["policy_version"] == "v0003" for line in lines)
    with pytest.raises(UserError, match="distillation"):
        train(config(tiny_model_dir, tmp_path / "packs"))


def test_a_window_of_steps_is_profiled(tmp_path: Path, tiny_model_dir: Path) -> None:
    packs = make_packs(tmp_path / "packs")
    window = {"profile": True, "profile_step_start": 2, "profile_step_end": 3}
    train(config(tiny_model_dir, packs, tmp_path / "run", train_iters=3, lr_warmup_iters=0, **window))
    trace = gzip.decompress((tmp_path / "run" / "profile" / "rank-0000.json.gz").read_bytes())
    names = [event.get("name", "") for event in json.loads(trace)["traceEvents"]]
    assert sum(name == "aten::embedding" for name in names) == 4, "the micro-batches of one step"
    with pytest.raises(UserError, match=r"profile_step_start must be from 1 to profile_step_end - 1 \(11\), got 12"):
        config(tiny_model_dir, packs, profile_step_start=12)
