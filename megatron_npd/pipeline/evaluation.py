"""What is measured of policies on held-out prompts: accuracy by references, and the distance from the teacher.

The distance needs a small round of rollouts with its annotations. ``held_out/`` of a run is laid out as a run:
``prompts/``, and ``rounds/0000/`` of the student as given, ``0001/`` of the policy after the first round. Each prompt
has a greedy response and one sampled at temperature 1, so that no further forward of the student is needed:

- KL(student || teacher) is the mean of log q - log p over the sampled tokens, both log-probabilities over the whole
  vocabulary: without bias, and with a standard error, which is given;
- the student's most likely token is the greedy response's own, the teacher's is the first of its record.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_npd.config.run import NPDConfig
from megatron_npd.config.settings import RolloutConfig
from megatron_npd.data.held_out import HELD_OUT_FILE, prepare_held_out
from megatron_npd.data.prompts import prepare_prompts
from megatron_npd.data.tokenizer import load_model_tokens, load_tokenizer
from megatron_npd.durable import write_atomic
from megatron_npd.log import get_logger
from megatron_npd.manifest import is_sealed, read_manifest, verified_file
from megatron_npd.pipeline.environment import read_json
from megatron_npd.quarantine import in_words
from megatron_npd.records import PROMPTS_FILE, ROLLOUTS_FILE
from megatron_npd.rollout.evaluate import Accuracy, exact_match
from megatron_npd.run_dir import RunDir, version
from megatron_npd.serving.pool import ServerPool
from megatron_npd.store.annotation_store import AnnotationStore

_NUMBERS = ("prompts", "kl", "kl_error", "top1_agreement", "response_tokens", "cut")
_PATHS = 2  # of each held-out prompt

# -- accuracy ------------------------------------------------------------------------------------------------------


class Accuracies:
    """``report/accuracy.json`` of a run, in percent: ``start``, ``rounds`` and, where it is asked for, ``teacher``.

    Args:
        run: The run.
        cfg: Its configuration.
    """

    def __init__(self, run: RunDir, cfg: NPDConfig) -> None:
        self.cfg, self.run, self.path = cfg, run, run.accuracy
        self.known: dict[str, Any] = {"start": None, "rounds": []} | read_json(self.path, {})

    def lack(self, index: int | None) -> bool:
        """Whether policy ``index`` (0: before the run; None: the teacher) is still to be evaluated."""
        if not (self.cfg.eval.prompts and self.cfg.eval.answer_regex):
            return False
        if index is None:
            return self.cfg.eval.teacher and "teacher" not in self.known
        return self.known["start"] is None if index == 0 else len(self.known["rounds"]) < index

    def add(self, index: int, pool: ServerPool) -> None:
        """Evaluate policy ``index``, which the pool serves."""
        result = self._ask(pool, self.run.eval_prompts, self.cfg.student)
        if index == 0:
            self.known["start"] = result.accuracy
        else:
            self.known["rounds"].append(result.accuracy)
        self._keep(version(index), result)

    def add_teacher(self) -> None:
        """Evaluate the teacher, on its servers where they are given, else on one that is started for that."""
        prompts = self.run.teacher_eval_prompts
        if not is_sealed(prompts):
            prepare_prompts(
                self.cfg.eval.prompts,
                prompts,
                model=load_model_tokens(self.cfg.teacher),
                max_prompt_len=self.cfg.rollout.max_model_len - 1,
                max_quarantined=self.cfg.rollout.max_quarantined,
                special_tokens_in_text=self.cfg.special_tokens_in_text,
            )
        given = {"urls": self.cfg.annotate.urls, "token_file": self.cfg.annotate.token_file}
        cfg = dataclasses.replace(self.cfg.rollout, num_servers=1, **given)
        with ServerPool.open(self.cfg.teacher, cfg, version="teacher", log_dir=self.run.logs) as pool:
            result = self._ask(pool, prompts, self.cfg.teacher)
        self.known["teacher"] = result.accuracy
        self._keep("the teacher", result)

    def _ask(self, pool: ServerPool, prompts: Path, model: str) -> Accuracy:
        settings = self.cfg.eval
        return exact_match(
            pool,
            prompts,
            answer_regex=settings.answer_regex,
            tokenizer=load_tokenizer(model),
            max_tokens=settings.max_tokens,
        )

    def _keep(self, name: str, result: Accuracy) -> None:
        self.path.parent.mkdir(exist_ok=True)
        write_atomic(self.path, json.dumps(self.known, indent=1) + "\n")
        get_logger().info(f"accuracy of {name}: {result.accuracy:.1f} % ({result.correct}/{result.total})")


# -- distance from the teacher -------------------------------------------------------------------------------------


def prepare_measure(run: RunDir, cfg: NPDConfig) -> None:
    """Seal ``held_out/prompts``, once the run's prompts are; nothing where none are to be held out."""
    source = run.eval_prompts / PROMPTS_FILE if cfg.eval.prompts else run.prompts / HELD_OUT_FILE
    if cfg.eval.held_out and source.exists():
        training = run.prompts / PROMPTS_FILE
        prepare_held_out(source, run.held_out.prompts, cfg.eval.held_out, training=training)


def measure_settings(cfg: RolloutConfig) -> RolloutConfig:
    """The run's rollout settings with the paths that the measure needs; its few samples must not stop a run."""
    return dataclasses.replace(
        cfg,
        greedy_paths=1,
        sampled_paths=_PATHS - 1,
        prompts_per_round=0,
        dataset_fraction=0.0,
        temperature=1.0,
        top_p=1.0,
        merge_identical=False,
        max_quarantined=1.0,
    )


