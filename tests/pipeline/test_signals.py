"""A signal to the runner, a rank that is killed under torchrun: the trainer saves, or goes on from what it saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_npd.config.cluster import ClusterConfig
from megatron_npd.config.command_line import command_flags
from megatron_npd.config.training import TrainConfig
from megatron_npd.log import run_main
from megatron_npd.manifest import is_sealed
from megatron_npd.pipeline.launch import Launcher
from megatron_npd.pipeline.signals import Signals
from megatron_npd.stoppable import StoppedBySignal
from megatron_npd.training.trainer import train
from tests.helpers import wait_for
from tests.training.make_run import column, config, make_packs, read_metrics

STEPS = 60


def lines(cfg: TrainConfig) -> int:
    path = Path(cfg.save) / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def _stop_by_signal(cfg: TrainConfig) -> None:
    """Start the trainer in two ranks as the runner does, which then gets Slurm's warning."""
    with Signals(0.0) as signals, Launcher(ClusterConfig(nproc_per_node=2)) as launcher:
        signals.launcher = launcher
        job = launcher.start("train", vars(cfg))
        wait_for(lambda: lines(cfg) > 1, job._process)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(60)


def _restart(cfg: TrainConfig) -> None:
    """Train to the end under torchrun, which starts the ranks again after one of them is killed."""
    where = ["--standalone", "--max-restarts", "1", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", "megatron_npd.torchrun", *where, "-m", "megatron_npd", "train"]
    torchrun = subprocess.Popen([*command, *command_flags(vars(cfg))])
    done = lines(cfg)
    wait_for(lambda: lines(cfg) > done + 10, torchrun)
    psutil.Process(torchrun.pid).children()[-1].kill()
    assert torchrun.wait(200) == 0


def test_the_trainer_saves_at_a_signal_and_outlives_a_killed_rank(
    tmp_path: Path, tiny_model_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    packs = make_packs(tmp_path / "packs")
    cfg = config(tiny_model_dir, packs, tmp_path / "run", train_iters=STEPS, save_interval=5)
    with pytest.raises(StoppedBySignal):
        _stop_by_signal(cfg)
    steps = lines(cfg)
    assert 1 < steps < STEPS and is_sealed(tmp_path / f"run/iter_{steps:07d}")
    assert f"stopped by SIGTERM after step {steps} of {STEPS}: {cfg.save} holds it" in capfd.readouterr().err

    _restart(cfg)
    path = Path(cfg.save) / "metrics.jsonl"
    assert capfd.readouterr().err.count("resumed from") == 2
    assert [line["iteration"] for line in read_metrics(path)] == [*range(1, STEPS + 1)]
    whole = train(config(tiny_model_dir, packs, metrics_path=str(tmp_path / "whole.jsonl"), train_iters=STEPS))
    assert column(path, "samples_sha256") == column(whole.metrics_path, "samples_sha256")
    assert column(path, "loss") == pytest.approx(column(whole.metrics_path, "loss"), abs=1e-4)


def test_a_stopped_command_ends_with_0_and_says_how_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    def stop() -> None:
        with Signals(1e-5):
            time.sleep(60)

    with pytest.raises(SystemExit) as ended:
        run_main(stop)
    assert ended.value.code == 0
    assert capsys.readouterr().err == "stopped by SIGUSR1; run the same command again to go on\n"
