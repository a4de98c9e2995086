"""Which parallel layouts a model can be cut into."""

from __future__ import annotations

from megatron_npd.errors import UserError
from megatron_npd.models.families.base import ModelSpec


def check_layout(spec: ModelSpec, tensor_size: int, pipeline_size: int) -> None:
    """Refuse sizes by which a model's heads, widths or layers cannot be divided.

    Args:
        spec: The model.
        tensor_size: Tensor-parallel ranks.
        pipeline_size: Pipeline-parallel ranks.

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
    must(spec.ffn_hidden_size % tensor_size == 0, "MLP width", tensor, spec.ffn_hidden_size)
    must(spec.hidden_size % tensor_size == 0, "hidden size", tensor, spec.hidden_size)
    must(spec.num_layers % pipeline_size == 0, "layers", pipeline, spec.num_layers)
    if spec.num_kv_heads % tensor_size and tensor_size % spec.num_kv_heads:
        raise UserError(
            f"key-value heads of {spec.path} must divide {tensor} or be a multiple of it, got {spec.num_kv_heads}; "
            "choose another tensor-parallel size"
        )
