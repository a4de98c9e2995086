"""The selection stage: zones and reasons by sample, tau given, frozen or taken as a quantile, the tool."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_npd.audit.sample import _decision
from megatron_npd.cli import select as select_tool
from megatron_npd.config.settings import SelectConfig
from megatron_npd.data.packing import pack_selection
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.manifest import is_sealed, seal, writing
from megatron_npd.records import PROMPT_SCHEMA, PROMPTS_FILE, SELECTION_FILE, SELECTION_SCHEMA
from megatron_npd.selection.select import frozen_taus, select_round
from tests.store.make_store import make_store

STUDENT = 0.5  # IFD of the student of every sample
DELTAS = [-0.2, 0.0, 0.1, 0.3, 0.9, None]


def store_of(path: Path, deltas: list[float | None]) -> Path:
    columns = {
        "teacher_loss": [1.0 if delta is None else 2 * (delta + STUDENT) for delta in deltas],
        "teacher_loss_unconditional": [0.0 if delta is None else 2.0 for delta in deltas],
        "student_loss": [STUDENT * 3] * len(deltas),
        "student_loss_unconditional": [3.0] * len(deltas),
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
    assert set(table["source"].to_pylist()) == {"student"} and set(table["policy_version"].to_pylist()) == {"v0000"}
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


def test_no_filter_keeps_all(tmp_path: Path) -> None:
    manifest = select_round(store_of(tmp_path / "a", DELTAS), tmp_path / "s", SelectConfig(filter="none", tau=0.3))
    assert manifest.counts["kept"] == 6 and manifest.counts["quarantined"] == {}
    assert manifest.counts["zones"]["degenerate"]["count"] == 1  # the zones are told all the same
    assert manifest.counts["zones"]["undefined"]["count"] == 1


def test_what_was_scored_with_prompts_alone_trains_without_a_filter(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a", [None] * 4)
    manifest = select_round(store, tmp_path / "s", SelectConfig(filter="none"))
    assert manifest.counts["kept"] == 4 and manifest.counts["tau"] is None
    assert frozen_taus(tmp_path / "s") is None
    sample = pq.read_table(tmp_path / "s" / SELECTION_FILE)["sample_id"][0].as_py()
    assert _decision(tmp_path / "s", sample).endswith("delta undefined; zone undefined: kept")
    again = select_round(store, tmp_path / "s2", SelectConfig(filter="none"), frozen_taus(tmp_path / "s"))
    assert again.counts == manifest.counts
    with pytest.raises(
        UserError, match="must hold a sample with a defined IFD, got none of 4; annotate it with uncond"
    ):
        select_round(store, tmp_path / "s3", SelectConfig(filter="perplexity"))


def test_tau_is_a_quantile_of_the_first_round_and_then_frozen(tmp_path: Path) -> None:
    deltas: list[float | None] = [float(value) for value in np.linspace(0.0, 1.0, 201)]
    first = select_round(store_of(tmp_path / "a0", [*deltas, None]), tmp_path / "s0", SelectConfig(tau_quantile=0.9))
    assert first.counts["tau"] == pytest.approx(0.9, abs=1e-6)
    assert first.provenance["taus"] is None and first.provenance["tau_quantile"] == 0.9

    wider: list[float | None] = [2 * delta for delta in deltas if delta is not None]
    later = select_round(
        store_of(tmp_path / "a1", wider), tmp_path / "s1", SelectConfig(tau_quantile=0.9), first.counts["taus"]
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
    assert "81.8 %" in warning and "1 degenerate, 9 proximal, 0 disconnect, 1 undefined" in warning


@pytest.mark.parametrize(
    ("cfg", "cut", "advice"),
    [
        (SelectConfig(tau=1.0), False, "most of the dropped are below the lower bound 0"),
        (SelectConfig(tau=-0.3, lower=-1.0), False, r"most of the dropped are above tau -0.3: consider a larger tau"),
        (SelectConfig(tau=1.0, lower=-1.0, cut_by_length="drop"), True, "most of the dropped were cut by length"),
    ],
)
def test_few_or_none_kept_name_the_bound_that_drops_them_and_nothing_is_not_sealed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cfg: SelectConfig, cut: bool, advice: str
) -> None:
    columns: dict[str, list[Any]] = {
        "teacher_loss": [0.6] * 8,
        "teacher_loss_unconditional": [2.0] * 8,
        "student_loss": [1.0] * 8,
    }
    columns |= {"student_loss_unconditional": [2.0] * 8, "finish_reason": ["length" if cut else "stop"] * 8}
    store = make_store(tmp_path / "a", [(3, 4)] * 8, columns=columns)  # delta -0.2
    with pytest.raises(UserError, match=rf"must leave a sample that trains, got none of 8 .*: {advice}"):
        select_round(store, tmp_path / "s", cfg)
    assert not is_sealed(tmp_path / "s")
    manifest = select_round(store, tmp_path / "s", SelectConfig(tau=1.0, lower=-1.0))
    assert manifest.counts["kept"] == 8
    columns["teacher_loss"][0], columns["finish_reason"][0] = (0.1 if cfg.tau == -0.3 else 1.0), "stop"
    mended = make_store(tmp_path / "b", [(3, 4)] * 8, columns=columns)
    (warning,) = warnings_of(caplog, mended, tmp_path / "t", cfg)
    assert "only 12.5 %" in warning and re.search(advice, warning)


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
    from megatron_npd.config.settings import PackConfig

    store = store_of(tmp_path / "a", DELTAS)
    select_round(store, tmp_path / "s", SelectConfig(tau=0.5))
    manifest = pack_selection(store, tmp_path / "s", tmp_path / "p", PackConfig(seq_length=64, segment_align=16))
    assert manifest.counts["kept"] == 3


def test_the_bounds_of_one_models_ifd(tmp_path: Path) -> None:
    """IFD of the teacher is delta + 0.5, of the student 0.5 throughout."""
    store = store_of(tmp_path / "a", DELTAS)
    teacher = select_round(store, tmp_path / "t", SelectConfig(filter="teacher_ifd", lower=0.45, tau=0.7))
    assert teacher.counts["kept"] == 2 and teacher.counts["measure"] == "ifd_teacher"
    student = select_round(store, tmp_path / "s", SelectConfig(filter="student_ifd", tau=0.5))
    assert student.counts["kept"] == 6 and student.counts["quarantined"] == {}


def test_perplexity_weighs_by_what_the_teacher_thinks(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a", [0.0, 0.5, None])
    manifest = select_round(store, tmp_path / "s", SelectConfig(filter="perplexity"))
    weights = pq.read_table(tmp_path / "s" / SELECTION_FILE)["weight"].to_numpy()
    assert manifest.counts["kept"] == 2 and weights[2] == 0
    np.testing.assert_allclose(weights[0] / weights[1], np.exp(1.0), rtol=1e-5)  # losses 1 and 2 nats
    np.testing.assert_allclose(weights[:2].sum(), 2.0, rtol=1e-6)


def test_answers_of_one_prompt_share_its_weight(tmp_path: Path) -> None:
    columns = {"prompt_id": ["p", "p", "q"], "path": [0, 1, 0]}
    store = make_store(tmp_path / "a", [(3, 4)] * 3, columns=columns)
    select_round(store, tmp_path / "s", SelectConfig(tau=1.0, prompt_weights=True))
    weights = pq.read_table(tmp_path / "s" / SELECTION_FILE)["weight"].to_pylist()
    assert weights == pytest.approx([0.75, 0.75, 1.5])


@pytest.mark.parametrize("choice", ["keep", "drop"])
def test_answers_cut_by_length_are_flagged_and_kept_or_dropped(tmp_path: Path, choice: Literal["keep", "drop"]) -> None:
    columns = {"finish_reason": ["stop", "length", "length"], "teacher_loss": [0.5, 0.5, 9.0]}
    store = make_store(tmp_path / "a", [(3, 4)] * 3, columns=columns)
    manifest = select_round(store, tmp_path / "s", SelectConfig(tau=1.0, cut_by_length=choice))
    table = pq.read_table(tmp_path / "s" / SELECTION_FILE).to_pydict()
    assert table["cut"] == [False, True, True] and manifest.counts["cut"] == 2
    dropped = choice == "drop"
    assert table["reason"] == ["", "cut_by_length" if dropped else "", "cognitive_disconnect"]
    assert manifest.counts["kept"] + sum(manifest.counts["quarantined"].values()) == 3
    assert table["kept"] == [True, not dropped, False]


def prompts_of(path: Path, extras: list[str]) -> Path:
    rows = [
        {"prompt_id": f"p{i:06d}", "prompt_ids": [1], "generation_prompt_len": 1, "extras": extra}
        for i, extra in enumerate(extras)
    ]
    with writing(path):
        pq.write_table(pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA), path / PROMPTS_FILE)
        seal(path, kind="prompts")
    return path


def test_each_domain_has_its_tau(tmp_path: Path) -> None:
    deltas: list[float | None] = [0.1, 0.2, 0.3, 1.1, 1.2, 1.3]
    prompts = prompts_of(tmp_path / "p", ['{"domain": "code"}'] * 3 + ['{"domain": "prose"}'] * 3)
    cfg = SelectConfig(domain_column="domain", tau_quantile=0.5)
    store = store_of(tmp_path / "a", deltas)
    manifest = select_round(store, tmp_path / "s", cfg, prompts_dir=prompts)
    assert manifest.counts["taus"] == pytest.approx({"": 0.7, "code": 0.2, "prose": 1.2}, abs=1e-6)
    table = pq.read_table(tmp_path / "s" / SELECTION_FILE).to_pydict()
    assert table["kept"] == [True, True, False, True, True, False]

    taus = frozen_taus(tmp_path / "s") or {}
    del taus["prose"]  # a domain that the first round did not have takes the tau of all
    later = select_round(store, tmp_path / "s1", cfg, taus, prompts_dir=prompts)
    assert pq.read_table(tmp_path / "s1" / SELECTION_FILE)["kept"].to_pylist() == [True, True, False] + [False] * 3
    assert later.counts["taus"] == taus

    with pytest.raises(UserError, match="prompts must be given"):
        select_round(store, tmp_path / "x", cfg)
    bare = prompts_of(tmp_path / "b", ["{}"] * 6)
    with pytest.raises(UserError, match=r"column domain of prompt p000000 .* must be a text, got None"):
        select_round(store, tmp_path / "x", cfg, prompts_dir=bare)


def test_a_dry_run_tells_several_taus_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = store_of(tmp_path / "a", DELTAS)
    before = sorted(tmp_path.rglob("*"))
    select_tool.main(["--annotations", str(store), "--dry-run", "--taus", "0.05,0.5"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [
        ["0.05", "1", "1", "3", "1", "1", "16.67", "%", "4"],
        ["0.5", "1", "3", "1", "1", "3", "50.00", "%", "12"],
    ]
    select_tool.main(["--annotations", str(store), "--dry-run"])
    assert len(capsys.readouterr().out.splitlines()) == 7
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="out must be a directory"):
        select_tool.main(["--annotations", str(store)])


def test_the_tool_prints_the_zones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = store_of(tmp_path / "a", DELTAS)
    select_tool.main(["--annotations", str(store), "--out", str(tmp_path / "s"), "--tau", "0.5"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["proximal", "3", "50.00", "%"] in lines and ["kept", "3", "50.00", "%"] in lines
    assert ["dropped", "as", "cognitive_disconnect:", "1"] in lines
