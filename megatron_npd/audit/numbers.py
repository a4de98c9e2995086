"""The numbers of a run's report: read from the files that the stages left, put into one dictionary, and judged.

Nothing is measured here. What a run does not have is left out, and said in words under ``missing``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_npd.errors import UserError
from megatron_npd.manifest import is_sealed, read_manifest
from megatron_npd.pipeline.environment import read_json
from megatron_npd.pipeline.evaluation import read_measures, read_samples
from megatron_npd.pipeline.stages import STAGES
from megatron_npd.run_dir import RunDir

ZONES = ("degenerate", "proximal", "disconnect", "undefined")
LAG_BOUND = 0.10  # nats per token, METHOD section 4
DROPPED_BOUND = CUT_BOUND = 0.10  # shares of a round's responses
# Models that a run's are compared with, by their names in accuracy.json, in the order in which they are shown.
COMPARED = {"further_sft": "further SFT", "seqkd": "SeqKD", "on_policy": "on-policy", "teacher": "teacher"}
# Numbers of a step that are no parts of its objective, or have a table of their own.
_NO_PARTS = ("lag_k1", "lag_k3", "lr", "grad_norm", "tokens_per_second", "model_tflops")
_ESSENTIAL = (
    *("teacher", "student", "prompts", "updates", "rollout.greedy_paths", "rollout.sampled_paths"),
    *("rollout.temperature", "rollout.max_tokens", "rollout.seed", "annotate.top_k", "annotate.backend"),
    *("select.filter", "train.kd_alpha", "train.kd_mode", "train.train_iters", "train.global_batch_size"),
    *("train.global_batch_tokens", "pack.seq_length", "train.lr", "train.min_lr", "train.lr_decay_style"),
    *("train.lr_warmup_iters", "train.weight_decay", "train.bf16", "train.seed", "eval.prompts", "nproc_per_node"),
)


def read_metrics(run: RunDir) -> list[dict[str, Any]]:
    """The trainer's line of each step."""
    return json_lines(run.metrics, "round", "iteration")


