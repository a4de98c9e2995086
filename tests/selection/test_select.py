"""The selection stage: zones and reasons by sample, tau given, frozen or taken as a quantile, the tool."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_npd.config import SelectConfig
from megatron_npd.data.packing import pack_selection
from megatron_npd.log import UserError, get_logger
from megatron_npd.records import SELECTION_FILE, SELECTION_SCHEMA
from megatron_npd.selection.select import select_round
from tests.data.make_store import make_store
from tools import select as select_tool

STUDENT = 0.5  # IFD of the student of every sample
DELTAS = [-0.2, 0.0, 0.1, 0.3, 0.9, None]


def store_of(path: Path, deltas: list[float | None]) -> Path:
    columns = {
        "teacher_loss": [1.0 if delta is None else 2 * (delta + STUDENT) for delta in deltas],
        "teacher_loss_alone": [0.0 if delta is None else 2.0 for delta in deltas],
        "student_loss": [STUDENT * 3] * len(deltas),
        "student_loss_alone": [3.0] * len(deltas),
    }
    return make_store(path, [(3, 4)] * len(deltas), columns=columns)


def warnings_of(caplog: pytest.LogCaptureFixture, store: Path, out: Path, cfg: SelectConfig) -> list[str]:
    get_logger().addHandler(caplog.handler)
    try:
        select_round(store, out, cfg)
    finally:
        get_logger().removeHandler(caplog.handler)
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_every_sample_has_its_zone_and_every_dropped_one_its_reason(tmp_path: Path) -> None:
    manifest = select_round(store_of(tmp_path / "a", DELTAS), tmp_path / "s", SelectConfig(tau=0.3001))

    table = pq.read_table(tmp_path / "s" / SELECTION_FILE)
    assert table.schema.equals(SELECTION_SCHEMA)
    columns = table.to_pydict()
    assert columns["zone"] == ["degenerate", "proximal", "proximal", "proximal", "disconnect", "undefined"]
    assert columns["reason"] == ["degenerate", "", "", "", "cognitive_disconnect", "ifd_undefined"]
    assert columns["kept"] == [reason == "" for reason in columns["reason"]]
    np.testing.assert_allclose(columns["delta"][:5], DELTAS[:5], atol=1e-6)
    np.testing.assert_allclose(columns["ifd_student"], [0.5] * 6)
    assert columns["ifd_teacher"][5] is None and columns["delta"][5] is None
    counts = manifest.counts
    assert counts["in"] == 6 == counts["kept"] + sum(counts["quarantined"].values()) + counts["pending"]
    assert counts["quarantined"] == {"degenerate": 1, "cognitive_disconnect": 1, "ifd_undefined": 1}
    assert counts["kept_share"] == 0.5 and counts["tau"] == 0.3001
    assert {zone: row["count"] for zone, row in counts["zones"].items()} == {
        "degenerate": 1,
        "proximal": 3,
        "disconnect": 1,
        "undefined": 1,
    }
    assert sum(counts["histogram"]["counts"]) == 5


def test_no_filter_keeps_all_that_is_defined(tmp_path: Path) -> None:
    manifest = select_round(store_of(tmp_path / "a", DELTAS), tmp_path / "s", SelectConfig(filter="none", tau=0.3))
    assert manifest.counts["kept"] == 5 and manifest.counts["quarantined"] == {"ifd_undefined": 1}
    assert manifest.counts["zones"]["degenerate"]["count"] == 1  # the zones are told all the same


def test_tau_is_a_quantile_of_the_first_round_and_then_frozen(tmp_path: Path) -> None:
    deltas: list[float | None] = [float(value) for value in np.linspace(0.0, 1.0, 201)]
    first = select_round(store_of(tmp_path / "a0", [*deltas, None]), tmp_path / "s0", SelectConfig(tau_quantile=0.9))
    assert first.counts["tau"] == pytest.approx(0.9, abs=1e-6)
    assert first.provenance["tau"] is None and first.provenance["tau_quantile"] == 0.9

    wider: list[float | None] = [2 * delta for delta in deltas if delta is not None]
    later = select_round(
        store_of(tmp_path / "a1", wider), tmp_path / "s1", SelectConfig(tau_quantile=0.9), tau=first.counts["tau"]
    )
    assert later.counts["tau"] == first.counts["tau"]
    assert later.counts["zones"]["disconnect"]["count"] == 110  # 2 d > 0.9


def test_the_whole_quantile_keeps_the_largest(tmp_path: Path) -> None:
    manifest = select_round(store_of(tmp_path / "a", [0.0, 0.1, 0.7]), tmp_path / "s", SelectConfig(tau_quantile=1.0))
    assert manifest.counts["kept"] == 3


def test_the_lower_bound_is_a_parameter(tmp_path: Path) -> None:
    manifest = select_round(store_of(tmp_path / "a", DELTAS), tmp_path / "s", SelectConfig(lower=-0.25, tau=1.0))
    assert manifest.counts["kept"] == 5


def test_a_warning_below_ninety_percent_and_none_above(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good: list[float | None] = [0.1] * 9
    cfg = SelectConfig(tau=1.0)
    assert warnings_of(caplog, store_of(tmp_path / "a", [*good, -0.1]), tmp_path / "s", cfg) == []
    (warning,) = warnings_of(caplog, store_of(tmp_path / "b", [*good, -0.1, None]), tmp_path / "t", cfg)
    assert "81.8 %" in warning and "1 degenerate" in warning and "1 ifd_undefined" in warning


def test_no_defined_delta_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="defined IFD"):
        select_round(store_of(tmp_path / "a", [None, None]), tmp_path / "s", SelectConfig())


def test_a_second_call_changes_nothing_and_another_filter_is_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a", DELTAS)
    first = select_round(store, tmp_path / "s", SelectConfig())
    assert select_round(store, tmp_path / "s", SelectConfig()) == first
    with pytest.raises(UserError, match="filter"):
        select_round(store, tmp_path / "s", SelectConfig(filter="none"))


def test_the_selection_packs(tmp_path: Path) -> None:
    from megatron_npd.config import PackConfig

    store = store_of(tmp_path / "a", DELTAS)
    select_round(store, tmp_path / "s", SelectConfig(tau=0.5))
    manifest = pack_selection(store, tmp_path / "s", tmp_path / "p", PackConfig(seq_length=64, segment_align=16))
    assert manifest.counts["kept"] == 3


def test_the_tool_prints_the_zones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = store_of(tmp_path / "a", DELTAS)
    select_tool.main(["--annotations", str(store), "--out", str(tmp_path / "s"), "--tau", "0.5"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["proximal", "3", "50.00", "%"] in lines and ["kept", "3", "50.00", "%"] in lines
    assert ["dropped", "as", "cognitive_disconnect:", "1"] in lines


def test_scripts_beside_the_tool_still_find_the_standard_select() -> None:
    import subprocess
    import sys

    tools = Path(select_tool.__file__).parent
    code = f"import sys; sys.path.insert(0, {str(tools)!r}); import select, subprocess; select.poll()"
    subprocess.run([sys.executable, "-c", code], check=True)
