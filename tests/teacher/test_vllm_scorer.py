"""A teacher behind a vLLM server: the same records as on megatron-core, and what a server refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_npd.cli.annotate import main as command
from megatron_npd.config.settings import AnnotateConfig
from megatron_npd.errors import UserError
from megatron_npd.manifest import read_manifest
from megatron_npd.models.families import FAMILIES
from megatron_npd.serving import asking
from megatron_npd.serving.pool import ServerPool
from megatron_npd.teacher.vllm_scorer import ServerScorer
from megatron_npd.weights import model_fingerprint
from tests.dist import run_distributed
from tests.helpers import make_tiny_model
from tests.serving.fake import FakeServer
from tests.teacher.reference import TransformersModel, check_top_k, make_rollouts
from tests.teacher.test_annotate import LENGTHS, annotate, assert_samples_close, contents, rollout_rows

TOP_K = 6


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("score") / "student", family="llama", seed=2)


def settings(*urls: str, **fields: Any) -> AnnotateConfig:
    return AnnotateConfig(**{"top_k": TOP_K, "seq_length": 128, "backend": "vllm", "urls": urls, **fields})


def teacher_server(teacher_dir: Path) -> FakeServer:
    server = FakeServer()
    server.max_model_len = 256
    server.headers_of = lambda directory: {"fingerprint": model_fingerprint(teacher_dir)}
    return server


@pytest.mark.server
def test_servers_leave_the_records_of_megatron_core(
    served_pool: ServerPool,
    token_file: Path,
    tiny_model_dir: Path,
    student_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a teacher that no family covers: its directory is read for its sizes and tokenizer alone."""
    from megatron_npd.store.annotation_store import AnnotationStore

    make_rollouts(tmp_path / "rollouts", LENGTHS)
    models = {"teacher_dir": tiny_model_dir, "student_dir": student_dir}
    annotate(tmp_path / "rollouts", tmp_path / "core", models, AnnotateConfig(top_k=TOP_K, seq_length=128))
    flags = {
        "rollouts": tmp_path / "rollouts",
        "out": tmp_path / "served",
        "teacher": tiny_model_dir,
        "student": student_dir,
    }
    flags |= {
        "top-k": TOP_K,
        "seq-length": 128,
        "backend": "vllm",
        "urls": served_pool.urls[0],
        "token-file": token_file,
        "platform": "cpu",
    }

    def arguments(**changed: str) -> list[str]:
        return [f"--{name}={value}" for name, value in (flags | changed).items()]

    monkeypatch.delitem(FAMILIES, "Qwen2ForCausalLM")
    with pytest.raises(UserError, match="must be one of LlamaForCausalLM"):
        command(arguments(backend="megatron", urls="[]"))
    command(arguments())

    core, served = AnnotationStore(tmp_path / "core"), AnnotationStore(tmp_path / "served")
    assert read_manifest(tmp_path / "served").counts == read_manifest(tmp_path / "core").counts
    assert read_manifest(tmp_path / "served").provenance["backend"] == "vllm"
    teacher = TransformersModel(tiny_model_dir)
    for index, row in enumerate(rollout_rows(tmp_path / "rollouts")):
        reference = teacher(row["prompt_ids"], row["response_ids"]).logprobs
        ours, theirs = core.teacher(index), served.teacher(index)
        for records in (ours, theirs):
            check_top_k(records["ids"], records["logprobs"], reference, 4e-3)  # fp16
        np.testing.assert_allclose(theirs["log_tail"], ours["log_tail"], atol=4e-3)
        np.testing.assert_array_equal(served.generator(index), core.generator(index))
        assert served.tokens(index).tolist() == core.tokens(index).tolist()
    assert_samples_close(tmp_path / "served", tmp_path / "core")


@pytest.mark.server
def test_a_server_of_another_model_is_refused(served_pool: ServerPool, token_file: Path, student_dir: Path) -> None:
    with (
        ServerScorer(student_dir, settings(served_pool.urls[0], token_file=str(token_file))) as scorer,
        pytest.raises(UserError, match=r"must serve the teacher .*student, got a model with other files"),
    ):
        scorer.score([np.array([5])], [np.array([6, 7])], top_k=TOP_K)