def read_measures(run: RunDir) -> list[dict[str, Any]]:
    """What was measured of each policy, in order.

    Returns:
        ``policy`` (0: the student as given), ``prompts``, ``kl`` and ``kl_error`` (its standard error over prompts;
        nats per token), ``top1_agreement``, ``response_tokens`` (mean) and ``cut`` (share of the responses that
        were cut by length); None where too few responses were scored. ``reason`` says why nothing could be, else None.
    """
    entries = []
    for path in run.held_out.rounds():
        policy = {"policy": int(path.name)}
        if is_sealed(path / "annotations"):
            entries.append(policy | {"reason": None} | _measure(path / "annotations"))
        elif (reason := nothing_measured(path)) is not None:
            entries.append(policy | {"reason": reason} | dict.fromkeys(_NUMBERS))
    return entries


def nothing_measured(path: Path) -> str | None:
    """Why nothing can be measured on a round of ``held_out/``: a stage quarantined all; None where that is not so.

    Such a stage leaves its directory unsealed; its shards are sealed, and have all of what it reads between them.
    """
    source, asked = path.parents[1] / "prompts", _PATHS
    for stage, what in (("rollouts", "no response was kept"), ("annotations", "no response was scored")):
        shards = [] if is_sealed(path / stage) else list(filter(is_sealed, sorted((path / stage).glob("shard-*"))))
        books = [read_manifest(shard, verify=False).counts for shard in shards]
        if books and not any(book["kept"] for book in books):
            reasons: Counter[str] = Counter()
            for book in books:
                reasons.update(book["quarantined"])
            expected = asked * read_manifest(source, verify=False).counts["kept"]
            return f"{what} ({in_words(reasons)})" if sum(book["in"] for book in books) == expected else None
        source, asked = path / stage, 1
    return None


def measure_line(entry: Mapping[str, Any]) -> str:
    """One entry of ``read_measures`` in words."""
    policy = version(entry["policy"])
    if entry["reason"] is not None:
        return f"{policy} could not be measured on held-out prompts: {entry['reason']}"
    parts = [f"{policy} on {entry['prompts']} held-out prompts:"]
    if entry["kl"] is not None:
        parts.append(f"KL to the teacher {entry['kl']:.3f} +- {entry['kl_error']:.3f} nats per token,")
    if entry["top1_agreement"] is not None:
        parts.append(f"top-1 agreement {100 * entry['top1_agreement']:.1f} %,")
    if entry["response_tokens"] is not None:
        parts.append(f"{entry['response_tokens']:.1f} response tokens")
    return " ".join(parts)


def read_samples(run: RunDir, student: str, number: int = 3) -> list[dict[str, Any]]:
    """The first prompts that are measured on, with each policy's greedy response.

    Returns:
        ``prompt`` and ``responses``: ``policy``, ``text``, ``tokens`` and ``cut`` of each.
    """
    prompts: dict[str, dict[str, Any]] = {}
    if not (rounds := _measured(run)):
        return []
    decode = load_tokenizer(student).decode
    for path in rounds:
        shards = sorted((path.parent / "rollouts").glob("shard-*"))
        tables = [pq.read_table(verified_file(shard, ROLLOUTS_FILE, kind="rollouts-shard")) for shard in shards]
        greedy = pa.concat_tables(tables).filter(pc.field("path") == 0)
        for row in greedy.slice(0, 2 * number).to_pylist():
            text = decode(row["prompt_ids"], skip_special_tokens=True)
            sample = prompts.setdefault(row["prompt_id"], {"prompt": text, "responses": []})
            response: dict[str, Any] = {"policy": int(path.parent.name), "tokens": len(row["response_ids"])}
            response["text"] = decode(row["response_ids"], skip_special_tokens=True)
            sample["responses"].append(response | {"cut": row["finish_reason"] == "length"})
    whole = [sample for sample in prompts.values() if len(sample["responses"]) == len(rounds)]
    return whole[:number]


def _measured(run: RunDir) -> list[Path]:
    return [path for path in (rounds / "annotations" for rounds in run.held_out.rounds()) if is_sealed(path)]


def _measure(path: Path) -> dict[str, Any]:
    store = AnnotationStore(path)
    names = ("prompt_id", "response_len", "finish_reason", "on_distribution", "student_loss", "teacher_loss")
    columns = store.metadata(*names)
    lengths, student, teacher = (columns[name].to_numpy() for name in ("response_len", "student_loss", "teacher_loss"))
    sampled = columns["on_distribution"].to_numpy()
    greedy = np.flatnonzero(~sampled)
    agreed = [store.teacher(i)["ids"][:, 0] == store.tokens(i)[-lengths[i] :] for i in greedy]
    kl, error = _mean_with_error(((teacher - student) * lengths)[sampled], lengths[sampled])
    return {
        "prompts": len(set(columns["prompt_id"].to_pylist())),
        "kl": kl,
        "kl_error": error,
        "top1_agreement": float(np.concatenate(agreed).mean()) if agreed else None,
        "response_tokens": float(lengths.mean()) if len(lengths) else None,
        "cut": columns["finish_reason"].to_pylist().count("length") / len(lengths) if len(lengths) else None,
    }


def _mean_with_error(sums: np.ndarray, tokens: np.ndarray) -> tuple[float | None, float | None]:
    """The mean over all tokens of what was summed for each response, and its standard error (of a ratio)."""
    number = len(tokens)
    if number < 2 or not tokens.sum():
        return None, None
    mean = sums.sum() / tokens.sum()
    spread = np.sqrt(((sums - mean * tokens) ** 2).sum() * number / (number - 1))
    return float(mean), float(spread / tokens.sum())
