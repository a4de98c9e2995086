"""The model families that are supported, by the architecture that ``config.json`` names."""

from __future__ import annotations

from megatron_npd.models.families.base import Family, ModelSpec, Rule
from megatron_npd.models.families.config import load_spec
from megatron_npd.models.families.llama import LLAMA
from megatron_npd.models.families.mistral import MISTRAL
from megatron_npd.models.families.openpangu import OPENPANGU
from megatron_npd.models.families.phi3 import PHI3
from megatron_npd.models.families.qwen2 import QWEN2
from megatron_npd.models.families.qwen3 import QWEN3
from megatron_npd.models.families.qwen3_moe import QWEN3_MOE

FAMILIES = {family.architecture: family for family in (LLAMA, MISTRAL, OPENPANGU, PHI3, QWEN2, QWEN3, QWEN3_MOE)}

__all__ = ["FAMILIES", "Family", "ModelSpec", "Rule", "load_spec"]
