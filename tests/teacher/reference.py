"""What the teacher's tests compare with: sealed rollouts of random tokens, and transformers on one sequence a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from megatron_npd.manifest import Manifest, seal, writing
from megatron_npd.records import ROLLOUT_SCHEMA, ROLLOUTS_FILE

TOKENS = 300  # of the tiny tokenizer
HEADER = [1, 67, 85]


class Reference(NamedTuple):
    """Of one response: log-probabilities over ``columns`` [n, columns], and those of its own tokens [n]."""

    logprobs: torch.Tensor
    sampled: torch.Tensor

    @property
    def loss(self) -> float:
        return -self.sampled.mean().item()


class TransformersModel:
    """A Hugging Face directory as transformers runs it, in fp32."""

    def __init__(self, path: Path, columns: int | None = None) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32).eval()
        self.columns = columns

    @torch.no_grad()
    def __call__(self, prefix: Sequence[int] | np.ndarray, response: Sequence[int] | np.ndarray) -> Reference:
        tokens = torch.tensor([[*prefix, *response]]).long()
        logits = self.model(tokens).logits[0, len(prefix) - 1 : -1, : self.columns].double()
        logprobs = torch.log_softmax(logits, dim=-1)
        return Reference(logprobs, logprobs.gather(1, tokens[0, len(prefix) :, None])[:, 0])


def check_top_k(ids_nK: np.ndarray, logprobs_nK: np.ndarray, reference_nV: torch.Tensor, tolerance: float) -> None:
    """Ids equal up to ties, log-probabilities within ``tolerance``."""
    expected = reference_nV.topk(ids_nK.shape[1]).values
    own = reference_nV.gather(1, torch.as_tensor(ids_nK).long())
    assert (own - expected).abs().max() < tolerance, "another token is more likely"
    assert (torch.as_tensor(logprobs_nK).double() - own).abs().max() < tolerance
    assert all(len(set(row)) == len(row) for row in ids_nK.tolist())


def make_rollouts(
    path: Path, lengths: Sequence[tuple[int, int]], *, shards: int = 2, seed: int = 0, **overrides: Sequence[Any]
) -> Manifest:
    """Seal rollouts of random tokens with the given (prompt, response) lengths; ``overrides`` replace columns.

    Prompts end in ``HEADER`` where they are long enough; odd samples are greedy.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for index, (prompt_len, response_len) in enumerate(lengths):
        prompt = rng.integers(3, TOKENS, prompt_len).tolist()
        generation_prompt_len = len(HEADER) if prompt_len > len(HEADER) else 0
        row = {
            "sample_id": f"{index:016x}",
            "prompt_id": f"p{index // 2}",
            "path": index % 2,
            "prompt_ids": prompt[: prompt_len - generation_prompt_len] + HEADER[:generation_prompt_len],
            "generation_prompt_len": generation_prompt_len,
            "teacher_prompt_ids": None,
            "response_ids": rng.integers(3, TOKENS, response_len).tolist(),
            "logprobs": (-rng.exponential(size=response_len)).tolist(),
            "finish_reason": "stop",
            "copies": 1,
            "seed": index,
            "temperature": float(index % 2 == 0),
            "top_p": 1.0,
            "source": "student",
            "policy_version": "v0003",
        }
        rows.append(row | {name: values[index] for name, values in overrides.items()})
    provenance = {"round": 3, "policy_version": "v0003"}
    with writing(path):
        for shard, part in enumerate(np.array_split(np.arange(len(rows)), shards)):
            with writing(path / f"shard-{shard:05d}") as directory:
                table = pa.Table.from_pylist([rows[index] for index in part], schema=ROLLOUT_SCHEMA)
                pq.write_table(table, directory / ROLLOUTS_FILE)
                seal(directory, kind="rollouts-shard", provenance=provenance)
        return seal(path, kind="rollouts", provenance=provenance, counts={"in": len(rows), "kept": len(rows)})
