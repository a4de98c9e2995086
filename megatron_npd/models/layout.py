"""Which parallel layouts a model can be cut into."""

from __future__ import annotations

from dataclasses import replace

from megatron_npd.config.training import TrainConfig
from megatron_npd.errors import UserError
from megatron_npd.models.families.base import ModelSpec


def check_layout(
    spec: ModelSpec,
    tensor_size: int,
    pipeline_size: int,
    *,
    first: int = 0,
    last: int = 0,
    virtual: int = 1,
    expert_size: int = 1,
) -> None:
    """Refuse sizes by which a model's heads, widths or layers cannot be divided.

    Args:
        spec: The model.
        tensor_size: Tensor-parallel ranks.
        pipeline_size: Pipeline-parallel ranks.
        first: Layers of the first pipeline stage; 0: as many as the stages between.
        last: Layers of the last one, likewise.
        virtual: Parts of each stage's layers.
        expert_size: Expert-parallel ranks.

    Raises:
        UserError: One does not divide.
    """

    def must(holds: bool, what: str, size: str, got: int) -> None:
        if not holds:
            raise UserError(
                f"{what} of {spec.path} must be a multiple of {size}, got {got}; choose a parallel size that divides it"
            )

    tensor, pipeline = f"tensor_model_parallel_size ({tensor_size})", f"pipeline_model_parallel_size ({pipeline_size})"
    must(spec.num_heads % tensor_size == 0, "attention heads", tensor, spec.num_heads)
    width = spec.experts.ffn_hidden_size if spec.experts else spec.ffn_hidden_size
    must(width % tensor_size == 0, "MLP width", tensor, width)
    number = spec.experts.number if spec.experts else 1
    must(number % expert_size == 0, "experts", f"expert_model_parallel_size ({expert_size})", number)
    must(spec.hidden_size % tensor_size == 0, "hidden size", tensor, spec.hidden_size)
    if first == last == 0:
        must(spec.num_layers % pipeline_size == 0, "layers", pipeline, spec.num_layers)
    _check_stages(spec, pipeline_size, first, last, virtual)
    if spec.num_kv_heads % tensor_size and tensor_size % spec.num_kv_heads:
        raise UserError(
            f"key-value heads of {spec.path} must divide {tensor} or be a multiple of it, got {spec.num_kv_heads}; "
            "choose another tensor-parallel size"
        )


def with_parts(cfg: TrainConfig, spec: ModelSpec) -> TrainConfig:
    """The same settings, with the number of a stage's parts in place of their layers.

    Raises:
        UserError: The stages cannot be cut into parts of so many layers.
    """
    layers, stages = cfg.num_layers_per_virtual_pipeline_stage, cfg.pipeline_model_parallel_size
    if not layers:
        return cfg
    if spec.num_layers % (stages * layers):
        raise UserError(
            f"layers of {spec.path} must be a multiple of pipeline_model_parallel_size x "
            f"num_layers_per_virtual_pipeline_stage = {stages} x {layers}, got {spec.num_layers}; choose sizes that "
            "divide them"
        )
    parts = spec.num_layers // (stages * layers)
    return replace(cfg, num_layers_per_virtual_pipeline_stage=0, virtual_pipeline_model_parallel_size=parts)


def _check_stages(spec: ModelSpec, pipeline_size: int, first: int, last: int, virtual: int) -> None:
    named = {
        "decoder_first_pipeline_num_layers": first,
        "decoder_last_pipeline_num_layers": last,
        "virtual_pipeline_model_parallel_size": virtual - 1,
    }
    if pipeline_size == 1 and any(named.values()):
        name = next(name for name, value in named.items() if value)
        raise UserError(
            f"{name} must be left out with pipeline_model_parallel_size 1, got one; drop it or cut the depth"
        )
    between, layers = pipeline_size - bool(first) - bool(last), spec.num_layers - first - last
    if layers % between if between else layers:
        rest = f"a multiple of the {between} stages between" if between else "0"
        raise UserError(
            f"layers of {spec.path} beside decoder_first_pipeline_num_layers ({first}) and "
            f"decoder_last_pipeline_num_layers ({last}) must be {rest}, got {layers}; change one of them"
        )
    for stage in (first, last, layers // between if between else 0):
        if stage % virtual or layers < 0 or (between and not layers):
            raise UserError(
                f"layers of each pipeline stage of {spec.path} must be a positive multiple of "
                f"virtual_pipeline_model_parallel_size ({virtual}), got {stage}; choose a size that divides it"
            )
