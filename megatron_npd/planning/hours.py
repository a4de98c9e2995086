"""How long the stages take: FLOPs over what a device reaches of its peak, bytes over what it reaches of its bandwidth.

Legend: e bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_npd.config.plan import Assumptions
from megatron_npd.config.settings import AnnotateConfig
from megatron_npd.config.training import TrainConfig
from megatron_npd.models.families import ModelSpec
from megatron_npd.models.flops import BACKWARD, forward_flops, mlp_weights
from megatron_npd.planning.memory import GRADIENT, ServerMemory, element_bytes
from megatron_npd.planning.model import Layout, cache_bytes, rank_parameters
from megatron_npd.platform.accelerators import Accelerator

GBIT = 10**9 / 8
MILLISECOND = 1e-3
UPDATE_BYTES = 28  # per parameter: gradient, weight and two moments read, weight and moments written, in float32


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Nodes of devices.

    Attributes:
        device: One of them.
        per_node: Devices of a node.
        assume: What share of the data sheet is reached.
    """

    device: Accelerator
    per_node: int
    assume: Assumptions

    @property
    def memory(self) -> float:
        """Bytes of a device that a stage may fill."""
        return self.device.memory * self.assume.memory_share

    def link(self, ranks: int) -> float:
        """Bytes per second and direction between so many neighbouring ranks."""
        bandwidth = self.device.link if ranks <= self.per_node else self.assume.network * GBIT
        return bandwidth * self.assume.link_share


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of an optimizer step.

    Attributes:
        compute: Forwards and backwards of the pipeline stage that has most, and forwards that are computed again.
        bubble: Waiting of a pipeline that fills and drains.
        tensor: Collectives of tensor parallelism.
        context: Keys and values gathered, and their gradients scattered, over the context-parallel ranks.
        pipeline: Activations sent from stage to stage.
        data: Gradients summed over the data- and context-parallel ranks, and weights gathered.
        update: The optimizer.
    """

    compute: float
    bubble: float
    tensor: float
    context: float
    pipeline: float
    data: float
    update: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def step_time(
    spec: ModelSpec, cfg: TrainConfig, layout: Layout, machine: Machine, *, rows: int, row_tokens: int, segment: float
) -> StepTime:
    """One step of training.

    Args:
        spec: The student.
        cfg: Type, micro-batch, recompute and optimizer; its parallel sizes are not read.
        layout: How it is cut.
        machine: On what.
        rows: Of a global batch.
        row_tokens: Tokens of a row.
        segment: Tokens of a sample, inside which attention stays.
    """
    e, assume = element_bytes(cfg.bf16), machine.assume
    tokens = rows * row_tokens / layout.dp  # of one copy of the model
    number = rows / (cfg.micro_batch_size * layout.dp)
    again = _again(spec, cfg, layout, tokens, segment)
    layers = (1 + BACKWARD) * forward_flops(spec, tokens, head_tokens=0, context=segment / 2) + again.flops
    head = (1 + BACKWARD) * forward_flops(spec, 0, head_tokens=tokens, context=0)
    speed = layout.tp * layout.cp * machine.device.flops(cfg.bf16) * assume.train_share
    stages = [flops / speed for flops in _stages(spec, layout, layers, head)]
    deepest = max(layout.stage_layers(spec.num_layers))
    reduced = tokens / layout.cp * spec.hidden_size * e * deepest
    # Two sums over the ranks forward, two backward; a split sequence is gathered twice more.
    sums = 4 + 2 * (cfg.sequence_parallel and layout.tp > 1) / 2 + again.sums
    sent = 2 * tokens / layout.cp * spec.hidden_size * e * layout.virtual if layout.pp > 1 else 0
    gathers = 2 + again.gathers
    largest = max(rank_parameters(spec, layout))
    copies = layout.dp * layout.cp
    shards = copies if cfg.use_distributed_optimizer else 1
    summed = (GRADIENT + e) if cfg.use_distributed_optimizer else 2 * GRADIENT
    return StepTime(
        compute=max(stages),
        bubble=(sum(stages) - max(stages)) / number / layout.virtual,
        tensor=sums * _ring(layout.tp) * 2 * reduced / machine.link(layout.tp),
        context=gathers * _gathered(spec, layout, tokens, e) / machine.link(layout.tp * layout.cp),
        pipeline=sent / machine.link(layout.ranks),
        data=_ring(copies) * summed * largest / machine.link(layout.tp * copies),
        update=UPDATE_BYTES * largest / shards / (machine.device.bandwidth * assume.bandwidth_share),
    )


@dataclass(frozen=True, kw_only=True)
class _Again:
    """What a backward computes again: FLOPs of all layers, and per layer sums over tensor ranks and gathers of keys."""

    flops: float = 0.0
    sums: float = 0.0
    gathers: float = 0.0


def _again(spec: ModelSpec, cfg: TrainConfig, layout: Layout, tokens: float, segment: float) -> _Again:
    context = segment / 2
    whole, without = (forward_flops(spec, tokens, head_tokens=0, context=length) for length in (context, 0))
    if cfg.recompute_granularity == "full":
        share = 1.0
        if cfg.recompute_method == "block":  # of each part of each stage
            parts = [number / layout.virtual for number in layout.stage_layers(spec.num_layers)]
            share = sum(min(cfg.recompute_num_layers, part) for part in parts) / sum(parts)
        return _Again(flops=share * whole, sums=2 * share, gathers=share)
    if cfg.recompute_granularity == "none":
        return _Again()
    core, mlp = ("core_attn" in cfg.recompute_modules), ("mlp" in cfg.recompute_modules)
    flops = core * (whole - without) + mlp * 2 * tokens * mlp_weights(spec)
    return _Again(flops=flops, sums=float(mlp), gathers=float(core))


def _stages(spec: ModelSpec, layout: Layout, layers: float, head: float) -> list[float]:
    """What each pipeline stage has of the work of all layers; the last has the output layer's too."""
    stages = [layers * number / spec.num_layers for number in layout.stage_layers(spec.num_layers)]
    stages[-1] += head
    return stages


