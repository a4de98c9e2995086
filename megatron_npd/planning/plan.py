"""A run's plan: its work, layouts, hours, split of nodes and storage, as one object; ``planning/table.py`` shows it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_npd.config.plan import PlanConfig
from megatron_npd.errors import UserError
from megatron_npd.models.families import ModelSpec, load_spec
from megatron_npd.models.layout import with_parts
from megatron_npd.planning.hours import Machine
from megatron_npd.planning.layouts import (
    Candidate,
    Server,
    annotation_layouts,
    by_time,
    rollout_seconds,
    servers,
    training_layouts,
    usable,
)
from megatron_npd.planning.model import parameters
from megatron_npd.planning.splits import RoundTime, run_seconds
from megatron_npd.planning.storage import (
    Samples,
    annotations_bytes,
    checkpoint_bytes,
    packs_bytes,
    prompts_bytes,
    rollouts_bytes,
    selection_bytes,
)
from megatron_npd.platform.accelerators import ACCELERATORS, GIB
from megatron_npd.training.refresh_schedule import RefreshSchedule


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run has to do.

    Attributes:
        prompts: In all.
        rounds: Of rollouts.
        samples: Of a round.
        kept: Of them that train.
        sample_tokens: Mean tokens of one, its prompt included.
        train_tokens: Of a round's steps, padding included.
    """

    prompts: int
    rounds: int
    samples: int
    kept: int
    sample_tokens: int
    train_tokens: float

    @property
    def passes(self) -> float:
        """Over the samples that a round keeps."""
        return self.train_tokens / max(self.kept * self.sample_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class Split:
    """One way to use the nodes.

    Attributes:
        train_nodes: That annotate and train.
        server_nodes: That generate; where both are all nodes, they do one after the other.
        max_lead: Rounds ahead of the trainer.
        annotate: Layout of the annotator; None: nobody annotates.
        train: Layout of the trainer.
        seconds: Of a round's stages.
        total: Of the run, in seconds.
    """

    train_nodes: int
    server_nodes: int
    max_lead: int
    annotate: Candidate | None
    train: Candidate
    seconds: RoundTime
    total: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is said of a run.

    Attributes:
        asked: What was asked.
        cfg: The same, with what follows from the models' depth.
        machine: On what.
        student: Its shape.
        teacher: Its shape; None: no model of it runs here.
        work: What is to be done.
        training: The trainer's layouts on the nodes of the shortest split, or on all where nothing fits.
        annotation: The annotator's.
        servers: The ways to generate.
        splits: By time, the shortest first; empty: nothing fits.
        refused: Why no layout is left on so many training nodes, by reason.
        storage: Bytes by what lies there.
    """

    asked: PlanConfig
    cfg: PlanConfig
    machine: Machine
    student: ModelSpec
    teacher: ModelSpec | None
    work: Work
    training: list[Candidate]
    annotation: list[Candidate]
    servers: list[Server]
    splits: list[Split]
    refused: dict[str, list[int]]
    storage: dict[str, float]

    @property
    def generator(self) -> ModelSpec:
        """Whose responses train."""
        return self.student if self.cfg.responses == "student" or self.teacher is None else self.teacher

    @property
    def server(self) -> Server | None:
        """The way to generate that gives most tokens per device, on fewest devices."""
        return max(self.servers, key=lambda one: (one.per_device, -one.decoding.devices), default=None)


def make_plan(cfg: PlanConfig) -> Plan:
    """Plan a run from its settings and the models' ``config.json``.

    Raises:
        UserError: A model is not supported, or the number of prompts is not known.
    """
    asked, student = cfg, load_spec(cfg.student)
    cfg = replace(cfg, train=with_parts(cfg.train, student))
    teacher = None if cfg.annotate.backend == "none" and cfg.responses == "student" else _teacher(cfg)
    machine = Machine(device=ACCELERATORS[cfg.gpu], per_node=cfg.devices_per_node, assume=cfg.assume)
    work = _work(cfg)
    plan = Plan(
        asked=asked,
        cfg=cfg,
        machine=machine,
        student=student,
        teacher=teacher,
        work=work,
        training=[],
        annotation=[],
        servers=[],
        splits=[],
        refused={},
        storage=_storage(cfg, student, work),
    )
    plan = replace(plan, servers=servers(plan.generator, cfg, machine))
    splits, refused = _splits(plan)
    nodes = splits[0].train_nodes if splits else cfg.num_nodes
    return replace(
        plan,
        training=training_layouts(student, cfg, nodes, machine),
        annotation=_annotation(plan, nodes),
        splits=splits,
        refused=refused,
    )


def _teacher(cfg: PlanConfig) -> ModelSpec:
    try:
        return load_spec(cfg.teacher)
    except UserError as error:
        if cfg.annotate.backend != "vllm":
            raise
        raise UserError(f"{error}: of a teacher that no family covers the sizes are not known to the plan") from error


def _work(cfg: PlanConfig) -> Work:
    prompts = cfg.num_prompts or _count_prompts(cfg.prompts)
    asked = min(prompts, cfg.rollout.prompts_per_round or prompts)
    samples = asked * (cfg.rollout.greedy_paths + cfg.rollout.sampled_paths)
    rounds, row = cfg.updates + 1, cfg.pack.seq_length
    rows = cfg.train.global_batch_tokens // row or cfg.train.global_batch_size
    return Work(
        prompts=prompts,
        rounds=rounds,
        samples=samples,
        kept=math.ceil(samples * (1 if cfg.select.filter == "none" else cfg.kept_share)),
        sample_tokens=cfg.mean_prompt + cfg.mean_response,
        train_tokens=cfg.train.train_iters / rounds * rows * row,
    )


def _count_prompts(path: str) -> int:
    file = Path(path)
    if not path or not file.is_file():
        raise UserError(f"--num-prompts must be given, or --prompts a file, got {path!r}; say how many there will be")
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.ParquetFile(file).metadata.num_rows
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _annotation(plan: Plan, nodes: int) -> list[Candidate]:
    if plan.cfg.annotate.backend == "none":
        return []
    assert plan.teacher is not None
    return annotation_layouts(plan.teacher, plan.student, plan.cfg, plan.work.samples, nodes, plan.machine)


def _splits(plan: Plan) -> tuple[list[Split], dict[str, list[int]]]:
    """All nodes in turns, and every share of them with and without a lead; and which shares no layout fits, and why."""
    nodes, turns, lead = plan.cfg.num_nodes, plan.cfg.take_turns, max(plan.cfg.max_lead, 1)
    found: list[Split] = []
    refused: dict[str, list[int]] = {}
    for train_nodes in range(nodes, 0, -1):
        in_turns = train_nodes == nodes
        stages = _stages(plan, train_nodes, beside=not in_turns and not turns and plan.work.rounds > 1)
        if isinstance(stages, str):
            refused.setdefault(stages, []).append(train_nodes)
        elif plan.server is not None:
            servers = nodes if in_turns else nodes - train_nodes
            leads = (0,) if in_turns or turns else (0, lead)
            found += [_split(plan, *stages, train_nodes, servers, ahead) for ahead in leads]
    return sorted(found, key=lambda split: split.total), refused


def _stages(plan: Plan, nodes: int, *, beside: bool) -> tuple[Candidate, Candidate | None] | str:
    """Layouts of trainer and annotator on so many nodes, or why there are none.

    Args:
        plan: As far as it is made.
        nodes: That annotate and train.
        beside: Whether both hold their memory at a time: the trainer lives through the rounds of ``npd run``.
    """
    candidates = training_layouts(plan.student, plan.cfg, nodes, plan.machine)
    trainers = usable(candidates, plan.cfg.train)
    if not trainers:
        return f"training: {_least(candidates)}"
    candidates = _annotation(plan, nodes)
    annotators = usable(candidates, plan.cfg.annotate)
    if not candidates:
        return trainers[0], None
    if not annotators:
        return f"annotation: {_least(candidates)}"
    pairs = [(trainer, annotator) for trainer in trainers for annotator in annotators]
    room = plan.machine.memory if beside else math.inf
    fitting = [pair for pair in pairs if _held(*pair) <= room]
    if not fitting:
        least = min(_held(*pair) for pair in pairs) / GIB
        return (
            f"memory of the trainer, which lives through the rounds, and of the annotator beside it must be at most "
            f"{room / GIB:.1f} GiB per rank, got {least:.1f}; --take-turns has one there at a time"
        )
    steps = plan.cfg.train.train_iters / plan.work.rounds
    return min(fitting, key=lambda pair: steps * by_time(pair[0])[0] + by_time(pair[1])[0])


def _held(trainer: Candidate, annotator: Candidate) -> float:
    assert trainer.memory is not None and annotator.memory is not None
    return trainer.memory.total + annotator.memory.total


def _least(candidates: list[Candidate]) -> str:
    """The reason that is nearest to none: a little too much memory, or what the layout that is set is refused for."""
    by_memory = [one for one in candidates if one.memory is not None]
    return min(by_memory, key=lambda one: one.memory.total if one.memory else 0, default=candidates[0]).refused


def _split(
    plan: Plan, train: Candidate, annotate: Candidate | None, train_nodes: int, server_nodes: int, max_lead: int
) -> Split:
    cfg, work = plan.cfg, plan.work
    assert plan.server is not None and train.seconds is not None
    each = RoundTime(
        rollout=rollout_seconds(
            plan.generator, cfg, plan.machine, plan.server, samples=work.samples, nodes=server_nodes
        ),
        annotate=annotate.seconds if annotate is not None and annotate.seconds is not None else 0.0,
        train=train.seconds * cfg.train.train_iters / work.rounds,
    )
    follow = cfg.annotate.follow_seconds > 0 and train_nodes + server_nodes == cfg.num_nodes
    return Split(
        train_nodes=train_nodes,
        server_nodes=server_nodes,
        max_lead=max_lead,
        annotate=annotate,
        train=train,
        seconds=each,
        total=run_seconds(work.rounds, each, max_lead=max_lead, follow=follow)
        + work.rounds * cfg.assume.round_overhead,
    )


def _storage(cfg: PlanConfig, student: ModelSpec, work: Work) -> dict[str, float]:
    """Bytes of each kind of file over the whole run; reports and logs are small."""
    samples = Samples(
        number=work.samples,
        paths=cfg.rollout.greedy_paths + cfg.rollout.sampled_paths,
        prompt=cfg.mean_prompt,
        response=cfg.mean_response,
        vocab_size=student.vocab_size,
        shard=cfg.rollout.shard_size,
    )
    scored = cfg.annotate.backend != "none"
    sizes = {
        "prompts": prompts_bytes(replace(samples, number=work.prompts)),
        "rollouts": work.rounds * rollouts_bytes(samples),
        "annotations": work.rounds * annotations_bytes(samples, cfg.annotate.top_k if scored else 0),
        "selection": work.rounds * selection_bytes(samples) if scored else 0.0,
        "packs": work.rounds * packs_bytes(replace(samples, number=work.kept)),
    }
    if scored and cfg.eval.held_out:
        held = min(cfg.eval.held_out, max(work.prompts // 10, 1))
        few = replace(samples, number=2 * held, paths=2)  # one greedy and one sampled response (pipeline/evaluation.py)
        sizes["held out"] = (work.rounds + 1) * (rollouts_bytes(few) + annotations_bytes(few, cfg.annotate.top_k))
    count, numbers = parameters(student), cfg.train.bf16
    sizes["checkpoints"] = _checkpoints(cfg) * checkpoint_bytes(count, bf16=numbers)
    sizes["policies"] = work.rounds * count * student.dtype.itemsize
    return sizes


def _checkpoints(cfg: PlanConfig) -> int:
    """Checkpoints that are kept, and one that is replaced as training goes on."""
    steps, interval = cfg.train.train_iters, cfg.train.save_interval
    kept = {step for step in range(1, steps + 1) if interval and step % interval == 0}
    if cfg.train.refresh == "by_lag":  # when, nobody knows
        policies = {steps, *(-index for index in range(cfg.updates))}
    else:
        schedule = RefreshSchedule(replace(cfg.train, updates=cfg.updates))
        policies = {step for step in range(1, steps + 1) if schedule.after(step, 0, None)}
    others = len(kept - policies)
    most = min(others, cfg.train.most_recent_k or others)  # policies are kept beside them
    return len(policies) + most + bool(cfg.train.save_interval_in_mins or most < others)
