"""From a ``ModelSpec`` to megatron-core's GPTModel, cut to this rank's share of the parallel layout.

The layers are megatron-core's local ones (no Transformer Engine), with RMSNorm and packed attention of this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_npd.errors import UserError
from megatron_npd.models.attention import PackedAttention, Rotary, packed_params
from megatron_npd.models.families import ModelSpec, load_spec
from megatron_npd.models.families.base import Experts
from megatron_npd.models.families.rope import inverse_frequencies
from megatron_npd.models.hf_checkpoint import open_checkpoint, widest
from megatron_npd.models.layout import check_layout
from megatron_npd.models.mapping import global_parameters, local_shape, parameter_rules, pieces
from megatron_npd.platform import get_platform
from megatron_npd.platform.base import local_rank

__all__ = [
    "ModelSpec",
    "build_chunks",
    "build_model",
    "head_weight",
    "load_hf_weights",
    "load_spec",
    "packed_params",
    "without_output_layer",
]


# What megatron-core's interleaved schedule needs of its messages between stages.
_INTERLEAVED = {"overlap_p2p_comm": True, "batch_p2p_comm": False}


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm whose weight, under sequence parallelism, has its gradient summed over tensor ranks.

    megatron-core's wrapper of torch's norms refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """Args: config: of the model; hidden_size: size of the last dimension; eps: added to the mean square."""
        super().__init__()
        self.eps = eps
        self.platform = get_platform()
        device = self.platform.device(local_rank())
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  (read by megatron-core)

    def forward(self, x: Tensor) -> Tensor:
        """Any leading shape; the last dimension is normalised, in x's dtype."""
        return self.platform.rms_norm(x, self.weight, self.eps)


class _BiasedColumn(ColumnParallelLinear):
    """With a bias, whatever the configuration has for the other linear layers."""

    def __init__(self, *sizes: Any, bias: bool, **options: Any) -> None:
        super().__init__(*sizes, bias=True, **options)


class _BiasedRow(RowParallelLinear):
    """With a bias, whatever the configuration has for the other linear layers."""

    def __init__(self, *sizes: Any, bias: bool, **options: Any) -> None:
        super().__init__(*sizes, bias=True, **options)


def build_model(spec: ModelSpec, **options: Any) -> GPTModel:
    """``build_chunks`` where a pipeline stage is one part of the model."""
    (model,) = build_chunks(spec, **options)
    return model


def build_chunks(
    spec: ModelSpec, *, bf16: bool = False, sequence_parallel: bool = False, **options: Any
) -> list[GPTModel]:
    """Build this rank's parts of the model, one a virtual stage; weights are zero (the norms' one) until loaded.

    Call it after ``initialize_distributed``, whose sizes it takes. Call a part with tokens int64 [1, T], those of
    this context-parallel rank, as ``model(tokens, positions, None, packed_seq_params=packed_params(cu_seqlens))``; the
    positions are not read, those that cu_seqlens implies are used. The last stage gives logits [1, T, V / TP], its
    slice of the padded vocabulary; other stages give hidden states [T, 1, H] (T / TP where
    sequence-parallel).

    Args:
        spec: The model's shape.
        bf16: Parameters and computation in bfloat16 rather than float32.
        sequence_parallel: Split norms and residuals over the tensor-parallel ranks; ignored at TP = 1.
        options: ``LayoutConfig.transformer_options``.

    Raises:
        UserError: Heads, MLP width or layers do not divide over the parallel layout.
    """
    tensor_size = parallel_state.get_tensor_model_parallel_world_size()
    pipeline_size = parallel_state.get_pipeline_model_parallel_world_size()
    parts = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    first, last = (options.get(f"num_layers_in_{stage}_pipeline_stage", 0) for stage in ("first", "last"))
    expert_size = parallel_state.get_expert_model_parallel_world_size()
    check_layout(spec, tensor_size, pipeline_size, first=first, last=last, virtual=parts or 1, expert_size=expert_size)
    config = _transformer_config(
        spec,
        tensor_size,
        pipeline_size,
        torch.bfloat16 if bf16 else torch.float32,
        sequence_parallel and tensor_size > 1,
        options | ({} if parts is None else _INTERLEAVED | {"virtual_pipeline_model_parallel_size": parts}),
    )
    return [_chunk(spec, config, None if parts is None else part) for part in range(parts or 1)]


def _chunk(spec: ModelSpec, config: TransformerConfig, part: int | None) -> GPTModel:
    layers, norm = [_layer_spec(spec)] * get_num_layers_to_build(config, part), cast(Any, RMSNorm)
    block = TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)
    model = GPTModel(
        config,
        cast(Any, block),  # megatron-core takes a block's submodules too, though its annotation does not say so
        vocab_size=spec.padded_vocab_size(config.tensor_model_parallel_size),
        max_sequence_length=spec.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=part),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=part),
        share_embeddings_and_output_weights=spec.tied,
        position_embedding_type="none",  # rotary positions are the core attention's
        parallel_output=True,
        vp_stage=part,
    )
    return model.to(get_platform().device(local_rank()))


