"""The report as one HTML page without anything from outside; wide, on a phone, light and dark."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from typing import TYPE_CHECKING, Any

from megatron_npd.audit.numbers import ZONES, accuracy_rows, busy_words, duration, refresh_words
from megatron_npd.run_dir import RunDir

if TYPE_CHECKING:
    from megatron_npd.audit.status import Status  # which imports the runner

REFRESH_SECONDS = 5  # of the live page
_LONGEST = 700  # characters of a prompt or response that are shown
_STYLE = """
:root { color-scheme: light dark; --ink: #1b2431; --muted: #5b6675; --line: #dfe4ea; --page: #f6f7f9; --card: #fff;
  --accent: #2563b0; --warn: #9a5b00; --warn-page: #fff6e5; --good: #1f7a53; --good-page: #eaf6f0;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7ebf0; --muted: #9daab9; --line: #303a47; --page: #12171e;
  --card: #1a212b; --accent: #7fb2f0; --warn: #f0bf6a; --warn-page: #2e2617; --good: #7fd1ac; --good-page: #172a22; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 var(--font); color: var(--ink); background: var(--page); margin: 0; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
.over { color: var(--muted); font-size: .875rem; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h1 { font-size: clamp(1.35rem, 1rem + 1.6vw, 2rem); line-height: 1.3; font-weight: 650; margin: 0 0 1.5rem;
  letter-spacing: -.01em; text-wrap: pretty; }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .9rem; letter-spacing: -.005em; }
h3 { font-size: .95rem; margin: 0 0 .4rem; }
p { margin: .5rem 0; } .note { color: var(--muted); font-size: .875rem; max-width: 60rem; } a { color: var(--accent); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 0 0 1.25rem; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1rem; }
.tile b { display: block; font-size: 1.3rem; font-weight: 650; white-space: nowrap; }
.tile span { display: block; color: var(--muted); font-size: .8125rem; line-height: 1.35; }
.verdicts { list-style: none; margin: 0; padding: 0; display: grid; gap: .5rem; }
.verdicts li { background: var(--warn-page); border-left: 4px solid var(--warn); border-radius: 6px;
  padding: .6rem .9rem; }
.verdicts .good { background: var(--good-page); border-color: var(--good); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1rem;
  margin: 1rem 0; }
figure { margin: 0; } figure svg { display: block; width: 100%; height: auto; }
figcaption { color: var(--muted); font-size: .8125rem; margin-top: .4rem; }
table { border-collapse: separate; width: 100%; background: var(--card); font-size: .9375rem;
  font-variant-numeric: tabular-nums; border: 1px solid var(--line); border-radius: 10px; border-spacing: 0; }
th, td { padding: .5rem .8rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: baseline; }
tr:last-child td { border-bottom: 0; } th { color: var(--muted); font-weight: 600; font-size: .8125rem; }
th:first-child, td:first-child { text-align: left; }
.facts td { text-align: left; overflow-wrap: anywhere; } .facts td:first-child { color: var(--muted); width: 16rem; }
.samples { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0 .8rem; max-height: 12.5rem; overflow-y: auto; }
.samples dl { margin: 0; } dt { color: var(--muted); font-size: .8125rem; }
dd { margin: 0; padding-left: .8rem; border-left: 3px solid var(--line); }
footer { color: var(--muted); font-size: .875rem; margin-top: 3rem; }
@media (max-width: 44rem) { main { padding: 1.5rem 1rem 3rem; }
  .rows tr:first-child { display: none; } .rows tr, .rows td { display: block; }
  .rows tr { border-bottom: 1px solid var(--line); padding: .6rem .9rem; } .rows tr:last-child { border-bottom: 0; }
  .rows td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .12rem 0; }
  .tile { padding: .7rem .8rem; } .tile b { font-size: 1.1rem; }
  .rows td:first-child { display: block; font-weight: 650; } .rows td:empty { display: none; }
  .rows td:not(:first-child)::before { content: attr(data-label); color: var(--muted); }
  .facts td { padding: .45rem .7rem; } .facts td:first-child { width: 9.5rem; } }
