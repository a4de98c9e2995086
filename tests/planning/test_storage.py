"""The bytes of a run's stages, beside what the stages themselves leave on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_npd.manifest import read_manifest
from megatron_npd.models.families import load_spec
from megatron_npd.planning.model import parameters
from megatron_npd.planning.storage import (
    Samples,
    annotations_bytes,
    checkpoint_bytes,
    packs_bytes,
    pairs_bytes,
    prompts_bytes,
    rollouts_bytes,
    selection_bytes,
)
from megatron_npd.store.annotation_store import AnnotationStore
from megatron_npd.training.trainer import train
from tests.faults import world
from tests.helpers import VOCAB_SIZE, make_tiny_model
from tests.serving.fake import FakeServer
from tests.training.make_run import config, make_packs

PROMPTS, TOP_K = 600, 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run up to its packs, in one shard, made by the stages themselves."""
    root = tmp_path_factory.mktemp("storage")
    with FakeServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "PROMPTS", PROMPTS)
        patch.setattr(world, "ROLLOUT", replace(world.ROLLOUT, shard_size=4096, concurrency=32))
        patch.setenv(world.INPUTS, str(world.make_inputs(root)))
        patch.setenv(world.SERVER, server.url)
        from megatron_npd.teacher import annotate

        patch.setattr(annotate, "Scorer", world.StandInScorer)
        (root / "run").mkdir()
        for stage in ("prompts", "rollouts", "annotations", "selection", "packs"):
            world.STAGES[stage](root / "run")
        yield root / "run"


def written(path: Path, *suffixes: str) -> int:
    """Bytes of the files of a directory with these endings."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.suffix in suffixes)


def samples_of(run: Path) -> Samples:
    store = AnnotationStore(run / "rounds/0000/annotations")
    means = {"prompt": float(store.prompt_lens.mean()), "response": float(store.response_lens.mean())}
    return Samples(number=len(store), paths=3, vocab_size=VOCAB_SIZE, shard=4096, **means)


def test_a_round_takes_what_is_planned(run: Path) -> None:
    here, samples = run / "rounds/0000", samples_of(run)
    kept = replace(samples, number=read_manifest(here / "packs").counts["kept"])
    planned = {
        "rollouts": rollouts_bytes(samples),
        "annotations": annotations_bytes(samples, TOP_K),
        "selection": selection_bytes(samples),
        "packs": packs_bytes(kept),
    }
    found = {name: written(here / name, ".parquet", ".arrow", ".bin", ".idx") for name in planned}
    assert sum(planned.values()) == pytest.approx(sum(found.values()), rel=0.02)
    assert planned["packs"] == pytest.approx(found["packs"], rel=0.02)


def test_the_pairs_of_a_store_are_counted_exactly(run: Path) -> None:
    headers = 3 * (9 + 8 + 1 + 8 + 8 + 8)  # of the indices; with the last document's end
    pairs = written(run / "rounds/0000/annotations", ".bin", ".idx")
    assert pairs == pytest.approx(pairs_bytes(samples_of(run), TOP_K) + headers, abs=1)


def test_a_store_without_a_teacher_has_no_records(run: Path) -> None:
    samples = samples_of(run)
    record = 6 * TOP_K + 4
    less = annotations_bytes(samples, TOP_K) - annotations_bytes(samples, 0)
    assert less == pytest.approx(samples.number * (samples.response * record + 20))


def test_prompts_are_there_once(run: Path) -> None:
    samples = replace(samples_of(run), number=PROMPTS)
    assert prompts_bytes(samples) == prompts_bytes(replace(samples, paths=1))
    assert prompts_bytes(replace(samples, number=10 * PROMPTS)) > 5 * prompts_bytes(samples)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_checkpoint_holds_weights_and_optimizer(tmp_path: Path, bf16: bool) -> None:
    """Of a model so large that what is written around each tensor, 1 KB, does not count."""
    packs = make_packs(tmp_path)
    model = make_tiny_model(tmp_path / "model", hidden_size=256, intermediate_size=1024)
    train(config(model, packs, tmp_path / "save", train_iters=1, lr_warmup_iters=0, bf16=bf16))
    planned = checkpoint_bytes(parameters(load_spec(model)), bf16=bf16)
    assert written(tmp_path / "save", ".distcp") == pytest.approx(planned, rel=0.02)
