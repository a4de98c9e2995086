"""Where metrics go: the JSONL file's truncation, interval means, TensorBoard and wandb."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_npd.config.training import TrainConfig
from megatron_npd.platform.accelerators import ACCELERATORS, accelerator_of
from megatron_npd.training.metrics import MetricsWriter, average, console_line, metrics_file, truncate_metrics


def record(iteration: int, **values: Any) -> dict[str, Any]:
    """One step's record as the trainer makes it."""
    return {
        "iteration": iteration,
        "rows_consumed": 4 * iteration,
        "round": 0,
        "policy_version": "v0000",
        "loss": float(iteration),
        "ce": 1.0,
        "entropy": None,
        "kd": None,
        "teacher_mass": None,
        "student_mass": None,
        "top1_agreement": None,
        "lag_k1": None,
        "lag_k3": None,
        "lag_tokens": 0,
        "response_tokens": 10,
        "lr": 1e-3 * iteration,
        "grad_norm": 2.0,
        "tokens": 256,
        "tokens_per_second": 1000.0,
        "step_seconds": 0.256,
        "data_wait_seconds": 0.01,
    } | values


def write(path: Path, *iterations: int) -> None:
    path.write_text("".join(json.dumps({"iteration": n}) + "\n" for n in iterations))


def test_truncation_keeps_the_steps_of_the_checkpoint_and_drops_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2, 3, 4, 5)
    with path.open("a") as stream:
        stream.write('{"iteration": 6, "lo')
    truncate_metrics(path, 3)
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert path.read_text().endswith("\n")


def test_an_interval_averages_what_is_defined_and_takes_the_rest_from_its_last_step() -> None:
    means = average([record(1, lag_k3=None), record(2, lag_k3=0.5), record(3, lag_k3=0.1)])
    assert means["loss"] == 2.0 and means["lag_k3"] == pytest.approx(0.3) and means["kd"] is None
    assert means["iteration"] == 3 and means["lr"] == pytest.approx(3e-3) and means["rows_consumed"] == 12


def test_parts_of_an_objective_that_nobody_knows_are_shown_too(caplog: pytest.LogCaptureFixture) -> None:
    records = [record(1, advantage=0.5), record(2, advantage=1.0)]
    means = average(records)
    assert means["advantage"] == 0.75
    assert "advantage 0.7500" in console_line(means, 10)


def test_console_has_one_line_an_interval_and_one_at_the_end(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    cfg = TrainConfig(log_interval=2, train_iters=10, metrics_path=str(tmp_path / "m.jsonl"))
    with caplog.at_level(logging.INFO), MetricsWriter(cfg, iteration=0, stop=5) as writer:
        for iteration in range(1, 6):
            writer.write(record(iteration, kd=0.25, teacher_mass=0.9, student_mass=0.8, lag_k3=0.01))
    lines = [message for message in caplog.messages if message.startswith("step ")]
    assert [line.split(",")[0] for line in lines] == ["step 2/10", "step 4/10", "step 5/10"]
    assert "loss 1.5000, CE 1.0000, KD 0.2500" in lines[0] and "lag k3 0.0100" in lines[0]
    assert "1000 tok/s" in lines[0] and "256.0 ms/step (data 10.0)" in lines[0]
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 5


def test_a_line_says_how_fast_a_rank_is_and_what_part_of_its_peak_that_is() -> None:
    line = console_line(record(1, model_tflops=64.0) | {"memory_gb": 41.25}, 10, ranks=4, peak=125e12)
    assert ", 1000 tok/s, 250 per rank, 62.5 TFLOP/s per rank (MFU 50.0%), " in line and line.endswith(", 41.2 GB")
    alone = console_line(record(1, model_tflops=64.0), 10)
    assert ", 1000 tok/s, 250 TFLOP/s, " in alone and "MFU" not in alone


@pytest.mark.parametrize(
    ("product", "key"),
    [
        ("NVIDIA H200", "h200-141g"),
        ("NVIDIA H20", "h20-96g"),
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("Ascend910B3", "ascend-910b-64g"),
        ("NVIDIA T4", ""),
    ],
)
def test_a_device_is_known_by_its_product_name(product: str, key: Any) -> None:
    found = accelerator_of(product)
    assert (found and found.flops_bf16) == (ACCELERATORS[key].flops_bf16 if key else None)


def test_the_file_is_under_save_unless_named() -> None:
    assert metrics_file(TrainConfig()) is None
    assert metrics_file(TrainConfig(save="run")) == Path("run/metrics.jsonl")
    assert metrics_file(TrainConfig(save="run", metrics_path="report/m.jsonl")) == Path("report/m.jsonl")


def test_tensorboard_and_one_offline_wandb_run_get_the_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = TrainConfig(
        log_interval=2,
        train_iters=4,
        save=str(tmp_path),
        tensorboard_dir=str(tmp_path / "tb"),
        wandb_project="npd",
    )
    monkeypatch.delenv("WANDB_DIR", raising=False)
    for first, stop in ((1, 2), (3, 4)):  # two rounds
        with MetricsWriter(cfg, iteration=first - 1, stop=stop) as writer:
            for iteration in range(first, stop + 1):
                writer.write(record(iteration))
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(2, 1.5), (4, 3.5)]
    assert "train/kd" not in events.Tags()["scalars"]
    (run,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")

    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(KeyboardInterrupt), MetricsWriter(cfg, iteration=0, stop=2):
        raise KeyboardInterrupt  # its run is closed
    (other,) = (tmp_path / "elsewhere/wandb").glob("offline-run-*/*.wandb")
    assert other.name == run.name and list((tmp_path / "wandb").glob("offline-run-*/*.wandb")) == [run]
