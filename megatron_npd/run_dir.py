"""Where everything of a run lies: the one module that spells the paths of a run's directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

# What stages write in a run's directory.
PARTS = ("prompts", "eval_prompts", "held_out", "rounds", "schedule.jsonl", "checkpoints", "policies")


def version(policy: int) -> str:
    """The version tag of a policy's number: ``v0001``; 0 is the student as given."""
    return f"v{policy:04d}"


@dataclass(frozen=True)
class RunDir:
    """The paths of a run; ``held_out`` is laid out as a run too, with policies in the place of rounds.

    Attributes:
        root: Directory of the run.
    """

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def config_changes(self) -> Path:
        return self.root / "config_changes.jsonl"

    @property
    def prompts(self) -> Path:
        return self.root / "prompts"

    @property
    def eval_prompts(self) -> Path:
        return self.root / "eval_prompts"

    @property
    def teacher_eval_prompts(self) -> Path:
        """The problems as the teacher's tokenizer writes them."""
        return self.root / "eval_prompts_teacher"

    @property
    def held_out(self) -> RunDir:
        return RunDir(self.root / "held_out")

    @property
    def schedule(self) -> Path:
        return self.root / "schedule.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def policies(self) -> Path:
        return self.root / "policies"

    @property
    def attempts(self) -> Path:
        """What the nodes of a start tell one another."""
        return self.root / "attempts"

    @property
    def logs(self) -> Path:
        """The servers' logs."""
        return self.root / "logs"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def metrics(self) -> Path:
        return self.report / "metrics.jsonl"

    @property
    def accuracy(self) -> Path:
        return self.report / "accuracy.json"

    @property
    def seconds(self) -> Path:
        return self.report / "seconds.jsonl"

    @property
    def servers(self) -> Path:
        """Which rollout servers are asked, and with what on them."""
        return self.report / "servers.json"

    @property
    def environment(self) -> Path:
        return self.report / "environment.json"

    def round(self, index: int) -> Path:
        return self.root / "rounds" / f"{index:04d}"

    def rollouts(self, index: int) -> Path:
        return self.round(index) / "rollouts"

    def annotations(self, index: int) -> Path:
        return self.round(index) / "annotations"

    def selection(self, index: int) -> Path:
        return self.round(index) / "selection"

    def packs(self, index: int) -> Path:
        return self.round(index) / "packs"

    def rounds(self) -> list[Path]:
        """Directories of the rounds that there are, in order."""
        return sorted((self.root / "rounds").glob("[0-9]*"))

    def policy(self, index: int) -> Path:
        """HF directory of a policy that the run exported; number 0, the student as given, is not one."""
        return self.policies / version(index)

    def checkpoint_at(self, iteration: int) -> Path:
        return self.checkpoints / f"iter_{iteration:07d}"

    def checkpoint(self, policy: int) -> Path | None:
        """The checkpoint that the trainer marked to become a policy; None: not yet."""
        for path in sorted(self.checkpoints.glob("iter_*"), reverse=True):  # the newest is asked for most often
            marked = self.marked(path)
            if marked is not None and marked <= policy:
                return path if marked == policy and (path / "manifest.json").is_file() else None
        return None

    @staticmethod
    def marked(checkpoint: Path) -> int | None:
        """The policy that a checkpoint is marked to become: the higher, the later; None: it is not, or not there."""
        try:
            marked = json.loads((checkpoint / "state.json").read_text())["state"].get("policy")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # being written, or removed; what is damaged is refused by who reads it
        return marked if isinstance(marked, int) else None
