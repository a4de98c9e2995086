"""The stages of a run as one table: what each reads, seals and needs, and the function that does it.

Runner, audit, report and the rule for changed settings read this table; nothing else knows the order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_npd.pipeline import work
from megatron_npd.pipeline.work import Context
from megatron_npd.run_dir import RunDir

Needs = Literal["host", "servers", "ranks"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One kind of step of a run.

    Attributes:
        name: In logs, times and the report.
        per: How often it is there: once in a run, for each policy (number 0 is the student as given), for each round.
        kind: Of the manifest that it seals; empty: it seals nothing, and ``done`` knows.
        output: What it leaves, from the run and the number of policy or round; None: there is no path yet.
        inputs: Sealed directories that it reads, relative to ``output``, each with the name under which the output's
            manifest holds the hash of the input's manifest.
        needs: What it computes with.
        policy: Number of the policy that must be on the rollout servers before; None: it does not ask them.
        background: Whether ``function`` only sees to it that the trainer is at work, which waits for nothing else.
        function: Does it, or sees to it that a command of ours does it in the background.
        ready: Whether it may start, where sealed ``inputs`` do not tell.
        done: Whether there is nothing left to do, where ``output`` being sealed does not tell.
        settings: Group of the configuration that its results are the first to depend on.
    """

    name: str
    per: Literal["run", "policy", "round"]
    kind: str = ""
    output: Callable[[RunDir, int], Path | None]
    inputs: Mapping[str, str] = field(default_factory=dict)
    needs: Needs = "host"
    policy: Callable[[Context, int], int | None] | None = None
    background: bool = False
    function: Callable[[Context, int], None]
    ready: Callable[[Context, int], bool] | None = None
    done: Callable[[Context, int], bool] | None = None
    settings: str = ""

    @property
    def occupies(self) -> str:
        """What one task at a time works with, where stages overlap; on the host there may be one of each stage."""
        if self.background:
            return "trainer"
        return self.name if self.needs == "host" else self.needs


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name="prompts",
            per="run",
            kind="prompts",
            output=lambda run, _: run.prompts,
            function=work.prompts,
        ),
        Stage(
            name="evaluate teacher",
            per="run",
            output=lambda run, _: run.accuracy,
            needs="servers",
            function=work.evaluate_teacher,
            done=work.teacher_is_evaluated,
        ),
        Stage(
            name="evaluate",
            per="policy",
            output=lambda run, _: run.accuracy,
            needs="servers",
            policy=work.own_policy,
            function=work.evaluate,
            ready=work.policy_is_there,
            done=work.is_evaluated,
        ),
        Stage(
            name="held-out rollout",
            per="policy",
            kind="rollouts",
            output=lambda run, index: run.held_out.rollouts(index),
            inputs={"../../../prompts": "prompts"},
            needs="servers",
            policy=work.own_policy,
            function=work.answer_held_out,
            ready=work.policy_is_there,
            done=work.held_out_is_answered,
        ),
        Stage(
            name="measure",
            per="policy",
            kind="annotations",
            output=lambda run, index: run.held_out.annotations(index),
            inputs={"../rollouts": "rollouts_sha256"},
            needs="ranks",
            function=work.measure,
            done=work.is_measured,
        ),
        Stage(
            name="rollout",
            per="round",
            kind="rollouts",
            output=lambda run, index: run.rollouts(index),
            inputs={"../../../prompts": "prompts"},
            needs="servers",
            policy=work.serving_policy,
            function=work.rollout,
            ready=work.policy_is_due,
            settings="rollout",
        ),
        Stage(
            name="annotate",
            per="round",
            kind="annotations",
            output=lambda run, index: run.annotations(index),
            inputs={"../rollouts": "rollouts_sha256"},
            needs="ranks",
            function=work.annotate,
            ready=work.rollouts_can_be_read,
            done=work.is_annotated,
            settings="annotate",
        ),
        Stage(
            name="select",
            per="round",
            kind="selection",
            output=lambda run, index: run.selection(index),
            inputs={"../annotations": "annotations_sha256"},
            function=work.select,
            done=work.is_selected,
            settings="select",
        ),
        Stage(
            name="pack",
            per="round",
            kind="packs",
            output=lambda run, index: run.packs(index),
            inputs={"../selection": "selection_sha256"},
            function=work.pack,
            ready=work.is_selected,
            settings="pack",
        ),
        Stage(
            name="train",
            per="round",
            kind="checkpoint",
            output=lambda run, index: run.checkpoint(index + 1),
            needs="ranks",
            background=True,
            function=work.train,
            ready=work.packs_are_there,
            settings="train",
        ),
        Stage(
            name="export",
            per="round",
            kind="policy",
            output=lambda run, index: run.policy(index + 1),
            function=work.export,
            ready=work.checkpoint_is_there,
            settings="train",
        ),
    )
}
