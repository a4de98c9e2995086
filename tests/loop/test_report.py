"""The report, from synthetic run directories: what it shows, what it leaves out, what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_npd.log import UserError
from megatron_npd.loop.report import write_report
from megatron_npd.manifest import seal

PNG = b"\x89PNG\r\n\x1a\n"
STEPS = 40  # of each of two rounds


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
    config = {"teacher": "big <model>", "train": {"lr": 0.002, "kd_alpha": 0.9}, "select": {"filter": "delta_ifd"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_lines(tmp_path / "report" / "metrics.jsonl", metrics())
    accuracy = {"start": 6.25, "rounds": [55.0, 78.5], "further_sft": 7.0}
    (tmp_path / "report" / "accuracy.json").write_text(json.dumps(accuracy))
    stages = [("rollout", 0, 40.0), ("train", 0, 20.5), ("rollout", 1, 41.5), ("train", 1, 21.0), ("evaluate", 2, 3.0)]
    seconds = [{"stage": stage, "round": index, "seconds": value} for stage, index, value in stages]
    write_lines(tmp_path / "report" / "seconds.jsonl", seconds)
    make_selection(tmp_path, 0, kept=680)
    make_selection(tmp_path, 1, kept=460)
    return tmp_path


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "report" / "summary.json").read_text())


def test_summary_holds_what_was_measured(run: Path) -> None:
    write_report(run)
    summary = summary_of(run)
    assert summary["accuracy"] == {"start": 6.25, "further_sft": 7.0, "rounds": [55.0, 78.5]}
    assert [entry["kept_share"] for entry in summary["zones"]] == [0.68, 0.46]
    assert summary["zones"][1]["zones"]["proximal"] == {"count": 460, "share": 0.46}
    assert summary["seconds"] == {"rollout": 81.5, "train": 41.5, "evaluate": 3.0}
    assert [entry["round"] for entry in summary["lag"]] == [0, 1]
    assert summary["lag"][0]["mean"] == pytest.approx(0.002 * (STEPS + 1) / 2)
    assert summary["lag"][0]["end"] == pytest.approx(0.002 * (STEPS - 1.5))  # mean of the last 4 of 40 steps
    assert summary["lag"][1]["max"] == pytest.approx(0.002 * STEPS)
    assert summary["training"][1]["steps"] == [STEPS + 1, 2 * STEPS]
    assert summary["config"] == {
        "teacher": "big <model>",
        "select.filter": "delta_ifd",
        "train.kd_alpha": 0.9,
        "train.lr": 0.002,
    }
    assert summary["missing"] == []


def test_page_is_self_contained_and_begins_with_the_accuracies(run: Path) -> None:
    write_report(run)
    page = (run / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "src=" not in page.replace('src="data:image/png;base64,', "") and "<link" not in page
    assert page.index("<h2>Accuracy</h2>") < page.index("<h2>What was run</h2>")
    assert "78.5 %" in page and "+72.2" in page
    assert "big &lt;model&gt;" in page and "<model>" not in page
    for name in ("accuracy", "loss", "lag", "zones", "seconds"):
        image = (run / "report" / f"{name}.png").read_bytes()
        assert image.startswith(PNG) and len(image) > 5000


def test_text_table(run: Path) -> None:
    lines = write_report(run).splitlines()
    assert lines[0].startswith("accuracy")
    assert [line.split() for line in lines[1:5]] == [
        ["start", "6.2", "%"],
        ["further", "SFT", "7.0", "%"],
        ["after", "round", "0", "55.0", "%"],
        ["after", "round", "1", "78.5", "%"],
    ]
    assert ["1", "530", "460", "10", "0", "46.0", "%"] in [line.split() for line in lines]
    assert any(line.split() == ["rollout", "81.5"] for line in lines)


def test_parts_that_a_run_lacks_are_said_in_words(run: Path) -> None:
    write_report(run)
    (run / "report" / "accuracy.json").unlink()
    write_lines(run / "report" / "metrics.jsonl", metrics(lag=False))
    table = write_report(run)
    summary = summary_of(run)
    assert summary["accuracy"] == {"start": None, "further_sft": None, "rounds": []}
    assert summary["lag"] == []
    assert "No accuracy" in table and "No policy lag" in table
    page = (run / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "No policy lag" in page
    assert not (run / "report" / "accuracy.png").exists()  # the earlier report's figure is gone
    assert not (run / "report" / "lag.png").exists()


def test_empty_run(tmp_path: Path) -> None:
    table = write_report(tmp_path)
    assert len(table.splitlines()) == 4  # accuracy, losses, zones, times
    assert len(summary_of(tmp_path)["missing"]) == 4
    assert (tmp_path / "report" / "report.html").exists()


def test_unfinished_run(run: Path) -> None:
    """The second round is being selected, the start alone was evaluated, the trainer was killed while it wrote."""
    (run / "rounds" / "0001" / "selection" / "manifest.json").unlink()
    (run / "report" / "accuracy.json").write_text(json.dumps({"start": 6.25, "rounds": []}))
    with open(run / "report" / "metrics.jsonl", "a") as stream:
        stream.write('{"iteration": 81, "ro')
    table = write_report(run)
    summary = summary_of(run)
    assert [entry["round"] for entry in summary["zones"]] == [0]
    assert summary["training"][-1]["steps"] == [STEPS + 1, 2 * STEPS]
    assert "No student with further SFT" in table


@pytest.mark.parametrize("name", ["accuracy.json", "metrics.jsonl", "seconds.jsonl"])
def test_a_file_that_is_not_json_is_named(run: Path, name: str) -> None:
    (run / "report" / name).write_text("{not json\n")
    with pytest.raises(UserError, match=name):
        write_report(run)
