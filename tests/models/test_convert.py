"""Converted models against transformers, in every layout: logits, gradients, and the way back, byte for byte.

Legend: T tokens of a packed row, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_npd.errors import UserError
from megatron_npd.manifest import read_manifest
from megatron_npd.models.convert import megatron_to_hf
from megatron_npd.models.families import FAMILIES
from megatron_npd.platform import initialize
from tests.dist import run_distributed
from tests.helpers import make_tiny_model, present

ROOT = Path(__file__).resolve().parents[2]
# Each family with one kv head, fewer than TP = 2 has ranks, and a tied output layer.
CASES: dict[str, dict[str, Any]] = {family.name: {"family": family.name} for family in FAMILIES.values()} | {
    # An odd vocabulary: padded at TP = 2.
    "qwen2_untied": {
        "family": "qwen2",
        "vocab_size": 303,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    # Heads that do not add up to the hidden size; segments are long enough for the scaled frequencies to matter.
    "llama3": {
        "family": "llama",
        "hidden_size": 96,
        "head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama_biases": {"family": "llama", "attention_bias": True, "mlp_bias": True, "vocab_size": 305},
    # openPangu-Embedded 7B: four queries a key-value head, untied, theta by its own key.
    "openpangu_untied": {
        "family": "openpangu",
        "hidden_size": 96,
        "head_dim": 32,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 307,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 16e6},
    },
    # Phi-4: four queries a key-value head, untied, theta by its own key.
    "phi3_untied": {
        "family": "phi3",
        "hidden_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 309,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 250000.0},
    },
    "qwen2_yarn": {
        "family": "qwen2",
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral_linear": {
        "family": "mistral",
        "head_dim": 24,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
}
CONFIGS = ("config.json", "tokenizer_config.json")
SEGMENTS = (40, 7, 1, 16)
LAYOUTS = ((1, 1), (2, 1), (1, 2))  # TP, PP of two processes; the first one is data-parallel


def packed_row(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens [1, T] and the weights [T, V] of a loss that is linear in the logits."""
    generator = torch.Generator().manual_seed(7)
    # Not 0, the padding id: transformers gives its row no gradient from the lookup.
    tokens = torch.randint(1, vocab_size, (1, sum(SEGMENTS)), generator=generator)
    return tokens, torch.randn(sum(SEGMENTS), vocab_size, generator=generator) / sum(SEGMENTS)


