"""The quickstart: train a teacher and a small student from scratch, then distill, on this machine's CPU.

    python examples/quickstart/run.py [--work-dir runs/quickstart] [--fast]

Every step is skipped when its result is there, so that stopping and starting again is safe:

1. problems, tokenizer, randomly initialised teacher and student;
2. the teacher: SFT on 12 000 labelled problems;
3. the student: SFT on 500 labelled problems until it stops getting better;
4. near-policy distillation on 3 000 other problems without answers: ten rounds of fresh responses;
5. for comparison, as many steps of further SFT on the student's own 500 problems, of SeqKD on the teacher's responses
   to the 3 000, and on-policy: with fresh responses after every ten steps;
6. the report.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]  # problems.py and models.py

from megatron_npd.cli import train as train_command  # noqa: E402
from megatron_npd.config.command_line import command_flags, parse_config  # noqa: E402
from megatron_npd.config.run import NPDConfig  # noqa: E402
from megatron_npd.config.training import TrainConfig  # noqa: E402
from megatron_npd.durable import write_atomic  # noqa: E402
from megatron_npd.log import get_logger, run_main  # noqa: E402
from megatron_npd.manifest import is_sealed  # noqa: E402
from megatron_npd.platform import get_platform  # noqa: E402
from megatron_npd.stoppable import StoppedBySignal  # noqa: E402
from models import write_models  # noqa: E402
from problems import SPLITS, write_splits  # noqa: E402

get_platform("cpu")  # before anything imports megatron.core

from megatron_npd.audit.numbers import COMPARED  # noqa: E402
from megatron_npd.audit.report import write_report  # noqa: E402
from megatron_npd.data.packing import pack_prompts, pack_rollouts  # noqa: E402
from megatron_npd.data.prompts import prepare_prompts  # noqa: E402
from megatron_npd.data.tokenizer import load_model_tokens, load_tokenizer  # noqa: E402
from megatron_npd.models.convert import megatron_to_hf  # noqa: E402
from megatron_npd.models.families import load_spec  # noqa: E402
from megatron_npd.pipeline.environment import timed  # noqa: E402
from megatron_npd.pipeline.runner import results, run_npd  # noqa: E402
from megatron_npd.rollout.evaluate import exact_match  # noqa: E402
from megatron_npd.rollout.generate import generate_round  # noqa: E402
from megatron_npd.run_dir import RunDir  # noqa: E402
from megatron_npd.serving.pool import ServerPool  # noqa: E402
from megatron_npd.serving.refresh import refresh  # noqa: E402

FAST = 20  # by which --fast divides problems and steps
ON_POLICY = 10  # steps between two refreshes of the on-policy run


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Two models from scratch, then near-policy distillation."""

    work_dir: str = "runs/quickstart"
    """Directory of everything that is made."""
    teacher_config: str = str(HERE / "teacher_sft.yaml")
    """Recipe of the teacher's SFT."""
    student_config: str = str(HERE / "student_sft.yaml")
    """Recipe of the student's SFT: train_iters is its longest, save_interval the steps between two evaluations."""
    npd_config: str = str(HERE / "npd.yaml")
    """Recipe of the distillation."""
    patience: int = 3
    """Evaluations in a row that bring less than one point and so end the student's SFT."""
    fast: bool = False
    """A twentieth of the problems and steps, in two rounds: shows that all of it runs, and teaches next to nothing.
    It needs a work_dir of its own."""


