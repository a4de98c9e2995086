"""The report of a run, written between its rounds: `report.html`, figures as PNG, `summary.json` and a text table."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron_npd.audit import figures
from megatron_npd.audit.numbers import (
    ZONES,
    accuracy_rows,
    busy_words,
    duration,
    read_metrics,
    refresh_words,
    summarise,
)
from megatron_npd.audit.page import page
from megatron_npd.durable import write_atomic
from megatron_npd.run_dir import RunDir


def write_report(run_dir: str | Path) -> str:
    """Write ``report/report.html``, ``report/*.png`` and ``report/summary.json`` of a run, finished or not.

    Reads ``config.json``, ``report/metrics.jsonl``, ``report/accuracy.json`` (``start``, ``rounds``, optional
    ones of ``numbers.COMPARED``, in percent), ``report/seconds.jsonl``, ``report/environment.json``, the manifests
    of ``rounds/*/selection``, and ``held_out/``.

    Args:
        run_dir: Directory of the run.

    Returns:
        The headline and a text table of what was measured.

    Raises:
        UserError: One of these files cannot be read.
    """
    run = RunDir(Path(run_dir))
    summary, drawn = draw(run)
    report = run.report
    report.mkdir(parents=True, exist_ok=True)
    for file in report.glob("*.png"):  # a figure of an earlier report must not outlive its data
        if file.stem not in drawn:
            file.unlink()
    for name, figure in drawn.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor="white")
        write_atomic(report / f"{name}.png", buffer.getvalue())
    write_atomic(report / "summary.json", json.dumps(summary, indent=1) + "\n")
    html = page(run, summary, svgs(drawn))
    write_atomic(report / "report.html", html.encode(errors="replace"))  # a path may be no UTF-8
    return text_table(summary)


def draw(run: RunDir) -> tuple[dict[str, Any], dict[str, Figure]]:
    """The numbers of a run's report, and its figures by name; errors as for ``write_report``."""
    metrics = read_metrics(run)
    summary = summarise(run, metrics)
    return summary, figures.draw_all(summary, metrics)


def svgs(drawn: Mapping[str, Figure]) -> dict[str, str]:
    """The figures as elements of the page."""
    return {name: figures.svg(figure, name) for name, figure in drawn.items()}


def text_table(summary: Mapping[str, Any]) -> str:
    """The report as plain text, for a terminal."""
    lines = [summary["headline"]]
    lines += ["", *summary["verdicts"]] if summary["verdicts"] else []
    if rows := accuracy_rows(summary["accuracy"]):
        lines += ["", "accuracy on held-out problems (exact match)"]
        lines += [f"  {label:<16}{value:6.1f} %" for label, value in rows]
    if summary["measures"]:
        lines += [
            "",
            "held-out prompts",
            "                  KL to teacher  (nats/token)  top-1 agreement  response tokens",
        ]
        for entry in summary["measures"]:
            label = f"round {entry['policy'] - 1}" if entry["policy"] else "start"
            kl = "-" if entry["kl"] is None else f"{entry['kl']:.3f} +- {entry['kl_error']:.3f}"
            agreed = "-" if entry["top1_agreement"] is None else f"{100 * entry['top1_agreement']:.1f} %"
            tokens = "-" if entry["response_tokens"] is None else f"{entry['response_tokens']:.1f}"
            lines += [f"  {label:<16}{kl:>27}{agreed:>17}{tokens:>17}"]
    if summary["zones"]:
        lines += ["", "responses by zone of Delta-IFD"]
        lines += ["  round" + "".join(f"{zone:>12}" for zone in ZONES) + "    kept"]
        for entry in summary["zones"]:
            counts = "".join(f"{entry['zones'][zone]['count']:>12}" for zone in ZONES)
            lines += [f"  {entry['round']:>5}{counts}{100 * entry['kept_share']:>6.1f} %"]
    if summary["lag"]:
        lines += ["", "policy lag k3 (nats per token)", "  round     mean  highest   at end"]
        names = ("mean", "highest", "end")
        lines += [f"  {entry['round']:>5}" + "".join(f"{entry[n]:>9.4f}" for n in names) for entry in summary["lag"]]
    if summary["seconds"]:
        lines += ["", f"seconds by stage ({duration(summary['total_seconds'])} in all)"]
        lines += [f"  {stage:<22}{value:8.1f}" for stage, value in summary["seconds"].items()]
    if summary["busy"]:
        lines += [f"at work: {busy_words(summary)}"]
    if summary["refreshes"]:
        lines += [f"refreshes: {refresh_words(summary)}"]
    if summary["missing"]:
        lines += ["", *summary["missing"]]
    return "\n".join(lines)
