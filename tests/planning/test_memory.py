"""The memory of a training step, beside what this package's own step allocates on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_npd.config.training import TrainConfig
from megatron_npd.data.batch import PackedBatch
from megatron_npd.models.families import FAMILIES, ModelSpec, load_spec
from megatron_npd.models.flops import head_parameters
from megatron_npd.planning.layouts import own_layout
from megatron_npd.planning.memory import RankMemory, element_bytes, server_memory, training_memory
from megatron_npd.planning.model import Layout, cache_bytes, parameters, rank_parameters
from tests.dist import run_distributed
from tests.helpers import VOCAB_SIZE, make_tiny_model

TOKENS, TOP_K = 256, 10
TOLERANCE = 0.02
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 64, "tie_word_embeddings": False},
    "llama": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "openpangu": {"num_key_value_heads": 2},
    "qwen3_moe": {"num_key_value_heads": 2, "head_dim": 32, "num_experts": 8, "moe_intermediate_size": 96},
}
TP2, PP2, CP2 = (
    {f"{axis}_size": 2} for axis in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel")
)
SP, BF16 = {"sequence_parallel": True}, {"bf16": True}
CORE: dict[str, Any] = {"recompute_granularity": "selective"}
MLP: dict[str, Any] = CORE | {"recompute_modules": ("mlp",)}
UNIFORM: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BLOCK: dict[str, Any] = UNIFORM | {"recompute_method": "block", "recompute_num_layers": 3}
# On two ranks.
CASES: dict[str, dict[str, Any]] = {
    "dp2": {},
    "dp2-bf16": BF16,
    "dp2-bf16-whole-optimizer": BF16 | {"use_distributed_optimizer": False},
    "dp2-core": CORE,
    "dp2-core-mlp-bf16": BF16 | CORE | {"recompute_modules": ("core_attn", "mlp")},
    "dp2-uniform": UNIFORM,
    "dp2-uniform2-bf16": BF16 | UNIFORM | {"recompute_num_layers": 2},
    "dp2-block": BLOCK,
    "tp2": TP2,
    "tp2-sp-bf16": TP2 | SP | BF16,
    "tp2-sp-core": TP2 | SP | CORE,
    "tp2-sp-mlp": TP2 | SP | MLP,
    "tp2-sp-uniform": TP2 | SP | UNIFORM,
    "tp2-fused": TP2 | {"fused_linear_loss": True},
    "cp2": CP2,
    "cp2-bf16": CP2 | BF16,
    "pp2-bf16": PP2 | BF16,
    "pp2-uniform": PP2 | UNIFORM,
    "pp2-uneven": PP2 | {"decoder_first_pipeline_num_layers": 3},
    "vpp2": PP2 | {"virtual_pipeline_model_parallel_size": 2},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    common = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_hidden_layers": 4}
    for family, fields in SHAPES.items():
        make_tiny_model(root / family, family=family, **(common | fields))
    return root


def _config(fields: dict[str, Any]) -> TrainConfig:
    return TrainConfig(train_iters=2, global_batch_size=4, platform="cpu", **fields)


def _batch(ranks: int) -> PackedBatch:
    """This one's share among so many context-parallel ranks of a row of two segments of the same length.

    All of it is response.
    """
    tokens = TOKENS // ranks
    logprobs_TK = torch.full((tokens, TOP_K), -3.0)
    return PackedBatch(
        tokens=torch.randint(0, VOCAB_SIZE, (1, tokens)),
        position_ids=torch.arange(tokens)[None],
        cu_seqlens=torch.tensor([0, TOKENS // 2, TOKENS], dtype=torch.int32),
        max_seqlen=TOKENS // 2,
        labels=torch.randint(0, VOCAB_SIZE, (1, tokens)),
        loss_mask=torch.ones(1, tokens),
        weights=None,
        teacher_ids=torch.stack([torch.randperm(VOCAB_SIZE)[:TOP_K] for _ in range(tokens)]),
        teacher_logprobs=logprobs_TK,
        teacher_log_tail=torch.log1p(-logprobs_TK.exp().sum(1)),
        generator_logprobs=torch.full((tokens,), -1.0),
    )


def _measure(rank: int, world_size: int, model_dir: Path, fields: dict[str, Any]) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer, and of what is kept for backwards at most, on one rank of a real step."""
    from megatron_npd.models.build import build_chunks, load_hf_weights
    from megatron_npd.platform.initialize import initialize_distributed
    from megatron_npd.training.step import TrainStep

    cfg, spec = _config(fields), load_spec(model_dir)
    parts = cfg.virtual_pipeline_model_parallel_size
    initialize_distributed(virtual_pipeline_model_parallel_size=parts, **cfg.parallel_sizes)
    chunks = build_chunks(spec, bf16=cfg.bf16, sequence_parallel=cfg.sequence_parallel, **cfg.transformer_options)
    for chunk in chunks:
        load_hf_weights(chunk, spec)
    number = 4 * cfg.copy_size // world_size
    step = TrainStep(cfg, chunks, vocab_size=spec.vocab_size, micro_batch_tokens=TOKENS, num_micro_batches=number)
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    own = set(map(_place, parameters))
    alive = Alive(own)
    for chunk in chunks:
        _watch(chunk, alive)
    with torch.autograd.graph.saved_tensors_hooks(alive.pack, alive.unpack):
        step.run(iter([_batch(cfg.context_parallel_size) for _ in range(number)]), 1, dict)
    wrapped: list[Any] = [*step.chunks]
    gradients = [buffer.grad_data for chunk in wrapped for buffer in chunk.buffers]
    states = {tensor.data_ptr(): _bytes(tensor) for tensor in _states(step.optimizer) if _place(tensor) not in own}
    return {
        "weights": sum(map(_bytes, parameters)),
        "gradients": sum(map(_bytes, gradients)),
        "optimizer": sum(states.values()),
        "kept": alive.most,
    }


