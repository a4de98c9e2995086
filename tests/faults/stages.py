"""Stages that are killed, torn or run out of disk, anywhere: what is left is refused, and running again mends it."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_npd.audit.verify import verify_run
from megatron_npd.manifest import MANIFEST
from tests.faults.world import OUTPUTS, STAGES, content, make_inputs
from tests.faults.zygote import Outcome, Zygote
from tests.serving.fake import FakeServer


class Bench:
    """A whole run that nothing disturbed, and the means to disturb others; a context manager."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="npd-faults-"))
        (self.root / "inputs").mkdir()
        self.server = FakeServer()
        self.inputs = make_inputs(self.root / "inputs")
        self.zygotes = [Zygote(self.inputs, self.server.url) for _ in range(2)]  # the other one: for two writers
        self.zygote = self.zygotes[0]
        self.whole = self.root / "whole"
        self.whole.mkdir()
        self.events: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        for stage in STAGES:
            self.zygote.run(stage, self.whole)  # warm: imports that a stage makes late
            _remove(self.whole / OUTPUTS[stage])
            outcome = self.zygote.run(stage, self.whole)
            assert outcome.code == 0, f"{stage}: {outcome.text}"
            self.events[stage], self.seconds[stage] = outcome.events, outcome.seconds
        assert not verify_run(self.whole, full=True).problems

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        for zygote in self.zygotes:
            zygote.__exit__()
        self.server.__exit__(None, None, None)
        shutil.rmtree(self.root)

    def before(self, stage: str) -> Path:
        """A fresh run in which all stages before ``stage`` are done."""
        run = self.root / f"before-{stage}"
        _remove(run)
        run.mkdir()
        for earlier in list(STAGES)[: list(STAGES).index(stage)]:
            target = run / OUTPUTS[earlier]
            target.parent.mkdir(parents=True, exist_ok=True)
            source = self.whole / OUTPUTS[earlier]
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        return run

    def disturb(
        self, stage: str, points: Iterable[tuple[str, int, float]], *, kills: int = 0
    ) -> tuple[Counter[str], list[str]]:
        """Disturb a stage once for each point (mode, event, seconds until a kill) and run it again.

        Args:
            stage: Name of the stage.
            points: Where; nothing is asked of them once ``kills`` processes were killed, where that is not 0.
            kills: Number of kills.

        Returns:
            How the disturbed processes ended; and every broken promise in words.
        """
        run = self.before(stage)
        out, ends, broken = run / OUTPUTS[stage], Counter[str](), []
        for mode, at, kill_after in points:
            where = f"{stage}, {mode} at " + (f"{kill_after:.3f} s" if kill_after else f"event {at}")
            _remove(out)
            outcome = self.zygote.run(stage, run, mode, at, kill_after)
            ends[_end(outcome)] += 1
            if kills and outcome.code == 0:  # the machine is less busy than before; a tenth more, to hit the last lines
                self.seconds[stage] = 1.1 * outcome.seconds
            broken += [f"{where}: {text}" for text in self._promises(stage, run, out, mode, outcome)]
            if kills and ends["killed"] == kills:
                break
        return ends, broken

    def _promises(self, stage: str, run: Path, out: Path, mode: str, outcome: Outcome) -> list[str]:
        broken = []
        if outcome.code not in (0, -9) and (mode != "full" or outcome.code != 2 or "Traceback" in outcome.text):
            broken.append(f"ended with {outcome.code}: {outcome.text[-800:]}")
        done = [out] if outcome.code == 0 or out.is_file() else [file.parent for file in out.rglob(MANIFEST)]
        broken += [f"{path}, which looks finished, is another" for path in done if not self._same(path, run)]
        broken += [f"books after it: {problem}" for problem in _problems(run)]
        again = self.zygote.run(stage, run)
        if again.code != 0:
            broken.append(f"running again ended with {again.code}: {again.text[-800:]}")
        elif not self._same(out, run):
            broken.append("running again left other bytes than the undisturbed run")
        broken += [f"books at the end: {problem}" for problem in _problems(run)]
        return broken

    def _same(self, path: Path, run: Path) -> bool:
        """Whether a file or directory of ``run`` is what the undisturbed run has there."""
        return content(path) == content(self.whole / path.relative_to(run))

    def boundaries(
        self, stage: str, rng: random.Random, number: int, *, share: int = 0, shares: int = 1
    ) -> list[tuple[str, int, float]]:
        """``number`` of the stage's events (of a share of them) to die before, and as many to tear; at most all."""
        events = range(1 + share, self.events[stage] + 1, shares)
        chosen = sorted(rng.sample(events, min(number, len(events))))
        return [(mode, at, 0.0) for at in chosen for mode in ("kill", "torn")]

    def random_kills(self, stage: str, rng: random.Random, number: int) -> tuple[Counter[str], list[str]]:
        """Kill a stage at random moments of its time until ``number`` processes died of it."""
        moments: Iterator[tuple[str, int, float]] = (
            ("none", 0, rng.uniform(1e-4, self.seconds[stage])) for _ in range(10 * number)
        )
        ends, broken = self.disturb(stage, moments, kills=number)
        if ends["killed"] < number:
            broken.append(f"{stage}: only {ends['killed']} of {ends.total()} were hit alive")
        return ends, broken

    def two_writers(self, stage: str, number: int) -> tuple[Counter[str], list[str]]:
        """Two processes run a stage at the same time: one finishes, the other finishes later or names the first."""
        run, ends, broken = self.before(stage), Counter[str](), []
        for _ in range(number):
            _remove(run / OUTPUTS[stage])
            with ThreadPoolExecutor(2) as threads:
                outcomes = list(threads.map(lambda zygote: zygote.run(stage, run), self.zygotes))
            ends.update(map(_end, outcomes))
            refused = [outcome for outcome in outcomes if outcome.code]
            if len(refused) > 1 or any("error: " not in outcome.text for outcome in refused):
                broken.append(f"{stage}, two writers: {[outcome.text[-300:] for outcome in refused]}")
            if not self._same(run / OUTPUTS[stage], run):
                broken.append(f"{stage}, two writers: other bytes than one writer's")
        return ends, broken

    def followed(self, rng: random.Random, number: int) -> tuple[Counter[str], list[str]]:
        """Answers are generated and annotated at the same time; one or both die at random moments and run again."""
        stages, run = ("rollouts", "following"), self.before("rollouts")
        outs = [run / OUTPUTS["rollouts"], run / OUTPUTS["annotations"]]
        longest, ends, broken = self.seconds["rollouts"] + self.seconds["annotations"], Counter[str](), []
        for _ in range(number):
            for out in outs:
                _remove(out)
            victims = rng.choice(([0], [1], [0, 1]))
            for attempt in range(2):
                kills = [rng.uniform(1e-4, longest) if i in victims and not attempt else 0.0 for i in range(2)]
                with ThreadPoolExecutor(2) as threads:
                    jobs = zip(self.zygotes, stages, kills, strict=True)
                    outcomes = list(threads.map(lambda job: job[0].run(job[1], run, kill_after=job[2]), jobs))
                if not attempt:
                    ends.update(f"{stage} {_end(outcome)}" for stage, outcome in zip(stages, outcomes, strict=True))
                for stage, outcome, kill in zip(stages, outcomes, kills, strict=True):
                    # The follower of a round whose generator died gives up in words.
                    allowed = (0, -9, 2) if not attempt else (0,)
                    if outcome.code not in allowed or "Traceback" in outcome.text:
                        broken.append(f"{stage}, killed at {kill:.3f} s: {outcome.code}: {outcome.text[-800:]}")
                done = [file.parent for out in outs for file in out.rglob(MANIFEST)]
                broken += [f"{path}, which looks finished, is another" for path in done if not self._same(path, run)]
                broken += [f"books of rollouts with their annotations: {problem}" for problem in _problems(run)]
        return ends, broken


def _problems(run: Path) -> list[str]:
    begun = any(run.rglob(".lock")) or any(run.rglob("manifest.json"))  # else it was killed before anything was there
    return verify_run(run).problems if begun else []


def _end(outcome: Outcome) -> str:
    return {0: "finished", 2: "refused with a clear error", -9: "killed"}.get(outcome.code, f"exit {outcome.code}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
