"""Where the numbers of a training run go: JSON lines every step; console, TensorBoard and wandb every interval."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_npd.config.training import TrainConfig
from megatron_npd.durable import fsync, write_atomic
from megatron_npd.log import get_logger, progress
from megatron_npd.platform import get_platform
from megatron_npd.platform.accelerators import accelerator_of

METRICS_FILE = "metrics.jsonl"
_wandb_runs: dict[str, Any] = {}  # those that are open: the rounds of a run are one of wandb's
_OF_THE_LAST_STEP = ("lr",)  # beside whole numbers: what an interval's line does not average over its steps
_LABELS = {"ce": "CE", "kd": "KD", "lag_k3": "lag k3", "grad_norm": "grad norm"}
_NO_PARTS = ("lr", "model_tflops", "memory_gb")  # shown in units of their own, as times are


def is_time(name: str) -> bool:
    """Whether a metric says how long something took, or for which rank: no two runs have the same."""
    return name.endswith("_seconds") or name in ("tokens_per_second", "slowest_rank", "data_wait_rank")


def is_logged(cfg: TrainConfig, iteration: int, stop: int) -> bool:
    """Whether a step has a line in the log: each ``log_interval``-th, and that at which a call of ``train`` ends."""
    return iteration % cfg.log_interval == 0 or iteration == stop


def metrics_file(cfg: TrainConfig) -> Path | None:
    """The run's JSONL file, or None where neither ``metrics_path`` nor ``save`` is given."""
    if cfg.metrics_path:
        return Path(cfg.metrics_path)
    return Path(cfg.save) / METRICS_FILE if cfg.save else None


def truncate_metrics(path: Path, iteration: int) -> None:
    """Drop the lines of steps after ``iteration``, and a last line cut short by a kill, so that none is repeated."""
    if not path.is_file():
        return
    kept: list[str] = []
    for line in path.read_text().splitlines():
        try:
            step = json.loads(line)["iteration"]
        except (ValueError, KeyError, TypeError):
            break
        if step <= iteration:
            kept.append(line + "\n")
    write_atomic(path, "".join(kept))


