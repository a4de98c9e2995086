"""The order in which a round asks, on a stand-in server: by what an earlier round's responses took."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_npd.config.settings import RolloutConfig
from megatron_npd.manifest import MANIFEST
from megatron_npd.records import PROMPTS_FILE, ROLLOUTS_FILE
from megatron_npd.rollout.generate import generate_round
from megatron_npd.rollout.order import expected_tokens
from megatron_npd.serving.pool import ServerPool
from tests.rollout.test_generate import CFG, content
from tests.serving.fake import FakeServer, write_prompts

PROMPTS = 12  # with three paths: 36 samples, in shards of 15, 15 and 6
ALONE = dataclasses.replace(CFG, concurrency=1, merge_identical=False)  # asks in the order that is looked at


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("in") / "prompts", [5 + i for i in range(PROMPTS)])


def generate(
    prompts: Path,
    out: Path,
    index: int,
    rounds: Callable[[int], Path] | None = None,
    cfg: RolloutConfig = ALONE,
) -> list[list[int]]:
    """Generate a round; its prompts in the order in which they were asked, each as often as it was."""
    with FakeServer() as server:
        pool = ServerPool([server.url], cfg)
        generate_round(prompts, out, pool=pool, cfg=cfg, round_index=index, policy_version="v0000", rounds=rounds)
        return [body["token_ids"] for body in server.asked]


def lengths_of(out: Path) -> dict[tuple[int, ...], float]:
    """Mean tokens of the responses to each prompt."""
    table = pa.concat_tables([pq.read_table(shard / ROLLOUTS_FILE) for shard in sorted(out.glob("shard-*"))])
    lengths: dict[tuple[int, ...], list[int]] = {}
    for row in table.to_pylist():
        lengths.setdefault(tuple(row["prompt_ids"]), []).append(len(row["response_ids"]))
    return {prompt: float(np.mean(values)) for prompt, values in lengths.items()}


def test_the_longest_of_a_shard_come_first_and_the_files_are_the_same(prompts: Path, tmp_path: Path) -> None:
    """Of the last two shards together; the three responses to a prompt stand together."""
    in_order = generate(prompts, tmp_path / "0", 0)
    given = pq.read_table(prompts / PROMPTS_FILE)["prompt_ids"].to_pylist()
    assert in_order == [ids for ids in given for _ in range(3)]
    expected = lengths_of(tmp_path / "0")
    asked = generate(prompts, tmp_path / "1", 1, lambda index: tmp_path / str(index))
    assert sorted(asked) == sorted(in_order) and asked != in_order
    assert asked[::3] == asked[1::3] == asked[2::3]
    for part, own in ((asked[:15], given[:5]), (asked[15:], given[5:])):
        assert sorted(part[::3]) == sorted(own)
        values = [expected[tuple(ids)] for ids in part]
        assert values == sorted(values, reverse=True) and len(set(values)) > 2
    generate(prompts, tmp_path / "plain", 1)
    assert content(tmp_path / "1") == content(tmp_path / "plain")


def test_rounds_that_take_turns_look_at_the_one_with_the_same_prompts(prompts: Path, tmp_path: Path) -> None:
    cfg, looked = dataclasses.replace(ALONE, prompts_per_round=5), []

    def rounds(index: int) -> Path:
        looked.append(index)
        return tmp_path / str(index)

    asked = [generate(prompts, tmp_path / str(index), index, rounds, cfg) for index in range(4)]
    assert looked == [0]
    values = [lengths_of(tmp_path / "0")[tuple(ids)] for ids in asked[3]]
    assert sorted(asked[3]) == sorted(asked[0]) and values == sorted(values, reverse=True)


def test_who_had_no_response_comes_first(prompts: Path, tmp_path: Path) -> None:
    generate(prompts, tmp_path / "0", 0)
    shard = tmp_path / "0" / "shard-00000"
    table = pq.read_table(shard / ROLLOUTS_FILE)
    without = table["prompt_ids"][6].as_py()
    pq.write_table(table.filter(pa.array([ids != without for ids in table["prompt_ids"].to_pylist()])), shard / "x")
    (shard / "x").replace(shard / ROLLOUTS_FILE)
    asked = generate(prompts, tmp_path / "1", 1, lambda index: tmp_path / str(index))
    assert asked[:3] == [without] * 3


@pytest.mark.parametrize("damage", ["gone", "no manifest", "no parquet", "other columns"])
def test_an_earlier_round_that_cannot_be_read_says_nothing(prompts: Path, tmp_path: Path, damage: str) -> None:
    in_order = generate(prompts, tmp_path / "0", 0)
    for shard in (tmp_path / "0").glob("shard-*"):
        if damage == "gone":
            (shard / ROLLOUTS_FILE).unlink()
        elif damage == "no manifest":
            (shard / MANIFEST).unlink()
        elif damage == "no parquet":
            (shard / ROLLOUTS_FILE).write_bytes(b"PAR1 and no more")
        else:
            pq.write_table(pa.table({"prompt_id": ["a"]}), shard / ROLLOUTS_FILE)
        assert expected_tokens(shard) == {}
    assert generate(prompts, tmp_path / "1", 1, lambda index: tmp_path / str(index)) == in_order


def test_copies_count(prompts: Path, tmp_path: Path) -> None:
    """A response that stands for three weighs as much."""
    generate(prompts, tmp_path / "0", 0)
    shard = tmp_path / "0" / "shard-00000"
    table = pq.read_table(shard / ROLLOUTS_FILE).slice(0, 2)
    first, second = (len(ids) for ids in table["response_ids"].to_pylist())
    place = table.schema.get_field_index("copies")
    table = table.set_column(place, table.schema.field("copies"), pa.array([3, 1], table.schema.field("copies").type))
    pq.write_table(table, shard / ROLLOUTS_FILE)
    assert list(expected_tokens(shard).values()) == [(3 * first + second) / 4]
