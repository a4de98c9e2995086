"""The report of a run: what was measured, from the files that the stages left, as HTML, PNG, JSON and a text table.

Nothing is measured here. What a run does not have (no evaluation, no sampled path and so no policy lag) is left out
and said in words.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron_npd.log import UserError
from megatron_npd.loop import figures
from megatron_npd.manifest import is_sealed, read_manifest, write_atomic

ZONES = ("degenerate", "proximal", "disconnect", "undefined")
# Heading -> (file, what the figure shows), in the order of the page.
FIGURES = {
    "accuracy": "Exact-match accuracy of the greedy answers to held-out problems, through the rollout servers.",
    "loss": "Means over the response tokens of each step's global batch.",
    "lag": "k3 estimate on the tokens that the generator sampled at temperature 1 over the whole vocabulary.",
    "zones": "Answers by Delta-IFD, a logarithmic scale; outliers stand in the end bins.",
    "seconds": "Wall time of all calls together, interrupted ones included.",
}


def write_report(run_dir: str | Path) -> str:
    """Write ``report/report.html``, ``report/*.png`` and ``report/summary.json`` of a run, finished or not.

    Reads ``config.json``, ``report/metrics.jsonl``, ``report/accuracy.json`` (``start``, ``rounds``, optional
    ``further_sft``, in percent), ``report/seconds.jsonl`` and the manifests of ``rounds/*/selection``.

    Args:
        run_dir: Directory of the run.

    Returns:
        A text table of the accuracies, zones, lag and seconds.

    Raises:
        UserError: One of these files cannot be read.
    """
    run = Path(run_dir)
    metrics = _json_lines(run / "report" / "metrics.jsonl")
    summary = summarise(run, metrics)
    report = run / "report"
    report.mkdir(parents=True, exist_ok=True)
    images: dict[str, bytes] = {}
    for name, figure in _figures(summary, metrics).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=figures.STYLE["savefig.dpi"])
        images[name] = buffer.getvalue()
    for name in FIGURES:  # a figure of an earlier report must not outlive its data
        (report / f"{name}.png").unlink(missing_ok=True)
        if name in images:
            write_atomic(report / f"{name}.png", images[name])
    write_atomic(report / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_atomic(report / "report.html", _page(run, summary, images))
    return text_table(summary)


def summarise(run: Path, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers of the report.

    Returns:
        ``accuracy`` (``start``, ``further_sft``, ``rounds``; None or missing where not evaluated), ``zones`` and
        ``lag`` (one entry a round; lag in nats a token), ``training`` (one entry a round), ``seconds`` by stage,
        ``config`` (the essentials) and ``missing`` (sentences).
    """
    known = _json_file(run / "report" / "accuracy.json") or {}
    accuracy = {name: known.get(name) for name in ("start", "further_sft")} | {"rounds": known.get("rounds", [])}
    seconds: dict[str, float] = {}
    for record in _json_lines(run / "report" / "seconds.jsonl"):
        seconds[record["stage"]] = round(seconds.get(record["stage"], 0.0) + record["seconds"], 3)
    rounds = sorted({line["round"] for line in metrics})
    by_round = [(index, [line for line in metrics if line["round"] == index]) for index in rounds]
    summary = {
        "accuracy": accuracy,
        "zones": list(_selections(run)),
        "lag": [entry for index, lines in by_round if (entry := _lag(index, lines))],
        "training": [_training(index, lines) for index, lines in by_round],
        "seconds": seconds,
        "config": _essentials(_json_file(run / "config.json") or {}),
    }
    return summary | {"missing": list(_missing(summary))}


