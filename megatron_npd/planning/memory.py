"""The memory of one rank: what a training step, an annotator and a rollout server hold on a device.

Activations are what autograd keeps of a forward of ``models/build.py``, tensor by tensor; the trainer recomputes none.
``tests/planning/test_memory.py`` compares each part with what this package's own step allocates.

Legend: T tokens of a micro-batch, H hidden, F MLP width, V vocabulary, e bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_npd.config.settings import AnnotateConfig
from megatron_npd.config.training import TrainConfig
from megatron_npd.models.families import ModelSpec
from megatron_npd.ops import fused_linear
from megatron_npd.planning.model import Layout, cache_bytes, rank_parameters
from megatron_npd.teacher.megatron_scorer import HEAD_ROWS

Norms = Literal["cpu", "cuda", "npu"]
GRADIENT = 4  # bytes: gradients are summed in float32 (training/step.py)
ADAM = 8  # two moments in float32
MAIN = 4  # a float32 copy of bfloat16 weights
# MLP widths that megatron-core's gated MLP keeps: gate and up, and their product; on a CPU silu(gate) and up as well.
MIDDLE: dict[Norms, int] = {"cpu": 5, "cuda": 3, "npu": 3}


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on the rank of a layout that holds most.

    Attributes:
        weights: Parameters.
        gradients: Their gradients.
        optimizer: Moments and main weights.
        activations: What the layers' forwards keep for the backward, of all micro-batches in flight.
        logits: Logits, whose gradient takes their place; with a fused loss a chunk of them and the gradients that it
            keeps.
        working: What exists for a moment beside these.
    """

    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    working: float = 0.0

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def element_bytes(bf16: bool) -> int:
    """Bytes of a number in the type that a stage computes in."""
    return 2 if bf16 else 4


def training_memory(
    spec: ModelSpec, cfg: TrainConfig, layout: Layout, *, row_tokens: int, micro_batches: int, norms: Norms = "cuda"
) -> RankMemory:
    """The stage of a layout that needs most, at the moment of a step when that is.

    Args:
        spec: The student.
        cfg: Type, loss, micro-batch and optimizer; its parallel sizes are not read.
        layout: How it is cut.
        row_tokens: Tokens of a packed row.
        micro_batches: Of a step on each data-parallel rank.
        norms: The platform, whose norms differ in what they keep.
    """
    counts = rank_parameters(spec, layout)
    parts = []
    for stage, parameters in enumerate(counts):
        flight = min(layout.pp - stage, micro_batches)
        parts.append(_stage_memory(spec, cfg, layout, stage, parameters, row_tokens, flight, norms))
    return max(parts, key=lambda part: part.total)


def _stage_memory(
    spec: ModelSpec,
    cfg: TrainConfig,
    layout: Layout,
    stage: int,
    parameters: int,
    row_tokens: int,
    flight: int,
    norms: Norms,
) -> RankMemory:
    e, tokens = element_bytes(cfg.bf16), row_tokens * cfg.micro_batch_size
    split = layout.tp if cfg.sequence_parallel else 1
    last = stage == layout.pp - 1
    layers = spec.num_layers // layout.pp
    kept = layers * layer_activations(spec, layout.tp, e, sequence_parallel=cfg.sequence_parallel, norms=norms)
    kept += spec.head_dim * e  # cosines and sines
    kept += 0 if last else spec.hidden_size * e / split  # what is sent on
    kept += spec.hidden_size * e / split if stage and norms == "cpu" else 0  # what came: its norms keep copies
    kept += 8 if stage == 0 else 0  # token ids, for the embedding's gradient
    logits = working = 0.0
    if last:
        kept += _norm(spec.hidden_size, 1, e, norms) / split + spec.hidden_size * e / split
        logits, working = _head(spec, cfg, layout.tp, tokens, e)
    working = max(working, tokens * _layer_working(spec, layout.tp, e))
    if split > 1:
        working += tokens * spec.hidden_size * e  # the buffer that a sequence is gathered in
    shards = layout.dp if cfg.use_distributed_optimizer else 1
    return RankMemory(
        weights=parameters * e,
        gradients=parameters * GRADIENT,
        optimizer=parameters * (ADAM + (MAIN if cfg.bf16 else 0)) / shards,
        activations=flight * tokens * kept,
        logits=logits,
        working=working,
    )