def test_a_server_that_gives_too_few_logprobs_is_refused(student_dir: Path, tmp_path: Path) -> None:
    make_rollouts(tmp_path / "rollouts", LENGTHS)
    with teacher_server(student_dir) as server:
        server.trouble = lambda body: 400 if body["sampling_params"].get("prompt_logprobs", 0) > 4 else None
        with (
            ServerScorer(student_dir, settings(server.url)) as scorer,
            pytest.raises(UserError, match=r"must give 6 \(top_k\) prompt_logprobs, got 400: .*--max-logprobs 6"),
        ):
            scorer.score([np.array([5])], [np.array([6, 7])], top_k=TOP_K)


def test_a_sequence_that_a_server_refuses_is_set_aside(student_dir: Path, tmp_path: Path) -> None:
    from megatron_npd.teacher.annotate import annotate_round

    make_rollouts(tmp_path / "rollouts", LENGTHS)
    longest = max(prompt + response for prompt, response in LENGTHS)
    with teacher_server(student_dir) as server:
        server.trouble = lambda body: 400 if len(body["token_ids"]) == longest else None
        cfg = settings(server.url, max_quarantined=0.2)
        with ServerScorer(student_dir, cfg) as servers:
            models = {"teacher_dir": student_dir, "student_dir": student_dir}
            manifest = annotate_round(tmp_path / "rollouts", tmp_path / "out", **models, cfg=cfg, servers=servers)
    assert manifest is not None
    assert manifest.counts["quarantined"] == {"sampled_logprob_undefined": 1} and manifest.counts["kept"] == 7


GOOD = [None, {"6": {"logprob": -0.7}, "3": {"logprob": -1.7}}, {"7": {"logprob": -0.7}, "3": {"logprob": -1.7}}]
NONSENSE = {
    "none": None,
    "a string": "text",
    "too short": GOOD[:2],
    "a null position": [None, GOOD[1], None],
    "another token": [None, GOOD[1], GOOD[1]],
    "too few": [None, GOOD[1], {"7": {"logprob": -0.7}}],
    "words": [None, GOOD[1], {"7": {"logprob": -0.7}, "x": {"logprob": -1.7}}],
    "outside the vocabulary": [None, GOOD[1], {"7": {"logprob": -0.7}, "304": {"logprob": -1.7}}],
    "no number": [None, GOOD[1], {"7": {"logprob": "x"}, "3": {"logprob": -1.7}}],
    "undefined": [None, GOOD[1], {"7": {"logprob": -9999.0}, "3": {"logprob": -1.7}}],
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_asked_for_again_then_set_aside(
    student_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(asking, "_RETRY_DELAYS", (0.0, 0.0))

    def send(positions: object) -> bytes:
        return json.dumps({"choices": [{"token_ids": [3]}], "prompt_logprobs": positions}).encode()

    asked: list[list[int]] = []

    def trouble(body: dict[str, Any]) -> bytes | None:
        if body["token_ids"] not in ([5, 6, 7], [9, 6, 7]):
            return None
        asked.append(body["token_ids"])
        always = body["token_ids"][0] == 9
        return send(NONSENSE[name] if always or asked.count(body["token_ids"]) == 1 else GOOD)

    with teacher_server(student_dir) as server:
        server.trouble = trouble
        with ServerScorer(student_dir, settings(server.url, top_k=2)) as scorer:
            prefixes, responses = [np.array([5]), np.array([9])], [np.array([6, 7])] * 2
            scores = scorer.score(prefixes, responses, top_k=2)
    assert scores.sampled_logprobs_R.tolist()[:2] == pytest.approx([-0.7, -0.7])
    assert scores.ids_RK is not None and scores.ids_RK.tolist() == [[6, 3], [7, 3], [0, 0], [0, 0]]
    assert np.isnan(scores.sampled_logprobs_R[2:]).all()


def _annotate_rank(rank: int, world_size: int, rollouts: Path, out: Path, student_dir: Path, url: str) -> None:
    from megatron_npd.teacher.annotate import annotate_round

    cfg = settings(url)
    with ServerScorer(student_dir, cfg) as servers:
        annotate_round(rollouts, out, teacher_dir=student_dir, student_dir=student_dir, cfg=cfg, servers=servers)


def test_ranks_share_the_shards(student_dir: Path, tmp_path: Path) -> None:
    make_rollouts(tmp_path / "rollouts", LENGTHS, shards=3)
    with teacher_server(student_dir) as server:
        for world_size, name in ((1, "one"), (2, "two")):
            run_distributed(_annotate_rank, world_size, tmp_path / "rollouts", tmp_path / name, student_dir, server.url)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_urls_go_with_the_backend() -> None:
    with pytest.raises(UserError, match=r"urls must be empty, got .*backend vllm"):
        AnnotateConfig(urls=("http://a",))