def text_table(summary: Mapping[str, Any]) -> str:
    """The report as plain text, for a terminal."""
    lines = []
    if rows := figures.accuracy_rows(summary["accuracy"]):
        lines += ["accuracy on held-out problems (exact match)"]
        lines += [f"  {label:<16}{value:6.1f} %" for label, value in rows]
    if summary["zones"]:
        lines += ["", "answers by zone of Delta-IFD", "  round" + "".join(f"{zone:>12}" for zone in ZONES) + "    kept"]
        for entry in summary["zones"]:
            counts = "".join(f"{entry['zones'][zone]['count']:>12}" for zone in ZONES)
            lines += [f"  {entry['round']:>5}{counts}{100 * entry['kept_share']:>6.1f} %"]
    if summary["lag"]:
        lines += ["", "policy lag k3 (nats a token)", "  round     mean   at end"]
        lines += [f"  {entry['round']:>5}{entry['mean']:>9.4f}{entry['end']:>9.4f}" for entry in summary["lag"]]
    if summary["seconds"]:
        lines += ["", "seconds by stage"]
        lines += [f"  {stage:<22}{value:8.1f}" for stage, value in summary["seconds"].items()]
    if summary["missing"]:
        lines += ["", *summary["missing"]]
    return "\n".join(lines).lstrip("\n")


# -- reading -------------------------------------------------------------------------------------------------------


def _json_file(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} must hold JSON, got {error}; remove it and run the stage again") from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, none where it is missing; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    records = []
    lines = path.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise UserError(f"{path}:{number} must hold JSON, got {error}; remove the line") from error
    return records