def run_layouts(rank: int, world_size: int, layouts: tuple[tuple[int, int], ...], work: Path) -> dict[str, float]:
    """In each layout and for each model: compare logits, then save its weights, its gradients, and another layout's."""
    from megatron_npd.models.build import build_model, load_hf_weights
    from megatron_npd.models.checkpoint import load_checkpoint, save_checkpoint
    from megatron_npd.models.families import load_spec
    from megatron_npd.platform.initialize import initialize_distributed

    differences = {}
    for tp, pp in layouts:
        initialize_distributed(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
        for case in CASES:
            out = work / f"{case}-tp{tp}-pp{pp}"
            spec = load_spec(work / case)
            model = build_model(spec, sequence_parallel=spec.experts is not None)
            load_hf_weights(model, spec)
            save_checkpoint(out / "checkpoint", 3, model=model, state={})
            difference = forward_backward(model, spec.vocab_size, torch.load(work / f"{case}.pt"))
            if difference is not None:
                differences[f"{case} TP={tp} PP={pp}"] = difference
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(present(parameter.grad))
            save_checkpoint(out / "gradients", 3, model=model, state={})

            # A checkpoint of another layout (the first one's) into this one.
            dist.barrier()
            foreign = work / f"{case}-tp1-pp1" / "checkpoint" / "iter_0000003"
            load_checkpoint(foreign, model=model)
            save_checkpoint(out / "foreign", 3, model=model, state={})
    return differences


def forward_backward(model: Any, vocab_size: int, expected_TV: torch.Tensor) -> float | None:
    """One packed row through all pipeline stages and back; the largest difference of the logits on the last one."""
    from megatron.core import parallel_state

    from megatron_npd.models.build import packed_params

    tp, tp_rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    tokens, weights_TV = packed_row(vocab_size)
    cu_seqlens = torch.tensor([0, *SEGMENTS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    inputs = {
        "input_ids": tokens,
        "position_ids": torch.cat([torch.arange(length) for length in SEGMENTS])[None],
        "attention_mask": None,
        "packed_seq_params": packed_params(cu_seqlens),
    }
    hidden = torch.zeros(tokens.shape[1], 1, model.config.hidden_size, requires_grad=True)
    if not first:
        dist.recv(hidden.data, dist.get_rank() - 1)
        model.set_input_tensor(hidden)
    output = model(**inputs)
    if not last:
        dist.send(output.detach(), dist.get_rank() + 1)
        gradient = torch.zeros_like(output)
        dist.recv(gradient, dist.get_rank() + 1)
        output.backward(gradient)
    else:
        padded_TV = torch.nn.functional.pad(weights_TV, (0, -vocab_size % tp))
        (output[0] * padded_TV.chunk(tp, dim=1)[tp_rank]).sum().backward()
        if not first:
            dist.send(present(hidden.grad), dist.get_rank() - 1)
    if not (first and last) and model.share_embeddings_and_output_weights:
        dist.all_reduce(model.shared_embedding_or_output_weight().grad, group=parallel_state.get_embedding_group())
    # Tensor ranks have gradients of their heads and their part of a split sequence, as megatron-core's finalize knows.
    for name, parameter in model.named_parameters():
        split = tp > 1 and getattr(parameter, "sequence_parallel", False)
        if split or name.endswith(("q_layernorm.weight", "k_layernorm.weight")):
            dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
    if not last:
        return None
    parts = [torch.empty_like(output[0]) for _ in range(tp)]
    dist.all_gather(parts, output[0].detach(), group=parallel_state.get_tensor_model_parallel_group())
    return (torch.cat(parts, dim=1)[:, :vocab_size] - expected_TV).abs().max().item()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, transformers' logits and gradients of them on unpacked segments, and every layout's output."""
    from transformers import AutoModelForCausalLM

    work = tmp_path_factory.mktemp("convert")
    for case, overrides in CASES.items():
        path = make_tiny_model(work / case, **overrides)
        model = AutoModelForCausalLM.from_pretrained(path)
        tokens, weights_TV = packed_row(model.config.vocab_size)
        logits_TV = torch.cat([model(segment).logits[0] for segment in tokens.split(SEGMENTS, dim=1)])
        (logits_TV * weights_TV).sum().backward()
        torch.save(logits_TV.detach(), work / f"{case}.pt")
        gradients = (
            item for name, parameter in model.named_parameters() for item in apart(name, present(parameter.grad))
        )
        torch.save(dict(gradients), work / f"{case}-grad.pt")
    return work


def apart(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A parameter of transformers as the tensors of a checkpoint: it keeps those of a layer's experts as one."""
    if ".experts." not in name:
        yield name, tensor
        return
    prefix, _, kind = name.rpartition(".")
    for expert, own in enumerate(tensor):
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
        for part, piece in zip(parts, own.chunk(len(parts)), strict=True):
            yield f"{prefix}.{expert}.{part}.weight", piece


@pytest.fixture(scope="module")
def differences(work: Path) -> dict[str, float]:
    """Largest logit difference by case and layout; running it makes every layout's output under ``work``."""
    result: dict[str, float] = {}
    for found in run_distributed(run_layouts, 2, LAYOUTS, work):
        result.update(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "init_process_group", None)  # no conversion joins one
        patch.setattr(initialize, "initialize_distributed", None)
        for case in CASES:
            for out in outputs(work, case):
                megatron_to_hf(out / "checkpoint", work / case, out / "hf", max_shard_bytes=100_000)
                megatron_to_hf(out / "gradients", work / case, out / "hf-gradients")
                megatron_to_hf(out / "foreign", work / case, out / "hf-foreign", workers=1)
    return result


def outputs(work: Path, case: str) -> Iterator[Path]:
    for tp, pp in LAYOUTS:
        yield work / f"{case}-tp{tp}-pp{pp}"


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_weights(path: Path, original: Path) -> None:
    got, expected = tensors_of(path), tensors_of(original)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_logits_equal_transformers(differences: dict[str, float]) -> None:
    assert len(differences) == len(CASES) * len(LAYOUTS)
    print(differences)
    assert max(differences.values()) < 1e-4, differences


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_transformers(work: Path, differences: dict[str, float], case: str) -> None:
    expected = torch.load(work / f"{case}-grad.pt")
    worst = 0.0
    for out in outputs(work, case):
        got = tensors_of(out / "hf-gradients")
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            difference = ((got[name] - gradient).abs().max() / gradient.abs().max()).item()
            assert difference < 1e-5, (out.name, name, difference)
            worst = max(worst, difference)
    print(f"{case}: largest difference of a gradient over its tensor's maximum: {worst:.1e}")


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_byte_identical(work: Path, differences: dict[str, float], case: str) -> None:
    for out in outputs(work, case):
        assert len(list((out / "hf").glob("*.safetensors"))) > 1
        assert_same_weights(out / "hf", work / case)
        assert_same_weights(out / "hf-foreign", work / case)
        assert [file.name for file in (out / "hf-foreign").glob("*.safetensors")] == ["model.safetensors"]
        for file in (work / case).iterdir():
            if file.suffix != ".safetensors":
                assert (out / "hf" / file.name).read_bytes() == file.read_bytes(), file
        manifest = read_manifest(out / "hf", kind="policy")
        assert {"config.json", "tokenizer.json"} < set(manifest.files)
        assert not list(out.glob(".*")) and not list((out / "hf").glob(".*"))


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_the_output(work: Path, differences: dict[str, float], case: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = work / f"{case}-tp2-pp1" / "hf"
    loaded: Any = AutoModelForCausalLM.from_pretrained
    model, info = loaded(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = AutoModelForCausalLM.from_pretrained(work / case)
    tokens, _ = packed_row(model.config.vocab_size)
    assert torch.equal(model(tokens).logits, expected(tokens).logits)
    messages = [{"role": "user", "content": "How many?"}]
    before, after = (AutoTokenizer.from_pretrained(path) for path in (work / case, out))
    assert before.apply_chat_template(messages) == after.apply_chat_template(messages)


def test_an_export_of_openpangu_needs_no_code(work: Path, differences: dict[str, float], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    published = Path(shutil.copytree(work / "openpangu", tmp_path / "published"))
    config, tokenizer = (json.loads((published / name).read_text()) for name in CONFIGS)
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_openpangu_dense.PanguEmbeddedForCausalLM"}}
    del config["attention_bias"]
    config |= code | {"model_type": "PanguEmbedded", "bias": True}
    tokenizer |= {"auto_map": {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]}}
    for name, content in zip(CONFIGS, (config, tokenizer), strict=True):
        (published / name).write_text(json.dumps(content))
    with pytest.raises(Exception, match=r"PanguEmbedded|custom code"):
        AutoModelForCausalLM.from_pretrained(published)
    megatron_to_hf(work / "openpangu-tp2-pp1" / "checkpoint", published, tmp_path / "out", verify=True)
    assert "auto_map" not in "".join((tmp_path / "out" / name).read_text() for name in CONFIGS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens, _ = packed_row(model.config.vocab_size)
    assert torch.equal(model(tokens).logits, AutoModelForCausalLM.from_pretrained(work / "openpangu")(tokens).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == tokenizer["eos_token"]


@pytest.fixture(scope="module")
def bf16_dir(work: Path) -> Path:
    """The tied Qwen2 model, rounded to bfloat16."""
    from transformers import AutoModelForCausalLM

    path = Path(shutil.copytree(work / "qwen2", work / "bf16"))
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    assert {tensor.dtype for tensor in tensors_of(path).values()} == {torch.bfloat16}
    return path


def test_the_tool_converts_both_ways_keeping_bfloat16(work: Path, bf16_dir: Path) -> None:
    there = ("--direction", "hf-to-megatron", "--hf-model", bf16_dir, "--out", work / "bf16-megatron")
    run_distributed(tool, 1, [str(part) for part in there])
    back = ("--direction", "megatron-to-hf", "--hf-model", bf16_dir, "--checkpoint", work / "bf16-megatron")
    # One of the two as users start it, which costs the imports once more.
    command = [sys.executable, ROOT / "tools" / "convert_checkpoint.py", *back, "--out", work / "bf16-back"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same_weights(work / "bf16-back", bf16_dir)


def tool(rank: int, world_size: int, arguments: list[str]) -> None:
    from megatron_npd.cli.convert import main

    sys.argv[1:] = arguments
    main()


def test_types_are_those_of_the_model_that_the_checkpoint_started_from(
    work: Path, bf16_dir: Path, differences: dict[str, float]
) -> None:
    checkpoint = work / "qwen2-tp2-pp1" / "checkpoint"  # of float32
    megatron_to_hf(checkpoint, bf16_dir, work / "rounded")
    assert_same_weights(work / "rounded", bf16_dir)
    with pytest.raises(UserError, match="rounded must not exist yet"):
        megatron_to_hf(checkpoint, bf16_dir, work / "rounded")
