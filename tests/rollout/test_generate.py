"""Rounds of rollouts: order, books, restarts and troubles, on a stand-in server."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_npd.config.settings import RolloutConfig
from megatron_npd.errors import UserError
from megatron_npd.manifest import MANIFEST, Manifest, is_sealed, read_manifest, seal, writing
from megatron_npd.quarantine import QUARANTINE_FILE
from megatron_npd.records import PROMPTS_FILE, ROLLOUT_SCHEMA, ROLLOUTS_FILE, SEEDS, sample_id, sample_seed
from megatron_npd.rollout import shard as shard_module
from megatron_npd.rollout.generate import generate_round
from megatron_npd.rollout.journal import Journal, Recorded
from megatron_npd.serving import asking
from megatron_npd.serving.pool import ServerPool
from megatron_npd.stoppable import Worker
from tests.serving.fake import CONTENT, EOS, ROUND, VOCAB_SIZE, FakeServer, die_after, fake_answer, write_prompts

CFG = dataclasses.replace(ROUND, request_timeout=5.0)
FIRST_JOURNAL = "responses-00000.journal"
PROMPTS = 12  # with three paths: 36 samples, in shards of 15, 15 and 6


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("in") / "prompts", [5 + i for i in range(PROMPTS)])


def generate(prompts: Path, out: Path, *servers: FakeServer, cfg: RolloutConfig = CFG) -> Manifest:
    pool = ServerPool([server.url for server in servers], cfg)
    return generate_round(prompts, out, pool=pool, cfg=cfg, round_index=3, policy_version="v0000")


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file() and f.name[0] != "."
    }


@pytest.fixture(scope="module")
def reference(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a round that nothing disturbed."""
    out = tmp_path_factory.mktemp("reference") / "rollouts"
    with FakeServer() as server:
        generate(prompts, out, server)
    return content(out)


def test_rounds_take_turns_with_the_prompts(prompts: Path, tmp_path: Path) -> None:
    """Five at most of twelve prompts: three turns of four, each with prompts from the whole file."""
    cfg = dataclasses.replace(CFG, prompts_per_round=5)
    given = pq.read_table(prompts / PROMPTS_FILE).to_pydict()
    ids, asked = given["prompt_id"], []
    prompt_of = dict(zip(ids, given["prompt_ids"], strict=True))
    with FakeServer() as server:
        pool = ServerPool([server.url], cfg)
        for index in range(4):
            out = tmp_path / str(index)
            manifest = generate_round(prompts, out, pool=pool, cfg=cfg, round_index=index, policy_version="v0000")
            assert manifest.counts["in"] == 4 * 3 and manifest.provenance["prompts_per_round"] == 5
            tables = [pq.read_table(shard / ROLLOUTS_FILE) for shard in sorted(out.glob("shard-*"))]
            rows = pa.concat_tables(tables).to_pylist()
            asked.append([row["prompt_id"] for row in rows[::3]])
            for row in rows:
                assert row["prompt_ids"] == prompt_of[row["prompt_id"]]
                assert row["sample_id"] == sample_id(row["prompt_id"], index, row["path"])
        for most in (6, 0):
            other = dataclasses.replace(cfg, prompts_per_round=most)
            with pytest.raises(UserError, match=rf"prompts_per_round must be what .* was made with \(5\), got {most}"):
                generate_round(prompts, tmp_path / "0", pool=pool, cfg=other, round_index=0, policy_version="v0000")
    assert asked == [ids[0::3], ids[1::3], ids[2::3], ids[0::3]]


