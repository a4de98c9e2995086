"""The memory of one rank: what a training step, an annotator and a rollout server hold on a device.

Activations are what autograd keeps of a forward of ``models/build.py``, tensor by tensor, less what is computed again.
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
        cfg: Type, loss, micro-batch, recompute and optimizer; its parallel sizes are not read.
        layout: How it is cut.
        row_tokens: Tokens of a packed row.
        micro_batches: Of a step on each data-parallel rank.
        norms: The platform, whose norms differ in what they keep.
    """
    counts = rank_parameters(spec, layout)
    tokens = row_tokens * cfg.micro_batch_size / layout.cp
    parts = [
        _stage_memory(spec, cfg, layout, stage, parameters, tokens, micro_batches, norms)
        for stage, parameters in enumerate(counts)
    ]
    return max(parts, key=lambda part: part.total)


def _stage_memory(
    spec: ModelSpec,
    cfg: TrainConfig,
    layout: Layout,
    stage: int,
    parameters: int,
    tokens: float,
    micro_batches: int,
    norms: Norms,
) -> RankMemory:
    e, logits, working = element_bytes(cfg.bf16), 0.0, 0.0
    if stage == layout.pp - 1:
        logits, working = _head(spec, cfg, layout.tp, tokens, e)
    parts = [_part(spec, cfg, layout, stage, part, norms) for part in range(layout.virtual)]
    held = [_Part(kept=tokens * part.kept, again=tokens * part.again) for part in parts]
    activations, logits = _most(held, logits, layout, stage, micro_batches)
    working = max(working, tokens * _layer_working(spec, layout.tp, e))
    working = max(working, tokens * _gather_working(spec, layout, e))
    if cfg.sequence_parallel and layout.tp > 1:
        working += tokens * spec.hidden_size * e  # the buffer that a sequence is gathered in
    shards = layout.dp * layout.cp if cfg.use_distributed_optimizer else 1
    return RankMemory(
        weights=parameters * e,
        gradients=parameters * GRADIENT,
        optimizer=parameters * (ADAM + (MAIN if cfg.bf16 else 0)) / shards,
        activations=activations,
        logits=logits,
        working=working,
    )


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What a micro-batch's way through a part of a stage holds, without logits.

    Attributes:
        kept: From its forward to its backward.
        again: At most within the backward, with what is computed again; 0: nothing is.
    """

    kept: float
    again: float


def _part(spec: ModelSpec, cfg: TrainConfig, layout: Layout, stage: int, part: int, norms: Norms) -> _Part:
    """Of one part of a stage, in bytes per token."""
    e, split = element_bytes(cfg.bf16), layout.tp if cfg.sequence_parallel else 1
    hidden, first = spec.hidden_size * e / split, stage == part == 0
    last = (stage, part) == (layout.pp - 1, layout.virtual - 1)
    row = spec.head_dim * e  # cosines and sines
    row += 8 * (layout.cp + 0.5) if layout.cp > 1 else 0  # where the keys are
    row += 0 if last else hidden  # what is sent on
    row += 8 if first else 0  # token ids, for the embedding's gradient
    # What came: a GPU's norms keep it, and so does a layer that is computed again.
    row += hidden if norms == "cpu" and not first and cfg.recompute_granularity != "full" else 0
    head = _norm(spec.hidden_size, 1, e, norms) / split + hidden if last else 0.0
    whole = layer_activations(spec, layout, e, sequence_parallel=cfg.sequence_parallel, norms=norms)
    layers = layout.stage_layers(spec.num_layers)[stage] // layout.virtual
    if cfg.recompute_granularity == "none":
        return _Part(kept=row + head + layers * whole, again=0.0)
    if cfg.recompute_granularity == "selective":
        parts = _recomputed(spec, layout, e, norms)
        chosen = [parts[name] for name in cfg.recompute_modules]
        kept = row + layers * (whole - sum(saved for saved, _ in chosen))
        return _Part(kept=kept + head, again=kept + max(again for _, again in chosen))
    number = cfg.recompute_num_layers
    if cfg.recompute_method == "block":
        number = min(number, layers)
        kept, again = number * hidden + (layers - number) * whole, number * hidden + whole
    else:
        kept = -(-layers // number) * hidden
        again = kept + min(number, layers) * whole
    return _Part(kept=row + kept + head, again=row + again)


def _most(parts: list[_Part], logits: float, layout: Layout, stage: int, micro_batches: int) -> tuple[float, float]:
    """Activations and logits at the moment of a step when a rank holds most, by megatron-core's 1F1B schedules."""
    number = min(micro_batches, 2 * layout.pp)  # the pipeline is full by then
    order = [
        part
        for begin in range(0, number, layout.pp)
        for part in range(layout.virtual)
        for _ in range(begin, min(begin + layout.pp, number))
    ]
    ahead = layout.pp - stage - 1  # forwards before the first backward
    if layout.virtual > 1:
        ahead = 2 * ahead + (layout.virtual - 1) * layout.pp
    holds_logits = [logits if part == layout.virtual - 1 else 0.0 for part in range(layout.virtual)]
    moments, activations, outputs = [(0.0, 0.0)], 0.0, 0.0
    for step in range(len(order) + ahead):
        if step < len(order):
            activations += parts[order[step]].kept
            outputs += holds_logits[order[step]]
            moments.append((activations, outputs))
        if step >= ahead:
            part = layout.virtual - 1 - order[step - ahead]
            activations -= parts[part].kept
            outputs -= holds_logits[part]
            moments.append((activations + parts[part].again, outputs))
    return max(moments, key=sum)


