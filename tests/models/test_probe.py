"""What an export knows of its policy: the log-probabilities of a few tokens, beside transformers' on what it wrote.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_npd.errors import UserError
from megatron_npd.manifest import MANIFEST, read_manifest, seal
from megatron_npd.models import known
from megatron_npd.probe import PROBED, known_probe
from megatron_npd.weights import read_weights
from tests.dist import run_distributed
from tests.helpers import make_tiny_model
from tests.models.test_convert import CASES


def export_all(rank: int, world_size: int, work: Path, names: list[str]) -> None:
    from megatron_npd.models.convert import hf_to_megatron, megatron_to_hf

    for name in names:
        hf_to_megatron(work / name, work / f"{name}-checkpoint")
        megatron_to_hf(work / f"{name}-checkpoint", work / name, work / f"{name}-policy")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("probe")
    for name, fields in CASES.items():
        make_tiny_model(work / name, **fields)
    AutoModelForCausalLM.from_pretrained(make_tiny_model(work / "bf16"), dtype=torch.bfloat16).save_pretrained(
        work / "bf16"
    )
    run_distributed(export_all, 1, work, [*CASES, "bf16"])
    return work


@pytest.mark.parametrize("name", [*CASES, "bf16"])
def test_an_export_knows_what_transformers_computes_with_it(exported: Path, name: str) -> None:
    policy = exported / f"{name}-policy"
    weights, told = known_probe(policy) or ("", {})
    assert weights == read_manifest(policy).provenance["weights"] and len(told["ids"]) == PROBED
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    ids = torch.tensor([told["ids"]])
    with torch.no_grad():
        logprobs_TV = torch.log_softmax(model(ids).logits[0, :-1], dim=-1)
    expected_T = logprobs_TV.gather(1, ids[0, 1:, None])[:, 0]
    assert told["dtype"] == ("torch.bfloat16" if name == "bf16" else "torch.float32")
    torch.testing.assert_close(torch.tensor(told["logprobs"]), expected_T, atol=1e-4, rtol=0)
    assert logprobs_TV.std() > 0.1  # a model that says the same of every token would prove nothing


def test_what_would_take_minutes_is_left_out(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, sizes = exported / "bf16-policy", read_weights(exported / "bf16-policy").nbytes
    monkeypatch.setattr(known, "MOST_BYTES", sizes)
    assert known.known_logprobs(policy, 304) is not None
    monkeypatch.setattr(known, "MOST_BYTES", sizes - 1)
    assert known.known_logprobs(policy, 304) is None


def test_a_directory_that_no_export_made_knows_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert known_probe(tiny_model_dir) is None
    (tmp_path / "config.json").write_text("{}")
    seal(tmp_path, kind="policy", provenance={"weights": "0123456789abcdef"})
    assert known_probe(tmp_path) is None


@pytest.mark.parametrize("value", [[1.0], "nothing", {"ids": [0] * 16, "logprobs": [-1.0] * 14 + [None]}])
def test_what_is_no_probe_is_refused(tmp_path: Path, value: object) -> None:
    (tmp_path / "config.json").write_text("{}")
    seal(tmp_path, kind="policy", provenance={"weights": "0123456789abcdef", "probe": value})
    assert json.loads((tmp_path / MANIFEST).read_text())["provenance"]["probe"] == value
    with pytest.raises(UserError, match=r"must give the log-probabilities of 16 tokens, got .*; export it again"):
        known_probe(tmp_path)
