"""What a model says of given tokens, and what can be asked to say it: megatron-core here, or servers elsewhere.

Legend: P prefix tokens, n response tokens, R response tokens of all sequences, K top-k width, N sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.integer]
Sequences = Sequence[Ids]
# Called with what was scored since the last call: response tokens; all tokens; tokens that rows could have held.
OnForward = Callable[[int, int, int], object]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model says of the response tokens of all sequences, one after another.

    Attributes:
        starts_N: int64 [N + 1], first response token of each sequence.
        sampled_logprobs_R: float32 [R], log-probability of each response token, over the full vocabulary.
        ids_RK: int32 [R, K], most likely tokens first; None where none were asked for.
        logprobs_RK: float32 [R, K], full-vocabulary log-probabilities of ``ids_RK``; None with it.
        log_tail_R: float32 [R], log of the mass outside the K, floored at -30; None with it.
    """

    starts_N: npt.NDArray[np.int64]
    sampled_logprobs_R: npt.NDArray[np.float32]
    ids_RK: npt.NDArray[np.int32] | None
    logprobs_RK: npt.NDArray[np.float32] | None
    log_tail_R: npt.NDArray[np.float32] | None

    def losses(self) -> npt.NDArray[np.float32]:
        """L of each sequence: mean over its response tokens of -log p, nats per token, fp32 [N] (METHOD section 3)."""
        return mean_loss(self.sampled_logprobs_R, self.starts_N)


def mean_loss(logprobs_R: npt.NDArray[np.float32], starts_N: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Mean of ``-logprobs_R`` over each sequence (at least one token each), float32 [N], summed in float64."""
    if len(starts_N) == 1:
        return np.zeros(0, np.float32)
    sums_N = np.add.reduceat(logprobs_R.astype(np.float64), starts_N[:-1])
    return (-sums_N / np.diff(starts_N)).astype(np.float32)


def response_starts(responses: Sequence[Ids]) -> npt.NDArray[np.int64]:
    """First token of each response where all stand one after another, and the end of the last; int64 [N + 1]."""
    return np.concatenate([[0], np.cumsum([len(response) for response in responses], dtype=np.int64)])


def empty_scores(starts_N: npt.NDArray[np.int64], top_k: int) -> Scores:
    """Scores to write into, all 0, of sequences that start at ``starts_N``."""
    size = int(starts_N[-1])
    return Scores(
        starts_N=starts_N,
        sampled_logprobs_R=np.zeros(size, np.float32),
        ids_RK=np.zeros((size, top_k), np.int32) if top_k else None,
        logprobs_RK=np.zeros((size, top_k), np.float32) if top_k else None,
        log_tail_R=np.zeros(size, np.float32) if top_k else None,
    )


class TokenScorer(Protocol):
    """Scores each response after its prefix."""

    def score(
        self, prefixes: Sequences, responses: Sequences, *, top_k: int = 0, on_forward: OnForward | None = None
    ) -> Scores | None:
        """Score each response after its prefix.

        Args:
            prefixes: Token ids [P >= 1] of each sequence.
            responses: Token ids [n >= 1] of each.
            top_k: Most likely tokens kept a response token; 0: none.
            on_forward: Called as work proceeds.

        Returns:
            The scores; None on ranks that have no part of the model's output.
        """
        ...