def layer_activations(spec: ModelSpec, layout: Layout, e: int, *, sequence_parallel: bool, norms: Norms) -> float:
    """Bytes per token that one layer keeps for its backward on one rank."""
    tp, split = layout.tp, layout.tp if sequence_parallel else 1
    hidden = 2 * (_norm(spec.hidden_size, 1, e, norms) + spec.hidden_size * e) / split  # norms; inputs of products
    attention = _attention(spec, layout, norms)
    kept = attention.core + attention.query + (attention.product if attention.holds_product else 0)
    kept = kept * e + 4 * attention.heads
    if attention.normed:
        kept += _norm(attention.query, attention.heads, e, norms) + _norm(attention.key, attention.kv_heads, e, norms)
        if norms != "cpu":
            kept -= attention.key * e  # the key's norm keeps a view of the product
    return hidden + kept + MIDDLE[norms] * spec.ffn_hidden_size / tp * e + _expert_activations(spec, tp, e, split)


@dataclass(frozen=True, kw_only=True)
class _Attention:
    """Elements per token of a layer's attention on one rank.

    Attributes:
        heads: Of the queries.
        kv_heads: Of the keys.
        query: Of the queries, and of the output.
        key: Of the keys.
        product: Of queries, keys and values before they are taken apart.
        core: What the core attention keeps beside its output: queries and keys, rotated, and where keys and values are
            gathered these. Else the values are a view of the product.
        holds_product: Whether that one is kept.
        normed: Whether heads are normed.
    """

    heads: float
    kv_heads: float
    query: float
    key: float
    product: float
    core: float
    holds_product: bool
    normed: bool


def _attention(spec: ModelSpec, layout: Layout, norms: Norms) -> _Attention:
    heads, kv_heads = spec.num_heads / layout.tp, max(spec.num_kv_heads / layout.tp, 1)
    query, key = heads * spec.head_dim, kv_heads * spec.head_dim
    # With fewer key-value heads than ranks the whole product is gathered, and the values are a view of it.
    gathered = layout.tp if spec.num_kv_heads < layout.tp else 1
    normed = spec.has("self_attention.q_layernorm.weight")
    return _Attention(
        heads=heads,
        kv_heads=kv_heads,
        query=query,
        key=key,
        product=(spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim / layout.tp * gathered,
        # A chunk of queries attends to its segment from the beginning: CP + 1/2 keys to a token of the rank.
        core=query + (key if layout.cp == 1 else 2 * key * (layout.cp + 0.5)),
        holds_product=layout.cp == 1 or (normed and norms != "cpu"),
        normed=normed,
    )


def _recomputed(spec: ModelSpec, layout: Layout, e: int, norms: Norms) -> dict[str, tuple[float, float]]:
    """Bytes per token and layer that are not kept where a module is computed again, and those that it then takes."""
    attention, mlp = _attention(spec, layout, norms), MIDDLE[norms] * spec.ffn_hidden_size / layout.tp * e
    core = attention.core * e + 4 * attention.heads
    # Its inputs are kept instead: the product, and queries that were copied out of it, or heads that were normed.
    copied = attention.query if attention.normed or 1 < attention.kv_heads < attention.heads else 0
    inputs = copied + (attention.key if attention.normed else 0)
    inputs += 0 if attention.holds_product else attention.product
    return {"core_attn": (core - inputs * e, core + attention.query * e), "mlp": (mlp, mlp)}


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


def _head(spec: ModelSpec, cfg: TrainConfig, tp: int, tokens: float, e: int) -> tuple[float, float]:
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


def _gather_working(spec: ModelSpec, layout: Layout, e: int) -> float:
    """Bytes per token of keys and values on their way between context-parallel ranks: sent, gathered, chosen."""
    key = max(spec.num_kv_heads / layout.tp, 1) * spec.head_dim
    return 2 * key * e * (1 + layout.cp + layout.cp + 0.5) if layout.cp > 1 else 0.0


def annotation_memory(spec: ModelSpec, cfg: AnnotateConfig, layout: Layout) -> RankMemory:
    """Of the teacher's forward; nothing is kept of it."""
    e, tokens = element_bytes(cfg.bf16), cfg.seq_length * cfg.micro_batch_size / layout.cp
    columns = spec.padded_vocab_size(layout.tp) // layout.tp
    return RankMemory(
        weights=max(rank_parameters(spec, layout)) * e,
        logits=min(HEAD_ROWS, tokens) * columns * (e + 4),  # the top-k reads them in float32
        working=tokens * max(_layer_working(spec, layout.tp, e), _gather_working(spec, layout, e)),
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
