"""A few of each fault, in a minute; ``tests/faults/run.py`` does the full number (docs/reliability.md)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.damage import Readers, fuzz
from tests.faults.stages import Bench
from tests.faults.world import STAGES


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench() as bench:
        yield bench


@pytest.fixture(scope="module")
def readers(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Readers:
    return Readers(bench.whole, bench.inputs, tmp_path_factory.mktemp("damage"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_disturbed_stage_is_refused_and_mended(bench: Bench, stage: str) -> None:
    """Its last events seal it: those are always among the points."""
    rng = random.Random(len(stage))
    last = bench.events[stage]
    points = [("kill", at, 0.0) for at in range(max(1, last - 2), last + 1)]
    points += bench.boundaries(stage, rng, 1)
    points += [("full", rng.randint(1, last), 0.0), ("short", 0, 0.0)]
    ends, broken = bench.disturb(stage, points)
    broken += bench.random_kills(stage, rng, 1)[1]
    assert not broken, "\n".join(broken)
    assert ends["killed"] >= 2


def test_a_round_annotated_while_it_is_generated_survives_both_deaths(bench: Bench) -> None:
    ends, broken = bench.followed(random.Random(3), 3)
    assert not broken, "\n".join(broken)
    assert ends.total() == 6


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_every_damage_is_seen_before_use(readers: Readers, how: str) -> None:
    results, wrong = readers.damage(random.Random(1), 90, how)
    assert not wrong, "\n".join(wrong)
    assert all(ends["refused"] == 10 for ends in results.values())


def test_made_up_files_are_refused_in_words(readers: Readers) -> None:
    results, wrong = fuzz(readers, random.Random(2), 1400)
    assert not wrong, "\n".join(wrong[:5])
    assert results["manifest"]["refused"] > 190 and results["tokens.idx"]["refused"] > 190


def test_hostile_shard_names(readers: Readers) -> None:
    """A round whose manifest names a shard elsewhere is not read, whatever its hash."""
    from megatron_npd.errors import UserError
    from megatron_npd.manifest import MANIFEST, read_manifest
    from tests.test_manifest import rewrite

    rollouts = readers.run / "rounds/0000/rollouts"
    before = (rollouts / MANIFEST).read_bytes()
    entry = read_manifest(rollouts).files[f"shard-00000/{MANIFEST}"]
    elsewhere = readers.root / "elsewhere"
    (rollouts / "shard-00000").rename(elsewhere)
    for name in ("../../../../elsewhere", str(elsewhere), "link"):
        (rollouts / "link").unlink(missing_ok=True)
        (rollouts / "link").symlink_to(elsewhere)
        rewrite(rollouts, files={str(Path(name) / MANIFEST): entry})
        with pytest.raises(UserError, match="must name files inside"):
            readers.read["rollouts"]()
    (rollouts / "link").unlink()
    elsewhere.rename(rollouts / "shard-00000")
    (rollouts / MANIFEST).write_bytes(before)