def load_hf_weights(model: torch.nn.Module, spec: ModelSpec) -> None:
    """Fill a model with the weights of ``spec.path``; every rank reads only the slices that it holds.

    Numbers are cast to the parameters' type. Padding rows of the vocabulary become 0.

    Args:
        model: This rank's megatron-core GPTModel, bare or wrapped, built from ``spec``.
        spec: The model's shape, with the directory to read.

    Raises:
        UserError: No weights, a damaged file, or a tensor that is missing, unexpected, undefined or of another shape
            or type.
    """
    checkpoint = open_checkpoint(spec)
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    rules = parameter_rules(spec)
    with torch.no_grad():
        for name, parameter in global_parameters(model):
            rule = rules[name]
            assert tuple(parameter.shape) == local_shape(rule, spec, size), (name, parameter.shape)
            local = torch.zeros(parameter.shape, dtype=widest(rule, checkpoint.dtypes))
            for piece in pieces(rule, spec, rank, size):
                local[piece.target] = checkpoint.read(piece.name, piece.source)
            if not torch.stack(local.aminmax()).isfinite().all():
                raise UserError(
                    f"{' and '.join(rule.hf)} in {spec.path} must hold finite numbers, got NaN or infinity; use "
                    "weights from before they arose"
                )
            parameter.copy_(local)


@contextmanager
def without_output_layer(model: GPTModel) -> Iterator[None]:
    """Within it a forward of the last stage ends in hidden states ``[T, 1, H]``, after the final norm.

    For callers that apply the output layer to some rows only, or fused with something else.
    """
    last, model.post_process = model.post_process, False
    try:
        yield
    finally:
        model.post_process = last


def head_weight(model: GPTModel) -> Tensor:
    """The output layer's weight on the last stage, ``[V / TP, H]``: its own, or the embedding's where they are tied."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    assert model.output_layer.weight is not None
    return model.output_layer.weight


def _transformer_config(
    spec: ModelSpec,
    tensor_size: int,
    pipeline_size: int,
    dtype: torch.dtype,
    sequence_parallel: bool,
    options: Mapping[str, Any],
) -> TransformerConfig:
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        ffn_hidden_size=spec.experts.ffn_hidden_size if spec.experts else spec.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=spec.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,  # it means all linear layers; those that have a bias are _Biased
        qk_layernorm=spec.has("self_attention.q_layernorm.weight"),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor_size,
        pipeline_model_parallel_size=pipeline_size,
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights are always loaded. megatron-core marks parameters for its gradient norm while it initialises them,
        # so initialisation stays on, with zeros.
        init_method=torch.nn.init.zeros_,
        output_layer_init_method=torch.nn.init.zeros_,
        embedding_init_method=torch.nn.init.zeros_,
        calculate_per_token_loss=True,
        bias_activation_fusion=get_platform().fuses_swiglu,
        # These fusions would be compiled anew by each process, for a sum that is not worth it.
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        deallocate_pipeline_outputs=False,
        **options,
        **(_expert_options(spec.experts) if spec.experts else {}),
    )


def _expert_options(experts: Experts) -> dict[str, Any]:
    return {
        "num_moe_experts": experts.number,
        "moe_router_topk": experts.per_token,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        # Softmax of the chosen logits alone is that of all, scaled to add up to 1.
        "moe_router_pre_softmax": not experts.normalised,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",  # all to all needs streams of CUDA
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }


def _layer_spec(spec: ModelSpec) -> ModuleSpec:
    bias_dropout_add: Any = get_bias_dropout_add  # megatron-core's annotations allow classes only
    head_norm: Any = RMSNorm if spec.has("self_attention.q_layernorm.weight") else None  # and have None for a default

    def linear(name: str) -> type:
        """The class of the linear layer that a layer's rules name."""
        column = name.endswith(("linear_qkv", "linear_fc1"))
        if spec.has(f"{name}.bias"):
            return _BiasedColumn if column else _BiasedRow
        return ColumnParallelLinear if column else RowParallelLinear

    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linear("self_attention.linear_qkv"),
                    core_attention=_with_rotary(Rotary(*inverse_frequencies(spec))),
                    linear_proj=linear("self_attention.linear_proj"),
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_experts_spec()
            if spec.experts
            else ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=linear("mlp.linear_fc1"), linear_fc2=linear("mlp.linear_fc2")),
            ),
            mlp_bda=bias_dropout_add,
        ),
    )


def _experts_spec() -> ModuleSpec:
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = ModuleSpec(module=SequentialMLP, submodules=linear)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, router=_Router))


class _Router(TopKRouter):
    """megatron-core's router; its logits are computed in float32 without Transformer Engine, which it insists on."""

    def gating(self, input: Tensor) -> Tensor:
        """[T, B, H] -> [T, B, E] float32."""
        return F.linear(input.float(), self.weight.float())


def _with_rotary(rotary: Rotary) -> Any:
    def core_attention(**options: Any) -> PackedAttention:
        return PackedAttention(rotary=rotary, **options)

    return core_attention