"""
_CAPTIONS = {
    "accuracy": "Exact match of greedy responses, through the rollout servers.",
    "distance": "KL(student || teacher) over the whole vocabulary, on responses that the student sampled itself; with "
    "the standard error over prompts.",
    "loss": "Over the response tokens of each step's global batch; bands: lowest and highest of neighbouring steps.",
    "lag": "KL(generator || learner), k3 estimate, on the tokens that were sampled at temperature 1; "
    "bands: lowest and highest of neighbouring steps.",
    "zones": "Responses by the filter's measure; those beyond the edges stand in the end bins.",
    "seconds": "Wall time of all calls together, interrupted ones included.",
    "timeline": "Each stage's rounds or policies, light and dark by turns; times in which nothing ran are left out.",
}


def page(
    run: RunDir, summary: Mapping[str, Any], svgs: Mapping[str, str], status: Status | None = None, notice: str = ""
) -> str:
    """The page.

    Args:
        run: The run; links are relative to its ``report/``.
        summary: As ``numbers.summarise`` makes it.
        svgs: Figures by name.
        status: What the run is doing, for a live page: it reads itself anew, shows that first, and has no links, as
            nothing else is served. Before there are any results it shows that alone.
        notice: A sentence above all else, of a live page.
    """
    name = escape(run.root.resolve().name)
    if status is not None:
        return _frame(name, _live(run, summary, svgs, status, notice), refresh=True)
    body = _over(name, summary) + _sections(_results(summary, svgs))
    return _frame(
        name,
        body + '<footer>All numbers: <a href="summary.json">summary.json</a>, each step: '
        '<a href="metrics.jsonl">metrics.jsonl</a>.</footer>',
    )


def notice_page(run: RunDir, notice: str) -> str:
    """A live page of a run that cannot be read."""
    return _frame(escape(run.root.resolve().name), _notice(notice), refresh=True)


def _frame(name: str, body: str, *, refresh: bool = False) -> str:
    again = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">' if refresh else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{again}'
        f"<title>{name}: near-policy distillation</title><style>{_STYLE}</style></head><body><main>{body}"
        "</main></body></html>\n"
    )


def _over(name: str, summary: Mapping[str, Any]) -> str:
    return (
        f'<p class="over">Run {name} &middot; {_day(summary["written"])}</p>'
        f"<h1>{_unbroken(escape(summary['headline']))}</h1>"
    )


def _sections(sections: Sequence[tuple[str, str]]) -> str:
    return "".join((f"<h2>{title}</h2>" if title else "") + content for title, content in sections if content)


def _results(summary: Mapping[str, Any], svgs: Mapping[str, str], *, links: bool = True) -> list[tuple[str, str]]:
    return [
        ("", _tiles(summary) + _verdicts(summary)),
        ("Results", _policies(summary, links=links) + _figures(svgs, "accuracy", "distance")),
        ("Responses before and after", _samples(summary["samples"])),
        ("Training", _training(summary) + _figures(svgs, "loss", "lag")),
        ("Selection", _selection(summary["zones"]) + _figures(svgs, *(key for key in svgs if key.startswith("zones")))),
        ("Time and machine", _machine(summary) + _figures(svgs, "seconds", "timeline")),
        ("Settings", _facts(summary["config"].items())),
        ("Not in this report", "".join(f"<p>{escape(sentence)}</p>" for sentence in summary["missing"])),
    ]


def _live(run: RunDir, summary: Mapping[str, Any], svgs: Mapping[str, str], status: Status, notice: str) -> str:
    name = escape(run.root.resolve().name)
    now = [("Now", _facts(_doing(status))), ("Stages", _stages(status))]
    parts = ("accuracy", "measures", "training", "zones")
    there = any(accuracy_rows(summary[part]) if part == "accuracy" else summary[part] for part in parts)
    if not there:
        return _notice(notice) + f'<p class="over">Run {name}</p>' + _sections([("", _facts(_doing(status))), *now[1:]])
    return _notice(notice) + _over(name, summary) + _sections(now + _results(summary, svgs, links=False))


def _notice(words: str) -> str:
    return f'<ul class="verdicts"><li>{escape(words)}</li></ul>' if words else ""


def _doing(status: Status) -> list[tuple[str, str]]:
    facts = [("runner", "running" if status.running else "none on this machine")]
    facts += [("time left", f"about {duration(status.left)}")] if status.left else []
    facts += [("policy lag", f"{status.lag} nats per token")] if status.lag else []
    return facts + [("servers", words) for words in status.servers]


def _stages(status: Status) -> str:
    rows = [
        [
            escape(f"{entry.place}: {entry.stage}"),
            escape(entry.state),
            escape(entry.rate),
            duration(entry.seconds) if entry.seconds else "",
            f"about {duration(entry.left)}" if entry.left else "",
        ]
        for entry in status.stages
    ]
    return _rows(["stage", "state", "rate", "time", "left"], rows)


def _unbroken(text: str) -> str:
    """Numbers stay on a line with their units."""
    return re.sub(r"(?<=\d) (?=(%|s|min|h|d)\b|%)", "&nbsp;", text)


def _day(iso: str) -> str:
    return datetime.fromisoformat(iso).strftime("%Y-%m-%d %H:%M UTC")


def _tiles(summary: Mapping[str, Any]) -> str:
    """The few numbers that a reader looks for first."""
    accuracy, measures, tiles = summary["accuracy"], summary["measures"], []
    if accuracy["start"] is not None and accuracy["rounds"]:
        tiles.append((f"{accuracy['start']:.1f} → {accuracy['rounds'][-1]:.1f} %", "exact match"))
    first, last = (measures[0], measures[-1]) if measures else ({}, {})
    if len(measures) > 1 and None not in (first["kl"], last["kl"]):
        tiles.append((f"{first['kl']:.2f} → {last['kl']:.2f}", "KL to the teacher, nats per token"))
    if len(measures) > 1 and None not in (first["top1_agreement"], last["top1_agreement"]):
        values = f"{100 * first['top1_agreement']:.1f} → {100 * last['top1_agreement']:.1f} %"
        tiles.append((values, "tokens as the teacher would choose"))
    if summary["distillation_seconds"]:
        tiles.append((duration(summary["distillation_seconds"]), "for the distillation"))
    shown = "".join(f'<div class="tile"><b>{escape(value)}</b><span>{label}</span></div>' for value, label in tiles)
    return f'<div class="tiles">{shown}</div>' if tiles else ""


def _verdicts(summary: Mapping[str, Any]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in summary["verdicts"])
    checked = ["policy lag"] * bool(summary["lag"]) + ["dropped and cut responses"] * bool(summary["zones"])
    if not items and checked:
        items = f'<li class="good">Within their bounds: {", ".join(checked)}.</li>'
    return f'<ul class="verdicts">{items}</ul>' if items else ""


def _policies(summary: Mapping[str, Any], *, links: bool = True) -> str:
    """One row a policy with all that was measured of it, then what it is compared with."""
    accuracy, start = summary["accuracy"], summary["accuracy"]["start"]
    reached = dict(accuracy_rows(accuracy))
    measures = {entry["policy"]: entry for entry in summary["measures"]}
    number = max(len(summary["policies"]), len(accuracy["rounds"]), max(measures, default=0))
    names = {"start": None} | {f"round {index - 1}": index for index in range(1, number + 1)}
    rows = []
    for label in [*names, *(label for label in reached if label not in names)]:
        index = 0 if label == "start" else names.get(label)
        value, entry = reached.get(label), measures.get(-1 if index is None else index, {})
        if value is None and not entry and not index:
            continue
        kl = "-" * bool(entry) if entry.get("kl") is None else f"{entry['kl']:.3f} ± {entry['kl_error']:.3f}"
        policy = f"v{index:04d}" if index else ""
        link = f' (<a href="../policies/{policy}/">{policy}</a>)' if links and policy in summary["policies"] else ""
        rows.append(
            [
                f"after {label}{link}" if index else label,
                "" if value is None else f"{value:.1f} %",
                "" if value is None or start is None or label == "start" else f"{value - start:+.1f}",
                kl,
                _percent(entry.get("top1_agreement")),
                "" if entry.get("response_tokens") is None else f"{entry['response_tokens']:.1f}",
                _percent(entry.get("cut")),
            ]
        )
    header = ["policy", "accuracy", "points", "KL to teacher", "top-1 agreement", "response tokens", "cut by length"]
    note = (
        "KL in nats per token; agreement: tokens of the greedy responses that are the teacher's most likely ones too."
        if measures
        else ""
    )
    return _rows(header, rows) + f'<p class="note">{note}</p>' * bool(note) if rows else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of HTML cells below names, which are text; a list of cards where it is narrow.

    Columns without any cell are left out.
    """
    filled = [column for column in range(len(header)) if any(row[column] for row in rows)]
    names = {column: escape(header[column]) for column in filled}
    head = "".join(f"<th>{name}</th>" for name in names.values())
    lines = ("".join(f'<td data-label="{name}">{row[column]}</td>' for column, name in names.items()) for row in rows)
    return f'<table class="rows"><tr>{head}</tr>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _facts(items: Any) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in items)
    return f'<table class="facts">{rows}</table>' if rows else ""


