"""The parallel layouts of a stage on some nodes: which fit, how long they take, and why the others are refused.

The stages' own checks refuse (``models/layout.py``, ``training/trainer.py``); memory is looked at last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from megatron_npd.config.plan import PlanConfig
from megatron_npd.config.settings import AnnotateConfig, LayoutConfig
from megatron_npd.config.training import TrainConfig
from megatron_npd.errors import UserError
from megatron_npd.models.families import ModelSpec
from megatron_npd.models.layout import check_layout
from megatron_npd.models.zigzag import check_alignment
from megatron_npd.planning.hours import Decoding, Machine, StepTime, decoding, prefill_seconds, step_time
from megatron_npd.planning.memory import (
    RankMemory,
    ServerMemory,
    annotation_memory,
    element_bytes,
    server_memory,
    training_memory,
)
from megatron_npd.planning.model import Layout
from megatron_npd.platform.accelerators import GIB
from megatron_npd.training.trainer import check_batch, check_experts

Cfg = TypeVar("Cfg", bound=LayoutConfig)
# What keeps least: the input of each layer.
_RECOMPUTE: dict[str, Any] = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout, looked at.

    Attributes:
        layout: Its sizes.
        memory: Of the rank that holds most; None: a check refused it before.
        seconds: Of an optimizer step, or of annotating a round; None: it is refused.
        step: Where the seconds of a step go.
        refused: Why; empty: it fits.
        remedy: What would make it fit, where that is known.
    """

    layout: Layout
    memory: RankMemory | None = None
    seconds: float | None = None
    step: StepTime | None = None
    refused: str = ""
    remedy: str = ""


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def layouts(cfg: LayoutConfig, nodes: int, per_node: int) -> Iterator[Layout]:
    """What a stage may try: its own layout, where its settings name one, and all with TP inside a node.

    All have the settings' context-parallel size.
    """
    world, own, cp = nodes * per_node, own_layout(cfg, nodes * per_node), cfg.context_parallel_size
    if own is not None:
        yield own
    yield from (one for one in _cuts(world, per_node, cp) if own is None or (one.tp, one.pp) != (own.tp, own.pp))


