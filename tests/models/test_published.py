"""Published models: which are taken and which refused, by docs/models.md, and small ones against transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_npd.data.tokenizer import generation_prompt, load_model_tokens
from megatron_npd.errors import UserError
from megatron_npd.models.families import FAMILIES, load_spec
from tests.dist import run_distributed
from tests.helpers import make_tiny_model, make_tiny_tokenizer
from tests.models.common import packed_inputs
from tests.models.published import ACCEPTED, REFUSED, scaled_down

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, config: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_published_model_is_taken(tmp_path: Path, name: str) -> None:
    config = ACCEPTED[name]
    spec = load_spec(write(tmp_path, config))
    assert (spec.num_layers, spec.vocab_size) == (config["num_hidden_layers"], config["vocab_size"])
    assert spec.tied == config["tie_word_embeddings"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_published_model_is_refused_by_name_with_what_runs_it(tmp_path: Path, name: str) -> None:
    key, config = REFUSED[name]
    with pytest.raises(UserError, match=rf"{key}.*--annotate\.backend vllm"):
        load_spec(write(tmp_path, config))


def test_the_documents_table_is_this_one() -> None:
    rows = re.findall(r"^\| (.+?) \| .+ \| (yes|no) \|", (ROOT / "docs" / "models.md").read_text(), re.MULTILINE)
    found = {name: answer for names, answer in rows for name in names.split(", ")}
    assert found == dict.fromkeys(ACCEPTED, "yes") | dict.fromkeys(REFUSED, "no")


def test_every_family_has_a_published_model() -> None:
    assert {config["architectures"][0] for config in ACCEPTED.values()} == set(FAMILIES)


def _logits(rank: int, world: int, root: Path) -> dict[str, torch.Tensor]:
    from megatron_npd.models.build import build_model, load_hf_weights, packed_params
    from megatron_npd.platform.initialize import initialize_distributed

    initialize_distributed()
    found = {}
    for path in sorted(root.iterdir()):
        spec = load_spec(path)
        model = build_model(spec)
        load_hf_weights(model, spec)
        tokens, positions, bounds = packed_inputs([40, 9], spec.vocab_size)
        with torch.no_grad():
            found[path.name] = model(tokens, positions, None, packed_seq_params=packed_params(bounds))[0]
    return found


def test_scaled_down_they_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    expected, made = {}, {}
    for config in ACCEPTED.values():
        small: dict[str, Any] = {"family": FAMILIES[config["architectures"][0]].name} | scaled_down(config)
        name = made.setdefault(json.dumps(small, sort_keys=True), str(len(made)))
        if name in expected:
            continue  # the same as another one's
        path = make_tiny_model(tmp_path / name, **small)
        tokens, _, bounds = packed_inputs([40, 9], small["vocab_size"])
        model = AutoModelForCausalLM.from_pretrained(path)
        pieces = tokens.split(bounds.diff().tolist(), dim=1)
        with torch.no_grad():
            expected[name] = torch.cat([model(piece).logits[0] for piece in pieces])
    assert len(expected) > len(FAMILIES)
    [found] = run_distributed(_logits, 1, tmp_path)
    for name, logits_TV in expected.items():
        assert (found[name] - logits_TV).abs().max() < 1e-5, list(made)[int(name)]


# As openPangu-Embedded's: roles in Chinese between [unused9] and [unused10], the EOS; a system turn always.
PANGU_TEMPLATE = """
{%- for message in messages %}
{%- if loop.first and message.role != 'system' %}{{- '[unused9]系统：[unused10]' }}{%- endif %}
{%- set names = {'system': '系统', 'user': '用户', 'assistant': '助手', 'tool': '工具'} %}
{{- '[unused9]' + names[message.role] + '：' + message.content + '[unused10]' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '[unused9]助手：' }}{%- endif %}
"""


def test_turns_of_openpangu_open_and_end_with_unused_tokens(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer(tmp_path, vocab_size=290)
    tokenizer.add_tokens([f"[unused{i}]" for i in range(9, 18)], special_tokens=True)
    tokenizer.eos_token, tokenizer.chat_template = "[unused10]", PANGU_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    nine, ten = (tokenizer.convert_tokens_to_ids(f"[unused{i}]") for i in (9, 10))
    write(tmp_path, ACCEPTED["openPangu-Embedded-1B"] | {"eos_token_id": ten})
    model = load_model_tokens(tmp_path)
    assert model.stop_ids == (ten,)
    opening = generation_prompt(model.tokenizer)
    assert opening[0] == nine and model.tokenizer.decode(opening) == "[unused9]助手："