class Quickstart:
    """The steps, and the vLLM server that plays the student in all of them."""

    def __init__(self, cfg: QuickstartConfig) -> None:
        self.cfg = cfg
        self.work = Path(cfg.work_dir)
        npd = parse_config(NPDConfig, ["--config", cfg.npd_config])
        rollout = dataclasses.replace(npd.rollout, token_file=str(self.work / "server.token"))
        # The run is given a server that was started here.
        updates = 1 if cfg.fast else npd.updates
        self.npd = dataclasses.replace(npd, rollout=rollout, train=self._shortened(npd.train), updates=updates)
        self.npd_dir = self.work / "npd"
        self.npd_run = RunDir(self.npd_dir)
        self.pool: ServerPool | None = None

    def run(self) -> str:
        """Do what is left to do and return the report's table and where policy and report are."""
        try:
            with timed(self.npd_run, "problems and models"):
                sizes = {name: size // FAST for name, size in SPLITS.items()} if self.cfg.fast else SPLITS
                write_splits(self.work / "data", sizes=sizes)
                write_models(self.work / "models")
            with timed(self.npd_run, "teacher SFT"):
                teacher = self._teacher()
            with timed(self.npd_run, "student SFT"):
                student = self._student()
            cfg = dataclasses.replace(
                self.npd,
                run_dir=str(self.npd_dir),
                teacher=str(teacher),
                student=str(student),
                prompts=str(self.work / "data" / "npd.jsonl"),
                platform="cpu",
                eval=dataclasses.replace(self.npd.eval, prompts=str(self.work / "data" / "test.jsonl")),
                rollout=dataclasses.replace(self.npd.rollout, urls=tuple(self._serve(student, "student").urls)),
            )
            run_npd(cfg, write_report)
            self._compare(student, cfg)
        finally:
            if self.pool is not None:
                self.pool.close()
        return f"{write_report(self.npd_dir)}\n\n{results(dataclasses.replace(self.npd, run_dir=str(self.npd_dir)))}"

    # -- steps -------------------------------------------------------------------------------------------------

    def _recipe(self, file: str) -> TrainConfig:
        return self._shortened(parse_config(TrainConfig, ["--config", file]))

    def _shortened(self, recipe: TrainConfig) -> TrainConfig:
        """With ``fast``: fewer steps, and the student is evaluated after all of them."""
        if not self.cfg.fast:
            return recipe
        steps, warmup = recipe.train_iters // FAST, recipe.lr_warmup_iters // FAST
        return dataclasses.replace(recipe, train_iters=steps, save_interval=steps, lr_warmup_iters=warmup)

    def sft(self, name: str, recipe: TrainConfig, *, problems: str, start: Path, until: int) -> Path:
        """Train with ``npd train`` up to a step, and export to an HF directory, which is returned."""
        out = self.work / name / f"hf-{until:05d}"
        if is_sealed(out):
            return out
        data = self.work / name / "data"
        if not is_sealed(data / "packs"):
            self._prepare(self.work / "data" / f"{problems}.jsonl", data / "prompts", start)
            pack_prompts(data / "prompts", data, self.npd.pack, vocab_size=load_spec(start).vocab_size)
        save = self.work / name / "checkpoints"
        cfg = dataclasses.replace(
            recipe, hf_model=str(start), data_path=str(data / "packs"), save=str(save), exit_at_iteration=until
        )
        train_command.main(command_flags(dataclasses.asdict(cfg)))
        if not is_sealed(save / f"iter_{until:07d}"):  # it has said what stopped it
            raise StoppedBySignal("what stopped the trainer")
        megatron_to_hf(save / f"iter_{until:07d}", start, out)
        return out

    def _teacher(self) -> Path:
        recipe = self._recipe(self.cfg.teacher_config)
        start = self.work / "models" / "teacher"
        model = self.sft("teacher", recipe, problems="teacher", start=start, until=recipe.train_iters)
        result = self.work / "teacher" / "accuracy.json"
        if not result.exists():
            with ServerPool.open(model, self.npd.rollout, version="teacher", log_dir=self.work / "logs") as pool:
                accuracy = self._accuracy(pool, model)
            write_atomic(result, json.dumps({"accuracy": accuracy}) + "\n")
            get_logger().info(f"teacher: {accuracy:.1f} % of the held-out problems")
        return model

    def _student(self) -> Path:
        """SFT on the few labelled problems until ``patience`` evaluations in a row bring less than one point."""
        recipe = self._recipe(self.cfg.student_config)
        start = self.work / "models" / "student"
        path = self.work / "student" / "accuracy.json"
        known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        steps, best, stale = 0, 0.0, 0
        while stale < self.cfg.patience and steps < recipe.train_iters:
            steps = min(steps + recipe.save_interval, recipe.train_iters)
            model = self.sft("student", recipe, problems="student", start=start, until=steps)
            if str(steps) not in known:
                known[str(steps)] = self._accuracy(self._serve(model, f"sft-{steps}"), model)
                write_atomic(path, json.dumps(known) + "\n")
                get_logger().info(f"student after {steps} steps: {known[str(steps)]:.1f} % of the held-out problems")
            stale = 0 if known[str(steps)] >= best + 1.0 else stale + 1
            best = max(best, known[str(steps)])
        return self.work / "student" / f"hf-{steps:05d}"

    def _compare(self, student: Path, cfg: NPDConfig) -> None:
        """Other ways to as many steps with the distillation's other settings; their accuracies go into the report."""
        path = self.npd_dir / "report" / "accuracy.json"
        known = json.loads(path.read_text())
        known["teacher"] = json.loads((self.work / "teacher" / "accuracy.json").read_text())["accuracy"]
        ways = {"further_sft": self._further_sft, "seqkd": self._seqkd, "on_policy": self._on_policy}
        for name, train in ways.items():
            if name not in known:
                with timed(self.npd_run, COMPARED[name]):
                    model = train(student, cfg)
                    known[name] = self._accuracy(self._serve(model, name), model)
                write_atomic(path, json.dumps(known, indent=1) + "\n")

    def _further_sft(self, student: Path, cfg: NPDConfig) -> Path:
        recipe = dataclasses.replace(cfg.train, objective="sft")
        return self.sft("further", recipe, problems="student", start=student, until=recipe.train_iters)

    def _seqkd(self, student: Path, cfg: NPDConfig) -> Path:
        data, teacher = self.work / "seqkd", Path(cfg.teacher)
        prompts = self._prepare(Path(cfg.prompts), data / "prompts", teacher)
        if not is_sealed(data / "rollouts"):
            with ServerPool.open(teacher, self.npd.rollout, version="teacher", log_dir=self.work / "logs") as pool:
                generate_round(
                    prompts,
                    data / "rollouts",
                    pool=pool,
                    cfg=dataclasses.replace(self.npd.rollout, greedy_paths=1, sampled_paths=0, prompts_per_round=0),
                    round_index=0,
                    policy_version="teacher",
                    source="teacher",
                )
        pack_rollouts(data / "rollouts", data / "data", cfg.pack, vocab_size=load_spec(student).vocab_size)
        recipe = dataclasses.replace(cfg.train, objective="sft")
        return self.sft("seqkd", recipe, problems="npd", start=student, until=recipe.train_iters)

    def _on_policy(self, student: Path, cfg: NPDConfig) -> Path:
        refreshes = cfg.train.train_iters // ON_POLICY - 1
        asked = cfg.rollout.prompts_per_round * (cfg.updates + 1) // (refreshes + 1)
        run = RunDir(self.work / "on-policy")
        self._serve(student, "v0000")
        run_npd(
            dataclasses.replace(
                cfg,
                run_dir=str(run.root),
                updates=refreshes,
                train=dataclasses.replace(cfg.train, refresh="every_n", refresh_interval=ON_POLICY),
                rollout=dataclasses.replace(cfg.rollout, prompts_per_round=asked),
                annotate=dataclasses.replace(cfg.annotate, unconditional=False),
                eval=dataclasses.replace(cfg.eval, prompts="", held_out=0),
            ),
            lambda _: "",
        )
        return run.policy(refreshes + 1)

    # -- the student's server ----------------------------------------------------------------------------------

    def _serve(self, model: Path, version: str) -> ServerPool:
        """The student's server with this model on it: launched once, refreshed afterwards."""
        if self.pool is None:
            self.pool = ServerPool.open(model, self.npd.rollout, version=version, log_dir=self.work / "logs")
        elif self.pool.version(self.pool.urls[0]) != version:
            refresh(self.pool, model, version)
        return self.pool

    def _accuracy(self, pool: ServerPool, model: Path) -> float:
        """Percent of the held-out problems that the served model answers rightly, greedily."""
        settings = self.npd.eval
        problems = self._prepare(self.work / "data" / "test.jsonl", self.work / "test", model)
        return exact_match(
            pool,
            problems,
            answer_regex=settings.answer_regex,
            tokenizer=load_tokenizer(model),
            max_tokens=settings.max_tokens,
        ).accuracy

    def _prepare(self, source: Path, out: Path, model: Path) -> Path:
        if not is_sealed(out):
            longest = self.npd.rollout.max_model_len - 1
            prepare_prompts(source, out, model=load_model_tokens(model), max_prompt_len=longest)
        return out


def main() -> None:
    """Run the quickstart and print the report's table as the last lines."""
    print(Quickstart(parse_config(QuickstartConfig, description=__doc__ or "")).run())


if __name__ == "__main__":
    run_main(main)