def _gathered(spec: ModelSpec, layout: Layout, tokens: float, e: int) -> float:
    """Bytes of keys and values that a context-parallel rank gathers in its layers' forwards."""
    deepest, width = max(layout.stage_layers(spec.num_layers)), max(spec.num_kv_heads / layout.tp, 1) * spec.head_dim
    return _ring(layout.cp) * tokens * 2 * width * e * deepest


def _ring(ranks: int) -> float:
    """Share of the bytes that a rank sends, and receives, where they are gathered or scattered in a ring."""
    return (ranks - 1) / ranks


def prefill_seconds(
    spec: ModelSpec,
    cfg: AnnotateConfig,
    layout: Layout,
    machine: Machine,
    *,
    tokens: float,
    responses: float,
    segment: float,
    shard_rows: float,
) -> float:
    """Forwards of the annotation over all ranks of a layout.

    Args:
        spec: The model.
        cfg: Type and row; its parallel sizes are not read.
        layout: How it is cut.
        machine: On what.
        tokens: That the layers read, over all samples.
        responses: Those of them that predict response tokens, which the output layer reads.
        segment: Tokens of a sample.
        shard_rows: Rows of a shard, at whose end a pipeline drains.
    """
    e, assume = element_bytes(cfg.bf16), machine.assume
    layers = forward_flops(spec, tokens, head_tokens=0, context=segment / 2)
    head = forward_flops(spec, 0, head_tokens=responses, context=0)
    speed = layout.ranks / layout.pp * machine.device.flops(cfg.bf16) * assume.prefill_share
    stages = [flops / speed for flops in _stages(spec, layout, layers, head)]
    compute = max(stages) + (sum(stages) - max(stages)) * cfg.micro_batch_size / max(shard_rows, 1)
    sent = tokens / layout.dp / layout.cp * spec.hidden_size * e
    reduced = sent * max(layout.stage_layers(spec.num_layers))
    seconds = compute + 2 * _ring(layout.tp) * 2 * reduced / machine.link(layout.tp)
    seconds += _gathered(spec, layout, tokens / layout.dp, e) / machine.link(layout.tp * layout.cp)
    return seconds + (sent / machine.link(layout.ranks) if layout.pp > 1 else 0.0)


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a rollout server generates.

    Attributes:
        devices: That share the model.
        batch: Requests at work at a time.
        step: Seconds of a token of each of them.
        per_second: Response tokens per second, the prompts' prefill included.
    """

    devices: int
    batch: int
    step: float
    per_second: float


def decoding(
    spec: ModelSpec,
    server: ServerMemory,
    machine: Machine,
    *,
    bf16: bool,
    concurrency: int,
    prompt_tokens: float,
    response_tokens: float,
) -> Decoding:
    """A server in its steady state: each step reads the weights once and the cache of every request.

    Args:
        spec: The student.
        server: Its devices, and the tokens that its cache holds.
        machine: On what.
        bf16: Whether weights and cache have two bytes, or four.
        concurrency: Requests that are sent at a time.
        prompt_tokens: Mean length of a prompt.
        response_tokens: Mean length of a response.
    """
    e, assume, device = element_bytes(bf16), machine.assume, machine.device
    context = prompt_tokens + response_tokens / 2
    batch = max(1, min(concurrency, int(server.cache_tokens / context)))
    copies = min(server.devices, spec.num_kv_heads)
    read = server.weights + batch * context * cache_bytes(spec, e) / copies
    flops = forward_flops(spec, batch, head_tokens=batch, context=context) / server.devices
    sums = 2 * spec.num_layers * _ring(server.devices) * 2 * batch * spec.hidden_size * e / machine.link(server.devices)
    step = max(
        read / (device.bandwidth * assume.bandwidth_share),
        flops / (device.flops(bf16) * assume.prefill_share),
    )
    step += sums + assume.decode_overhead * MILLISECOND
    prefill = forward_flops(spec, prompt_tokens, head_tokens=1, context=prompt_tokens / 2)
    prefill /= server.devices * device.flops(bf16) * assume.prefill_share
    seconds = response_tokens * step / batch + prefill  # of one response
    return Decoding(devices=server.devices, batch=batch, step=step, per_second=response_tokens / seconds)
