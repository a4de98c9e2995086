"""The real vLLM server: its answers equal transformers', before and after a refresh, whatever the load."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_npd.config.settings import RolloutConfig
from megatron_npd.data.prompts import prepare_prompts
from megatron_npd.data.tokenizer import load_model_tokens
from megatron_npd.errors import UserError
from megatron_npd.manifest import read_manifest, seal
from megatron_npd.records import ROLLOUTS_FILE
from megatron_npd.rollout.evaluate import exact_match
from megatron_npd.rollout.generate import generate_round
from megatron_npd.serving.access import bearer, proves_secret
from megatron_npd.serving.pool import ServerPool
from megatron_npd.serving.protocol import Failure, Request, Response
from megatron_npd.serving.refresh import refresh
from megatron_npd.serving.server import GENERATE, tag
from megatron_npd.weights import EMBEDDING, HEAD, INDEX_FILE, SINGLE_FILE, read_weights
from tests.helpers import CHAT_TEMPLATE, make_tiny_model, make_tiny_tokenizer
from tests.serving.fake import write_prompts

pytestmark = pytest.mark.server


def make_requests(count: int, temperature: float = 0.0) -> list[Request]:
    """Prompts of 3 to 100 tokens."""
    rng = np.random.default_rng(5)
    return [
        Request(
            key=i,
            token_ids=rng.integers(3, 300, n).tolist(),
            max_tokens=16,
            stop_ids=[2],
            temperature=temperature,
            seed=i,
        )
        for i, n in enumerate(np.linspace(3, 100, count).astype(int))
    ]


def ask(pool: ServerPool, count: int = 12, temperature: float = 0.0) -> list[tuple[list[int], Response]]:
    """Some prompts and the responses to them."""
    answers: dict[int, tuple[list[int], Response]] = {}

    def on_result(request: Request, answer: Response | Failure) -> None:
        assert isinstance(answer, Response), answer
        answers[request.key] = (list(request.token_ids), answer)

    pool.run(make_requests(count, temperature), on_result)
    return [answers[i] for i in range(count)]


def assert_equal_to_transformers(model_dir: Path, answers: list[tuple[list[int], Response]], greedy: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for prompt, answer in answers:
        with torch.no_grad():
            logits_TV = model(torch.tensor([prompt + answer.token_ids])).logits[0, len(prompt) - 1 : -1]
        logprobs_TV = torch.log_softmax(logits_TV, dim=-1)
        if greedy:
            assert logprobs_TV.argmax(dim=-1).tolist() == answer.token_ids
        expected_T = logprobs_TV[torch.arange(len(answer.token_ids)), answer.token_ids]
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected_T, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_answers_equal_transformers(served_pool: ServerPool, tiny_model_dir: Path, temperature: float) -> None:
    answers = ask(served_pool, temperature=temperature)
    assert_equal_to_transformers(tiny_model_dir, answers, greedy=temperature == 0.0)
    assert {answer.versions for _, answer in answers} == {(tag("v0000", read_weights(tiny_model_dir).content_hash()),)}


def test_given_responses_are_scored_as_transformers_scores_them(served_pool: ServerPool, tiny_model_dir: Path) -> None:
    rng, answers = np.random.default_rng(6), dict[int, tuple[list[int], Response]]()
    requests = [replace(request, given=rng.integers(3, 300, 3 + request.key).tolist()) for request in make_requests(8)]

    def on_result(request: Request, answer: Response | Failure) -> None:
        assert isinstance(answer, Response), answer
        answers[request.key] = (list(request.token_ids), answer)

    served_pool.run(requests, on_result)
    assert [answers[request.key][1].token_ids for request in requests] == [request.given for request in requests]
    assert_equal_to_transformers(tiny_model_dir, list(answers.values()), greedy=False)
    assert {answer.versions for _, answer in answers.values()} == {
        (tag("v0000", read_weights(tiny_model_dir).content_hash()),)
    }


def test_responses_end_at_the_turn_end_of_the_template(
    served_pool: ServerPool, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The server stops at the model's EOS (2) by itself, the template ends turns with another token."""
    tokenizer = make_tiny_tokenizer(tmp_path)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>")
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": f"{i} + 1?"}) + "\n" for i in range(60)))
    prompts = tmp_path / "prompts"
    prepare_prompts(tmp_path / "in.jsonl", prompts, model=load_model_tokens(tmp_path), max_prompt_len=100)
    cfg = RolloutConfig(max_model_len=256, max_tokens=24, greedy_paths=0, sampled_paths=2, merge_identical=False)
    generate_round(prompts, tmp_path / "out", pool=served_pool, cfg=cfg, round_index=0, policy_version="v0000")
    assert read_manifest(tmp_path / "out").provenance["stop_ids"] == [0, 2]
    rows = pq.read_table(tmp_path / "out" / "shard-00000" / ROLLOUTS_FILE).to_pylist()
    ends = {row["response_ids"][-1] for row in rows if row["finish_reason"] == "stop"}
    assert ends == {0, 2}
    for row in rows:
        inside = row["response_ids"][:-1] if row["finish_reason"] == "stop" else row["response_ids"]
        assert not {0, 2} & set(inside), row