def _watch(chunk: Any, alive: Alive) -> None:
    """Count what comes from another stage and goes on to one, which megatron-core holds until the backward."""
    set_input_tensor = chunk.set_input_tensor

    def take(tensors: list[Any]) -> None:
        for tensor in tensors:
            if tensor is not None:
                alive.hold(tensor)
        set_input_tensor(tensors)

    chunk.set_input_tensor = take
    chunk.register_forward_hook(lambda module, given, output: alive.hold(output))


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _states(optimizer: Any) -> Iterator[torch.Tensor]:
    """Moments and main weights: what the optimizer updates, and the weights themselves in float32."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for parameter, state in one.optimizer.state.items():
            yield from (parameter, *(value for value in state.values() if isinstance(value, torch.Tensor)))


class Alive:
    """Bytes of the storages that autograd, or who calls ``hold``, keeps something of, each counted once meanwhile."""

    def __init__(self, without: set[int]) -> None:
        self.without, self.now, self.most = without, 0, 0
        self.holders: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> Any:
        return Kept(tensor, self)

    def unpack(self, kept: Any) -> torch.Tensor:
        return kept.tensor

    def hold(self, tensor: torch.Tensor) -> None:
        """Count it until it is gone."""
        storage = tensor.untyped_storage()
        self.change(storage, 1)
        weakref.finalize(tensor, self.change, storage, -1)

    def change(self, storage: torch.UntypedStorage, by: int) -> None:
        pointer = storage.data_ptr()
        if pointer in self.without:
            return
        before = self.holders.get(pointer, 0)
        self.holders[pointer] = before + by
        if before == 0 or before + by == 0:
            self.now += by * storage.nbytes()
            self.most = max(self.most, self.now)


class Kept:
    """A saved tensor, counted until autograd lets it go."""

    def __init__(self, tensor: torch.Tensor, alive: Alive) -> None:
        self.tensor, self.alive = tensor, alive
        alive.change(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.alive.change(self.tensor.untyped_storage(), -1)


def _measure_all(rank: int, world_size: int, root: Path, family: str) -> dict[str, dict[str, int]]:
    return {name: _measure(rank, world_size, root / family, case) for name, case in trained(family).items()}


@pytest.fixture(scope="module")
def measured(models: Path) -> dict[str, list[dict[str, dict[str, int]]]]:
    return {family: run_distributed(_measure_all, 2, models, family) for family in SHAPES}


def trained(family: str) -> dict[str, dict[str, Any]]:
    """The cases that are not refused; those of recompute once for layers that differ in biases alone."""
    if family in ("llama", "openpangu"):
        return {name: case for name, case in CASES.items() if "recompute_granularity" not in case}
    if "num_experts" not in SHAPES[family]:
        return CASES
    return {name: case for name, case in CASES.items() if "mlp" not in name and ("tp2" not in name or "sp" in name)}


def _of_a_cpu(spec: ModelSpec, layout: Layout, e: int) -> float:
    """What a CPU's attention keeps of shared rows beside a GPU's: a mask for each chunk, and its output twice."""
    if layout.cp == 1:
        return 0.0
    chunk = TOKENS // 2 // (2 * layout.cp)
    masks = 2 * chunk * chunk * (2 * layout.cp + 1)  # of two segments, on a rank whose chunks have keys before them
    return spec.num_layers * e * (masks + TOKENS // layout.cp * spec.num_heads * spec.head_dim)


@pytest.mark.parametrize(("family", "case"), [(family, case) for family in SHAPES for case in trained(family)])
def test_each_part_is_what_a_step_allocates(models: Path, measured: Any, family: str, case: str) -> None:
    spec, cfg = load_spec(models / family), _config(CASES[case])
    layout = own_layout(cfg, 2) or Layout(tp=1, pp=1, dp=2)
    memory = training_memory(spec, cfg, layout, row_tokens=TOKENS, micro_batches=4 // layout.dp, norms="cpu")
    ranks = [rank[case] for rank in measured[family]]
    found = max(ranks, key=lambda parts: sum(parts.values()))
    assert memory.weights == pytest.approx(found["weights"], rel=TOLERANCE)
    assert memory.gradients == pytest.approx(found["gradients"], rel=TOLERANCE)
    assert memory.optimizer == pytest.approx(found["optimizer"], rel=TOLERANCE)
    kept = memory.activations + memory.logits + _of_a_cpu(spec, layout, element_bytes(cfg.bf16))
    assert kept == pytest.approx(found["kept"], rel=TOLERANCE)


def test_the_layers_of_every_family_are_measured() -> None:
    parameters = {family.name: {rule.mcore for rule in family.layer_rules} for family in FAMILIES.values()}
    measured = [names for family, names in parameters.items() if family in SHAPES]
    assert [family for family, names in parameters.items() if names not in measured] == []


@pytest.mark.parametrize("family", SHAPES)
def test_a_model_is_as_large_as_its_checkpoint(models: Path, family: str) -> None:
    from safetensors import safe_open

    spec = load_spec(models / family)
    with safe_open(models / family / "model.safetensors", "pt") as file:
        whole = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert parameters(spec) == whole
    assert rank_parameters(spec, Layout(tp=1, pp=1, dp=1)) == [whole]
    halves = rank_parameters(spec, Layout(tp=1, pp=2, dp=1))
    assert sum(halves) == whole + (head_parameters(spec) if spec.tied else 0)


def test_a_server_has_the_cache_that_its_weights_leave(models: Path) -> None:
    spec = load_spec(models / "qwen2")
    weights, token = parameters(spec) * 4, cache_bytes(spec, 4)
    assert token == 2 * 4 * 2 * 32 * 4
    server = server_memory(spec, 1, 4, weights + 10 * token)
    assert server is not None and server.cache_tokens == 10
    assert server_memory(spec, 1, 4, weights) is None


def test_the_total_is_the_sum_of_the_parts() -> None:
    assert RankMemory(weights=1, gradients=2, optimizer=3, activations=4, logits=5, working=6).total == 21
