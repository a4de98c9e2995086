"""The figures of a run's report, each drawn from the numbers of `numbers.summarise`; narrow, to be read on a phone."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from megatron_npd.audit.numbers import LAG_BOUND, accuracy_rows
from megatron_npd.pipeline.stages import STAGES

BLUE, ORANGE, GREEN, RED, GREY = "#3b76c4", "#d9822b", "#2f9e6e", "#d1495b", "#8a94a3"
ZONE_COLOURS = {"degenerate": ORANGE, "proximal": GREEN, "disconnect": RED, "undefined": GREY}
# Colours that the page replaces by its own, so that figures follow its light or dark scheme.
INK, MUTED, LINE = "#1b2431", "#5b6675", "#dfe4ea"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)"}
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names with a dollar are names
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "savefig.dpi": 160,
}
_POINTS = 60  # of a curve, each with its range
_LEAST_LAG = 1e-4  # nats per token; less is drawn there
WORKERS = {"servers": ("servers", BLUE), "ranks": ("annotator", ORANGE), "trainer": ("trainer", GREEN)}
MEASURES = {"delta": "Delta-IFD", "ifd_student": "IFD of the student", "ifd_teacher": "IFD of the teacher"}


def draw_all(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """The figures that a run has data for, by name, in the order of the page."""
    drawn: dict[str, Figure] = {}
    if accuracy_rows(summary["accuracy"]):
        drawn["accuracy"] = _draw(_accuracies, summary["accuracy"])
    if any(entry["kl"] is not None for entry in summary["measures"]):
        drawn["distance"] = _draw(_distances, summary["measures"])
    if metrics:
        drawn["loss"] = _draw(_losses, metrics, height=3.0)
    if summary["lag"]:
        drawn["lag"] = _draw(_lag, metrics, height=3.0)
    for entry in (entry for entry in summary["zones"] if entry["tau"] is not None):
        drawn[f"zones-{entry['round']:04d}"] = _draw(_zones, entry, height=2.8)
    if by_stage := summary["seconds"]:
        drawn["seconds"] = _draw(_seconds, by_stage, height=0.9 + 0.25 * len(by_stage))
    if timeline := summary["timeline"]:
        rows = len({entry["stage"] for entry in timeline})
        drawn["timeline"] = _draw(_timeline, timeline, height=1.3 + 0.25 * rows)
    return drawn


def svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element that takes its width, its text's font and its neutral colours from the page."""
    buffer = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"| height="[^"]*pt"', r"\1", text, count=2)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text.replace("'DejaVu Sans'", "var(--font)").replace("<svg", f'<svg role="img" aria-label="{name}"', 1)


def _draw(paint: Callable[..., None], data: Any, *, height: float = 2.6) -> Figure:
    with rc_context(STYLE):
        figure = Figure(figsize=(4.0, height), layout="constrained")
        paint(figure.add_subplot(), data)
    return figure


def _accuracies(ax: Axes, accuracy: Mapping[str, Any]) -> None:
    """Bars of exact-match accuracy in percent: the student through the run, and what it is compared with in grey."""
    labels, values = zip(*accuracy_rows(accuracy), strict=True)
    colours = [BLUE if label.startswith("round") else GREY for label in labels]
    drawn = ax.bar(range(len(labels)), values, color=colours, width=0.62)
    ax.bar_label(drawn, [f"{value:.1f}" for value in values], padding=2)
    _name_bars(ax, labels)
    ax.set_ylim(0, min(112.0, max(10.0, 1.15 * max(values))))
    ax.set_title("Accuracy on held-out problems (%)")


def _distances(ax: Axes, measures: Sequence[Mapping[str, Any]]) -> None:
    """KL to the teacher of each policy, with its standard error."""
    entries = [entry for entry in measures if entry["kl"] is not None]
    values = [entry["kl"] for entry in entries]
    colours = [BLUE if entry["policy"] else GREY for entry in entries]
    places, errors = range(len(entries)), [entry["kl_error"] for entry in entries]
    ax.bar(places, values, color=colours, width=0.62)
    ax.errorbar(places, values, errors, fmt="none", ecolor=MUTED, capsize=4, linewidth=1)
    for place, value, error in zip(places, values, errors, strict=True):
        ax.text(place, max(value, 0) + error, f"{value:.2f}", ha="center", va="bottom")
    _name_bars(ax, [f"round {entry['policy'] - 1}" if entry["policy"] else "start" for entry in entries])
    ax.margins(y=0.12)
    ax.set_title("KL to the teacher (nats per token)")


def _name_bars(ax: Axes, labels: Sequence[str]) -> None:
    """Names under bars, on two lines or slanted where there are many; numbers above them get smaller."""
    many = len(labels) > 9
    names = [label.replace(" ", "\n") if 4 < len(labels) <= 9 else label for label in labels]
    slant: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if many else {}
    ax.set_xticks(range(len(labels)), names, **slant)
    for number in ax.texts if many else ():
        number.set_fontsize(7)
    ax.set_xlim(-0.6, max(len(labels), 3) - 0.4)
    ax.tick_params(axis="x", length=0)
    ax.grid(visible=False, axis="x")


def _losses(ax: Axes, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Loss, CE and KD in nats per response token, over steps."""
    for name, label, colour in (("ce", "CE", ORANGE), ("kd", "KD", GREEN), ("loss", "loss", BLUE)):
        _curve(ax, metrics, name, label, colour)
    ax.set_title("Training loss (nats per token)")
    _finish_curves(ax, metrics)


def _lag(ax: Axes, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Policy lag k3 over steps, beside the paper's bound."""
    _curve(ax, metrics, "lag_k3", "k3", BLUE, least=_LEAST_LAG)
    ax.axhline(LAG_BOUND, color=RED, linewidth=1.2, linestyle="--", label=f"bound {LAG_BOUND:.2f}")
    ax.set_title("Policy lag (nats per token)")
    _finish_curves(ax, metrics)


def _curve(
    ax: Axes, metrics: Sequence[Mapping[str, Any]], name: str, label: str, colour: str, *, least: float = 0.0
) -> None:
    """The mean over a few steps each, on the range of their values, so that a single step's spike is still seen."""
    lines = [line for line in metrics if line.get(name) is not None]
    width = max(1, -(-len(lines) // _POINTS))
    for _, of_round in itertools.groupby(lines, key=lambda line: line.get("round")):
        steps, values = np.array([(line["iteration"], line[name]) for line in of_round], dtype=float).T
        values, firsts = np.maximum(values, least), np.arange(0, len(values), width)
        sizes = np.diff(np.append(firsts, len(values)))
        middles, means = np.add.reduceat(steps, firsts) / sizes, np.add.reduceat(values, firsts) / sizes
        lows, highs = np.minimum.reduceat(values, firsts), np.maximum.reduceat(values, firsts)
        ax.fill_between(middles, lows, highs, color=colour, alpha=0.22, linewidth=0)
        ax.plot(middles, means, color=colour, linewidth=1.6, label=label)
        label = ""  # one legend entry for all rounds


def _finish_curves(ax: Axes, metrics: Sequence[Mapping[str, Any]]) -> None:
    """A logarithmic axis in plain numbers, marks where a new round's rollouts take over, a legend beside no data."""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    ax.set_title(ax.get_title("left"), pad=20)
    ax.set_xlabel("step")
    begins = [line for before, line in itertools.pairwise(metrics) if line.get("round") != before.get("round")]
    for line in begins:
        ax.axvline(line["iteration"], color=MUTED, linewidth=1, linestyle=":")
        name, place = f"round {line['round']}" if len(begins) < 4 else str(line["round"]), ax.get_xaxis_transform()
        ax.text(line["iteration"], 1.01, name, transform=place, fontsize=8.5, ha="center", color=MUTED)
    _legend_below(ax)


def _legend_below(ax: Axes, handles: Sequence[Any] | None = None) -> None:
    figure = ax.figure
    shown = ax.get_legend_handles_labels()[0] if handles is None else handles
    figure.legend(handles=shown, loc="outside lower center", ncols=3, columnspacing=1.2, handlelength=1.4)


def _zones(ax: Axes, entry: Mapping[str, Any]) -> None:
    """The histogram of the filter's measure in a round, coloured by zone."""
    edges, counts = np.array(entry["histogram"]["edges"]), np.array(entry["histogram"]["counts"])
    if counts.size:
        middle = (edges[:-1] + edges[1:]) / 2
        colours = np.where(middle < entry["lower"], "degenerate", "proximal")
        colours = np.where(middle > entry["tau"], "disconnect", colours)
        ax.bar(middle, counts, width=np.diff(edges), color=[ZONE_COLOURS[zone] for zone in colours])
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for bound in (entry["lower"], entry["tau"]):
        ax.axvline(bound, color=MUTED, linewidth=1, linestyle="--")
    shown = {zone: entry["zones"][zone]["count"] for zone in ZONE_COLOURS}
    handles = [
        Patch(color=colour, label=f"{zone} {shown[zone]}")
        for zone, colour in ZONE_COLOURS.items()
        if shown[zone] or zone != "undefined"
    ]
    ax.set_title(f"Round {entry['round']}: {100 * entry['kept_share']:.1f} % of {entry['in']} kept")
    ax.set_xlabel(f"{MEASURES[entry['measure']]}, kept from {entry['lower']:.3g} to {entry['tau']:.3g}")
    _legend_below(ax, handles)


def _seconds(ax: Axes, by_stage: Mapping[str, float]) -> None:
    """Horizontal bars of wall seconds, the stages in the order of their first run."""
    stages = list(by_stage)
    drawn = ax.barh(range(len(stages)), list(by_stage.values()), color=BLUE, height=0.62)
    ax.bar_label(drawn, [f"{value:.1f}" for value in by_stage.values()], padding=3)
    ax.set_yticks(range(len(stages)), stages)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.15 * max(max(by_stage.values()), 1e-3))
    ax.set_title("Seconds by stage")
    ax.grid(visible=False, axis="y")


def _timeline(ax: Axes, timeline: Sequence[Mapping[str, Any]]) -> None:
    """A bar for each time that a stage was at work, a row for each stage, coloured by what it worked with."""
    stages = list(dict.fromkeys(entry["stage"] for entry in timeline))
    for entry in timeline:
        what = STAGES[entry["stage"]].occupies if entry["stage"] in STAGES else ""
        colour, seconds = WORKERS.get(what, ("", GREY))[1], entry["end"] - entry["start"]
        light = 0.55 if (entry["round"] or 0) % 2 else 1.0
        ax.barh(stages.index(entry["stage"]), seconds, left=entry["start"], color=colour, alpha=light, height=0.62)
    ax.set_yticks(range(len(stages)), stages)
    ax.invert_yaxis()
    ax.set_xlabel("seconds")
    ax.set_title("Stages over time")
    ax.grid(visible=False, axis="y")
    _legend_below(ax, [Patch(color=colour, label=name) for name, colour in WORKERS.values()])
