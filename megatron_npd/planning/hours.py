"""How long the stages take: FLOPs over what a device reaches of its peak, bytes over what it reaches of its bandwidth.

Legend: e bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_npd.config.plan import Assumptions
from megatron_npd.config.settings import AnnotateConfig
from megatron_npd.config.training import TrainConfig
from megatron_npd.models.families import ModelSpec
from megatron_npd.models.flops import BACKWARD, forward_flops
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
        compute: Forwards and backwards of a rank's layers.
        bubble: Waiting of a pipeline that fills and drains.
        tensor: Collectives of tensor parallelism.
        pipeline: Activations sent from stage to stage.
        data: Gradients summed over the data-parallel ranks, and weights gathered.
        update: The optimizer.
    """

    compute: float
    bubble: float
    tensor: float
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
        cfg: Type, micro-batch and optimizer; its parallel sizes are not read.
        layout: How it is cut.
        machine: On what.
        rows: Of a global batch.
        row_tokens: Tokens of a row.
        segment: Tokens of a sample, inside which attention stays.
    """
    e, assume = element_bytes(cfg.bf16), machine.assume
    tokens = rows * row_tokens / layout.dp  # of one copy of the model
    number = rows / (cfg.micro_batch_size * layout.dp)
    flops = (1 + BACKWARD) * forward_flops(spec, tokens, head_tokens=tokens, context=segment / 2)
    compute = flops / (layout.tp * layout.pp) / (machine.device.flops(cfg.bf16) * assume.train_share)
    reduced = tokens * spec.hidden_size * e * spec.num_layers / layout.pp
    # Two sums over the ranks forward, two backward; a split sequence is gathered twice more.
    sums = 4 + 2 * (cfg.sequence_parallel and layout.tp > 1) / 2
    sent = 2 * tokens * spec.hidden_size * e if layout.pp > 1 else 0
    largest = max(rank_parameters(spec, layout))
    shards = layout.dp if cfg.use_distributed_optimizer else 1
    summed = (GRADIENT + e) if cfg.use_distributed_optimizer else 2 * GRADIENT
    return StepTime(
        compute=compute,
        bubble=compute * (layout.pp - 1) / number,
        tensor=sums * _ring(layout.tp) * 2 * reduced / machine.link(layout.tp),
        pipeline=sent / machine.link(layout.tp * layout.dp * layout.pp),
        data=_ring(layout.dp) * summed * largest / machine.link(layout.tp * layout.dp),
        update=UPDATE_BYTES * largest / shards / (machine.device.bandwidth * assume.bandwidth_share),
    )


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
    flops = forward_flops(spec, tokens, head_tokens=responses, context=segment / 2)
    ranks = layout.tp * layout.pp * layout.dp
    compute = flops / ranks / (machine.device.flops(cfg.bf16) * assume.prefill_share)
    compute *= 1 + (layout.pp - 1) * cfg.micro_batch_size / max(shard_rows, 1)
    sent = tokens / layout.dp * spec.hidden_size * e
    reduced = sent * spec.num_layers / layout.pp
    seconds = compute + 2 * _ring(layout.tp) * 2 * reduced / machine.link(layout.tp)
    return seconds + (sent / machine.link(ranks) if layout.pp > 1 else 0.0)


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