def test_round_is_the_same_whatever_the_concurrency(served_pool: ServerPool, tmp_path: Path) -> None:
    cfg = RolloutConfig(max_model_len=256, max_tokens=12, shard_size=32, sampled_paths=1)
    prompts = write_prompts(tmp_path / "prompts", [4 + 2 * i for i in range(24)])
    files = []
    for concurrency in (24, 3):
        out = tmp_path / f"concurrency{concurrency}"
        pool = ServerPool(served_pool.urls, replace(cfg, concurrency=concurrency), token=served_pool.token)
        manifest = generate_round(prompts, out, pool=pool, cfg=cfg, round_index=0, policy_version="v0000")
        assert manifest.counts["kept"] == 48
        files.append([pq.read_table(shard / ROLLOUTS_FILE) for shard in sorted(out.glob("shard-*"))])
    assert files[0] == files[1]
    rows = files[0][0].to_pylist()
    assert any(a["response_ids"] != b["response_ids"] for a, b in zip(rows[::2], rows[1::2], strict=True))


def test_answers_after_a_refresh_equal_transformers_on_the_new_weights(
    restored_pool: ServerPool, tiny_model_dir: Path, other_model_dir: Path
) -> None:
    before = ask(restored_pool)
    for version, model_dir in (("v0001", other_model_dir), ("v0002", tiny_model_dir), ("v0003", other_model_dir)):
        refresh(restored_pool, model_dir, version)
        assert restored_pool.version(restored_pool.urls[0]) == version
        answers = ask(restored_pool)  # the prompts of before: a stale prefix cache or head would show
        assert_equal_to_transformers(model_dir, answers, greedy=True)
        assert {answer.versions for _, answer in answers} == {(tag(version, read_weights(model_dir).content_hash()),)}
        same = [answer.token_ids for _, answer in answers] == [answer.token_ids for _, answer in before]
        assert same == (model_dir == tiny_model_dir)


