"""The mapping rules on plain tensors: the layouts against formulas, and that every number has exactly one place.

Legend: H hidden, G key-value heads, R query heads a key-value head, D head size, F mlp width, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_npd.models.families import ModelSpec, load_spec
from megatron_npd.models.mapping import hf_shapes, local_shape, parameter_rules, pieces
from tests.models.test_families import PUBLISHED

H, G, R, D, F, V = 24, 2, 3, 8, 16, 31
SIZES = {
    "hidden_size": H,
    "intermediate_size": F,
    "num_hidden_layers": 2,
    "num_attention_heads": G * R,
    "num_key_value_heads": G,
    "head_dim": D,
    "vocab_size": V,
    "num_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": F,
}
EXPERTS = {"num_experts", "num_experts_per_tok", "moe_intermediate_size"}


@pytest.fixture(params=PUBLISHED.values(), ids=list(PUBLISHED))
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> ModelSpec:
    sizes = {name: size for name, size in SIZES.items() if name in request.param or name not in EXPERTS}
    (tmp_path / "config.json").write_text(json.dumps(request.param | sizes))
    return load_spec(tmp_path)


def numbered(spec: ModelSpec) -> dict[str, torch.Tensor]:
    """A checkpoint in which no two numbers are equal (and none is 0)."""
    tensors, start = {}, 1
    for name, shape in hf_shapes(spec).items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(start, start + count).view(shape)
        start += count
    return tensors


def local(name: str, spec: ModelSpec, hf: dict[str, torch.Tensor], rank: int, size: int) -> torch.Tensor:
    rule = parameter_rules(spec)[name]
    result = torch.zeros(local_shape(rule, spec, size), dtype=torch.int64)
    for piece in pieces(rule, spec, rank, size):
        result[piece.target] = hf[piece.name][piece.source]
    return result


def parts(hf: dict[str, torch.Tensor], prefix: str, fused: str, names: str, rows: list[int]) -> list[torch.Tensor]:
    """The weights of some projections, of which a family may have made one."""
    if (together := hf.get(f"{prefix}.{fused}_proj.weight")) is not None:
        return list(together.split(rows))
    return [hf[f"{prefix}.{name}_proj.weight"] for name in names.split()]


@pytest.mark.parametrize("size", [1, 2])
def test_layouts_are_megatrons(spec: ModelSpec, size: int) -> None:
    hf = numbered(spec)
    layer, mlp, ours = "model.layers.1.self_attn", "model.layers.1.mlp", "decoder.layers.1.mlp"
    if spec.experts:
        mlp, ours = f"{mlp}.experts.1", f"{ours}.experts.local_experts.1"
    heads = parts(hf, layer, "qkv", "q k v", [G * R * D, G * D, G * D])
    qkv = torch.cat([part.view(G, -1, H) for part in heads], dim=1).view(-1, H)
    padded = torch.zeros(V + V % size, H, dtype=torch.int64)
    padded[:V] = hf["model.embed_tokens.weight"]
    for rank in range(size):

        def got(name: str, rank: int = rank) -> torch.Tensor:
            return local(name, spec, hf, rank, size)

        assert torch.equal(got("decoder.layers.1.self_attention.linear_qkv.weight"), qkv.chunk(size)[rank])
        halves = parts(hf, mlp, "gate_up", "gate up", [F, F])
        gate_up = torch.cat([half.chunk(size)[rank] for half in halves])
        assert torch.equal(got(f"{ours}.linear_fc1.weight"), gate_up)
        down = hf[f"{mlp}.down_proj.weight"].chunk(size, dim=1)[rank]
        assert torch.equal(got(f"{ours}.linear_fc2.weight"), down)
        out = hf[f"{layer}.o_proj.weight"].chunk(size, dim=1)[rank]
        assert torch.equal(got("decoder.layers.1.self_attention.linear_proj.weight"), out)
        assert torch.equal(got("decoder.layers.1.input_layernorm.weight"), hf["model.layers.1.input_layernorm.weight"])
        assert torch.equal(
            got("decoder.layers.1.pre_mlp_layernorm.weight"), hf["model.layers.1.post_attention_layernorm.weight"]
        )
        assert torch.equal(got("embedding.word_embeddings.weight"), padded.chunk(size)[rank])
        head = padded if spec.tied else torch.zeros_like(padded)
        if not spec.tied:
            head[:V] = hf["lm_head.weight"]
        assert torch.equal(got("output_layer.weight"), head.chunk(size)[rank])
        if "decoder.layers.1.self_attention.linear_qkv.bias" in parameter_rules(spec):
            bias = torch.cat([hf[f"{layer}.{name}_proj.bias"].view(G, -1) for name in "qkv"], dim=1).flatten()
            assert torch.equal(got("decoder.layers.1.self_attention.linear_qkv.bias"), bias.chunk(size)[rank])


@pytest.mark.parametrize("size", [1, 2, 4])  # 4 ranks exceed the 2 key-value heads
def test_every_number_has_its_place(spec: ModelSpec, size: int) -> None:
    hf = numbered(spec)
    covered = {name: torch.zeros_like(tensor) for name, tensor in hf.items()}
    for name, rule in parameter_rules(spec).items():
        for rank in range(1 if rule.kind == "replicated" else size):
            filled = torch.zeros(local_shape(rule, spec, size), dtype=torch.int64)
            for piece in pieces(rule, spec, rank, size):
                filled[piece.target] += 1
                if not (spec.tied and name == "output_layer.weight"):
                    covered[piece.name][piece.source] += 1
            assert filled.max() == 1
            if rule.kind != "vocab":
                assert filled.min() == 1
    assert all(bool((count == 1).all()) for count in covered.values())
    assert ("lm_head.weight" in covered) != spec.tied
