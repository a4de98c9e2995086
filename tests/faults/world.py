"""A small whole run for the fault tests: its inputs, its stages one by one, and what each must leave.

Stages run as users run them but for the engines: answers come from the stand-in server, scores from a stand-in scorer.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npd.config.settings import AnnotateConfig, PackConfig, SelectConfig
from megatron_npd.config.training import TrainConfig
from megatron_npd.manifest import MANIFEST, is_sealed
from megatron_npd.training.metrics import METRICS_FILE, is_time
from tests.helpers import VOCAB_SIZE, make_tiny_model
from tests.serving.fake import ROUND
from tests.store.make_store import make_records

ROLLOUT = dataclasses.replace(ROUND, request_timeout=20.0)
SERVER, INPUTS = "NPD_FAULTS_SERVER", "NPD_FAULTS_INPUTS"  # environment of the process that runs a stage
PROMPTS = 14
STEPS, SAVE_EVERY = 3, 2  # of the training: checkpoints after steps 2 and 3
UNSTABLE = (".metadata", "common.pt")  # of a dist checkpoint: pickles, whose bytes hold times and the order of sets


def make_inputs(root: Path) -> Path:
    """Two models with tokenizers, and prompts of which one is no JSON and one stands there twice."""
    make_tiny_model(root / "teacher", seed=1)
    make_tiny_model(root / "student", seed=2)
    lines = [json.dumps({"prompt": f"What is {index} + 7?", "id": f"p{index}"}) for index in range(PROMPTS)]
    (root / "prompts.jsonl").write_text("\n".join([*lines, "{", lines[3]]) + "\n")
    return root


class StandInScorer:
    """``teacher.scorer.Scorer`` without a model: scores that depend on the tokens alone."""

    def __init__(self, hf_dir: str | Path, **_: Any) -> None:
        self.name = Path(hf_dir).name

    def score(self, prefixes: Any, responses: Any, *, top_k: int = 0, on_forward: Any = None) -> Any:
        from megatron_npd.store.scores import Scores

        parts = []
        for prefix, response in zip(prefixes, responses, strict=True):
            rng = np.random.default_rng([len(self.name), int(np.sum(prefix)), int(np.sum(response)), len(response)])
            parts.append((make_records(rng, len(response), max(top_k, 1), VOCAB_SIZE), -rng.random(len(response))))
        records = np.concatenate([part for part, _ in parts])
        return Scores(
            starts_N=np.cumsum([0, *map(len, responses)]),
            sampled_logprobs_R=np.concatenate([values for _, values in parts]).astype(np.float32),
            ids_RK=records["ids"].copy() if top_k else None,
            logprobs_RK=records["logprobs"].astype(np.float32) if top_k else None,
            log_tail_R=records["log_tail"].astype(np.float32) if top_k else None,
        )


def prompts(run: Path) -> None:
    from megatron_npd.data.prompts import prepare_prompts
    from megatron_npd.data.tokenizer import load_model_tokens

    inputs = Path(os.environ[INPUTS])
    model = load_model_tokens(inputs / "student")
    prepare_prompts(inputs / "prompts.jsonl", run / "prompts", model=model, max_prompt_len=60)


def rollouts(run: Path) -> None:
    from megatron_npd.rollout.generate import generate_round
    from megatron_npd.serving.pool import ServerPool

    pool = ServerPool([os.environ[SERVER]], ROLLOUT)
    out = run / "rounds/0000/rollouts"
    generate_round(run / "prompts", out, pool=pool, cfg=ROLLOUT, round_index=0, policy_version="v0000")


def annotations(run: Path, follow_seconds: float = 0.0) -> None:
    from megatron_npd.teacher import annotate

    annotate.Scorer = StandInScorer
    inputs, here = Path(os.environ[INPUTS]), run / "rounds/0000"
    cfg = AnnotateConfig(top_k=4, seq_length=128, follow_seconds=follow_seconds)
    models: dict[str, Any] = {"teacher_dir": inputs / "teacher", "student_dir": inputs / "student"}
    annotate.annotate_round(here / "rollouts", here / "annotations", **models, cfg=cfg)


def following(run: Path) -> None:
    """The annotations of a round that another process generates."""
    from megatron_npd.teacher import shard_follower as waves

    waves._POLL_SECONDS = 0.02
    annotations(run, follow_seconds=2.0)


def selection(run: Path) -> None:
    from megatron_npd.selection.select import select_round

    here = run / "rounds/0000"
    select_round(here / "annotations", here / "selection", SelectConfig(lower=-0.5, tau_quantile=0.9))


def packs(run: Path) -> None:
    from megatron_npd.data.packing import pack_selection

    here = run / "rounds/0000"
    cfg = PackConfig(seq_length=64, segment_align=8)
    pack_selection(here / "annotations", here / "selection", here / "packs", cfg)


def schedule(run: Path) -> None:
    from megatron_npd.data.row_schedule import ScheduleEntry
    from megatron_npd.training.schedule import append_entry

    entry = ScheduleEntry(from_row=0, packs="rounds/0000/packs", round=0, policy_version="v0000")
    append_entry(run / "schedule.jsonl", entry)


def training(run: Path) -> None:
    from megatron_npd.training.trainer import train

    model, data = Path(os.environ[INPUTS]) / "student", run / "schedule.jsonl"
    files: dict[str, Any] = {"hf_model": str(model), "data_path": str(data), "save": str(run / "training")}
    steps: dict[str, Any] = {
        "train_iters": STEPS,
        "save_interval": SAVE_EVERY,
        "global_batch_size": 2,
        "log_interval": 1,
    }
    train(TrainConfig(**files, **steps, lr=1e-3, adam_eps=1e-6, platform="cpu"))


def checkpoint(run: Path) -> None:
    from megatron_npd.models.convert import hf_to_megatron

    if not is_sealed(run / "checkpoints/iter_0000000"):
        hf_to_megatron(Path(os.environ[INPUTS]) / "student", run / "checkpoints")


def policy(run: Path) -> None:
    from megatron_npd.models.convert import megatron_to_hf

    if not is_sealed(run / "policies/v0001"):
        student = Path(os.environ[INPUTS]) / "student"
        megatron_to_hf(run / "checkpoints/iter_0000000", student, run / "policies/v0001")


# Stage -> what it leaves, in the order of a run.
OUTPUTS = {
    "prompts": "prompts",
    "rollouts": "rounds/0000/rollouts",
    "annotations": "rounds/0000/annotations",
    "selection": "rounds/0000/selection",
    "packs": "rounds/0000/packs",
    "schedule": "schedule.jsonl",
    "training": "training",
    "checkpoint": "checkpoints/iter_0000000",
    "policy": "policies/v0001",
}
STAGES: dict[str, Callable[[Path], None]] = {
    stage.__name__: stage
    for stage in (prompts, rollouts, annotations, selection, packs, schedule, training, checkpoint, policy)
}
BESIDE: dict[str, Callable[[Path], None]] = {"following": following}  # runs beside the stage before its own


def content(path: Path) -> dict[str, bytes]:
    """Every file that a reader may see, without locks and temporaries; of what holds times, the rest."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    files = (file for file in path.rglob("*") if file.is_file())
    visible = (file for file in files if file.name == ".metadata" or not file.name.startswith("."))
    return {str(file.relative_to(path)): _lasting(file) for file in visible}


def _lasting(file: Path) -> bytes:
    data = file.read_bytes()
    if file.name in UNSTABLE or (file.name == MANIFEST and (file.parent / UNSTABLE[0]).exists()):
        return b"there" if data else b"empty"
    if file.name == METRICS_FILE:
        with suppress(ValueError):  # a torn line differs as it stands
            lines = [json.loads(line) for line in data.splitlines()]
            return json.dumps([{name: line[name] for name in line if not is_time(name)} for line in lines]).encode()
    return data
