"""The figures of a run's report, each drawn from the dictionary that ``report.summarise`` makes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

BLUE, ORANGE, GREEN, RED, GREY = "#3867a8", "#dd8a3c", "#4b9a6b", "#c2504d", "#9aa0a6"
ZONE_COLOURS = {"degenerate": ORANGE, "proximal": GREEN, "disconnect": RED, "undefined": GREY}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "savefig.dpi": 130,
}
LAG_BOUND = 0.10  # METHOD section 4


def accuracies(ax: Axes, accuracy: Mapping[str, Any]) -> None:
    """Bars of exact-match accuracy in percent: the start, each round, further SFT."""
    bars = [(label, value, BLUE) for label, value in accuracy_rows(accuracy)]
    bars = [(label, value, GREY if label in ("start", "further SFT") else colour) for label, value, colour in bars]
    labels, values, colours = zip(*bars, strict=True)
    drawn = ax.bar(range(len(bars)), values, color=colours, width=0.6)
    ax.bar_label(drawn, [f"{value:.1f}" for value in values], padding=2)
    ax.set_xticks(range(len(bars)), labels)
    ax.set_ylim(0, min(112.0, max(10.0, 1.15 * max(values))))
    ax.set_ylabel("exact match (%)")
    ax.set_title("Accuracy on held-out problems")
    ax.grid(visible=False, axis="x")


def accuracy_rows(accuracy: Mapping[str, Any]) -> list[tuple[str, float]]:
    """What was evaluated, in the order in which it is shown, with its percentage."""
    rows = [("start", accuracy["start"]), ("further SFT", accuracy["further_sft"])]
    rows += [(f"after round {index}", value) for index, value in enumerate(accuracy["rounds"])]
    return [(label, value) for label, value in rows if value is not None]


def losses(ax: Axes, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Loss, CE and KD in nats a response token, over steps."""
    for name, label, colour in (("ce", "CE", ORANGE), ("kd", "KD", GREEN), ("loss", "loss", BLUE)):
        _curve(ax, metrics, name, label, colour)
    ax.set_yscale("log")
    ax.set_ylabel("nats a response token")
    ax.set_title("Training loss")
    _rounds(ax, metrics)
    _legend(ax)


def lag(ax: Axes, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Policy lag k3 over steps, beside the paper's bound."""
    _curve(ax, metrics, "lag_k3", "k3", BLUE)
    ax.axhline(LAG_BOUND, color=RED, linewidth=1, linestyle="--", label=f"bound {LAG_BOUND:.2f}")
    ax.set_ylim(bottom=0)
    ax.set_ylabel("KL(generator || learner), nats a token")
    ax.set_title("Policy lag")
    _rounds(ax, metrics)
    _legend(ax)


MEASURES = {
    "delta": "Delta-IFD = IFD of the teacher - IFD of the student",
    "ifd_student": "IFD of the student",
    "ifd_teacher": "IFD of the teacher",
}


def zones(axes: Sequence[Axes], rounds: Sequence[Mapping[str, Any]]) -> None:
    """One histogram of the filter's measure a round, coloured by zone."""
    for ax, entry in zip(axes, rounds, strict=True):
        edges, counts = np.array(entry["histogram"]["edges"]), np.array(entry["histogram"]["counts"])
        if counts.size:
            middle = (edges[:-1] + edges[1:]) / 2
            colours = np.where(middle < entry["lower"], "degenerate", "proximal")
            colours = np.where(middle > entry["tau"], "disconnect", colours)
            ax.bar(middle, counts, width=np.diff(edges), color=[ZONE_COLOURS[zone] for zone in colours])
            ax.set_yscale("log")
        for bound, name in ((entry["lower"], "lower"), (entry["tau"], "tau")):
            ax.axvline(bound, color="#555555", linewidth=1, linestyle="--", label=f"{name} {bound:.3g}")
        ax.set_title(f"Round {entry['round']}: {100 * entry['kept_share']:.1f} % of {entry['in']} kept")
        ax.set_xlabel(MEASURES[entry["measure"]])
        shown = {zone: entry["zones"][zone]["count"] for zone in ZONE_COLOURS}
        handles: list[Artist] = [
            Patch(color=colour, label=f"{zone} {shown[zone]}")
            for zone, colour in ZONE_COLOURS.items()
            if shown[zone] or zone != "undefined"
        ]
        handles += ax.get_lines()
        ax.legend(handles=handles, fontsize=8.5, frameon=True, framealpha=0.9, edgecolor="none")
    axes[0].set_ylabel("answers")


def seconds(ax: Axes, by_stage: Mapping[str, float]) -> None:
    """Horizontal bars of wall seconds, the stages in the order of their first run."""
    stages = list(by_stage)
    drawn = ax.barh(range(len(stages)), list(by_stage.values()), color=BLUE, height=0.65)
    ax.bar_label(drawn, [f"{value:.1f}" for value in by_stage.values()], padding=3)
    ax.set_yticks(range(len(stages)), stages)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.12 * max(max(by_stage.values()), 1e-3))
    ax.set_xlabel("seconds")
    ax.set_title("Time by stage")
    ax.grid(visible=False, axis="y")


def _curve(ax: Axes, metrics: Sequence[Mapping[str, Any]], name: str, label: str, colour: str) -> None:
    """Each step's value, faint, under its running mean inside a round; nothing where no step has one."""
    lines = [line for line in metrics if line.get(name) is not None]
    width = max(1, len(lines) // 50)
    for _, of_round in itertools.groupby(lines, key=lambda line: line.get("round")):
        steps, values = np.array([(line["iteration"], line[name]) for line in of_round], dtype=float).T
        sums, ends = np.cumsum([0.0, *values]), np.arange(1, len(values) + 1)
        starts = np.maximum(ends - width, 0)
        if width > 1:
            ax.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
        ax.plot(steps, (sums[ends] - sums[starts]) / (ends - starts), color=colour, linewidth=1.6, label=label)
        label = ""  # one legend entry for all rounds


def _legend(ax: Axes) -> None:
    """A legend in the title's line, where it hides no data."""
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, borderpad=0.1)


def _rounds(ax: Axes, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Mark the steps at which a new round's rollouts take over, and name the x axis."""
    ax.set_xlabel("step")
    for before, line in itertools.pairwise(metrics):
        if line.get("round") != before.get("round"):
            ax.axvline(line["iteration"], color="#555555", linewidth=1, linestyle=":")
            transform = ax.get_xaxis_transform()
            ax.text(line["iteration"], 1.0, f" round {line['round']}", transform=transform, va="top", fontsize=9)


def draw(
    paint: Callable[..., None], *data: Any, width: float = 7.0, height: float = 3.6, columns: int | None = None
) -> Figure:
    """A figure with one axes, or a row of ``columns``, painted by one of the functions above."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        if columns is None:
            paint(figure.add_subplot(), *data)
        else:
            paint([figure.add_subplot(1, columns, column + 1) for column in range(columns)], *data)
    return figure
