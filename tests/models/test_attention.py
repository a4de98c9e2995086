"""Rotary positions of packed rows against transformers, and what a row's layers share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from megatron_npd.models.attention import Rotary, _Rotate, packed_params
from megatron_npd.models.build import load_spec
from megatron_npd.models.families.rope import inverse_frequencies
from tests.helpers import make_tiny_model

SCALED = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("rope", [{"rope_theta": 1e6, "rope_type": "default"}, SCALED], ids=["default", "llama3"])
def test_rotation_equals_transformers_in_each_segment(tmp_path: Path, rope: dict) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    path = make_tiny_model(tmp_path / "model", family="llama", rope_parameters=rope)
    assert json.loads((path / "config.json").read_text())["rope_parameters"]["rope_theta"] == rope["rope_theta"]
    lengths = [5, 300, 1]
    row = packed_params(torch.tensor([0, 5, 305, 306], dtype=torch.int32))
    assert row.max_seqlen_q == 300
    cos, sin = Rotary(*inverse_frequencies(load_spec(path))).of_row(row, torch.float32, torch.device("cpu"))
    x = torch.randn(306, 2, 32)

    embedding = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(path))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    heads = x.transpose(0, 1)[None]
    want, _ = apply_rotary_pos_emb(heads, heads, *embedding(heads, positions))
    torch.testing.assert_close(_Rotate.apply(x, cos, sin), want[0].transpose(0, 1), atol=1e-6, rtol=0)


def test_gradient_of_the_rotation() -> None:
    angles = torch.randn(4, 1, 3, dtype=torch.float64)
    x = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _Rotate.apply(x, angles.cos(), angles.sin()), (x,))


def test_angles_are_made_once_a_row() -> None:
    row = packed_params(torch.tensor([0, 5], dtype=torch.int32))
    teacher, student = Rotary(torch.ones(4), 1.0), Rotary(torch.full((4,), 0.5), 1.0)
    cpu = torch.device("cpu")
    first = teacher.of_row(row, torch.float32, cpu)
    assert teacher.of_row(row, torch.float32, cpu)[0] is first[0]
    assert not torch.equal(student.of_row(row, torch.float32, cpu)[0], first[0])
    assert teacher.of_row(row, torch.bfloat16, cpu)[0].dtype == torch.bfloat16