def average(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One record for several steps: the last one, with the means of the numbers that are no whole ones."""
    result = dict(records[-1])
    for name in {name for record in records for name, value in record.items() if isinstance(value, float)}:
        values = [record[name] for record in records if record.get(name) is not None]
        if name not in _OF_THE_LAST_STEP:
            result[name] = sum(values) / len(values)
    return result


def console_line(record: Mapping[str, Any], train_iters: int, *, ranks: int = 1, peak: float | None = None) -> str:
    """An interval's means in one line, with units; quantities that are not defined are left out.

    Args:
        record: The means.
        train_iters: Steps of the run.
        ranks: That share the work.
        peak: FLOP/s that one's device could reach; None: not known.
    """

    def items() -> Iterator[str]:
        yield f"step {record['iteration']}/{train_iters}"
        for name, value in record.items():
            if isinstance(value, float) and name not in _NO_PARTS and not is_time(name):
                yield f"{_LABELS.get(name, name.replace('_', ' '))} {value:.4f}"
        yield f"lr {record['lr']:.2e}"
        yield f"{record['tokens_per_second']:.0f} tok/s"
        if ranks > 1:
            yield f"{record['tokens_per_second'] / ranks:.0f} per rank"
        if (tflops := record.get("model_tflops")) is not None:
            speed = tflops / record["step_seconds"] / ranks
            utilisation = f" (MFU {1e12 * speed / peak:.1%})" if peak else ""
            yield f"{speed:.3g} TFLOP/s{' per rank' * (ranks > 1)}{utilisation}"
        yield f"{1e3 * record['step_seconds']:.1f} ms/step (data {1e3 * record['data_wait_seconds']:.1f})"
        if (slowest := record.get("slowest_rank")) is not None:
            times = (f"{1e3 * record[f'compute_{name}_seconds']:.1f}" for name in ("min", "median", "max"))
            yield f"ranks compute {' / '.join(times)} ms (slowest {slowest})"
            yield f"longest data wait {1e3 * record['data_wait_max_seconds']:.1f} ms (rank {record['data_wait_rank']})"
        yield f"{record['rows_consumed']} rows"
        if (memory := record.get("memory_gb")) is not None:
            yield f"{memory:.1f} GB"

    return ", ".join(items())


def _wandb_run(cfg: TrainConfig) -> Any:
    """The run of this directory: open since an earlier round in this process, else begun or gone on with."""
    import wandb

    where = str(Path(cfg.save or cfg.metrics_path or cfg.wandb_exp_name).resolve())
    identity = hashlib.sha256(where.encode()).hexdigest()[:16]
    if identity not in _wandb_runs:
        _wandb_runs[identity] = wandb.init(
            project=cfg.wandb_project,
            name=cfg.wandb_exp_name or None,
            id=identity,
            resume="allow",
            reinit="create_new",  # a run that the caller has open stays the caller's
            dir=os.environ.get("WANDB_DIR") or cfg.save or None,
            config=dict(vars(cfg)),
        )
    return _wandb_runs[identity]


class MetricsWriter:
    """Writes the records of one call of ``train``; used on rank 0 only, closed when the call ends.

    Args:
        cfg: Names the outputs; TensorBoard and wandb are imported only where asked for.
        iteration: Steps done before; later lines of an interrupted attempt are dropped from the JSONL file.
        stop: Step at which this call ends, for the progress bar.
        ranks: That share the work.
    """

    def __init__(self, cfg: TrainConfig, *, iteration: int, stop: int, ranks: int = 1) -> None:
        self._cfg, self._stop, self._ranks = cfg, stop, ranks
        devices = get_platform().device_names()
        sheet = accelerator_of(devices[0]) if devices else None
        self._peak = sheet and sheet.flops(cfg.bf16)
        self._pending: list[dict[str, Any]] = []
        self._jsonl = self._tensorboard = self._wandb = None
        path = metrics_file(cfg)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            truncate_metrics(path, iteration)
            self._jsonl = path.open("a", buffering=1)
        if cfg.tensorboard_dir:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._tensorboard = SummaryWriter(cfg.tensorboard_dir, purge_step=iteration + 1)
        if cfg.wandb_project:
            self._wandb = _wandb_run(cfg)
        self._bar = progress(cfg.train_iters, "train", "step", initial=iteration)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._pending and error is None:
            self._show()
        self._bar.close()
        if self._jsonl is not None:
            self._jsonl.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None and (error or self._stop == self._cfg.train_iters):
            _wandb_runs.pop(self._wandb.id).finish(exit_code=int(error is not None))

    def sync(self) -> None:
        """Flush the lines to the disk: a checkpoint must not outlive those of the steps before it."""
        if self._jsonl is not None:
            self._jsonl.flush()
            fsync(self._jsonl.fileno(), self._jsonl.name)

    def write(self, record: dict[str, Any]) -> None:
        """Take one step's record: the objective's parts and what ``trainer`` adds, None where undefined."""
        if self._jsonl is not None:
            self._jsonl.write(json.dumps(record) + "\n")
        self._bar.update()
        self._pending.append(record)
        if is_logged(self._cfg, record["iteration"], self._stop):
            self._show()

    def _show(self) -> None:
        """Log the mean of the steps since the last line."""
        step, means = self._pending[-1]["iteration"], average(self._pending)
        self._pending.clear()
        self._bar.clear()
        means["memory_gb"] = get_platform().max_memory_bytes() / 1e9
        line = console_line(means, self._cfg.train_iters, ranks=self._ranks, peak=self._peak)
        get_logger().info(line)
        self._bar.refresh()
        scalars = {name: value for name, value in means.items() if isinstance(value, int | float)}
        if self._tensorboard is not None:
            for name, value in scalars.items():
                if name != "iteration":
                    self._tensorboard.add_scalar(f"train/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)
