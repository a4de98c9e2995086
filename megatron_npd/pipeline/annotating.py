"""The annotator of a run: in this process, or a command on all training nodes; either keeps its models loaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_npd.config.run import NPDConfig
from megatron_npd.config.settings import AnnotateOrder
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.pipeline.launch import Job, Launcher
from megatron_npd.run_dir import RunDir

if TYPE_CHECKING:
    from megatron_npd.teacher.annotate import Annotator


class RunAnnotator:
    """Annotates one round after another; what is loaded or started, is so at the first need.

    Args:
        run: The run.
        cfg: Its configuration.
        launcher: Starts commands on the training nodes.
    """

    def __init__(self, run: RunDir, cfg: NPDConfig, launcher: Launcher) -> None:
        self.run, self.cfg, self.launcher = run, cfg, launcher
        # Where stages overlap, this process's threads must share no state of megatron-core; where they take turns, it
        # must leave the device; where the annotator follows the rollouts, it would hold the models a second time.
        apart = cfg.max_lead > 0 or cfg.take_turns or cfg.annotate.follow_seconds > 0
        self.here = cfg.alone and not apart and cfg.annotate.backend == "megatron"
        self._annotator: Annotator | None = None
        self._job: Job | None = None
        self._told: set[str] = set()

    def settings(self) -> dict[str, Any]:
        """The configuration of the command."""
        models = {"teacher": self.cfg.teacher, "log_dir": self.run.logs, "platform": self.cfg.platform}
        return {**models, **dataclasses.asdict(self.cfg.annotate), "orders": True}

    def begin(self, order: AnnotateOrder) -> None:
        """Have the command annotate a round while its rollouts are generated."""
        if self._job is None:
            self._job, self._told = self.launcher.start("annotate", self.settings(), told=True), set()
        if order.out not in self._told:
            self._told.add(order.out)
            self._job.tell(json.dumps(dataclasses.asdict(order)))

    def annotate(self, order: AnnotateOrder, done: Callable[[], bool]) -> None:
        """Annotate a round, or what of it was not annotated since ``begin``, until nothing of it is left to do.

        Raises:
            UserError: As ``teacher.annotate.Annotator`` does, or the command failed.
        """
        if self.here:
            if self._annotator is None:
                from megatron_npd.teacher.annotate import Annotator  # after the platform is chosen

                self._annotator = Annotator(self.cfg.teacher, self.cfg.annotate)
            self._annotator.annotate(order)
            return
        self.begin(order)
        assert self._job is not None
        job, self._job = self._job, None  # it may end by an error
        job.wait(done)
        if job.running():
            self._job = job

    def close(self) -> None:
        """Let the command end, which nothing more is asked of: all that it was told is done."""
        if self._job is not None:
            self._job.tell_end()
            try:
                self._job.wait()
            except UserError as error:
                get_logger().warning("%s; all of its rounds are annotated", error)
            self._job = None
