"""One sample as text, and tools whose names the standard library has too."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_npd.audit.sample import describe_sample
from megatron_npd.errors import UserError
from megatron_npd.records import PACKS_FILE, ROLLOUTS_FILE, SELECTION_FILE
from megatron_npd.store.annotation_store import AnnotationStore
from tests.audit.test_verify import here, whole  # noqa: F401  (a fixture)

ROOT = Path(__file__).resolve().parents[2]


def rollouts(run: Path) -> list[dict]:
    files = sorted(here(run).glob("rollouts/shard-*/" + ROLLOUTS_FILE))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_a_life_holds_what_the_files_hold(whole: Path) -> None:  # noqa: F811
    selection = {row["sample_id"]: row for row in pq.read_table(here(whole) / "selection" / SELECTION_FILE).to_pylist()}
    store = AnnotationStore(here(whole) / "annotations")
    ids = store.metadata("sample_id")["sample_id"].to_pylist()
    with pa.memory_map(str(here(whole) / "packs" / PACKS_FILE)) as source:
        packs = {ids[row["sample_index"]]: row for row in pa.ipc.open_file(source).read_all().to_pylist()}
    for index, row in enumerate(rollouts(whole)):
        if index % 5:
            continue
        sample = row["sample_id"]
        text = describe_sample(whole, sample, decode=lambda ids: "".join(chr(65 + i % 26) for i in ids))
        assert f"sample {sample}: prompt {row['prompt_id']}, path {row['path']}, round 0" in text
        assert f", seed {row['seed']}\n" in text
        assert f"ids {' '.join(map(str, row['prompt_ids']))}\n" in text
        assert f"zone {selection[sample]['zone']}" in text
        assert ("kept" if selection[sample]["kept"] else f"dropped as {selection[sample]['reason']}") in text
        if sample in packs:
            assert f"packs: row {packs[sample]['row']}, tokens {packs[sample]['offset']} to" in text
        else:
            assert "packs: in no row" in text
        lines = text.splitlines()[-len(row["response_ids"]) :]
        for t, (line, record) in enumerate(zip(lines, store.teacher(index), strict=True)):
            assert line.split()[:2] == [str(t), f"{row['logprobs'][t]:.3f}"]
            chosen = row["response_ids"][t]
            assert f" {chosen} '{chr(65 + chosen % 26)}'; " in line
            for token, value in zip(record["ids"], record["logprobs"], strict=True):
                star = "*" if token == chosen else ""
                assert f"{star}{token} '{chr(65 + token % 26)}' {value:.3f}" in line
            assert line.endswith(f"; {record['log_tail']:.3f}")


def test_a_life_so_far_and_damage(whole: Path, tmp_path: Path) -> None:  # noqa: F811
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    sample = rollouts(run)[20]["sample_id"]
    for stage, words in (
        ("packs", "not packed yet"),
        ("selection", "not selected yet"),
        ("annotations", "not annotated yet"),
    ):
        shutil.rmtree(here(run) / stage)
        assert words in describe_sample(run, sample)
    with pytest.raises(
        UserError, match=f"must be the id of a sample of .*, got nobody; it has {rollouts(run)[0]['sample_id']}"
    ):
        describe_sample(run, "nobody")
    file = here(run) / "rollouts/shard-00000" / ROLLOUTS_FILE
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="must have sha256"):
        describe_sample(run, sample)


def test_a_quarantined_sample_has_its_reason(whole: Path, tmp_path: Path) -> None:  # noqa: F811
    from megatron_npd.manifest import MANIFEST, read_manifest, seal

    run = Path(shutil.copytree(whole, tmp_path / "run"))
    shard = here(run) / "rollouts/shard-00000"
    (shard / "quarantine.jsonl").write_text(json.dumps({"sample_id": "lost", "reason": "timeout", "detail": "5 s"}))
    manifest = read_manifest(shard, verify=False)
    (shard / MANIFEST).unlink()
    seal(shard, kind=manifest.kind, provenance=manifest.provenance, counts=manifest.counts)
    assert describe_sample(run, "lost") == "sample lost: quarantined by the rollout stage (timeout: 5 s)\n"


def test_no_tool_has_the_name_of_a_standard_module() -> None:
    """Python puts a script's directory first on its path, also while the standard library imports from itself."""
    assert not {path.stem for path in (ROOT / "tools").glob("*.py")} & sys.stdlib_module_names


@pytest.mark.parametrize("folder", [".", "tools"])
def test_tools_do_not_hide_the_standard_library(whole: Path, folder: str) -> None:  # noqa: F811
    """Python puts a script's directory first on its path: none may have the name of a module."""
    program = "import dataclasses, inspect, select, subprocess; assert inspect.signature and select.epoll"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT / folder, check=True)
    sample = rollouts(whole)[0]["sample_id"]
    command = [sys.executable, str(ROOT / "tools" / "show_sample.py"), str(whole), "--sample", sample]
    result = subprocess.run(command, cwd=ROOT / folder, check=True, capture_output=True, text=True)
    assert result.stdout == describe_sample(whole, sample)
