"""CPU seconds to an accuracy: near-policy distillation of the quickstart's models beside TRL's on-policy trainer.

    make quickstart
    python -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0
    OMP_NUM_THREADS=1 python benchmarks/loop.py --trl trl/bin/python [--seeds 1 2 3] [--only NAME ...]

Every contender starts from the quickstart's student and learns from its teacher on its 3000 prompts, one thread a
process. Counted is the CPU time of the whole process tree, start-up and servers included, until a policy is on disk;
its accuracy on the 400 held-out problems (greedy, by transformers, the same for all) is measured afterwards.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from clock import TreeClock, contend
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_npd.config.run import EvalConfig
from megatron_npd.rollout.evaluate import compile_regex, find_answer

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "examples" / "quickstart" / "npd.yaml"
LEVELS = (45.0, 80.0, 90.0, 97.5)
# Nothing is measured on the way, nor scored that no filter asks for.
_FEW = ["--eval.held-out=0", "--annotate.unconditional=false", "--train.log-interval=100"]
_PAPER = ["--train.kd-alpha=0.9", "--train.lr=2e-3", "--rollout.greedy-paths=1", "--rollout.prompts-per-round=0"]
OURS: Mapping[str, Sequence[str]] = {
    "NPD, 10 rounds of 750": [],
    "NPD, 25 rounds of 300": ["--updates=24", "--rollout.prompts-per-round=300"],
    "NPD, 6 rounds of 750": ["--updates=5"],
    "NPD, 10 rounds of 750, overlapping": ["--max-lead=1"],
    "NPD, 10 rounds of 750, by lag": ["--train.refresh=by_lag", "--train.refresh-interval=10"],
    "NPD, 1 round of 6000": ["--updates=0", "--rollout.prompts-per-round=0", "--rollout.sampled-paths=2"],
    "on-policy, 50 rounds of 150": [
        *("--updates=49", "--train.refresh=every_n", "--train.refresh-interval=10", "--rollout.prompts-per-round=150")
    ],
    "NPD, 2 rounds of 6000, Delta-IFD": [
        *("--updates=1", "--select.filter=delta_ifd", "--annotate.unconditional=true", *_PAPER)
    ],
}
TRL: Mapping[str, Sequence[str]] = {"TRL GKD, lr 3e-3": ["--lr=3e-3"], "TRL GKD, lr 2e-3": ["--lr=2e-3"]}


def accuracies(models: Sequence[Path], test: Path, max_new_tokens: int = 64) -> list[float]:
    """Percent of the problems that each model answers rightly, greedily."""
    with open(test) as lines:
        problems = [json.loads(line) for line in lines]
    pattern, found = compile_regex(EvalConfig().answer_regex), []
    for path in models:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        right = 0
        for first in range(0, len(problems), 200):
            part = problems[first : first + 200]
            inputs = tokenizer.apply_chat_template(
                [problem["messages"] for problem in part],
                add_generation_prompt=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            )
            with torch.no_grad():
                ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right += sum(
                find_answer(text, pattern) == find_answer(problem["response"], pattern)
                for text, problem in zip(texts, part, strict=True)
            )
        found.append(100 * right / len(problems))
    return found


def curve(clock: TreeClock, test: Path) -> list[tuple[float, float]]:
    """(CPU seconds, accuracy) of each policy that a contender left, in order; the last one at its end."""
    found = sorted(clock.seen.items(), key=lambda item: item[1])
    scores = accuracies([path.parent for path, _ in found], test)
    points = [(seconds, score) for (_, seconds), score in zip(found, scores, strict=True)]
    return [*points, (clock.seconds, points[-1][1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"), help="its work directory")
    parser.add_argument("--work", type=Path, default=Path("runs/loop"), help="where the contenders leave their runs")
    parser.add_argument("--trl", help="an interpreter that has TRL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", help="names of contenders")
    parser.add_argument("--flags", default="", help="of npd run, in one text: your own, with --only flags")
    args = parser.parse_args()
    data = args.quickstart / "data"
    student, teacher = (max((args.quickstart / name).glob("hf-*")) for name in ("student", "teacher"))
    models = ["--student", str(student), "--teacher", str(teacher), "--prompts", str(data / "npd.jsonl")]
    print("| contender | seed | " + " | ".join(f"to {level:g} %" for level in LEVELS) + " | in all | at the end |")
    print("|---|---|" + "---|" * (len(LEVELS) + 2))
    for seed in args.seeds:
        runs: dict[str, tuple[list[str], str]] = {}
        for name, flags in {**OURS, "flags": args.flags.split()}.items():
            run = [sys.executable, "-m", "megatron_npd", "run", "--config", str(RECIPE), *models, "--platform=cpu"]
            run += [f"--run-dir={args.work / 'npd'}", *_FEW, f"--rollout.seed={seed}", f"--train.seed={seed}", *flags]
            runs[name] = (run, "policies/v*/manifest.json")
        for name, flags in TRL.items() if args.trl else ():
            script = [args.trl, str(ROOT / "benchmarks" / "trl_distill.py"), f"--seed={seed}", *flags]
            runs[name] = ([*script, *models, f"--out={args.work / 'npd'}"], "checkpoint-*/trainer_state.json")
        for name, (command, pattern) in runs.items():
            if name in args.only if args.only else name != "flags":
                points = curve(contend(command, args.work / "npd", pattern), data / "test.jsonl")
                reached = [next((f"{at:.0f} s" for at, score in points if score >= level), "-") for level in LEVELS]
                cells = " | ".join([*reached, f"{points[-1][0]:.0f} s", f"{points[-1][1]:.1f} %"])
                print(f"| {name} | {seed} | {cells} |", flush=True)
                print(" ".join(f"{at:.0f}s:{score:.1f}" for at, score in points), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
