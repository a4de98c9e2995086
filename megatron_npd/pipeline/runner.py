"""The loop of METHOD section 1, stage after stage: each stage writes one sealed directory, and resuming is rerunning.

A stage is skipped when its directory is sealed, so the controller may be stopped anywhere and started again. The
stages run inside this process, or under torchrun where ``nproc_per_node`` asks for several; on a cluster the same
stages are the commands under ``tools/`` and ``pretrain_npd.py``.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_npd.audit.report import write_report
from megatron_npd.config.command_line import command_flags
from megatron_npd.config.settings import NPDConfig
from megatron_npd.data.packing import pack_selection
from megatron_npd.data.prompts import prepare_prompts
from megatron_npd.data.row_schedule import ScheduleEntry
from megatron_npd.data.tokenizer import check_vocabularies, load_model_tokens, load_tokenizer
from megatron_npd.errors import UserError
from megatron_npd.lifeline import child_environment
from megatron_npd.log import get_logger
from megatron_npd.manifest import is_sealed
from megatron_npd.pipeline.environment import record_environment
from megatron_npd.pipeline.evaluation import (
    HELD_OUT,
    Accuracies,
    measure_line,
    measure_settings,
    prepare_measure,
    read_measures,
)
from megatron_npd.pipeline.preflight import check_prompts, check_run
from megatron_npd.pipeline.resume import keep_config
from megatron_npd.pipeline.schedule import append_entry, round_boundaries
from megatron_npd.rollout.generate import generate_round
from megatron_npd.selection.select import frozen_taus, select_round
from megatron_npd.serving.pool import ServerPool
from megatron_npd.serving.refresh import refresh

REPOSITORY = Path(__file__).resolve().parents[2]


def run_npd(cfg: NPDConfig) -> str:
    """Run near-policy distillation to its end, or go on where an earlier call stopped.

    Args:
        cfg: Configuration of the whole run.

    Returns:
        The text table of the report.

    Raises:
        UserError: The configuration, the models or the prompts cannot be used, or results depend on what was changed.
    """
    check_run(cfg)
    run = Path(cfg.run_dir)
    run.mkdir(parents=True, exist_ok=True)
    with _run_lock(run):
        keep_config(run, cfg)
        return _Loop(run, cfg).run()


def results(cfg: NPDConfig) -> str:
    """Where a finished run left its policy and its report, as two lines."""
    run = Path(cfg.run_dir)
    return f"policy  {run / 'policies' / _version(cfg.updates + 1)}\nreport  {run / 'report' / 'report.html'}"


class _Loop:
    """One run: the paths of its stages and the servers that it started."""

    def __init__(self, run: Path, cfg: NPDConfig) -> None:
        self.run_dir = run
        self.cfg = cfg
        self.boundaries = round_boundaries(cfg.train.train_iters, cfg.updates)
        self.pool: ServerPool | None = None
        self.served: int | None = None  # index of the policy on the servers

    def run(self) -> str:
        try:
            self._prepare()
            accuracies = Accuracies(self.run_dir, self.cfg)
            if accuracies.lack(None):  # before the student's servers take the devices
                with timed(self.run_dir, "evaluate teacher"):
                    accuracies.add_teacher()
            self._evaluate(0)
            for index in range(self.cfg.updates + 1):
                if index and not is_sealed(self._policy(index + 1)):
                    write_report(self.run_dir)  # what the rounds before left
                self._round(index)
                self._evaluate(index + 1)
        finally:
            if self.pool is not None:
                self.pool.close()
        return write_report(self.run_dir)

    def _round(self, index: int) -> None:
        directory = self.run_dir / "rounds" / f"{index:04d}"
        rollouts, annotations = directory / "rollouts", directory / "annotations"
        selection, packs = directory / "selection", directory / "packs"
        if not is_sealed(rollouts):
            self._serve(index)  # before the stage's clock starts: a server's start and refresh have their own
        with self._following(index, rollouts, annotations):
            self._stage("rollout", index, rollouts, lambda: self._rollout(index, rollouts))
        self._stage("annotate", index, annotations, lambda: self._annotate(index, rollouts, annotations))
        self._stage(
            "select",
            index,
            selection,
            lambda: select_round(
                annotations,
                selection,
                self.cfg.select,
                self._frozen_taus(index),
                prompts_dir=self.run_dir / "prompts",
            ),
        )
        self._stage("pack", index, packs, lambda: pack_selection(annotations, selection, packs, self.cfg.pack))
        first_step = self.boundaries[index - 1] if index else 0
        rows_per_step = (
            self.cfg.train.global_batch_tokens // self.cfg.pack.seq_length or self.cfg.train.global_batch_size
        )
        append_entry(
            self.run_dir / "schedule.jsonl",
            ScheduleEntry(
                from_row=first_step * rows_per_step,
                packs=str(packs.relative_to(self.run_dir)),
                round=index,
                policy_version=_version(index),
            ),
        )
        checkpoint = self.run_dir / "checkpoints" / f"iter_{self.boundaries[index]:07d}"
        self._stage("train", index, checkpoint, lambda: self._train(index))
        policy = self._policy(index + 1)
        self._stage("export", index, policy, lambda: self._export(checkpoint, policy))

    # -- stages ------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        student, teacher = load_model_tokens(self.cfg.student), load_tokenizer(self.cfg.teacher)
        check_vocabularies(student.tokenizer, teacher)
        for source, name in ((self.cfg.eval.prompts, "eval_prompts"), (self.cfg.prompts, "prompts")):
            if source:  # where they are sealed, this insists on the same file
                prepare_prompts(
                    source,
                    self.run_dir / name,
                    model=student,
                    teacher_tokenizer=teacher,
                    max_prompt_len=self.cfg.rollout.max_model_len - 1,
                    max_quarantined=self.cfg.rollout.max_quarantined,
                    special_tokens_in_text=self.cfg.special_tokens_in_text,
                    held_out=0 if self.cfg.eval.prompts else self.cfg.eval.held_out,
                )
        check_prompts(self.run_dir, self.cfg)
        prepare_measure(self.run_dir, self.cfg)

    def _rollout(self, index: int, out: Path) -> None:
        generate_round(
            self.run_dir / "prompts",
            out,
            pool=self._serve(index),
            cfg=self.cfg.rollout,
            round_index=index,
            policy_version=_version(index),
        )

    def _annotate(self, index: int, rollouts: Path, out: Path) -> None:
        teacher, student = self.cfg.teacher, str(self._policy(index))
        if self.cfg.nproc_per_node > 1 or self.cfg.annotate.backend == "vllm":
            _run("tools/annotate.py", self._annotate_command(index, rollouts, out))
            return
        from megatron_npd.teacher.annotate import annotate_round  # after the platform is chosen

        annotate_round(rollouts, out, teacher_dir=teacher, student_dir=student, cfg=self.cfg.annotate)

    def _annotate_command(self, index: int, rollouts: Path, out: Path) -> list[str]:
        paths = {"rollouts": rollouts, "out": out, "teacher": self.cfg.teacher, "student": self._policy(index)}
        fields = {**paths, **dataclasses.asdict(self.cfg.annotate), "platform": self.cfg.platform}
        return self._command("tools/annotate.py", fields)

    @contextmanager
    def _following(self, index: int, rollouts: Path, out: Path) -> Iterator[None]:
        """With ``annotate.follow_seconds``: another process annotates the shards while this one generates the rest."""
        if not self.cfg.annotate.follow_seconds or is_sealed(rollouts):
            yield
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(self._annotate_command(index, rollouts, out), env=child_environment())
        try:
            yield
            with timed(self.run_dir, "annotate", index):  # what is left once the last answer is there
                code = process.wait()
        finally:
            process.terminate()
            process.wait()
        _check_exit("tools/annotate.py", code)

    def _train(self, index: int) -> None:
        cfg = dataclasses.replace(
            self.cfg.train,
            hf_model=self.cfg.student,
            data_path=str(self.run_dir / "schedule.jsonl"),
            save=str(self.run_dir / "checkpoints"),
            load=str(self.run_dir / "checkpoints"),
            exit_at_iteration=self.boundaries[index],
            metrics_path=str(self.run_dir / "report" / "metrics.jsonl"),
            platform=self.cfg.platform,
        )
        if self.cfg.nproc_per_node > 1:
            command = self._command("pretrain_npd.py", dataclasses.asdict(cfg))
            _run("pretrain_npd.py", command)
            return
        from megatron_npd.training.trainer import train  # after the platform is chosen

        train(cfg)

    def _export(self, checkpoint: Path, policy: Path) -> None:
        from megatron_npd.models.convert import megatron_to_hf  # after the platform is chosen

        megatron_to_hf(checkpoint, self.cfg.student, policy)

    def _evaluate(self, index: int) -> None:
        """What is measured of policy ``index`` (0: before the run) on held-out prompts."""
        accuracies = Accuracies(self.run_dir, self.cfg)
        if accuracies.lack(index):
            pool = self._serve(index)
            with timed(self.run_dir, "evaluate", index):
                accuracies.add(index, pool)
        annotations = self.run_dir / HELD_OUT / "rounds" / f"{index:04d}" / "annotations"
        if is_sealed(self.run_dir / HELD_OUT / "prompts") and not is_sealed(annotations):
            self._serve(index)  # before the stage's clock starts
            self._stage("measure", index, annotations, lambda: self._measure(index, annotations))
            get_logger().info("%s", measure_line(read_measures(self.run_dir)[-1]))

    def _measure(self, index: int, annotations: Path) -> None:
        rollouts = annotations.with_name("rollouts")
        generate_round(
            self.run_dir / HELD_OUT / "prompts",
            rollouts,
            pool=self._serve(index),
            cfg=measure_settings(self.cfg.rollout),
            round_index=index,
            policy_version=_version(index),
        )
        self._annotate(index, rollouts, annotations)

    # -- helpers -----------------------------------------------------------------------------------------------

    def _policy(self, index: int) -> Path:
        """HF directory of a policy; v0000 is the student as given."""
        return Path(self.cfg.student) if index == 0 else self.run_dir / "policies" / _version(index)

    def _serve(self, index: int) -> ServerPool:
        """The servers, launched or found on the first call, with policy ``index`` on them."""
        version = _version(index)
        if self.pool is None:
            with timed(self.run_dir, "server start", index):
                policy, log_dir = self._policy(index), self.run_dir / "logs"
                self.pool = ServerPool.open(policy, self.cfg.rollout, version=version, log_dir=log_dir)
            if not self.cfg.rollout.urls:  # given servers may hold another run's weights under the same version
                self.served = index
        if self.served != index:
            with timed(self.run_dir, "refresh", index):
                refresh(self.pool, self._policy(index), version)
            self.served = index
        return self.pool

    def _frozen_taus(self, index: int) -> dict[str, float] | None:
        """The taus of the first round, which stay frozen (METHOD section 3)."""
        if index == 0 or self.cfg.select.tau is not None:
            return None
        return frozen_taus(self.run_dir / "rounds" / "0000" / "selection")

    def _stage(self, name: str, index: int, out: Path, work: Callable[[], object]) -> None:
        """Do a stage unless its directory is sealed already."""
        if is_sealed(out):
            return
        get_logger().info(f"round {index}: {name}")
        out.parent.mkdir(parents=True, exist_ok=True)
        with timed(self.run_dir, name, index):
            work()
        if not is_sealed(out):
            raise UserError(f"round {index}: {name} must leave a sealed {out}, got none; see the messages above")

    def _command(self, script: str, fields: dict[str, Any]) -> list[str]:
        """A stage as ``nproc_per_node`` processes on this machine; their output goes to ours."""
        command = [sys.executable]
        if self.cfg.nproc_per_node > 1:
            command += ["-m", "megatron_npd.torchrun", "--standalone"]
            command += ["--nproc-per-node", str(self.cfg.nproc_per_node)]
        return [*command, str(REPOSITORY / script), *command_flags(fields)]


def _run(script: str, command: list[str]) -> None:
    _check_exit(script, subprocess.run(command, env=child_environment(), check=False).returncode)


def _check_exit(script: str, code: int) -> None:
    if code:
        raise UserError(f"{script} must exit with 0, got {code}; see its messages above, then run again")


@contextmanager
def timed(run_dir: str | Path, stage: str, round_index: int | None = None) -> Iterator[None]:
    """Append the wall seconds of a stage, finished or interrupted, to ``report/seconds.jsonl`` of a run.

    What it is computed with is kept too, beside it.
    """
    start = time.monotonic()
    record_environment(Path(run_dir))
    try:
        yield
    finally:
        path = Path(run_dir) / "report" / "seconds.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"stage": stage, "round": round_index, "seconds": round(time.monotonic() - start, 3)}
        with open(path, "ab+") as stream:
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)  # a line that a full disk or a kill cut short
            stream.write(json.dumps(record).encode() + b"\n")
        record_environment(Path(run_dir))  # with the highest memory by now


def _version(index: int) -> str:
    return f"v{index:04d}"


@contextmanager
def _run_lock(run: Path) -> Iterator[None]:
    with open(run / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{run} must have one controller, got a second; wait for the first or stop it") from None
        yield
