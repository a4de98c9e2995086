"""Paths and flags that a command cannot use are refused before torch or megatron-core is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_npd.errors import UserError
from megatron_npd.paths import check_out_dir, check_sealed

ROOT = Path(__file__).resolve().parents[1]
# Runs a script to its end and says which of the slow packages were imported by then.
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print([name for name in ("torch", "transformers", "megatron.core") if name in sys.modules])
"""
MODEL = ("--hf-model", "model")
CONVERT = ("tools/convert_checkpoint.py", "--direction=megatron-to-hf", "--hf-model=model", "--out=out")
ANNOTATE = ("tools/annotate.py", "--rollouts=sealed", "--out=out", "--teacher=model", "--student=model")


@pytest.mark.parametrize(
    ("argv", "words", "imported"),
    [
        (("tools/annotate.py", "--help"), "", []),
        (("pretrain_npd.py", "--hf-model", "nowhere"), "hf_model must be a Hugging Face model directory", []),
        (("pretrain_npd.py", *MODEL, "--data-path", "model"), "data_path must be a sealed directory of packs", []),
        (("pretrain_npd.py", *MODEL, "--data-path", "sealed", "--load", "out"), "load must hold a checkpoint", []),
        (("pretrain_npd.py", *MODEL, "--data-path=sealed", "--kd-temperature=2"), "temperature must be 1", ["torch"]),
        (
            ("pretrain_npd.py", *MODEL, "--data-path=sealed", "--tensor-model-parallel-size=2"),
            "number of processes must be a multiple",
            ["torch"],
        ),
        ((*CONVERT, "--checkpoint=model"), "checkpoint must be a sealed directory, got 'model' without", []),
        ((*CONVERT, "--checkpoint=sealed", "--hf-model=out"), "hf_model must be a Hugging Face model directory", []),
        ((*ANNOTATE, "--rollouts=model"), "rollouts must be a sealed directory, got 'model'", []),
        ((*ANNOTATE, "--student=out"), "student must be a Hugging Face model directory, got 'out'", []),
        ((*ANNOTATE, "--out=model/config.json/out"), "out must be a directory, got 'model/config.json/out', where", []),
        ((*ANNOTATE, "--pipeline-model-parallel-size=2"), "number of processes must be a multiple", ["torch"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_work_is_refused_first(
    tmp_path: Path, argv: tuple[str, ...], words: str, imported: list[str]
) -> None:
    for name in ("model/config.json", "sealed/manifest.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}")
    script, *flags = argv
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(ROOT / script), *flags],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (2 if words else 0), done.stderr
    assert f"error: {words}" in done.stderr or not words
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == str(imported)


def test_a_directory_that_is_to_be_made_needs_room(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_out_dir("out", str(tmp_path / "new" / "deeper"))
    with pytest.raises(UserError, match=r"where .*/file is a file"):
        check_out_dir("out", str(tmp_path / "file" / "deeper"))
    with pytest.raises(UserError, match="must be a sealed directory"):
        check_sealed("packs", str(tmp_path))
