"""A tiny model and packs of random samples with valid teacher rows, for the tests of training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npd.config.settings import PackConfig
from megatron_npd.config.training import TrainConfig
from megatron_npd.data.packing import pack_prompts, pack_selection
from tests.data.test_packing import make_prompts, make_selection
from tests.helpers import VOCAB_SIZE
from tests.store.make_store import make_store

SEQ_LENGTH = 64


def sample_lengths(samples: int, seed: int = 0) -> list[tuple[int, int]]:
    """(prompt, response) tokens of random samples, each shorter than a row."""
    rng = np.random.default_rng(seed)
    return [(int(rng.integers(2, 12)), int(rng.integers(3, 40))) for _ in range(samples)]


def make_packs(
    root: Path,
    *,
    samples: int = 40,
    seq_length: int = SEQ_LENGTH,
    vocab_size: int = VOCAB_SIZE,
    weights: Sequence[float] | None = None,
) -> Path:
    """Packs with teacher rows over a new store, both under ``root``."""
    store = make_store(root / "annotations", sample_lengths(samples), top_k=8, vocab_size=vocab_size)
    selection = make_selection(root / "selection", store, [True] * samples, weights)
    pack_selection(store, selection, root / "packs", PackConfig(seq_length=seq_length, segment_align=8))
    return root / "packs"


def make_round(run: Path, index: int, *, samples: int = 30) -> Path:
    """The packs of a round of a run, over a store of its own, as its stages leave them."""
    root = run / "rounds" / f"{index:04d}"
    about = {"round": index, "policy_version": f"v{index:04d}"}
    lengths = sample_lengths(samples, seed=index)
    store = make_store(root / "annotations", lengths, top_k=8, vocab_size=VOCAB_SIZE, seed=index, provenance=about)
    selection = make_selection(root / "selection", store, [True] * samples)
    pack_selection(store, selection, root / "packs", PackConfig(seq_length=SEQ_LENGTH, segment_align=8))
    return root / "packs"


def make_sft_packs(root: Path, *, samples: int = 40) -> Path:
    """Packs of tokens alone."""
    rng = np.random.default_rng(1)
    prompts = [
        (rng.integers(0, VOCAB_SIZE, p).tolist(), rng.integers(0, VOCAB_SIZE, n).tolist())
        for p, n in sample_lengths(samples)
    ]
    source = make_prompts(root / "prompts", prompts)
    pack_prompts(source, root, PackConfig(seq_length=SEQ_LENGTH, segment_align=8), vocab_size=VOCAB_SIZE)
    return root / "packs"


def config(model: Path, packs: Path, save: Path | str = "", **overrides: Any) -> TrainConfig:
    """20 steps of 4 rows with warm-up; an epsilon that keeps Adam from blowing up gradients that are 0 but for
    rounding (those of the key's bias)."""
    fields: dict[str, Any] = {
        "hf_model": str(model),
        "data_path": str(packs),
        "save": str(save),
        "train_iters": 20,
        "global_batch_size": 4,
        "lr": 1e-3,
        "min_lr": 1e-4,
        "lr_warmup_iters": 3,
        "adam_eps": 1e-6,
        "platform": "cpu",
    }
    return TrainConfig(**(fields | overrides))


def read_metrics(path: Path | None) -> list[dict[str, Any]]:
    """The lines of a metrics file."""
    assert path is not None
    return [json.loads(line) for line in path.read_text().splitlines()]


def column(path: Path | None, name: str) -> list[float]:
    """One quantity of every step."""
    return [line[name] for line in read_metrics(path)]