def summarise(run: RunDir, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers of the report.

    Returns:
        ``headline``, ``verdicts`` and ``missing`` (sentences); ``accuracy`` (``start``, those of ``COMPARED``,
        ``rounds``, in percent; the number of ``problems``, and of those that train too); ``measures`` and ``samples``
        (``pipeline/evaluation.py``); ``zones``, ``lag`` and ``training`` (one entry per round; lag in nats per token);
        ``policies`` (names of finished ones); ``seconds`` by stage, ``distillation_seconds`` (what belongs to a round)
        and ``total_seconds``, in which stages that overlapped count once; ``timeline`` and ``busy`` (as below);
        ``round_wait_seconds``, in which the trainer waited for packs;
        ``refreshes`` of the servers (with ``pause_s`` and ``gb_per_s``); ``environment`` (one entry a process),
        ``config`` (the essentials), ``rounds`` (planned) and ``written``.
    """
    config = read_json(run.config, {})
    timed = json_lines(run.seconds, "stage", "round", "seconds")
    seconds: dict[str, float] = {}
    for record in timed:
        seconds[record["stage"]] = round(seconds.get(record["stage"], 0.0) + record["seconds"], 3)
    rounds = sorted({line["round"] for line in metrics})
    by_round = [(index, [line for line in metrics if line["round"] == index]) for index in rounds]
    summary = {
        "accuracy": _accuracy(run),
        "measures": read_measures(run),
        "samples": read_samples(run, config["student"]) if "student" in config else [],
        "zones": list(_selections(run)),
        "lag": [entry for index, lines in by_round if (entry := _lag(index, lines))],
        "training": [_training(index, lines) for index, lines in by_round],
        "policies": [path.name for path in sorted(run.policies.glob("v*")) if is_sealed(path)],
        "seconds": seconds,
        "distillation_seconds": _wall([line for line in timed if line["round"] is not None]),
        "total_seconds": _wall(timed),
        "timeline": (timeline := timeline_of(timed)),
        "busy": busy_shares(timeline),
        "round_wait_seconds": sum(line.get("round_wait_seconds", 0.0) for line in metrics),
        "refreshes": [line for line in timed if "pause_s" in line],
        "environment": read_json(run.environment, []),
        "config": _essentials(config),
        "rounds": config["updates"] + 1 if "updates" in config else None,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    summary |= {"verdicts": list(verdicts(summary)), "missing": list(_missing(summary))}
    return {"headline": headline(summary)} | summary


def timeline_of(timed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was at work when, in the order of beginning: ``stage``, ``round``, ``start`` and ``end``.

    In seconds since the first began; times in which nothing was at work, as between two calls, are left out.
    """
    entries, idle, ended = [], 0.0, 0.0
    for record in sorted((record for record in timed if "at" in record), key=lambda record: record["at"]):
        start, end = record["at"], record["at"] + record["seconds"]
        idle += max(0.0, start - ended)
        ended = max(ended, end)
        place = {"start": round(start - idle, 3), "end": round(end - idle, 3)}
        entries.append({"stage": record["stage"], "round": record["round"]} | place)
    return entries


def busy_shares(timeline: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Which share of a timeline something of the run was at work on servers, with the annotator, with the trainer."""
    whole = max((entry["end"] for entry in timeline), default=0.0)
    shares = {}
    for name, what in (("servers", "servers"), ("annotator", "ranks"), ("trainer", "trainer")):
        stages = {stage.name for stage in STAGES.values() if stage.occupies == what}
        if seconds := _covered(entry for entry in timeline if entry["stage"] in stages):
            shares[name] = seconds / whole
    return shares


def _covered(timeline: Iterable[Mapping[str, Any]]) -> float:
    """Seconds in which one or more of the entries were at work."""
    seconds, ended = 0.0, 0.0
    for entry in timeline:
        seconds += max(0.0, entry["end"] - max(entry["start"], ended))
        ended = max(ended, entry["end"])
    return seconds


def _wall(timed: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of records, those in which several were at work counted once."""
    timeline = timeline_of(timed)
    overlap = sum(entry["end"] - entry["start"] for entry in timeline) - _covered(timeline)
    return round(sum(record["seconds"] for record in timed) - overlap, 3)


def accuracy_rows(accuracy: Mapping[str, Any]) -> list[tuple[str, float]]:
    """What was evaluated, in the order in which it is shown, with its percentage."""
    rows = [("start", accuracy["start"])]
    rows += [(f"round {index}", value) for index, value in enumerate(accuracy["rounds"])]
    rows += [(label, accuracy[name]) for name, label in COMPARED.items()]
    return [(label, value) for label, value in rows if value is not None]


def duration(seconds: float) -> str:
    """Seconds in the two largest units: ``2 h 5 min``, ``3 min 7 s``, ``41 s``."""
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {name}"
    return f"{whole} s" if seconds >= 1 or not seconds else f"{seconds:.1f} s"


def busy_words(summary: Mapping[str, Any]) -> str:
    """``servers 83 %, annotator 20 %, trainer 55 % of 3 min 7 s, in which the trainer waited 8 s for rounds``."""
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in summary["busy"].items())
    whole = duration(max(entry["end"] for entry in summary["timeline"]))
    waited = summary["round_wait_seconds"]
    return f"{shares} of {whole}" + (f", in which the trainer waited {duration(waited)} for rounds" if waited else "")


def refresh_words(summary: Mapping[str, Any]) -> str:
    """``3, servers paused for 0.52 s at most, weights loaded at 1.31 GB/s at least``."""
    done = summary["refreshes"]
    pause, rate = max(entry["pause_s"] for entry in done), min(entry["gb_per_s"] for entry in done)
    return f"{len(done)}, servers paused for {pause:.2f} s at most, weights loaded at {rate:.2g} GB/s at least"


def headline(summary: Mapping[str, Any]) -> str:
    """What was done, from where to where, against what, in how long: one sentence."""
    finished, planned = len(summary["policies"]), summary["rounds"]
    if not finished:
        return "The first round has not ended yet." if summary["seconds"] else "Nothing has been run yet."
    accuracy, measures = summary["accuracy"], summary["measures"]
    span = f"{finished} round{'s' * (finished > 1)}"
    if planned and finished < planned:
        span = f"the first {span} of {planned}" if finished > 1 else f"the first of {planned} rounds"
    if summary["distillation_seconds"]:
        span += f" and {duration(summary['distillation_seconds'])}"
    if accuracy["start"] is not None and accuracy["rounds"]:
        problems = f"{accuracy['problems']} held-out problems" if accuracy["problems"] else "held-out problems"
        sentence = f"from {accuracy['start']:.1f} % to {accuracy['rounds'][-1]:.1f} % exact match on {problems}"
    elif len(measures) > 1 and None not in (measures[0]["kl"], measures[-1]["kl"]):
        values = f"from {measures[0]['kl']:.2f} to {measures[-1]['kl']:.2f}"
        sentence = f"{values} nats per token of KL to its teacher, on {measures[-1]['prompts']} held-out prompts"
    else:
        return f"Near-policy distillation trained the student in {span}; nothing was measured on held-out prompts."
    sentence = f"Near-policy distillation took the student {sentence}, in {span}"
    others = [
        f"{'the ' * (name == 'teacher')}{label} reaches {accuracy[name]:.1f} %"
        for name, label in reversed(COMPARED.items())
        if accuracy[name] is not None and accuracy["rounds"]
    ]
    return "; ".join([sentence, ", ".join(others)] if others else [sentence]) + "."


# -- reading -------------------------------------------------------------------------------------------------------


def json_lines(path: Path, *names: str) -> list[dict[str, Any]]:
    """The records of a JSONL file, which have these fields; a last line cut short by a kill is left out.

    None where the file is missing.
    """
    if not path.is_file():
        return []
    records = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not all(name in record for name in names):
                raise ValueError(f"no object with {', '.join(names)}")
            records.append(record)
        except ValueError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise UserError(f"{path}:{number} must hold JSON, got {error}; remove the line") from error
    return records


def _accuracy(run: RunDir) -> dict[str, Any]:
    known = read_json(run.accuracy, {})
    accuracy = {name: known.get(name) for name in ("start", *COMPARED)}
    problems, held_out = (
        read_manifest(path, verify=False).counts if is_sealed(path) else {}
        for path in (run.eval_prompts, run.held_out.prompts)
    )
    counts = {"problems": problems.get("kept"), "also_training": held_out.get("also_training", 0)}
    return accuracy | {"rounds": known.get("rounds", [])} | counts


def _selections(run: RunDir) -> Iterator[dict[str, Any]]:
    """What was selected in each finished round, in order."""
    for directory in (path / "selection" for path in run.rounds()):
        if not is_sealed(directory):
            continue
        manifest = read_manifest(directory, kind="selection")
        fields = ("in", "kept", "kept_share", "cut", "measure", "lower", "tau", "zones", "histogram")
        yield {
            "round": int(directory.parent.name),
            "filter": manifest.provenance["filter"],
            **{name: manifest.counts[name] for name in fields},
        }


def _lag(index: int, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Mean, highest and last running mean over a tenth of the round's steps, and largest k3 of a round.

    None where it is not defined.
    """
    values = [line["lag_k3"] for line in lines if line.get("lag_k3") is not None]
    if not values:
        return None
    width = max(1, len(values) // 10)
    means = [sum(values[first : first + width]) / width for first in range(len(values) - width + 1)]
    return {
        "round": index,
        "mean": sum(values) / len(values),
        "highest": max(means),
        "end": means[-1],
        "max": max(values),
        "steps": len(values),
    }


def _training(index: int, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """First and last steps of a round, its tokens per second, and the objective's parts over its last tenth."""
    end = lines[-max(1, len(lines) // 10) :]
    names = [
        name
        for name, value in end[-1].items()
        if isinstance(value, float) and not name.endswith("_seconds") and name not in _NO_PARTS
    ]
    return {
        "round": index,
        "steps": [lines[0]["iteration"], lines[-1]["iteration"]],
        "parts": {name: _mean(end, name) for name in names},
        "tokens_per_second": _mean(lines, "tokens_per_second"),
    }


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [line[name] for line in lines if line.get(name) is not None]
    return sum(values) / len(values) if values else None


def _essentials(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a reader of the numbers has to know."""
    essentials = {}
    for name in _ESSENTIAL:
        value: Any = config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value not in (None, ""):
            essentials[name] = value
    return essentials


# -- judging -------------------------------------------------------------------------------------------------------


def verdicts(summary: Mapping[str, Any]) -> Iterator[str]:
    """Each bound that was passed, by how much in the worst round, and what helps."""
    if lags := [entry for entry in summary["lag"] if entry["highest"] > LAG_BOUND]:
        worst = max(lags, key=lambda entry: entry["highest"])
        yield (
            f"{_where(worst, lags)}: the policy lag reached {worst['highest']:.2f} nats per token (mean over a tenth "
            f"of the steps), {worst['highest'] / LAG_BOUND:.1f} times its bound of {LAG_BOUND:.2f}. More updates, "
            "fewer "
            "steps or a lower learning rate keep the training data closer to the policy."
        )
    zones = summary["zones"]
    if few := [entry for entry in zones if 1 - entry["kept_share"] > DROPPED_BOUND]:
        worst = min(few, key=lambda entry: entry["kept_share"])
        zone = max(("degenerate", "disconnect", "undefined"), key=lambda name: worst["zones"][name]["count"])
        bound = {"degenerate": "select.lower", "disconnect": "select.tau", "undefined": "select.filter"}[zone]
        yield (
            f"{_where(worst, few)}: {100 * (1 - worst['kept_share']):.1f} % of the responses were dropped "
            f"({worst['in'] - worst['kept']} of {worst['in']}, most of them {zone}), above "
            f"{100 * DROPPED_BOUND:.0f} %. npd select --dry-run shows what other bounds keep ({bound})."
        )
    if cut := [entry for entry in zones if entry["cut"] > CUT_BOUND * entry["in"]]:
        worst = max(cut, key=lambda entry: entry["cut"] / entry["in"])
        yield (
            f"{_where(worst, cut)}: {100 * worst['cut'] / worst['in']:.1f} % of the responses were cut at "
            f"rollout.max_tokens, above {100 * CUT_BOUND:.0f} %. They have no end to learn from: raise it."
        )
    accuracy = summary["accuracy"]
    if accuracy["also_training"]:
        yield (
            f"{accuracy['also_training']} of {accuracy['problems']} problems of eval.prompts are among the prompts "
            "that train: the accuracy flatters. The distance from the teacher leaves them out."
        )
    reached = [value for value in (accuracy["start"], *accuracy["rounds"]) if value is not None]
    if reached and reached[-1] < max(reached) - 1:
        yield f"The accuracy ends at {reached[-1]:.1f} %, below the {max(reached):.1f} % that it had reached before."
    for before, after in pairwise(summary["measures"]):
        if None in (before["kl"], after["kl"]):
            continue
        if after["kl"] - before["kl"] > 2 * (before["kl_error"] ** 2 + after["kl_error"] ** 2) ** 0.5:
            yield (
                f"Round {after['policy'] - 1}: the KL to the teacher rose from {before['kl']:.2f} to {after['kl']:.2f} "
                "nats per token. A lower learning rate is the first thing to try."
            )


def _where(worst: Mapping[str, Any], entries: Sequence[Any]) -> str:
    others = f", and in {len(entries) - 1} more" if len(entries) > 1 else ""
    return f"Round {worst['round']}{others}"


def _missing(summary: Mapping[str, Any]) -> Iterator[str]:
    accuracy = summary["accuracy"]
    if not accuracy_rows(accuracy):
        yield "No accuracy: the run has no evaluation (eval.prompts)."
    else:
        if accuracy["teacher"] is None:
            yield "No accuracy of the teacher: eval.teacher measures it."
        if accuracy["further_sft"] is None:
            yield "No student with further SFT to compare with."
    if not summary["measures"]:
        yield "No distance from the teacher and no samples: no prompts were held out (eval.held_out)."
    for entry in summary["measures"]:
        if entry["reason"] is not None:
            when = f"after round {entry['policy'] - 1}" if entry["policy"] else "before the run"
            yield f"No distance from the teacher {when}: {entry['reason']}."
    if not summary["training"]:
        yield "No losses: no training step has been recorded."
    elif not summary["lag"]:
        yield "No policy lag: no token that trained was sampled at temperature 1 over the whole vocabulary."
    if not summary["zones"]:
        yield "No zones: no round has been selected."
    if not summary["seconds"]:
        yield "No times: the stages have not recorded any."
    if not summary["environment"]:
        yield "No machine and versions: the run was not started by npd run."
    elif "commit" not in summary["environment"][-1]:
        yield "No commit: the program does not run from a clone of its repository."