def _cuts(world: int, per_node: int, cp: int) -> Iterator[Layout]:
    for tp in divisors(per_node):
        for pp in divisors(world // tp):
            if world // (tp * pp) % cp == 0:
                yield Layout(tp=tp, pp=pp, cp=cp, dp=world // (tp * pp * cp))


def _lighter(cfg: TrainConfig, segment_align: int, world: int, per_node: int) -> Iterator[Layout]:
    """What the trainer may try where nothing fits: rows shared by more ranks, and layers that are computed again."""
    recompute = (False, True) if cfg.recompute_granularity == "none" else (False,)
    sizes = [size for size in divisors(world) if size % cfg.context_parallel_size == 0]
    for cp in sizes:
        if cp == cfg.context_parallel_size or segment_align % (2 * cp) == 0:
            for one in _cuts(world, per_node, cp):
                ways = [replace(one, recompute=again) for again in recompute]
                yield from ways[cp == cfg.context_parallel_size :]


def own_layout(cfg: LayoutConfig, world: int) -> Layout | None:
    """The layout that the settings ask for; None: 1 x 1, which is left to the plan."""
    tp, pp, cp = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size, cfg.context_parallel_size
    if tp == pp == cp == 1:
        return None
    own = Layout(tp=tp, pp=pp, cp=cp, dp=max(world // (tp * pp * cp), 1))
    return replace(own, **cfg.pipeline_split)


def is_own(cfg: LayoutConfig, layout: Layout) -> bool:
    """Whether the settings ask for it."""
    return layout == own_layout(cfg, layout.ranks)


def cut(cfg: Cfg, layout: Layout) -> Cfg:
    """A stage's settings with a layout's sizes; a layout that is not the settings' own splits the sequence too."""
    if is_own(cfg, layout):
        return cfg
    fields: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "context_parallel_size": layout.cp,
        "decoder_first_pipeline_num_layers": 0,
        "decoder_last_pipeline_num_layers": 0,
    }
    if isinstance(cfg, TrainConfig):
        fields |= {"sequence_parallel": layout.tp > 1, "virtual_pipeline_model_parallel_size": 1}
        fields |= _RECOMPUTE if layout.recompute else {}
    return replace(cfg, **fields)


def training_layouts(spec: ModelSpec, cfg: PlanConfig, nodes: int, machine: Machine) -> list[Candidate]:
    """Layouts of the trainer on so many nodes."""

    def look(layout: Layout) -> Candidate:
        train, row = cut(cfg.train, layout), cfg.pack.seq_length
        check_experts(train, spec)
        check_alignment(cfg.pack.segment_align, layout.cp, "pack.segment_align")
        rows = check_batch(train, row, layout.dp)
        sizes = {"row_tokens": row, "micro_batches": rows // (train.micro_batch_size * layout.dp)}
        memory = training_memory(spec, train, layout, **sizes, norms=machine.device.platform)
        if train.recompute_granularity == "none" and memory.total > machine.memory:
            least = training_memory(spec, replace(train, **_RECOMPUTE), layout, **sizes, norms=machine.device.platform)
            if least.total <= machine.memory:
                how = "recompute_granularity full (recompute_method uniform, recompute_num_layers 1)"
                return Candidate(layout=layout, memory=memory, remedy=f"{how} needs {least.total / GIB:.1f}")
        segment = cfg.mean_prompt + cfg.mean_response
        step = step_time(spec, train, layout, machine, rows=rows, row_tokens=row, segment=segment)
        return Candidate(layout=layout, memory=memory, seconds=step.total, step=step)

    def looked_at(found: Iterable[Layout]) -> list[Candidate]:
        return [_looked_at(spec, layout, nodes, machine, look) for layout in found]

    found = looked_at(layouts(cfg.train, nodes, machine.per_node))
    if any(one.seconds is not None for one in found):
        return found
    return found + looked_at(_lighter(cfg.train, cfg.pack.segment_align, nodes * machine.per_node, machine.per_node))


def annotation_layouts(
    teacher: ModelSpec, student: ModelSpec, cfg: PlanConfig, samples: int, nodes: int, machine: Machine
) -> list[Candidate]:
    """Layouts of the annotator on so many nodes, with the seconds of ``samples`` of them."""
    seconds = partial(_annotation_seconds, teacher, student, cfg, samples, machine)

    def look(layout: Layout) -> Candidate:
        settings = cut(cfg.annotate, layout)
        memory = annotation_memory(teacher, settings, layout)
        if settings.unconditional:
            students = annotation_memory(student, settings, student_layout(student, layout))
            if settings.keep_loaded:
                memory = replace(memory, weights=memory.weights + students.weights)
            memory = max(memory, students, key=lambda one: one.total)
        return Candidate(layout=layout, memory=memory, seconds=seconds(settings, layout))

    found = layouts(cfg.annotate, nodes, machine.per_node)
    return [_looked_at(teacher, layout, nodes, machine, look) for layout in found]


def _annotation_seconds(
    teacher: ModelSpec,
    student: ModelSpec,
    cfg: PlanConfig,
    samples: int,
    machine: Machine,
    settings: AnnotateConfig,
    layout: Layout,
) -> float:
    """The teacher's pass over prompts and responses; with ``unconditional`` both models' over the responses alone."""
    response, whole = cfg.mean_response, cfg.mean_prompt + cfg.mean_response
    passes = [(teacher, layout, whole)]
    if settings.unconditional:
        passes += [(teacher, layout, response), (student, student_layout(student, layout), response)]
    seconds = 0.0
    for spec, sizes, length in passes:
        # A data-parallel rank scores whole shards: those with one less than others wait.
        shards = -(-samples // cfg.rollout.shard_size)
        share = -(-shards // sizes.dp) * sizes.dp / shards
        work = {"tokens": share * samples * length, "responses": share * samples * response}
        work["shard_rows"] = min(samples, cfg.rollout.shard_size) * length / settings.seq_length
        seconds += prefill_seconds(spec, settings, sizes, machine, **work, segment=length)
    return seconds


def student_layout(student: ModelSpec, layout: Layout) -> Layout:
    """How the annotator cuts the student (``teacher/annotate.py``): no wider than its key-value heads allow."""
    tp = math.gcd(layout.tp, student.num_kv_heads)
    return Layout(tp=tp, pp=1, dp=layout.ranks // tp)


def _looked_at(
    spec: ModelSpec, layout: Layout, nodes: int, machine: Machine, look: Callable[[Layout], Candidate]
) -> Candidate:
    """What ``look`` says of a layout that the checks let pass, if it fits into a device."""
    from megatron_npd.platform.initialize import check_world_size

    try:
        sizes = {"tensor_model_parallel_size": layout.tp, "pipeline_model_parallel_size": layout.pp}
        check_world_size(nodes * machine.per_node, **sizes, context_parallel_size=layout.cp)
        check_layout(spec, layout.tp, layout.pp, first=layout.first, last=layout.last, virtual=layout.virtual)
        candidate = look(layout)
    except UserError as error:
        return Candidate(layout=layout, refused=str(error).replace(f" of {spec.path}", ""))
    assert candidate.memory is not None
    if candidate.memory.total > machine.memory:
        need, room = candidate.memory.total / GIB, machine.memory / GIB
        reason = f"memory must be at most {room:.1f} GiB per rank, got {need:.1f}"
        reason += f"; {candidate.remedy}" if candidate.remedy else ""
        return replace(candidate, seconds=None, step=None, refused=reason)
    return candidate


def usable(candidates: list[Candidate], cfg: LayoutConfig) -> list[Candidate]:
    """The settings' own layout where it fits, else all that fit, by time."""
    fitting = sorted((candidate for candidate in candidates if candidate.seconds is not None), key=by_time)
    return [one for one in fitting if is_own(cfg, one.layout)] or fitting


def by_time(candidate: Candidate) -> tuple[float, int]:
    """Order of layouts that fit: the fastest first, of those that are as fast the least cut."""
    assert candidate.seconds is not None
    return candidate.seconds, candidate.layout.tp * candidate.layout.pp * candidate.layout.cp


@dataclass(frozen=True, kw_only=True)
class Server:
    """One way to serve the model that generates.

    Attributes:
        memory: Of each of its devices.
        decoding: How it generates.
        per_device: Response tokens per second and device.
    """

    memory: ServerMemory
    decoding: Decoding

    @property
    def per_device(self) -> float:
        return self.decoding.per_second / self.decoding.devices


def servers(spec: ModelSpec, cfg: PlanConfig, machine: Machine) -> list[Server]:
    """The ways that fit, by the devices of a server: those of rollout.server_args, or any share of a node.

    Raises:
        UserError: ``--tensor-parallel-size`` of rollout.server_args is no number.
    """
    found = []
    for devices in _server_sizes(cfg, machine.per_node):
        memory = server_memory(spec, devices, element_bytes(_serves_16_bits(spec, cfg)), machine.memory)
        if memory is not None and spec.num_heads % devices == 0:
            how = _decoding(spec, cfg, machine, memory, cfg.rollout.concurrency)
            found.append(Server(memory=memory, decoding=how))
    return found


def rollout_seconds(
    spec: ModelSpec, cfg: PlanConfig, machine: Machine, server: Server, *, samples: int, nodes: int
) -> float:
    """A round of responses by as many servers as so many nodes hold; a small one leaves requests' places empty."""
    number = machine.per_node // server.decoding.devices * nodes
    each = -(-samples // number)
    how = _decoding(spec, cfg, machine, server.memory, min(cfg.rollout.concurrency, each))
    return each * cfg.mean_response / how.per_second


def _decoding(spec: ModelSpec, cfg: PlanConfig, machine: Machine, memory: ServerMemory, concurrency: int) -> Decoding:
    return decoding(
        spec,
        memory,
        machine,
        bf16=_serves_16_bits(spec, cfg),
        concurrency=concurrency,
        prompt_tokens=cfg.mean_prompt,
        response_tokens=cfg.mean_response,
    )


def _server_sizes(cfg: PlanConfig, per_node: int) -> list[int]:
    arguments = [part for argument in cfg.rollout.server_args for part in argument.split("=")]
    for name in ("--tensor-parallel-size", "-tp"):
        if name in arguments[:-1]:
            value = arguments[arguments.index(name) + 1]
            if not value.isdecimal() or not 0 < int(value) <= per_node:
                raise UserError(
                    f"{name} in rollout.server_args must be from 1 to the devices of a node ({per_node}), got {value}; "
                    "correct it"
                )
            return [int(value)]
    return divisors(per_node)


def _serves_16_bits(spec: ModelSpec, cfg: PlanConfig) -> bool:
    given = cfg.rollout.dtype
    return spec.dtype.itemsize == 2 if given == "auto" else given != "float32"