def test_bad_directories_are_refused_and_the_old_version_serves_on(
    served_pool: ServerPool, other_model_dir: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    def copy(name: str) -> Path:
        return Path(shutil.copytree(other_model_dir, tmp_path / name))

    weights = load_file(other_model_dir / "model.safetensors")
    bad = {
        "truncated": r"must be a whole safetensors file, got \d+ bytes where",
        "missing": r"tensor model.norm.weight = nothing for F32 \[64\]",
        "shape": r"tensor model.norm.weight = F32 \[32\] for F32 \[64\]",
        "type": r"tensor model.norm.weight = BF16 \[64\] for F32 \[64\]",
        "config": r"config key rms_norm_eps = 0.1 for 1e-06",
        "sealed": r"must have sha256",
        "empty": r"must be a Hugging Face model directory, got no config.json",
        "undefined": r"model.norm.weight in .* must hold finite numbers, got NaN or infinity",
        "two": r"must hold one copy of its weights, .*got consolidated.safetensors beside it",
    }
    data = (copy("truncated") / "model.safetensors").read_bytes()
    (tmp_path / "truncated" / "model.safetensors").write_bytes(data[:-100])
    norm = "model.norm.weight"
    save_file({k: v for k, v in weights.items() if k != norm}, copy("missing") / "model.safetensors")
    save_file(weights | {norm: weights[norm][:32].clone()}, copy("shape") / "model.safetensors")
    save_file(weights | {norm: weights[norm].bfloat16()}, copy("type") / "model.safetensors")
    save_file(
        weights | {norm: weights[norm].index_fill(0, torch.tensor(7), np.nan)}, copy("undefined") / "model.safetensors"
    )
    save_file(weights, copy("two") / "consolidated.safetensors")
    config = json.loads((copy("config") / "config.json").read_text())
    (tmp_path / "config" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    seal(copy("sealed"), kind="policy")
    flipped = bytearray(data)
    flipped[-5] ^= 1
    (tmp_path / "sealed" / "model.safetensors").write_bytes(flipped)
    (tmp_path / "empty").mkdir()

    before = ask(served_pool)
    for name, message in bad.items():
        with pytest.raises(UserError, match=message):
            refresh(served_pool, tmp_path / name, "v0009")
    assert served_pool.version(served_pool.urls[0]) == "v0000"
    assert ask(served_pool) == before


def test_every_way_to_hold_a_tied_model_is_served_alike(
    restored_pool: ServerPool, other_model_dir: Path, tmp_path: Path
) -> None:
    """An output layer that is saved too or saved alone, in shards, and with buffers that older releases left behind."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(other_model_dir / SINGLE_FILE)
    shutil.copytree(other_model_dir, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(tmp_path / "copy", tmp_path / "alone")
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    parts = {"x-1.safetensors": {HEAD: tensors[EMBEDDING].clone()} | frequencies, "x-2.safetensors": tensors}
    index = {name: file for file, part in parts.items() for name in part}
    for file, part in parts.items():
        save_file(part, tmp_path / "copy" / file)
    (tmp_path / "copy" / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    tensors[HEAD] = tensors.pop(EMBEDDING)
    save_file(tensors | frequencies, tmp_path / "alone" / SINGLE_FILE, metadata={"format": "pt"})

    content = read_weights(other_model_dir).content_hash()
    for name in ("copy", "alone"):
        refresh(restored_pool, tmp_path / name, "v0001")
        answers = ask(restored_pool)
        assert {answer.versions for _, answer in answers} == {(tag("v0001", content),)}
        assert_equal_to_transformers(tmp_path / name, answers, greedy=True)


def test_a_file_that_is_exchanged_while_servers_load_is_found(
    restored_pool: ServerPool, other_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Path(shutil.copytree(other_model_dir, tmp_path / "policy"))
    another = make_tiny_model(tmp_path / "another", seed=2)
    call = restored_pool.call_worker

    def exchange_then_call(url: str, method: str, *args: str, **options: float) -> dict:
        if method == "npd_load":
            shutil.copy(another / SINGLE_FILE, policy / SINGLE_FILE)
        return call(url, method, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(restored_pool, "call_worker", exchange_then_call)
        before = ask(restored_pool)
        with pytest.raises(UserError, match=r"must stay as it is while servers load it, got"):
            refresh(restored_pool, policy, "v0001")
    restored_pool.check(version="v0000")  # which it knows where to load from
    assert ask(restored_pool) == before


@pytest.mark.timeout(1200)
def test_a_killed_server_is_started_again_with_the_policy_of_the_others(
    tiny_model_dir: Path, other_model_dir: Path, tmp_path: Path
) -> None:
    """In the middle of its work: the other one answers meanwhile, and nothing tells which of them answered what."""
    cfg = RolloutConfig(num_servers=2, max_model_len=256, concurrency=4, start_timeout=900.0)
    requests, results = make_requests(40), {}
    with ServerPool.open(tiny_model_dir, cfg, version="v0000", log_dir=tmp_path) as pool:
        refresh(pool, other_model_dir, "v0001")
        expected = dict(enumerate(answer for _, answer in ask(pool, count=len(requests))))
        doomed = pool.servers[pool.urls[0]].process
        assert doomed is not None

        def on_result(request: Request, result: Response | Failure) -> None:
            results[request.key] = result
            if len(results) == 10:
                os.killpg(doomed.pid, signal.SIGKILL)

        pool.run(requests, on_result)
        assert_same(results, expected)
        pool.find_all()
        assert sorted(pool.urls) == sorted(pool.servers) and not pool.lost
        assert pool.check(version="v0001") == tag("v0001", read_weights(other_model_dir).content_hash())
        assert_same(dict(enumerate(answer for _, answer in ask(pool, count=len(requests)))), expected)
        refresh(pool, tiny_model_dir, "v0002")
        pool.check(version="v0002")


def assert_same(results: dict[int, Response | Failure], expected: dict[int, Response]) -> None:
    """The same tokens of the same policy; log-probabilities differ with what is computed beside them."""
    assert results.keys() == expected.keys()
    for key, result in results.items():
        assert isinstance(result, Response), result
        assert (result.token_ids, result.versions) == (expected[key].token_ids, expected[key].versions)
        assert result.logprobs == pytest.approx(expected[key].logprobs, abs=1e-4)


def test_what_overflows_is_set_aside_and_leaves_nothing_behind(
    restored_pool: ServerPool, tiny_model_dir: Path, other_model_dir: Path, tmp_path: Path
) -> None:
    """Finite weights whose products are not: NaN goes into the KV pages, where a refresh alone would leave it."""
    from safetensors.torch import load_file, save_file

    policy = Path(shutil.copytree(tiny_model_dir, tmp_path / "policy"))
    tensors = load_file(policy / SINGLE_FILE)
    for name in tensors:
        if "v_proj.weight" in name or "o_proj" in name or "down_proj" in name:
            tensors[name] *= 1e38
    save_file(tensors, policy / SINGLE_FILE)
    (url,) = restored_pool.urls
    requests = [Request(key=i, token_ids=[3 + i] * 240, max_tokens=2, stop_ids=[2]) for i in range(60)]
    cleared: list[str] = []

    def results(pool: ServerPool) -> list[Response | Failure]:
        cleared.clear()
        found: list[Response | Failure] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pool, "clear", lambda url: cleared.append(url))  # counts only: NaN stays in the pages
            pool.run(requests, lambda _, result: found.append(result))
        return found

    with pytest.raises(UserError, match=r"v0001-\w+ must give the log-probabilities of 16 given tokens, got .*Out of"):
        refresh(restored_pool, policy, "v0001")
    assert restored_pool.version(url) == "v0000"
    assert_equal_to_transformers(tiny_model_dir, ask(restored_pool), greedy=True)
    # As what overflows on some prompts only:
    weights = restored_pool.call_worker(url, "npd_load", str(policy))["weights"]
    restored_pool.control(url, "/update_weight_version", body={"new_version": tag("v0001", weights)})
    with pytest.raises(UserError, match=r"must give defined log-probabilities, got NaN with the weights v0001-\w+ for"):
        results(restored_pool)
    assert cleared == 2 * restored_pool.urls  # for what was undefined, and for the trivial request
    refresh(restored_pool, other_model_dir, "v0002")
    assert all(isinstance(result, Response) for result in results(restored_pool)) and not cleared
    assert_equal_to_transformers(other_model_dir, ask(restored_pool), greedy=True)


def test_nothing_is_open_without_the_token(served_pool: ServerPool) -> None:
    url = served_pool.urls[0]
    with httpx.Client(base_url=url, trust_env=False, headers=bearer(served_pool.token)) as client:
        paths = client.get("/openapi.json").status_code, client.get("/nowhere").status_code
        assert paths == (403, 403)
    routes = [
        "/health",
        "/metrics",
        "/metrics/",
        "/version",
        "/v1/models",
        "/weight_info",
        "/is_paused",
        "/server_info",
    ]
    routes += ["/collective_rpc", "/pause", "/resume", "/update_weights", "/update_weight_version", "/sleep", "/docs"]
    routes += [
        "/reset_prefix_cache",
        "/init_weight_transfer_engine",
        "/openapi.json",
        "/ping",
        "/invocations",
        GENERATE,
    ]
    routes += ["/v1/completions", "//collective_rpc", "/v1/../collective_rpc", "/%63ollective_rpc", "/nowhere"]
    for token in ("", "wrong", served_pool.token[:-1], f"{served_pool.token}x"):
        with httpx.Client(base_url=url, trust_env=False, headers=bearer(token)) as client:
            for route in routes:
                for method in ("GET", "POST", "OPTIONS", "HEAD", "DELETE"):
                    assert client.request(method, route).status_code == 401, (method, route)
    pool = ServerPool([url], replace(served_pool.cfg, token_file=""))
    for ask_it in (pool.check, lambda: pool.run([], print), lambda: refresh(pool, "/nowhere", "v0001")):
        with pytest.raises(UserError):
            ask_it()
    with pytest.raises(UserError, match=f"requests to {url} must carry its token, got none; give --token-file"):
        pool.check()
    assert proves_secret(url, served_pool.servers[url].secret) and not proves_secret(url, served_pool.token)


@pytest.mark.parametrize(
    "call",
    [
        {"method": "save_sharded_state", "args": ["/tmp/x"]},
        {"method": "npd_load", "args": ["/nowhere"], "kwargs": {}},
        {"method": "npd_load", "args": [{}]},
        {"method": "_npd_first", "args": []},
        {"method": ["npd_load"], "args": []},
        [],
        "npd_describe",
    ],
)
def test_only_our_methods_are_called_with_the_token(served_pool: ServerPool, call: object) -> None:
    with httpx.Client(base_url=served_pool.urls[0], trust_env=False, headers=bearer(served_pool.token)) as client:
        answer = client.post("/collective_rpc", json=call)
        assert answer.status_code == 403 and "npd_describe" in answer.json()["error"]
        assert client.post("/collective_rpc", content=b"[" * 100_000).status_code == 403
        for closed in ("/update_weights", "/init_weight_transfer_engine", "/sleep", "/server_info", "/v1/../sleep"):
            assert client.post(closed, json={}).status_code == 403


def test_the_token_is_nowhere_that_others_see(served_pool: ServerPool) -> None:
    (server,) = served_pool.servers.values()
    assert server.process is not None
    assert served_pool.token not in Path(f"/proc/{server.process.pid}/cmdline").read_text()
    assert served_pool.token not in server.log_path.read_text()
    assert server.log_path.stat().st_mode & 0o777 == 0o600
    listening = Path(f"/proc/{server.process.pid}/net/tcp").read_text().splitlines()
    local = [line.split()[1] for line in listening[1:] if line.split()[3] == "0A"]
    assert [address for address in local if address.endswith(f":{server.port:04X}")] == [f"0100007F:{server.port:04X}"]


def test_exact_match_asks_the_real_server(served_pool: ServerPool, tiny_model_dir: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts", [10, 20, 30])
    result = exact_match(
        served_pool,
        prompts,
        answer_regex=r"####\s*(\S+)",
        tokenizer=AutoTokenizer.from_pretrained(tiny_model_dir),
        max_tokens=8,
    )
    assert (result.correct, result.total, result.accuracy) == (0, 3, 0.0)
    assert result.wrong[2]["expected"] == "2" and result.wrong[2]["got"] is None and result.wrong[2]["response"]
    assert 0 < result.tokens <= 24