def _figures(svgs: Mapping[str, str], *names: str) -> str:
    cards = (
        f'<figure class="card">{svgs[name]}<figcaption>{_CAPTIONS[name.partition("-")[0]]}</figcaption></figure>'
        for name in names
        if name in svgs
    )
    shown = "".join(cards)
    return f'<div class="figures">{shown}</div>' if shown else ""


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """A few held-out prompts with each policy's greedy response."""

    def text(value: str) -> str:
        value = value.strip()
        return escape(value[:_LONGEST] + (" …" if len(value) > _LONGEST else "")) or "(no text)"

    cards = []
    for sample in samples:
        answers = "".join(
            f"<dt>{'after round ' + str(response['policy'] - 1) if response['policy'] else 'before the run'}, "
            f"{response['tokens']} tokens{', cut by length' * response['cut']}</dt>"
            f'<dd class="text">{text(response["text"])}</dd>'
            for response in sample["responses"]
        )
        prompt = f'<h3>Prompt</h3><p class="text">{text(sample["prompt"])}</p>'
        cards.append(f'<div class="card">{prompt}<dl>{answers}</dl></div>')
    note = '<p class="note">Held-out prompts and the student\'s greedy responses.</p>'
    return note + f'<div class="samples">{"".join(cards)}</div>' if cards else ""


