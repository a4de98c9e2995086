"""Saving on several ranks: what goes wrong on one of them ends all, and what a kill leaves is never taken for whole."""

from __future__ import annotations

import random
import shutil
import signal
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_npd.config.training import TrainConfig
from megatron_npd.manifest import is_sealed, seal, writing
from megatron_npd.training.metrics import is_time
from megatron_npd.training.trainer import train
from tests.dist import run_distributed
from tests.helpers import logged
from tests.training.make_run import config, make_packs, read_metrics

STEPS, RANKS = 3, 2


@dataclass(frozen=True)
class Kill:
    """Which ranks die, in the saving after which step, after how many seconds of it, and whether training goes on."""

    ranks: tuple[int, ...]
    step: int
    seconds: float
    in_background: bool


def _train(rank: int, world: int, cfg: TrainConfig, kill: Kill | None) -> list[float]:
    """Train on this rank and save after each step; the seconds that each saving took."""
    from megatron_npd.training import saving

    save, finish, took = saving.Saver.save, saving.Saver.finish, list[float]()

    def timed(self: Any, step: Any, state: Any) -> None:
        finish(self)
        took.append(time.monotonic())
        if kill is not None and rank in kill.ranks and state["iteration"] == kill.step:
            signal.setitimer(signal.ITIMER_REAL, kill.seconds)  # its signal ends a process as SIGKILL does
        save(self, step, state)

    def finished(self: Any) -> None:
        open_one = self._saving is not None
        finish(self)
        if open_one:
            took.append(time.monotonic() - took.pop())

    saving.Saver.save, saving.Saver.finish = timed, finished  # pyright: ignore[reportAttributeAccessIssue]
    train(cfg)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return took


class Killed:
    """A run of two ranks that nothing disturbed, and others that are killed while they save.

    Args:
        model: Directory of the model.
        root: Where all of it lies.
    """

    def __init__(self, model: Path, root: Path) -> None:
        self.model, self.packs, self.root = model, make_packs(root / "packs", samples=20), root
        self.seconds = max(run_distributed(_train, RANKS, self._config("whole"), None)[0][1:])

    def _config(self, name: str, async_save: bool = False) -> TrainConfig:
        more = {"train_iters": STEPS, "save_interval": 1, "lr_warmup_iters": 0, "async_save": async_save}
        return config(self.model, self.packs, self.root / name, **more)

    def draw(self, seed: int) -> Kill:
        """A kill of one rank or both, in the saving of the second or third checkpoint."""
        rng = random.Random(seed)
        return Kill(
            rng.choice([(0,), (1,), (0, 1)]), rng.choice([2, 3]), rng.uniform(1e-4, 1.1 * self.seconds), bool(seed % 2)
        )

    def run(self, kill: Kill) -> bool:
        """Whether the kill came in time; raises AssertionError where it leaves a part that passes for a checkpoint,
        loses an earlier one, or the run does not end as the whole one."""
        shutil.rmtree(self.root / "killed", ignore_errors=True)
        try:
            run_distributed(_train, RANKS, self._config("killed", kill.in_background), kill)
        except AssertionError as error:
            assert f"-{signal.SIGALRM:d}" in str(error).splitlines()[0], error
            died = True
        else:
            died = False
        sealed = [path for path in sorted((self.root / "killed").glob("iter_*")) if is_sealed(path)]
        assert len(sealed) >= kill.step - 1, f"{kill}: {sealed}"
        for path in sealed:
            self._alike(path)
        run_distributed(_train, RANKS, self._config("killed", kill.in_background), None)
        for path in (self.root / "whole").glob("iter_*"):
            self._alike(self.root / "killed" / path.name)
        assert self._metrics("killed") == self._metrics("whole")
        return died

    def _alike(self, path: Path) -> None:
        found, expected = (
            {file.name: file.read_bytes() for file in (self.root / run / path.name).glob("*.distcp")}
            for run in ("killed", "whole")
        )
        assert found == expected and expected, path

    def _metrics(self, name: str) -> list[dict[str, Any]]:
        lines = read_metrics(self.root / name / "metrics.jsonl")
        return [{key: value for key, value in line.items() if not is_time(key)} for line in lines]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Killed:
    return Killed(tiny_model_dir, tmp_path_factory.mktemp("killed"))


@pytest.mark.parametrize("seed", range(5))
def test_ranks_that_die_while_they_save_go_on_bit_by_bit(killed: Killed, seed: int) -> None:
    killed.run(killed.draw(seed))


def _save_beside_a_damaged_one(rank: int, world: int, root: Path) -> list[str]:
    from megatron_npd.platform.initialize import initialize_distributed
    from megatron_npd.training import saving

    initialize_distributed()
    done = types.SimpleNamespace(finish=lambda: root / "iter_0000002")
    saving.Saving = lambda *_, **__: done  # pyright: ignore
    saver = saving.Saver(config(root, root, root), stop=9)
    step: Any = types.SimpleNamespace(chunks=[], optimizer=None, scheduler=None, gather_parameters=lambda: None)
    with logged() as said:
        saver.save(step, {"iteration": 2})
    return said


def test_an_earlier_checkpoint_that_is_damaged_is_named_and_kept(tmp_path: Path) -> None:
    """It is not for that one to end the run at each of its savings."""
    with writing(tmp_path / "iter_0000001") as directory:
        (directory / "state.json").write_text("{}")
        seal(directory, kind="checkpoint")
    (tmp_path / "iter_0000001/state.json").write_text("[]")
    first, second = run_distributed(_save_beside_a_damaged_one, 2, tmp_path)
    assert len(first) == 1 and "iter_0000001/state.json must have" in first[0] and not second
    assert (tmp_path / "iter_0000001").is_dir()
