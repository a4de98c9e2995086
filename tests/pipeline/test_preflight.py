"""What would be refused in a later stage is refused before the first one, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_npd.config.command_line import parse_config
from megatron_npd.config.run import NPDConfig
from megatron_npd.config.settings import RolloutConfig
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.platform import get_platform
from tests.helpers import make_tiny_model

get_platform("cpu")

from megatron_npd.audit.report import write_report  # noqa: E402
from megatron_npd.ops import distill_loss_triton  # noqa: E402
from megatron_npd.pipeline import runner  # noqa: E402
from megatron_npd.pipeline.preflight import HIGH_LR_TIMES_WIDTH, check_prompts, check_run  # noqa: E402
from megatron_npd.platform.cpu import Device  # noqa: E402
from megatron_npd.run_dir import RunDir  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def run_npd(cfg: NPDConfig) -> str:
    return runner.run_npd(cfg, write_report)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("preflight")
    make_tiny_model(root / "teacher", seed=1, num_hidden_layers=3)
    shutil.copytree(tiny_model_dir, root / "student")
    (root / "prompts.jsonl").write_text('{"prompt": "How many?", "response": "#### 7"}\n')
    (root / "unanswered.jsonl").write_text('{"prompt": "How many?", "response": "seven"}\n')
    return root


def config(root: Path, *flags: str) -> NPDConfig:
    names = {"teacher": "teacher", "student": "student", "prompts": "prompts.jsonl", "run_dir": "run"}
    own = [f"--{name}={root / file}" for name, file in names.items()]
    small = ["--rollout.max-model-len=128", "--train.lr=1e-4", "--train.train-iters=4", "--platform=cpu"]
    return parse_config(NPDConfig, [*own, *small, *flags])


def test_a_run_that_fits_passes(inputs: Path) -> None:
    check_run(config(inputs, f"--eval.prompts={inputs / 'prompts.jsonl'}"))
    check_run(config(inputs, "--nproc-per-node=2", "--train.tensor-model-parallel-size=2", "--annotate.bf16"))


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--teacher=/nowhere"], "--teacher must be a Hugging Face model directory"),
        (["--student="], "--student must be a Hugging Face model directory"),
        (["--prompts=/nowhere.jsonl"], "--prompts must be a JSONL or Parquet file"),
        (["--prompts=README.md"], "--prompts must be a JSONL or Parquet file"),
        (["--eval.prompts=/nowhere.jsonl"], r"--eval\.prompts must be a JSONL or Parquet file"),
        (["--run-dir=README.md/run"], "--run-dir must be a directory, .* where README.md is a file"),
        (["--eval.prompts={root}/prompts.jsonl", "--eval.answer-regex=(("], "must be a regular expression"),
        (["--eval.prompts={root}/prompts.jsonl", "--eval.answer-regex=a"], "must have a group"),
        (["--train.global-batch-size=3", "--train.micro-batch-size=2"], "global_batch_size must be a multiple"),
        (["--train.global-batch-tokens=1000"], "global_batch_tokens must be a multiple of the packs' row length"),
        (["--train.tensor-model-parallel-size=2"], "number of processes must be a multiple"),
        (["--annotate.pipeline-model-parallel-size=2"], "number of processes must be a multiple"),
        (["--nproc-per-node=4", "--train.tensor-model-parallel-size=4"], "attention heads of .*student must be"),
        (["--nproc-per-node=2", "--annotate.pipeline-model-parallel-size=2"], "layers of .*teacher must be"),
        (["--nproc-per-node=2", "--annotate.expert-model-parallel-size=2"], "experts of .*teacher must be a multiple"),
        (["--annotate.top-k=1000"], "top_k must be at most the vocabulary"),
        (["--rollout.max-model-len=1024"], r"rollout\.max_model_len must be at most the student's context \(512"),
        (["--train.kd-divergence=jsd", "--train.kd-mode=truncated"], "mode must be"),
        (
            ["--nproc-per-node=2", "--train.context-parallel-size=2", "--pack.segment-align=2"],
            "pack.segment_align must be a multiple of 2 x context_parallel_size = 4, got 2; pack with",
        ),
    ],
)
def test_what_does_not_fit_is_refused(inputs: Path, flags: list[str], match: str) -> None:
    cfg = config(inputs, *(flag.format(root=inputs) for flag in flags))
    with pytest.raises(UserError, match=match):
        run_npd(cfg)
    assert not (inputs / "run").exists(), "a start that failed leaves nothing"


def test_what_needs_a_device_is_refused(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill_loss_triton, "INTERPRETED", False)
    with pytest.raises(UserError, match=r"train\.loss_impl must be one that can run, got 'triton' with tensors on cpu"):
        run_npd(config(inputs, "--train.loss-impl=triton"))
    monkeypatch.setattr(Device, "name", "cuda")
    monkeypatch.setattr(Device, "device_names", lambda self: ["A", "B"])
    check_run(config(inputs, "--nproc-per-node=2", "--platform=auto"))
    with pytest.raises(UserError, match=r"must be at most the cuda devices that are seen there \(2\), got 3; start"):
        check_run(config(inputs, "--nproc-per-node=3", "--platform=auto"))
    assert not (inputs / "run").exists()


def change(file: str, **values: Any) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        path = model / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return write


def drop_norm(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors")


@pytest.mark.parametrize("file", sorted(ROOT.glob("examples/recipes/*.yaml")), ids=lambda file: file.stem)
def test_the_recipes_fit_and_their_rates_suit_the_widths_that_they_name(inputs: Path, file: Path) -> None:
    small = ["--rollout.max-model-len=512", "--train.train-iters=60", "--train.sequence-parallel=false"]
    small += [f"--{stage}.tensor-model-parallel-size=1" for stage in ("annotate", "train")]
    check_run(config(inputs, "--config", str(file), *small))
    shipped = parse_config(NPDConfig, ["--config", str(file)])
    assert min(shipped.annotate.seq_length, shipped.pack.seq_length) >= shipped.rollout.max_model_len
    for lr, width in ((3e-4, 576), (1e-4, 896), (5e-5, 1536), (2e-5, 2048), (1e-5, 4096), (1e-5, 8192)):
        assert lr * width < HIGH_LR_TIMES_WIDTH
    assert shipped.train.lr * 896 < HIGH_LR_TIMES_WIDTH < 2e-3 * 576


@pytest.mark.parametrize("name", ["teacher", "student"])
@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (change("config.json", logit_scale=0.5), "logit_scale = 0.5"),
        (change("config.json", hidden_act="gelu"), "hidden_act in .* must be"),
        (lambda model: (model / "config.json").write_text("{"), "must be JSON"),
        (change("config.json", vocab_size=300), "must have shape"),
        (drop_norm, r"must hold the tensor model\.norm\.weight"),
        (lambda model: (model / "model.safetensors").write_bytes(b"cut"), "safetensors"),
        (lambda model: (model / "model.safetensors").unlink(), r"model\.safetensors"),
        (lambda model: (model / "tokenizer.json").write_text("{"), "must hold a tokenizer"),
        (lambda model: (model / "tokenizer_config.json").write_text("[]"), "must hold a tokenizer"),
        (
            lambda model: (model / "generation_config.json").write_text("{"),
            r"generation_config\.json must be (JSON|a readable JSON file)",
        ),
        (lambda model: (model / "generation_config.json").write_text("[" * 100_000), r"generation_config\.json must"),
        (lambda model: (model / "generation_config.json").write_text("[]"), r"generation_config\.json must"),
        (change("generation_config.json", eos_token_id="two"), "eos_token_id"),
        (lambda model: (model / "chat_template.jinja").write_text("{% if %}"), "chat template"),
        (lambda model: (model / "chat_template.jinja").write_text("{{ messages[0].x.y }}"), "chat template"),
        (lambda model: (model / "chat_template.jinja").write_text("{{ 'a' + 5 }}"), "chat template"),
    ],
)
def test_a_damaged_model_is_refused(
    inputs: Path, tmp_path: Path, name: str, damage: Callable[[Path], None], match: str
) -> None:
    damage(shutil.copytree(inputs / name, tmp_path / name))
    with pytest.raises(UserError, match=match):
        check_run(dataclasses.replace(config(inputs, "--eval.teacher=true"), **{name: str(tmp_path / name)}))


def test_prompts_without_a_response_are_refused_where_theirs_are_mixed_in(inputs: Path, tmp_path: Path) -> None:
    lines = [{"id": "one", "prompt": "1?", "response": "1"}, {"id": "two", "prompt": "2?"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [f"--run-dir={tmp_path}/run", f"--prompts={tmp_path}/prompts.jsonl", "--rollout.dataset-fraction=0.5"]
    with pytest.raises(UserError, match=r"must all have a response with rollout.dataset_fraction 0\.5, got none for t"):
        run_npd(config(inputs, *flags))
    assert not (tmp_path / "run" / "rounds").exists()
    with pytest.raises(UserError, match=r"dataset_fraction must be 0 with responses teacher, got 0\.5"):
        config(inputs, "--responses=teacher", "--updates=0", *flags)


def test_held_out_problems_without_an_answer_are_refused_before_any_server_starts(inputs: Path, tmp_path: Path) -> None:
    cfg = config(inputs, f"--run-dir={tmp_path}/run", f"--eval.prompts={inputs / 'unanswered.jsonl'}")
    with pytest.raises(UserError, match="must have a response that answer_regex matches, got 'seven'"):
        run_npd(cfg)
    assert not (tmp_path / "run" / "rounds").exists()
    check_prompts(
        RunDir(tmp_path / "run"), dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, answer_regex="(s)"))
    )
    other = ["--eval.answer-regex=(s)", f"--prompts={inputs / 'unanswered.jsonl'}", "--annotate.top-k=1000"]
    with pytest.raises(UserError, match="top_k must be"):  # what failed before pins neither prompts nor settings
        run_npd(config(inputs, f"--run-dir={tmp_path}/run", *other))


def test_a_domain_that_prompts_lack_is_refused_before_any_server_starts(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"column subject of prompt .* must be a text, got None"):
        run_npd(config(inputs, f"--run-dir={tmp_path}/run", "--select.domain-column=subject"))
    assert not (tmp_path / "run" / "rounds").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--train.lr=2e-3", "--annotate.top-k=4"], ""),  # 64 wide
        (["--train.lr=6e-3"], "train.lr 0.006 is high for a trained model 64 wide: above 0.005"),
        (["--updates=2", "--max-lead=1"], ""),
        (["--updates=1", "--max-lead=1"], "max_lead 1 with updates 1 has all rounds generated by the student as it is"),
        (["--annotate.seq-length=64"], "samples of more than 64 tokens, the smaller one of annotate.seq_length"),
        (["--pack.seq-length=64"], "samples of more than 64 tokens (pack.seq_length) do not train"),
        (["--pack.seq-length=64", "--pack.too-long=truncate"], ""),
    ],
)
def test_what_may_be_meant_is_said(
    inputs: Path, flags: list[str], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    get_logger().addHandler(caplog.handler)
    try:
        check_run(config(inputs, *flags))
    finally:
        get_logger().removeHandler(caplog.handler)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == bool(words) and all(words in line for line in warnings)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--train.save=elsewhere"], "train.save must be left to the run, got elsewhere"),
        (["--annotate.backend=vllm", "--nproc-per-node=2"], "annotate.urls must be given with backend vllm"),
        (["--rollout.server-args=--max-model-len=99"], "server_args must be without --max-model-len"),
    ],
)
def test_settings_that_would_be_overridden_are_refused(inputs: Path, flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config(inputs, *flags)
    RolloutConfig(server_args=("--max-num-batched-tokens", "4096"))


@pytest.mark.parametrize("flags", [["--teacher=/nowhere"], ["--teacher=tests", "--train.lr=x"], ["--trian.lr=3"]])
def test_paths_and_flags_are_checked_before_anything_heavy_is_imported(flags: list[str]) -> None:
    code = "import sys; sys.modules |= dict.fromkeys(('torch', 'megatron.core', 'transformers', 'pyarrow', 'vllm')); "
    code += f"sys.argv = ['tools/run_npd.py', *{flags!r}]; import runpy; sys.path[0] = 'tools'; "
    code += "runpy.run_path('tools/run_npd.py', run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: ")