def _training(summary: Mapping[str, Any]) -> str:
    def number(value: float | None, form: str = ".4f") -> str:
        return "" if value is None else format(value, form)

    lags = {entry["round"]: entry for entry in summary["lag"]}
    parts = list(dict.fromkeys(name for entry in summary["training"] for name in entry["parts"]))
    rows = [
        [
            f"round {entry['round']}",
            "{} to {}".format(*entry["steps"]),
            *(number(entry["parts"].get(name)) for name in parts),
            *(number(lags.get(entry["round"], {}).get(name)) for name in ("mean", "highest", "end")),
            number(entry["tokens_per_second"], ".0f"),
        ]
        for entry in summary["training"]
    ]
    if not rows:
        return ""
    names = [{"ce": "CE", "kd": "KD"}.get(name, name.replace("_", " ")) for name in parts]
    header = ["round", "steps", *names, "lag mean", "lag highest", "lag at end", "tokens/s"]
    note = "Loss and its parts: means over the last tenth of a round's steps; lag: means over any tenth."
    return _rows(header, rows) + f'<p class="note">{note}</p>'


def _selection(rounds: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            f"round {entry['round']}",
            escape(entry["filter"]),
            str(entry["in"]),
            *(f"{entry['zones'][zone]['count']} ({100 * entry['zones'][zone]['share']:.1f} %)" for zone in ZONES),
            "-" if entry["tau"] is None else f"{entry['tau']:.4g}",
            f"{entry['kept']} ({100 * entry['kept_share']:.1f} %)",
        ]
        for entry in rounds
    ]
    return _rows(["round", "filter", "responses", *ZONES, "tau", "kept"], rows) if rows else ""


def _machine(summary: Mapping[str, Any]) -> str:
    """Total time, and what the newest call of the run was computed with."""
    facts = []
    if summary["seconds"]:
        facts.append(("time in all stages", duration(summary["total_seconds"])))
        facts.append(("of which distillation", duration(summary["distillation_seconds"])))
    if summary["busy"]:
        facts.append(("at work", busy_words(summary)))
    if summary["refreshes"]:
        facts.append(("refreshes", refresh_words(summary)))
    calls = summary["environment"]
    if calls:
        last = calls[-1]
        started = _day(calls[0]["started"]) + (f", in {len(calls)} calls" if len(calls) > 1 else "")
        cores = f"{last['machine']}, {last['cores']} cores, {last['memory_gb']:.0f} GB of memory"
        facts += [("started", started), ("machine", cores)]
        if "devices" in last:
            facts.append(("devices", ", ".join(last["devices"])))
        facts.append(("peak memory", f"{max(call['peak_gb'] for call in calls):.1f} GB, of the largest process"))
        if "peak_device_gb" in last:
            facts.append(("peak on the device", f"{last['peak_device_gb']:.1f} GB"))
        versions = [", ".join(f"{name} {version}" for name, version in call["versions"].items()) for call in calls]
        facts.append(("versions", "; then ".join(dict.fromkeys(versions))))
        if commits := dict.fromkeys(call["commit"] for call in calls if "commit" in call):
            facts.append(("commit", "; then ".join(commits)))
    return _facts(facts)
