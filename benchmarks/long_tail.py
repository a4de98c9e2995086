"""CPU seconds of a trained sample where responses are long-tailed (20 to 400 tokens), beside TRL's GKD.

    OMP_NUM_THREADS=1 python benchmarks/long_tail.py --trl trl/bin/python [--seeds 1 2 3] [--only NAME ...]
    OMP_NUM_THREADS=1 python benchmarks/long_tail.py --trl trl/bin/python --smollm DIR    # of benchmarks/smollm.py

Chains of calculations (``chains.py``) for the quickstart's tiny models, or SmolLM2-135M and 24 of its layers on GSM8K.
Teacher and student are trained first, once, by this package's SFT. Ours runs first; TRL then trains on as many samples,
or on as many of its steps as ``TRL`` bounds. Counted is the CPU time of the whole process tree, one thread a process.
"start" is what was spent before the first request, and in the trainer before its first step; in TRL before its first
step. A visit is one sample in one step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
from clock import TreeClock, contend
from loop import ROOT, accuracies

sys.path.append(str(ROOT / "examples" / "quickstart"))
from chains import write_splits
from run import HERE, Quickstart, QuickstartConfig

from megatron_npd.config.command_line import parse_config
from megatron_npd.config.training import TrainConfig
from megatron_npd.data.row_schedule import load_schedule
from megatron_npd.manifest import read_manifest
from megatron_npd.run_dir import RunDir
from models import write_models

MAX_TOKENS = 400
DEFAULTS = ["--lmbda=0.5", "--beta=0.5", "--temperature=0.9", "--batch=8"]  # GKDConfig's
PARTS = ("start", "generation", "teacher", "training")
_COMMON = ["--eval.held-out=0", f"--rollout.max-tokens={MAX_TOKENS}", "--train.log-interval=100", "--platform=cpu"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is distilled, and how.

    Attributes:
        teacher, student: Hugging Face directories.
        prompts: JSONL, with references, which a ``--lmbda`` below 1 and ``--group`` read.
        ours: Flags of ``npd run``.
        shared: Flags of ``trl_distill.py`` that all its contenders have.
        trl: Their own flags, and how many steps they do at most.
        test: Problems with references, where accuracy is measured.
    """

    teacher: Path
    student: Path
    prompts: Path
    ours: Sequence[str]
    shared: Sequence[str]
    trl: dict[str, tuple[Sequence[str], int]]
    test: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a contender did, and its CPU seconds.

    Attributes:
        seconds: In all.
        parts: Those of ``PARTS``.
        visits: Samples that were trained on.
        lengths: Tokens of each response.
        padding: Share of the positions trained on that were none of a sample.
        idle: Share of the responses' places in decoding steps at which they had ended.
        policy: What it left.
    """

    seconds: float
    parts: dict[str, float]
    visits: float
    lengths: list[int]
    padding: float
    idle: float
    policy: Path

    @property
    def each(self) -> float:
        """Milliseconds of a visit without the start."""
        return 1e3 * (self.seconds - self.parts["start"]) / self.visits

    def cells(self) -> list[str]:
        """Of the table."""
        parts = [f"{self.parts[name]:.0f}" for name in PARTS]
        rest = self.seconds - sum(self.parts.values())
        lengths = f"{statistics.mean(self.lengths):.0f} / {statistics.median(self.lengths):.0f} / {max(self.lengths)}"
        return [
            f"{self.seconds:.0f}",
            " + ".join([*parts, f"{rest:.0f}"]),
            f"{self.visits:.0f} of {len(self.lengths)}",
            f"{self.each:.1f}",
            f"{1e3 * self.seconds / self.visits:.1f}",
            lengths,
            f"{100 * self.padding:.0f} %",
            f"{100 * self.idle:.0f} %",
        ]


def chains(work: Path) -> Workload:
    """Tiny models, trained from scratch."""
    quickstart = Quickstart(QuickstartConfig(work_dir=str(work)))
    write_splits(work / "data")
    write_models(work / "models")
    done = {}
    for name, steps in (("teacher", 800), ("student", 400)):
        recipe = parse_config(TrainConfig, ["--config", str(HERE / f"{name}_sft.yaml")])
        recipe = replace(recipe, train_iters=steps, save_interval=steps)
        start = work / "models" / name
        done[name] = quickstart.sft(name, recipe, problems=name, start=start, until=steps)
    lengths = ["--rollout.max-model-len=512", "--rollout.prompts-per-round=500", "--updates=2"]
    return Workload(
        **done,
        prompts=work / "data" / "npd.jsonl",
        test=work / "data" / "test.jsonl",
        ours=["--config", str(HERE / "npd.yaml"), *lengths, "--train.train-iters=200"],
        shared=["--lr=3e-3", "--max-length=512"],
        trl={
            "GKD as it comes": ([*DEFAULTS, "--gradient-checkpointing"], 30),
            "GKD as it comes, with a cache": (DEFAULTS, 60),
            "GKD on-policy, batch 8": (["--batch=8"], 60),
            "GKD on-policy, batch 16": (["--batch=16"], 60),
        },
    )


def smollm(made: Path, work: Path) -> Workload:
    """The real model, its student mended by a little SFT, after which responses end."""
    quickstart = Quickstart(QuickstartConfig(work_dir=str(work)))
    (work / "data").mkdir(parents=True, exist_ok=True)
    shutil.copy(made / "sft.jsonl", work / "data" / "sft.jsonl")
    recipe = TrainConfig(train_iters=50, save_interval=10, global_batch_size=1, objective="sft", lr=5e-4)
    recipe = replace(recipe, lr_warmup_iters=5, weight_decay=0.0, log_interval=1)
    student = quickstart.sft("student", recipe, problems="sft", start=made / "student", until=20)
    flags = ["--updates=0", "--annotate.seq-length=2048", "--pack.seq-length=2048", "--train.train-iters=6"]
    flags += ["--train.global-batch-size=1", "--rollout.max-model-len=1024", "--train.kd-alpha=1.0"]
    flags += ["--rollout.greedy-paths=0", "--select.filter=none", "--train.fused-linear-loss=true"]
    # Both stay at their first policy: the teacher answers at length, and a student grows longer with each update.
    flags += ["--train.lr=1e-6", "--train.lr-warmup-iters=1"]
    return Workload(
        teacher=made / "teacher",
        student=student,
        prompts=made / "prompts.jsonl",
        ours=["--config", str(ROOT / "examples" / "recipes" / "pretrained.yaml"), *flags],
        shared=["--lr=1e-6", "--max-length=1024"],
        trl={"GKD on-policy, batch 8": (["--batch=8"], 3), "GKD on-policy, batch 4": (["--batch=4"], 6)},
    )


def run_ours(load: Workload, out: Path, seed: int) -> Spent:
    """A run of ``npd run``, and its CPU seconds by the times that its stages noted."""
    command = [sys.executable, "-m", "megatron_npd", "run", *load.ours, f"--run-dir={out}", *_COMMON]
    command += ["--annotate.unconditional=false", f"--rollout.seed={seed}", f"--train.seed={seed}", *_models(load)]
    clock = contend(command, out, "report/metrics.jsonl")
    run = RunDir(out)
    with open(run.report / "seconds.jsonl") as lines:
        stages = [json.loads(line) for line in lines]
    parts = {
        part: sum(_between(clock, stage["at"], stage["seconds"]) for stage in stages if stage["stage"] == name)
        for part, name in (("generation", "rollout"), ("teacher", "annotate"), ("training", "train"))
    }
    first = {name: min(stage["at"] for stage in stages if stage["stage"] == name) for name in ("rollout", "train")}
    trainer = clock.seen[out / "report" / "metrics.jsonl"] - clock.until(first["train"])
    parts |= {"start": clock.until(first["rollout"]) + trainer, "training": parts["training"] - trainer}
    schedule = load_schedule(run.schedule)
    with open(run.report / "metrics.jsonl") as lines:
        rows = json.loads(list(lines)[-1])["rows_consumed"]
    visits, fill, lengths = 0.0, list[tuple[int, float]](), list[int]()
    for entry, end in zip(schedule, [*(later.from_row for later in schedule[1:]), rows], strict=True):
        counts = read_manifest(out / entry.packs, kind="packs", verify=False).counts
        visits += (end - entry.from_row) * counts["kept"] / counts["rows"]
        fill.append((end - entry.from_row, counts["fill"]))
        for shard in sorted((out / entry.packs).parent.glob("rollouts/shard-*/*.parquet")):
            lengths += map(len, pq.read_table(shard, columns=["response_ids"])["response_ids"].to_pylist())
    padding = 1 - sum(taken * filled for taken, filled in fill) / rows
    policy = max((out / "policies").glob("v*"))
    return Spent(
        seconds=clock.seconds, parts=parts, visits=visits, lengths=lengths, padding=padding, idle=0.0, policy=policy
    )


def _between(clock: TreeClock, at: float, seconds: float) -> float:
    return clock.until(at + seconds) - clock.until(at)


def run_trl(load: Workload, out: Path, seed: int, trl: str, flags: Sequence[str], visits: float, most: int) -> Spent:
    """As many visits by TRL, and its CPU seconds by its own clock."""
    batch = next(int(flag.removeprefix("--batch=")) for flag in flags if flag.startswith("--batch="))
    steps = min(most, round(visits / batch))
    command = [trl, str(ROOT / "benchmarks" / "trl_distill.py"), f"--out={out}", f"--seed={seed}", *_models(load)]
    command += [f"--max-new-tokens={MAX_TOKENS}", f"--steps={steps}", f"--save-steps={steps}", *load.shared, *flags]
    clock = contend(command, out, "work.json")
    work = json.loads((out / "work.json").read_text())
    parts = work["seconds"]
    parts["training"] = work["total"] - sum(parts.values())
    padding, idle = (1 - real / max(slots, 1) for slots, real in (work["computed"], work["decoded"]))
    return Spent(
        seconds=clock.seconds,
        parts=parts,
        visits=len(work["lengths"]),
        lengths=work["lengths"],
        padding=padding,
        idle=idle,
        policy=out / f"checkpoint-{steps}",
    )


def _models(load: Workload) -> list[str]:
    return [f"--student={load.student}", f"--teacher={load.teacher}", f"--prompts={load.prompts}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/long_tail"), help="models and runs")
    parser.add_argument("--smollm", type=Path, help="what smollm.py made; else chains")
    parser.add_argument("--trl", required=True, help="an interpreter that has TRL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", help="names of TRL's contenders")
    parser.add_argument("--accuracy", action="store_true", help="of each policy, on held-out problems; takes minutes")
    parser.add_argument("--flags", default="", help="of trl_distill.py, in one text: your own, with --only flags")
    args = parser.parse_args()
    work = args.work / ("smollm" if args.smollm else "chains")
    load = smollm(args.smollm, work) if args.smollm else chains(work)
    test = load.test if args.accuracy else None
    contenders = {**load.trl, "flags": (args.flags.split(), 10**6)}
    titles = ["contender", "seed", "CPU s", " + ".join([*PARTS, "rest"]), "visits of responses", "ms per visit"]
    titles += ["with start", "tokens, mean / median / max", "padding", "ended", "accuracy", "x ours"]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|", flush=True)
    if test is not None:
        print(f"| student | | | | | | | | | | {accuracies([load.student], test, MAX_TOKENS)[0]:.1f} % | |")
    for seed in args.seeds:
        ours = run_ours(load, work / "npd", seed)
        show("NPD", seed, ours, ours, test)
        for name, (flags, most) in contenders.items():
            if name in args.only if args.only else name != "flags":
                show(name, seed, run_trl(load, work / "trl", seed, args.trl, flags, ours.visits, most), ours, test)


def show(name: str, seed: int, spent: Spent, ours: Spent, test: Path | None) -> None:
    """Print a contender's line."""
    accuracy = "" if test is None else f"{accuracies([spent.policy], test, MAX_TOKENS)[0]:.1f} %"
    print(
        "| " + " | ".join([name, str(seed), *spent.cells(), accuracy, f"{spent.each / ours.each:.2f}"]) + " |",
        flush=True,
    )


if __name__ == "__main__":
    main()
