"""What servers are compared by, on stand-ins: each other, what they gave before, what the export knows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_npd.config.settings import RolloutConfig
from megatron_npd.errors import UserError
from megatron_npd.manifest import seal
from megatron_npd.probe import PROBE, probe_ids
from megatron_npd.serving.compared import known_answer
from megatron_npd.serving.pool import UNUSABLE, ServerPool
from megatron_npd.serving.refresh import refresh
from megatron_npd.serving.server import ServerLost, tag
from megatron_npd.weights import read_weights
from tests.serving.fake import VOCAB_SIZE, FakeServer, Launched
from tests.serving.test_refresh import answer_otherwise, serve

CFG = RolloutConfig(max_model_len=64)


def policy_that_knows(model_dir: Path, out: Path, logprob: float, dtype: str = "torch.float32") -> Path:
    """The model as an export whose tokens all have this log-probability; stand-ins give them -0.7."""
    shutil.copytree(model_dir, out)
    known = {"ids": probe_ids(VOCAB_SIZE), "logprobs": [logprob] * 15, "dtype": dtype}
    seal(out, kind="policy", provenance={"weights": read_weights(out).content_hash(), PROBE: known})
    return out


def describe_as(server: FakeServer, **more: Any) -> None:
    described = server.headers_of
    server.headers_of = lambda directory: described(directory) | more


def launched(fake: FakeServer, model_dir: Path) -> Launched:
    server = Launched(fake)
    server.model_dir, server.version = model_dir, "v0000"
    return server


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_a_refresh_compares_with_what_the_export_knows(tiny_model_dir: Path, tmp_path: Path, dtype: str) -> None:
    """All servers may be wrong alike, and with new weights there is nothing before: the weights themselves decide."""
    off = 0.02 if dtype == "torch.float32" else 0.6
    good = policy_that_knows(tiny_model_dir, tmp_path / "good", -0.7 - off / 4, dtype)
    bad = policy_that_knows(tiny_model_dir, tmp_path / "bad", -0.7 - off, dtype)
    with serve(tiny_model_dir) as first, serve(tiny_model_dir) as second:
        for server in (first, second):
            describe_as(server, dtype=dtype)
        pool = ServerPool([first.url, second.url], CFG)
        before = first.version
        with pytest.raises(UserError, match=rf"must give .* of the export {bad}, got {off} nats .*; the server comp"):
            refresh(pool, bad, "v0001")
        assert first.version == second.version == before and not pool.lost
        refresh(pool, good, "v0001")
        assert pool.reference is not None and pool.reference.known and first.version == second.version != before


def test_a_server_that_rounds_its_weights_is_compared_with_its_like(tiny_model_dir: Path, tmp_path: Path) -> None:
    policy = policy_that_knows(tiny_model_dir, tmp_path / "policy", -5.0)
    with serve(tiny_model_dir) as first, serve(tiny_model_dir) as second:
        for server in (first, second):
            describe_as(server, quantization="fp8")
        pool = ServerPool([first.url, second.url], CFG)
        refresh(pool, policy, "v0001")
        pool.check(version="v0001")
        answer_otherwise(second, lambda: True, 0.6)
        with pytest.raises(UserError, match=r"got 0\.6 nats apart, over 0\.5, .*; one of them computes"):
            refresh(pool, policy, "v0002")


def test_weights_that_an_export_does_not_speak_of_are_not_compared_with_it(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "policy")
    known = {"ids": probe_ids(VOCAB_SIZE), "logprobs": [-5.0] * 15, "dtype": "torch.float32"}
    seal(tmp_path / "policy", kind="policy", provenance={"weights": "0" * 16, PROBE: known})
    with serve(tiny_model_dir) as server:
        refresh(ServerPool([server.url], CFG), tmp_path / "policy", "v0001")


def test_a_round_begins_with_servers_that_compute_alike(tiny_model_dir: Path) -> None:
    with serve(tiny_model_dir) as first, serve(tiny_model_dir) as second:
        pool = ServerPool([first.url, second.url], CFG)
        pool.check()
        answer_otherwise(second, lambda: True, 0.6)
        with pytest.raises(UserError, match=rf"{second.url} .* must give .* of {first.url} .*one of them computes"):
            pool.check()


def test_who_computes_otherwise_than_the_weights_is_lost_at_the_start_of_a_round(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """One that was launched here is started again, at once."""
    policy = policy_that_knows(tiny_model_dir, tmp_path / "policy", -0.7)
    with serve(policy) as first, serve(policy) as second, serve(policy) as third:
        server = launched(second, policy)
        pool = ServerPool([first.url, second.url, third.url], CFG, [server])
        pool.reference = known_answer(policy)
        answer_otherwise(second, lambda: not server.starts, 0.6)
        answer_otherwise(third, lambda: True, 0.6)
        pool.check(version="v0000")
        assert server.starts == 1 and sorted(pool.urls) == sorted([first.url, second.url])
        assert list(pool.lost) == [third.url] and third.version == UNUSABLE


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("others", [0, 1])
def test_a_server_that_is_started_again_is_compared_before_it_is_asked(
    tiny_model_dir: Path, tmp_path: Path, others: int, known: bool
) -> None:
    """With the export, the others, or what it gave itself before; as often as it is started again."""
    policy = policy_that_knows(tiny_model_dir, tmp_path / "policy", -0.7) if known else tiny_model_dir
    with serve(policy) as fake, serve(policy) as other:
        server = launched(fake, policy)
        pool = ServerPool([fake.url, other.url][: 1 + others], CFG, [server])
        pool.reference = known_answer(policy)
        marks = pool.check(version="v0000")
        pool.lose(fake.url, ServerLost("as the test wants it"))
        answer_otherwise(fake, lambda: server.starts < 2, 0.6)
        assert not pool.find(fake.url) and fake.version == UNUSABLE
        assert "computes wrongly" in str(pool.lost[fake.url]) and fake.url not in pool.urls
        assert pool.find(fake.url) and fake.version == marks == tag("v0000", read_weights(policy).content_hash())
        assert server.starts == 2


def test_a_refresh_says_how_long_servers_were_paused(tiny_model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serve(tiny_model_dir) as first, serve(tiny_model_dir) as second, caplog.at_level("INFO"):
        pool = ServerPool([first.url, second.url], CFG)
        done = refresh(pool, tiny_model_dir, "v0001")
        assert done.pauses.keys() == done.loads.keys() == {first.url, second.url}
        assert all(0 < done.loads[url] < done.pauses[url] for url in done.loads)
        assert done.bytes == sum(file.stat().st_size for file in tiny_model_dir.glob("*.safetensors")) - header_bytes(
            tiny_model_dir
        )
    record = done.as_record()
    assert record["pause_s"] == round(max(done.pauses.values()), 3) and record["gb_per_s"] > 0
    for url in (first.url, second.url):
        assert f"{url} paused {done.pauses[url]:.2f} s, loaded " in caplog.messages[-1]


def header_bytes(model_dir: Path) -> int:
    with open(model_dir / "model.safetensors", "rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")
