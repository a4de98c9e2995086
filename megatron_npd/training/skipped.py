"""Steps that were skipped, because their loss or gradient norm was not finite: which samples they had, and how many."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from megatron_npd.config.training import TrainConfig
from megatron_npd.durable import fsync
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.training.metrics import metrics_file, truncate_metrics

SKIPPED_FILE = "skipped.jsonl"


class Skipped:
    """Counts skipped steps in a row; rank 0 writes what each trained on to ``skipped.jsonl`` beside the metrics.

    Args:
        cfg: ``max_skipped_steps``, and where the metrics are.
        iteration: Steps done; what an earlier call noted of later ones is forgotten, as they are done again.
    """

    def __init__(self, cfg: TrainConfig, iteration: int) -> None:
        metrics = metrics_file(cfg)
        self._path = metrics and metrics.with_name(SKIPPED_FILE)
        self._most, self._in_a_row = cfg.max_skipped_steps, 0
        if self._path is not None and dist.get_rank() == 0:
            truncate_metrics(self._path, iteration)

    def after(self, iteration: int, values: dict[str, Any], samples: Sequence[str] | None) -> None:
        """Take note of a step; all ranks call it, and of a skipped step the numbers that are not finite become None.

        Args:
            iteration: Number of the step, from 1.
            values: What ``TrainStep.run`` gave.
            samples: Ids of the step's samples in the order of their rows, on rank 0; None elsewhere.

        Raises:
            UserError: The step is the last that may be skipped in a row.
        """
        if not values["skipped"]:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        what = "gradient norm" if math.isfinite(values["loss"]) else "loss"
        got = values["grad_norm" if what == "gradient norm" else "loss"]
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None
        if samples is not None:
            where = self._write({"iteration": iteration, what.replace(" ", "_"): str(got), "samples": [*samples]})
            get_logger().warning(
                "step %d: its %s is %s, the update is skipped; the ids of its %d samples%s",
                *(iteration, what, got, len(samples), where),
            )
        if self._in_a_row >= self._most:
            raise UserError(
                f"the {what} must be finite in one of max_skipped_steps ({self._most}) steps, got {got} in step "
                f"{iteration} and in all {self._most}; nothing was saved since the last checkpoint: lower lr, look at "
                f"the samples in {self._path or SKIPPED_FILE}, or start from it with other settings"
            )

    def _write(self, line: Mapping[str, Any]) -> str:
        if self._path is None:
            return f": {', '.join(line['samples'])}"
        with open(self._path, "a") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            fsync(stream.fileno(), self._path)
        return f" are in {self._path}"