def _selections(run: Path) -> Iterator[dict[str, Any]]:
    """What was selected in each finished round, in order."""
    for directory in sorted((run / "rounds").glob("*/selection")):
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
    """Mean, end (the last tenth of the round's steps) and largest k3 of a round, None where it is not defined."""
    values = [line["lag_k3"] for line in lines if line.get("lag_k3") is not None]
    if not values:
        return None
    end = values[-max(1, len(values) // 10) :]
    return {
        "round": index,
        "mean": sum(values) / len(values),
        "end": sum(end) / len(end),
        "max": max(values),
        "steps": len(values),
    }


def _training(index: int, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """First and last steps of a round, its tokens a second, and loss, CE and KD over its last tenth."""
    end = lines[-max(1, len(lines) // 10) :]
    entry: dict[str, Any] = {"round": index, "steps": [lines[0]["iteration"], lines[-1]["iteration"]]}
    for name, part in (("loss", end), ("ce", end), ("kd", end), ("teacher_mass", end), ("tokens_per_second", lines)):
        values = [line[name] for line in part if line.get(name) is not None]
        entry[name] = sum(values) / len(values) if values else None
    return entry


def _essentials(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a reader of the numbers has to know."""
    names = ("teacher", "student", "prompts", "updates", "rollout.greedy_paths", "rollout.sampled_paths")
    names += ("rollout.temperature", "annotate.top_k", "select.filter", "train.kd_alpha", "train.kd_mode")
    names += ("train.train_iters", "train.global_batch_size", "train.global_batch_tokens", "pack.seq_length")
    names += ("train.lr", "train.min_lr", "train.lr_decay_style", "train.lr_warmup_iters", "train.weight_decay")
    names += ("train.seed", "eval.prompts")
    essentials = {}
    for name in names:
        value: Any = config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            essentials[name] = value
    return essentials


def _missing(summary: Mapping[str, Any]) -> Iterator[str]:
    accuracy = summary["accuracy"]
    if not figures.accuracy_rows(accuracy):
        yield "No accuracy: the run has no evaluation."
    elif accuracy["further_sft"] is None:
        yield "No student with further SFT to compare with."
    if not summary["training"]:
        yield "No losses: no training step has been recorded."
    elif not summary["lag"]:
        yield "No policy lag: no token that trained was sampled at temperature 1 over the whole vocabulary."
    if not summary["zones"]:
        yield "No zones: no round has been selected."
    if not summary["seconds"]:
        yield "No times: the stages have not recorded any."


# -- the page ------------------------------------------------------------------------------------------------------


def _figures(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    drawn: dict[str, Figure] = {}
    if figures.accuracy_rows(summary["accuracy"]):
        drawn["accuracy"] = figures.draw(figures.accuracies, summary["accuracy"])
    if metrics:
        drawn["loss"] = figures.draw(figures.losses, metrics)
    if summary["lag"]:
        drawn["lag"] = figures.draw(figures.lag, metrics)
    if rounds := summary["zones"]:
        drawn["zones"] = figures.draw(figures.zones, rounds, width=max(7.0, 4.5 * len(rounds)), columns=len(rounds))
    if by_stage := summary["seconds"]:
        drawn["seconds"] = figures.draw(figures.seconds, by_stage, height=1.1 + 0.28 * len(by_stage))
    return drawn


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2.5rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p, li { max-width: 46rem; } .note { color: #666; }
table { border-collapse: collapse; margin: .6rem 0; } th, td { padding: .25rem .9rem .25rem 0; text-align: right; }
th { color: #666; font-weight: 600; border-bottom: 1px solid #ccc; } td { border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; } td.text { text-align: left; word-break: break-all; }
img { max-width: 100%; height: auto; }
"""


def _page(run: Path, summary: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    def picture(name: str) -> str:
        if name not in images:
            return ""
        data = base64.b64encode(images[name]).decode()
        caption = html.escape(FIGURES[name])
        return f'<p><img alt="{name}" src="data:image/png;base64,{data}"></p><p class="note">{caption}</p>'

    rows = figures.accuracy_rows(summary["accuracy"])
    start = summary["accuracy"]["start"]
    sections = [("What was run", _description(summary["config"]))]
    if rows:
        table = [
            (label, f"{value:.1f} %", "" if start is None or label == "start" else f"{value - start:+.1f}")
            for label, value in rows
        ]
        accuracies = _table(("policy", "accuracy", "points over the start"), table) + picture("accuracy")
        sections.insert(0, ("Accuracy", accuracies))
    if summary["training"]:
        sections.append(("Training", _training_table(summary) + picture("loss") + picture("lag")))
    if summary["zones"]:
        sections.append(("Selection", _zones_table(summary["zones"]) + picture("zones")))
    if summary["seconds"]:
        seconds = [(stage, f"{value:.1f}") for stage, value in summary["seconds"].items()]
        sections.append(("Time", _table(("stage", "seconds"), seconds) + picture("seconds")))
    if summary["missing"]:
        items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in summary["missing"])
        sections.append(("Not in this report", f"<ul>{items}</ul>"))
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections)
    name = html.escape(str(run))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Near-policy distillation: {name}</title>'
        f"<style>{_STYLE}</style></head><body><h1>Near-policy distillation</h1>"
        f'<p class="note">Run directory: {name}</p>{body}</body></html>\n'
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{lines}</table>"


def _description(config: Mapping[str, Any]) -> str:
    if not config:
        return "<p>The run directory has no config.json.</p>"
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="text">{html.escape(str(value))}</td></tr>'
        for name, value in config.items()
    )
    return (
        "<p>The student answered the prompts, the teacher scored the answers in packed prefill, the filter chose, and "
        "the student trained on what was kept; between rounds the servers took over the trained student.</p>"
        f'<table><tr><th>setting</th><th class="text">value</th></tr>{rows}</table>'
    )


def _training_table(summary: Mapping[str, Any]) -> str:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lags = {entry["round"]: entry for entry in summary["lag"]}
    rows = []
    for entry in summary["training"]:
        of_round = lags.get(entry["round"], {})
        rows.append(
            (
                str(entry["round"]),
                "{} to {}".format(*entry["steps"]),
                *(number(entry[name], ".4f") for name in ("loss", "ce", "kd")),
                number(entry["teacher_mass"], ".4f"),
                *(number(of_round.get(name), ".4f") for name in ("mean", "end")),
                number(entry["tokens_per_second"], ".0f"),
            )
        )
    header = ("round", "steps", "loss", "CE", "KD", "teacher mass", "lag mean", "lag at end", "tokens/s")
    note = "Loss, CE, KD, teacher mass and the lag at the end: means over the last tenth of a round's steps."
    return _table(header, rows) + f'<p class="note">{note}</p>'


def _zones_table(rounds: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            str(entry["round"]),
            entry["filter"],
            str(entry["in"]),
            *(f"{entry['zones'][zone]['count']} ({100 * entry['zones'][zone]['share']:.1f} %)" for zone in ZONES),
            f"{entry['tau']:.4g}",
            f"{entry['kept']} ({100 * entry['kept_share']:.1f} %)",
        )
        for entry in rounds
    ]
    return _table(("round", "filter", "answers", *ZONES, "tau", "kept"), rows)