def test_samples_order_seeds_and_books(prompts: Path, tmp_path: Path) -> None:
    with FakeServer() as server:
        manifest = generate(prompts, tmp_path / "out", server)
    shards = sorted((tmp_path / "out").glob("shard-*"))
    assert [read_manifest(shard, kind="rollouts-shard").counts["kept"] for shard in shards] == [15, 15, 6]
    assert read_manifest(tmp_path / "out", kind="rollouts") == manifest
    assert not list((tmp_path / "out").glob("*.journal"))
    table = pa.concat_tables([pq.read_table(shard / ROLLOUTS_FILE) for shard in shards])
    assert table.schema.names == ROLLOUT_SCHEMA.names
    asked = pq.read_table(prompts / PROMPTS_FILE).to_pylist()
    rows = table.to_pylist()
    assert len(rows) == PROMPTS * 3
    for i, row in enumerate(rows):
        prompt, path = asked[i // 3], i % 3
        assert row["sample_id"] == sample_id(prompt["prompt_id"], 3, path)
        for name in ("prompt_id", "prompt_ids", "generation_prompt_len", "teacher_prompt_ids"):
            assert row[name] == prompt[name]
        assert row["path"] == path and row["policy_version"] == "v0000"
        assert row["temperature"] == (0.0 if path == 0 else 1.0) and row["top_p"] == 1.0
        assert row["seed"] == sample_seed(CFG.seed, 3, prompt["prompt_id"], path)
        sampling = {"max_tokens": 20, "temperature": row["temperature"], "seed": row["seed"], "logprobs": 0}
        choice = fake_answer({"token_ids": prompt["prompt_ids"], "sampling_params": sampling}, "v0000")
        assert row["response_ids"] == choice["token_ids"] and row["finish_reason"] == choice["finish_reason"]
        assert row["logprobs"] == [entry["logprob"] for entry in choice["logprobs"]["content"]]
    assert manifest.counts == {
        "in": 36,
        "kept": 36,
        "quarantined": {},
        "pending": 0,
        "tokens": sum(len(row["response_ids"]) for row in rows),
        "stopped": sum(row["finish_reason"] == "stop" for row in rows),
        "shards": 3,
    }
    assert 0 < manifest.counts["stopped"] < 36


def test_a_share_of_the_responses_is_the_data_set_s(tmp_path: Path) -> None:
    """Chosen by their seeds, scored by the server, without its sampling; too long or none: quarantined by reason."""
    lengths = [60] * 4 + [4, 5] * 28  # of 60 prompts the first four's responses do not fit into 64 tokens with them
    prompts = write_prompts(tmp_path / "prompts", [6] * 60, responses=lengths)
    given = pq.read_table(prompts / PROMPTS_FILE).to_pylist()
    cfg = dataclasses.replace(CFG, greedy_paths=1, sampled_paths=1, dataset_fraction=0.5, max_quarantined=1.0)
    with FakeServer() as server:
        manifest = generate(prompts, tmp_path / "out", server, cfg=cfg)
    rows = [row for shard in sorted((tmp_path / "out").glob("shard-*")) for row in rollout_rows(shard)]
    own = [row for row in rows if row["source"] == "dataset"]
    assert manifest.provenance["dataset_fraction"] == 0.5
    assert 40 < sum(row["copies"] for row in own) < 70 and len(rows) - len(own) > 40
    for row in own:
        prompt = given[int(row["prompt_id"][1:])]
        assert row["response_ids"] == prompt["response_ids"] and row["finish_reason"] == "stop"
        assert row["logprobs"] == [np.float32(-0.7)] * len(row["response_ids"]) and row["policy_version"] == "v0000"
        copies = [sample_seed(CFG.seed, 3, row["prompt_id"], path) < SEEDS / 2 for path in (0, 1)]
        assert row["copies"] == sum(copies) > 0, "both paths of a prompt may be the same response"
    others = [sample_seed(CFG.seed, 3, row["prompt_id"], row["path"]) for row in rows if row["source"] == "student"]
    assert min(others) >= SEEDS / 2 and all(len(body["token_ids"]) == 6 for body in server.asked)
    wrong = manifest.counts["quarantined"]
    long = [sample_seed(CFG.seed, 3, f"p{index}", path) < SEEDS / 2 for index in range(4) for path in (0, 1)]
    assert wrong["response_too_long"] == sum(long) > 0
    assert manifest.counts["in"] == 120 == len(rows) + sum(wrong.values())
    bare, strict = write_prompts(tmp_path / "bare", [6] * 60), dataclasses.replace(cfg, max_quarantined=0.1)
    with FakeServer() as server, pytest.raises(UserError, match=r"quarantined \(\d+ no_response\)"):
        generate(bare, tmp_path / "other", server, cfg=strict)


@pytest.mark.parametrize("greedy", [0, 1])
def test_one_of_identical_answers_stays_with_their_number(tmp_path: Path, greedy: int) -> None:
    """A sampled one where there is one; greedy responses and other prompts' equal ones are answers of their own."""
    source = write_prompts(tmp_path / "prompts", [5, 6])
    asked = pq.read_table(source / PROMPTS_FILE)["prompt_ids"].to_pylist()
    good = {"finish_reason": "length", "logprobs": {"content": [{"logprob": -1.0}] * 2}}
    cfg = dataclasses.replace(CFG, greedy_paths=greedy, sampled_paths=3)
    lone = sample_seed(CFG.seed, 3, pq.read_table(source / PROMPTS_FILE)["prompt_id"][1].as_py(), greedy + 2)

    def trouble(body: dict[str, Any]) -> dict[str, Any]:
        return good | {"token_ids": [7, 8] if body["sampling_params"].get("seed") == lone else [7, 7]}

    with FakeServer() as server:
        server.trouble = trouble
        manifest = generate(source, tmp_path / "out", server, cfg=cfg)
    assert len(asked) == 2 and manifest.counts["in"] == 2 * (3 + greedy)
    assert manifest.counts["kept"] == 3 and manifest.counts["quarantined"] == {"duplicate": 2 * (3 + greedy) - 3}
    rows = pq.read_table(tmp_path / "out/shard-00000" / ROLLOUTS_FILE).to_pylist()
    assert [(row["path"], row["response_ids"], row["copies"]) for row in rows] == [
        (greedy, [7, 7], 3 + greedy),
        (greedy, [7, 7], 2 + greedy),
        (greedy + 2, [7, 8], 1),
    ]
    aside = (tmp_path / "out/shard-00000" / QUARANTINE_FILE).read_text().splitlines()
    assert {json.loads(line)["detail"] for line in aside} == {
        f"the same response as {row['sample_id']}" for row in rows if row["copies"] > 1
    }


def test_files_do_not_depend_on_concurrency_or_servers(
    prompts: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    with FakeServer() as first, FakeServer() as second:
        first.trouble = lambda body: time.sleep(0.02 * (body["sampling_params"].get("seed", 0) % 3))
        generate(prompts, tmp_path / "out", first, second, cfg=dataclasses.replace(CFG, concurrency=2))
        assert first.asked and second.asked
    assert content(tmp_path / "out") == reference


@pytest.mark.parametrize("survived", [0, 1, 16, 22, 35])
def test_restart_after_a_death_asks_only_for_the_missing(
    prompts: Path, tmp_path: Path, reference: dict[str, bytes], survived: int
) -> None:
    out = tmp_path / "out"
    with FakeServer() as server:
        server.trouble = die_after(server, survived)
        with pytest.raises(UserError, match=r"server http://127.0.0.1:\d+ must generate, got .*run the same again"):
            generate(prompts, out, server)
        answered = server.answered
    assert not is_sealed(out) and survived - CFG.concurrency <= answered <= survived
    with FakeServer() as server:
        generate(prompts, out, server)
        assert len(server.asked) == 36 - answered
    assert content(out) == reference


def test_torn_and_damaged_journal_lines_are_asked_for_again(
    prompts: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    with FakeServer() as server:
        server.trouble = die_after(server, 12)
        with pytest.raises(UserError):
            generate(prompts, tmp_path / "out", server)
        answered = server.answered
    whole = (tmp_path / "out" / FIRST_JOURNAL).read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    assert len(ends) == 1 + answered  # the settings come first
    cuts = {len(whole) - 1: answered - 1, ends[5] + 1: 5, ends[5]: 5, ends[0] - 3: 0, 0: 0}
    for i, (cut, answers) in enumerate(cuts.items()):
        out = tmp_path / f"cut{i}"
        out.mkdir()
        (out / FIRST_JOURNAL).write_bytes(whole[:cut])
        with FakeServer() as server:
            generate(prompts, out, server)
            assert len(server.asked) == 36 - answers
        assert content(out) == reference
    flipped = bytearray(whole)
    flipped[ends[3] + 40] ^= 4
    (tmp_path / "flip").mkdir()
    (tmp_path / "flip" / FIRST_JOURNAL).write_bytes(flipped)
    with FakeServer() as server:
        generate(prompts, tmp_path / "flip", server)
        assert len(server.asked) == 36 - (answered - 1)
    assert content(tmp_path / "flip") == reference


def test_journals_go_with_the_seal_of_their_shard(
    prompts: Path, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a call was killed between the two; what a restart reads is what is not sealed."""
    out = tmp_path / "out"
    with FakeServer() as server, monkeypatch.context() as patch:
        patch.setattr(shard_module, "forget_journal", lambda path: None)
        server.trouble = die_after(server, 25)
        with pytest.raises(UserError, match="must generate"):
            generate(prompts, out, server)
    assert is_sealed(out / "shard-00000") and (out / FIRST_JOURNAL).is_file()
    assert sorted(file.name for file in out.glob("*.journal")) == [FIRST_JOURNAL, "responses-00001.journal"]
    read: list[str] = []
    real = Journal._read
    with FakeServer() as server, monkeypatch.context() as patch:
        patch.setattr(Journal, "_read", lambda *args: (read.append(args[1].name), real(*args))[1])
        server.trouble = die_after(server, 0)
        with pytest.raises(UserError, match="must generate"):
            generate(prompts, out, server)
    assert [file.name for file in out.glob("*.journal")] == read == ["responses-00001.journal"]
    with FakeServer() as server:
        generate(prompts, out, server)
    assert content(out) == reference


def test_columns_of_prompts_may_pass_two_gib(tmp_path: Path) -> None:
    """24 texts of 100 MB beside prompts of a few tokens, which no column of a table could hold: they are not read."""
    source = write_prompts(tmp_path / "prompts", [5 + i for i in range(24)])
    table, file = pq.read_table(source / PROMPTS_FILE), source / PROMPTS_FILE
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 24, pa.int32()), pa.array(["x" * 10**8]))
    table = table.set_column(table.schema.get_field_index("extras"), "extras", texts)
    (source / MANIFEST).unlink()
    with writing(source) as directory:  # one dictionary entry in the file, 2.4 GB once it is decoded
        whole = {"store_schema": False, "dictionary_pagesize_limit": 2**30, "compression": "zstd"}
        pq.write_table(table, directory / PROMPTS_FILE, row_group_size=10, **whole)
        seal(directory, kind="prompts", provenance={"stop_ids": [EOS]})
    assert file.stat().st_size < 10**6
    memory, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(memory)
    try:
        with FakeServer() as server:
            assert generate(source, tmp_path / "out", server).counts["kept"] == 72
    finally:
        pa.set_memory_pool(before)
    assert memory.max_memory() < 10**7
    rows = [row for shard in sorted((tmp_path / "out").glob("shard-*")) for row in rollout_rows(shard)]
    assert [row["prompt_ids"] for row in rows[::3]] == table["prompt_ids"].to_pylist()


def rollout_rows(shard: Path) -> list[dict[str, Any]]:
    return pq.read_table(shard / ROLLOUTS_FILE).to_pylist()


def test_a_shard_that_no_column_can_hold_is_refused_before_it_is_generated(prompts: Path, tmp_path: Path) -> None:
    cfg = dataclasses.replace(CFG, shard_size=2**17, max_model_len=2**15)
    with FakeServer() as server:
        server.max_model_len = cfg.max_model_len
        with pytest.raises(UserError, match=r"shard_size x max_model_len must be below 2\*\*31 tokens, got 131070 x"):
            generate(prompts, tmp_path / "out", server, cfg=cfg)
        assert not server.asked


def test_what_is_appended_after_a_torn_line_is_kept(tmp_path: Path) -> None:
    answer = Recorded(token_ids=np.arange(3, dtype=np.int32), logprobs=np.zeros(3, np.float32), finish_reason="stop")
    path = tmp_path / "journal"
    for index in range(3):
        with Journal(path, {"round": 0}) as journal:
            assert sorted(journal.responses) == list(range(index))
            journal.append(index, answer)
        with open(path, "ab") as stream:
            stream.write(b"01234567 [9, cut by a kill")
    with Journal(path, {"round": 0}) as journal:
        assert sorted(journal.responses) == [0, 1, 2]


def test_kill_of_the_client_loses_nothing(prompts: Path, tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    program = (
        "import sys\n"
        "from megatron_npd.config.settings import RolloutConfig\n"
        "from megatron_npd.serving.pool import ServerPool\n"
        "from megatron_npd.rollout.generate import generate_round\n"
        f"cfg = {CFG!r}\n"
        "generate_round(sys.argv[1], sys.argv[2], pool=ServerPool([sys.argv[3]], cfg), cfg=cfg, round_index=3,"
        " policy_version='v0000')"
    )
    with FakeServer() as server:
        server.trouble = lambda body: time.sleep(0.05)
        process = subprocess.Popen([sys.executable, "-c", program, str(prompts), str(out), server.url])
        while len(server.asked) < 20 and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        before = len(server.asked)
        server.asked.clear()
        generate(prompts, out, server)
        assert len(server.asked) <= 36 - before + CFG.concurrency  # what was in flight is lost, no more
    assert content(out) == reference


def test_bad_prompts_and_answers_are_set_aside_by_reason(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts", [10, 0, 63, 64, 11, 12, 13, 14])
    ids = pq.read_table(prompts / PROMPTS_FILE)["prompt_ids"].to_pylist()
    span = {"start": 0, "end": 2}
    troubles = {
        4: {"token_ids": [2], "finish_reason": "stop", "logprobs": {"content": [{"logprob": -1.0}]}},
        5: 400,
        6: {"weight_versions": [{"version": f"v0000-{CONTENT}", **span}, {"version": "v0001", **span}]},
        7: {
            "token_ids": [5, 6],
            "finish_reason": "length",
            "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -9999.0}]},
        },
    }
    cfg = dataclasses.replace(CFG, sampled_paths=0, max_quarantined=0.75)
    with FakeServer() as server:
        server.trouble = lambda body: troubles.get(ids.index(body["token_ids"])) if body["token_ids"] in ids else None
        manifest = generate(prompts, tmp_path / "out", server, cfg=cfg)
        assert {len(body["token_ids"]): body["sampling_params"]["max_tokens"] for body in server.asked}[10] == 20
    reasons = {
        "empty_prompt": 1,
        "prompt_too_long": 1,
        "empty_response": 1,
        "request_failed": 1,
        "mixed_versions": 1,
        "undefined_logprob": 1,
    }
    assert manifest.counts["quarantined"] == reasons
    assert (manifest.counts["in"], manifest.counts["kept"], manifest.counts["pending"]) == (8, 2, 0)
    shard = tmp_path / "out" / "shard-00000"
    lines = [json.loads(line) for line in (shard / QUARANTINE_FILE).read_text().splitlines()]
    assert [line["prompt_id"] for line in lines] == ["p1", "p3", "p4", "p5", "p6", "p7"]
    assert lines[0]["sample_id"] == sample_id("p1", 3, 0) and "64 tokens" in lines[1]["detail"]
    assert pq.read_table(shard / ROLLOUTS_FILE)["prompt_id"].to_pylist() == ["p0", "p2"]


TWO = {"token_ids": [5, 6], "finish_reason": "length"}
NONSENSE = {
    "garbage": b"<html>busy</html>",
    "cut": b'{"choices": [{"token_ids": [5',
    "deep": b"[" * 100_000,
    "null": b"null",
    "string": b'"text"',
    "list": b"[]",
    "no choices": b'{"choices": []}',
    "null ids": {"token_ids": None},
    "no ids": {"token_ids": []},
    "words": {"token_ids": "text"},
    "floats": TWO | {"token_ids": [5.0, 6.0]},
    "below the vocabulary": TWO | {"token_ids": [5, -6]},
    "above the vocabulary": TWO | {"token_ids": [5, VOCAB_SIZE]},
    "no int32": TWO | {"token_ids": [5, 2**31]},
    "too many": {"token_ids": [5] * 21, "logprobs": {"content": [{"logprob": -1.0}] * 21}},
    "no log-probabilities": {"logprobs": None},
    "too few log-probabilities": TWO | {"logprobs": {"content": [{"logprob": -1.0}]}},
    "a log-probability in words": TWO | {"logprobs": {"content": [{"logprob": "x"}, {"logprob": -1.0}]}},
    "a stop without a stop id": {
        "token_ids": [EOS, 6],
        "finish_reason": "stop",
        "logprobs": {"content": [{"logprob": -1.0}] * 2},
    },
    "no end at a stop id": TWO | {"token_ids": [5, EOS], "logprobs": {"content": [{"logprob": -1.0}] * 2}},
    "nor in the middle": {
        "token_ids": [EOS, EOS],
        "finish_reason": "stop",
        "logprobs": {"content": [{"logprob": -1.0}] * 2},
    },
    "no finish": {"finish_reason": None},
    "finishes": {"finish_reason": ["stop"]},
    "aborted": {"finish_reason": "abort"},
    "no versions": {"weight_versions": "v0000"},
    "busy": (429, {"Retry-After": "0"}),
    "moved": (307, {"Location": "http://127.0.0.1:9/"}),
    "early": 425,
    "failing": 500,
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_asked_for_again_then_set_aside(
    prompts: Path, tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(asking, "_RETRY_DELAYS", (0.0, 0.01))
    first = pq.read_table(prompts / PROMPTS_FILE)["prompt_ids"][0].as_py()
    with FakeServer() as server:
        server.trouble = lambda body: NONSENSE[name] if len(server.asked) == 9 else None
        generate(prompts, tmp_path / "once", server)
        assert len(server.asked) == 37
        server.trouble = lambda body: NONSENSE[name] if body["token_ids"] == first else None
        manifest = generate(prompts, tmp_path / "always", server)
    assert content(tmp_path / "once") == reference
    assert manifest.counts["quarantined"] == {"request_failed": 3} and manifest.counts["kept"] == 33


def is_asked(body: dict[str, Any]) -> bool:
    """Whether a body asks for a response: others see whether the server is well."""
    return body["sampling_params"]["max_tokens"] > 1


def calls(server: FakeServer) -> list[str]:
    """What it was told to do."""
    return [call for call in server.called if call != "npd_describe"]


@pytest.mark.parametrize("logprob", [-9999.0, -1e9, float("-inf"), float("nan"), None, 0.1])
def test_undefined_numbers_are_asked_for_again_from_a_cleared_cache(
    prompts: Path, tmp_path: Path, reference: dict[str, bytes], logprob: float | None
) -> None:
    undefined = TWO | {"logprobs": {"content": [{"logprob": -1.0}, {"logprob": logprob}]}}
    first = pq.read_table(prompts / PROMPTS_FILE)["prompt_ids"][0].as_py()
    clearing = ["/pause?mode=wait", "npd_clear", "/reset_prefix_cache", "/resume"]
    with FakeServer() as server, FakeServer() as healthy:
        server.trouble = lambda body: undefined if is_asked(body) and "npd_clear" not in server.called else None
        generate(prompts, tmp_path / "cured", server, healthy)
        assert calls(server) == clearing and not calls(healthy)
    assert content(tmp_path / "cured") == reference
    with FakeServer() as server:
        server.trouble = lambda body: undefined if body["token_ids"] == first else None
        manifest = generate(prompts, tmp_path / "always", server)
        assert calls(server) == clearing  # once: what is undefined then is the model's
    assert manifest.counts["quarantined"] == {"undefined_logprob": 3} and manifest.counts["kept"] == 33


def test_what_another_request_left_in_the_cache_is_asked_for_again(
    prompts: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    """From a server that was cleared before, too."""
    undefined = TWO | {"logprobs": {"content": [{"logprob": -1.0}, {"logprob": float("nan")}]}}
    with FakeServer() as server:

        def poisoned(body: dict[str, Any]) -> Any:
            times = server.called.count("npd_clear")
            return undefined if is_asked(body) and len(server.asked) in (5, 25) and times < 2 else None

        server.trouble = poisoned
        generate(prompts, tmp_path / "out", server)
        assert server.called.count("npd_clear") == 2
    assert content(tmp_path / "out") == reference


def test_a_server_whose_weights_leave_all_undefined_is_named(
    prompts: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    """A restart with the same weights would give the same; what was answered is kept."""
    probed = {"logprobs": {"content": [{"logprob": float("nan")}]}}
    words = r"{} must give defined log-probabilities, got NaN with the weights v0000-\w+ .* dtype, .*run the same"
    with FakeServer() as server:
        server.trouble = lambda body: None if is_asked(body) else probed
        with pytest.raises(UserError, match=words.format(server.url)):
            generate(prompts, tmp_path / "first", server)
        assert server.called.count("npd_clear") == 1 and not server.asked
    undefined = TWO | {"logprobs": {"content": [{"logprob": float("nan")}] * 2}}
    with FakeServer() as server:
        server.trouble = lambda body: (undefined if is_asked(body) else probed) if len(server.asked) > 10 else None
        with pytest.raises(UserError, match=words.format(server.url)):
            generate(prompts, tmp_path / "out", server)
        assert server.called.count("npd_clear") == 2
    with FakeServer() as server:
        generate(prompts, tmp_path / "out", server)
        assert len(server.asked) == 26  # ten were kept
    assert content(tmp_path / "out") == reference


def test_a_server_of_nonsense_alone_is_named(prompts: Path, tmp_path: Path) -> None:
    with FakeServer() as server:
        server.trouble = lambda body: b"{}" if len(server.asked) > 10 else None
        with pytest.raises(UserError, match=rf"{server.url} must generate, got an answer that is none: no choices"):
            generate(prompts, tmp_path / "out", server)


def test_the_wait_that_a_server_asks_for_is_kept_within_bounds() -> None:
    def wait(text: str) -> float:
        return asking._retry_after(text)

    assert [wait(text) for text in ("2", "0.5", "1000", "-1", "soon", "nan")] == [2.0, 0.5, 30.0, 0.0, 0.0, 0.0]
    assert wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0 and wait("Wed, 21 Oct 2115 07:28:00 GMT") == 30.0
    assert wait(f"Wed, 21 Oct {'9' * 20} 07:28:00 GMT") == 0.0


def test_urls_of_no_server_are_named() -> None:
    for url in ("http://[::1", "node1:8100", "http://"):
        with pytest.raises(UserError, match=r"the vLLM server .* must answer /v1/models, got (InvalidURL|Unsupported)"):
            ServerPool([url], RolloutConfig()).check()


def test_too_many_failures_stop_the_round_and_are_asked_again(
    prompts: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    with FakeServer() as server:
        server.trouble = lambda body: 400 if len(server.asked) > 20 else None
        with pytest.raises(
            UserError, match=r"but for 10 %, got 4 of 36 quarantined \(4 request_failed\); .*max_quarantined"
        ):
            generate(prompts, tmp_path / "out", server)
    assert not is_sealed(tmp_path / "out" / "shard-00001")
    with FakeServer() as server:
        generate(prompts, tmp_path / "out", server)
        assert len(server.asked) < 20
    assert content(tmp_path / "out") == reference


def test_too_many_unusable_prompts_stop_the_round_before_it_begins(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts", [10, 64, 11, 12, 13, 14])
    with FakeServer() as server:
        with pytest.raises(UserError, match=r"got 3 of 18 quarantined \(3 prompt_too_long\)"):
            generate(prompts, tmp_path / "out", server)
        assert not server.asked


def test_a_prompt_of_the_longest_length_gets_one_token(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts", [63, 50])
    with FakeServer() as server:
        server.trouble = lambda body: {
            "token_ids": [7],
            "finish_reason": "length",
            "logprobs": {"content": [{"logprob": -1.0}]},
        }
        generate(prompts, tmp_path / "out", server)
        assert {body["sampling_params"]["max_tokens"] for body in server.asked} == {14}


def test_nothing_kept_is_an_error_and_not_sealed(prompts: Path, tmp_path: Path) -> None:
    with FakeServer() as server:
        server.trouble = lambda body: 400 if body["sampling_params"]["max_tokens"] > 1 else None
        cfg = dataclasses.replace(CFG, max_quarantined=1.0)
        with pytest.raises(
            UserError, match=r"at least one response, got none of 36 \(quarantined: 36 request_failed\)"
        ):
            generate(prompts, tmp_path / "out", server, cfg=cfg)
    assert not is_sealed(tmp_path / "out")


def test_other_policy_is_refused_before_and_during_the_round(
    prompts: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    with FakeServer(version="v0007") as server:
        with pytest.raises(UserError, match=r"must serve policy v0000, got v0007; load it first: npd refresh"):
            generate(prompts, out, server)
        assert not server.asked
    with FakeServer() as server:

        def switch(body: dict) -> None:
            if len(server.asked) > 10:
                server.version = f"v0000-{'f' * 16}"  # the same name for other weights

        server.trouble = switch
        with pytest.raises(UserError, match=rf"must come from policy v0000-{CONTENT}, got one from v0000-f+;"):
            generate(prompts, out, server)
        with pytest.raises(UserError, match=rf"weights must be what .* was begun with \({CONTENT}\), got f+;"):
            generate(prompts, out, server)
    with FakeServer() as server, FakeServer() as other:
        other.version = f"v0000-{'f' * 16}"
        with pytest.raises(UserError, match=rf"all servers must hold the same weights, got v0000-f+ on {other.url} "):
            generate(prompts, out, server, other)
        other.version = "v0000"
        with pytest.raises(UserError, match=rf"{other.url} must say which weights it holds, got v0000;"):
            generate(prompts, out, server, other)
        assert not server.asked + other.asked
    with FakeServer() as server:
        generate(prompts, out, server)
        assert len(server.asked) < 36
    assert content(out) == reference


def test_a_hung_server_is_told_from_a_slow_request(prompts: Path, tmp_path: Path) -> None:
    cfg = dataclasses.replace(CFG, request_timeout=0.5)
    with FakeServer() as server:
        server.trouble = lambda body: time.sleep(3) if len(server.asked) > 10 else None
        with pytest.raises(UserError, match="it hangs"):
            generate(prompts, tmp_path / "hung", server, cfg=cfg)
    with FakeServer() as server:
        slow = pq.read_table(prompts / PROMPTS_FILE)["prompt_ids"][2].as_py()
        server.trouble = lambda body: time.sleep(2) if body["token_ids"] == slow else None
        manifest = generate(prompts, tmp_path / "slow", server, cfg=cfg)
    assert manifest.counts["quarantined"] == {"timeout": 3} and manifest.counts["kept"] == 33


def test_servers_are_reached_past_a_proxy(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with FakeServer() as server:
        assert generate(prompts, tmp_path / "out", server).counts["kept"] == 36


def test_a_passing_failure_is_retried(prompts: Path, tmp_path: Path, reference: dict[str, bytes]) -> None:
    with FakeServer() as server:
        server.trouble = lambda body: 503 if len(server.asked) in (5, 9) else None
        generate(prompts, tmp_path / "out", server)
    assert content(tmp_path / "out") == reference


def test_rerun_of_a_sealed_round_and_changed_settings(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hotter = dataclasses.replace(CFG, temperature=0.7)
    with FakeServer() as server:
        server.trouble = die_after(server, 20)
        with pytest.raises(UserError):
            generate(prompts, out, server)
    with FakeServer() as server:
        with pytest.raises(UserError, match=r"temperature must be what .* was begun with \(1.0\), got 0.7"):
            generate(prompts, out, server, cfg=hotter)
        manifest = generate(prompts, out, server)
        asked = len(server.asked)
        assert generate(prompts, out, server) == manifest
        assert len(server.asked) == asked
        with pytest.raises(UserError, match=r"temperature must be what .* was made with \(1.0\), got 0.7"):
            generate(prompts, out, server, cfg=hotter)


def test_a_context_shorter_than_asked_is_refused(prompts: Path, tmp_path: Path) -> None:
    with FakeServer() as server:
        server.max_model_len = 32
        with pytest.raises(UserError, match=r"at least max_model_len \(64\), got 32"):
            generate(prompts, tmp_path / "out", server)


def test_a_thread_is_stopped_while_requests_are_in_flight(
    prompts: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    """What had arrived is kept; another call asks for the rest alone."""
    hanging, ended = threading.Event(), threading.Event()

    def trouble(body: dict[str, Any]) -> None:
        if len(server.asked) > 20:
            hanging.set()
            ended.wait(60)

    with FakeServer() as server:
        server.trouble = trouble
        worker = Worker(lambda: generate(prompts, tmp_path, server), ended)
        assert hanging.wait(60)
        worker.stop = True
        worker.join(30)
        assert isinstance(worker.error, asyncio.CancelledError)
        assert not is_sealed(tmp_path) and server.answered < 36
        server.trouble = lambda body: None
        server.asked.clear()
        generate(prompts, tmp_path, server)
        assert len(server.asked) <= 36 - 20 + CFG.concurrency
    assert content(tmp_path) == reference