def layer_activations(spec: ModelSpec, tp: int, e: int, *, sequence_parallel: bool, norms: Norms) -> float:
    """Bytes per token that one layer keeps for its backward on one rank."""
    split = tp if sequence_parallel else 1
    heads, kv_heads = spec.num_heads / tp, max(spec.num_kv_heads / tp, 1)
    query, key = heads * spec.head_dim, kv_heads * spec.head_dim
    # With fewer key-value heads than ranks the whole product is gathered, and the values are a view of it.
    gathered = tp if spec.num_kv_heads < tp else 1
    qkv = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim / tp * gathered
    hidden = 2 * (_norm(spec.hidden_size, 1, e, norms) + spec.hidden_size * e) / split  # norms; inputs of products
    attention = (qkv + query + key + query) * e + heads * 4  # the product, rotated q and k, output; log-sum-exp
    if spec.has("self_attention.q_layernorm.weight"):
        attention += _norm(query, heads, e, norms) + _norm(key, kv_heads, e, norms)
        if norms != "cpu":
            attention -= key * e  # the key's norm keeps a view of the product
    return hidden + attention + MIDDLE[norms] * spec.ffn_hidden_size / tp * e + _expert_activations(spec, tp, e, split)


def _expert_activations(spec: ModelSpec, tp: int, e: int, split: int) -> float:
    """What a layer with experts keeps per token beside what an MLP of the width of a token's experts does."""
    if spec.experts is None:
        return 0.0
    per_token, width = spec.experts.per_token, spec.ffn_hidden_size / tp * e
    inputs = per_token * spec.hidden_size * e  # a copy for each expert
    # Of the router its input in float32, the chosen experts and their weights; then the maps of the dispatch.
    router = (spec.hidden_size * (4 - e) + 12 * per_token) / split + 5 * spec.experts.number + 12 * per_token
    return inputs + width + router  # the width: of outputs before they are weighted


def _norm(width: float, groups: float, e: int, norms: Norms) -> float:
    """Bytes per token that an RMSNorm keeps: its input and a scale, or on a CPU float32 copies."""
    if norms != "cpu":
        return width * e + 4 * groups
    return (1 if e == 4 else 2) * 4 * width + 4 * groups


def _head(spec: ModelSpec, cfg: TrainConfig, tp: int, tokens: int, e: int) -> tuple[float, float]:
    """Logits, and what is there beside them while they become gradients: one of the output layer's weight."""
    columns, hidden = spec.padded_vocab_size(tp) // tp, spec.hidden_size
    if not cfg.fused_linear_loss:
        return tokens * columns * e, columns * hidden * e
    chunk = min(tokens * columns, fused_linear.CHUNK_ELEMENTS) * e
    return tokens * hidden * e + columns * hidden * 4, chunk


def _layer_working(spec: ModelSpec, tp: int, e: int) -> float:
    """Bytes per token that a layer's forward or backward holds beside what is kept: the widest is the MLP's."""
    copies = 1 + (spec.experts.per_token if spec.experts else 0)  # of a token, in and out
    return (4 * spec.ffn_hidden_size / tp + 2 * copies * spec.hidden_size) * e


def annotation_memory(spec: ModelSpec, cfg: AnnotateConfig, layout: Layout) -> RankMemory:
    """Of the teacher's forward; nothing is kept of it."""
    e, tokens = element_bytes(cfg.bf16), cfg.seq_length * cfg.micro_batch_size
    columns = spec.padded_vocab_size(layout.tp) // layout.tp
    return RankMemory(
        weights=max(rank_parameters(spec, layout)) * e,
        logits=min(HEAD_ROWS, tokens) * columns * (e + 4),  # the top-k reads them in float32
        working=tokens * _layer_working(spec, layout.tp, e),
    )


@dataclass(frozen=True, kw_only=True)
class ServerMemory:
    """What fits on the devices of one rollout server.

    Attributes:
        devices: That share it.
        weights: Bytes on each.
        cache_tokens: Tokens whose keys and values fit beside them.
    """

    devices: int
    weights: float
    cache_tokens: int


def server_memory(spec: ModelSpec, devices: int, e: int, memory: float) -> ServerMemory | None:
    """A server on so many devices with ``memory`` usable bytes each; None: the weights leave no room for a cache.

    Key-value heads that are fewer than the devices are repeated.
    """
    weights = rank_parameters(spec, Layout(tp=devices, pp=1, dp=1))[0] * e
    room = memory - weights
    per_token = cache_bytes(spec, e) / min(devices, spec.num_kv_heads)
    tokens = int(room / per_token)
    return ServerMemory(devices=devices, weights=weights, cache_tokens=tokens) if tokens > 0 else None
