"""A wheel, installed into an environment of its own, runs the whole loop outside the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import megatron_npd
from megatron_npd.__main__ import COMMANDS
from megatron_npd.manifest import is_sealed
from megatron_npd.serving.pool import ServerPool
from megatron_npd.serving.refresh import refresh
from tests.helpers import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]


class Installed:
    """The environment into which the wheel was installed, and a directory that is not the repository."""

    def __init__(self, root: Path) -> None:
        self.bin, self.elsewhere = root / "venv" / "bin", root / "elsewhere"
        self.elsewhere.mkdir()

    def __call__(self, *command: str) -> str:
        """A program of the environment, run elsewhere with nothing of the repository on its path."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["PATH"] = f"{self.bin}:{environment['PATH']}"
        done = subprocess.run(
            [self.bin / command[0], *command[1:]],
            cwd=self.elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"  # setuptools writes beside what it builds
    shutil.copytree(ROOT / "megatron_npd", source / "megatron_npd", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", root, source], check=True)
    venv.create(root / "venv", with_pip=False)
    here = Installed(root)
    (wheel,) = root.glob("*.whl")
    subprocess.run([*pip, "--python", here.bin / "python", "install", *offline, wheel], check=True)
    # The dependencies: a directory named in a .pth file is searched, but its own .pth files, such as that of an
    # editable install, are not read.
    (site,) = (root / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return here


def test_what_is_imported_is_the_wheel(installed: Installed) -> None:
    code = "import megatron_npd as m, importlib.metadata as d; print(m.__file__, d.version('megatron-npd'))"
    file, version = installed("python", "-c", code).split()
    assert Path(file).is_relative_to(installed.bin.parent) and version == megatron_npd.__version__
    assert (Path(file).parent / "py.typed").exists()


def test_every_command_explains_itself(installed: Installed) -> None:
    assert all(f"  {name} " in installed("npd", "--help") for name in COMMANDS)
    for name in COMMANDS:
        assert installed("npd", name, "--help").startswith("usage: npd")


@pytest.mark.server
def test_the_whole_loop(
    installed: Installed, tmp_path: Path, tiny_model_dir: Path, served_pool: ServerPool, token_file: Path
) -> None:
    make_tiny_model(tmp_path / "teacher", seed=1, num_hidden_layers=3)
    problems = [{"prompt": f"Tom has {n} apples and buys 7 more. How many?"} for n in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in problems))
    flags = {
        "run-dir": "run",  # below the directory in which the command is called
        "teacher": tmp_path / "teacher",
        "student": tiny_model_dir,
        "prompts": tmp_path / "prompts.jsonl",
        "eval.held-out": 0,
        "rollout.urls": ",".join(served_pool.urls),
        "rollout.token-file": token_file,
        "rollout.max-tokens": 12,
        "rollout.max-model-len": 128,
        "annotate.seq-length": 256,
        "annotate.top-k": 4,
        "select.filter": "none",
        "pack.seq-length": 256,
        "train.train-iters": 2,
        "train.global-batch-size": 2,
        "platform": "cpu",
    }
    try:
        installed("npd", "run", *(f"--{name}={value}" for name, value in flags.items()))
    finally:
        refresh(served_pool, tiny_model_dir, "v0000")  # as other tests expect to find it
    run = installed.elsewhere / "run"
    assert is_sealed(run / "policies" / "v0002") and (run / "report" / "report.html").exists()
    assert "rounds/0001/packs" in installed("npd", "verify", "run")
