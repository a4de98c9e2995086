"""A teacher behind vLLM servers: scores of given tokens from ``prompt_logprobs``, for models that no family covers.

The numbers are megatron-core's within the difference of the engines, but for two things. A server sends
log-probabilities alone, so log t_p is log(1 - sum), which is coarse below 1e-6. And its softmax spans the teacher's
whole vocabulary: where columns from V* on are among the top-k, the sample is quarantined.

Legend: R response tokens of all sequences, K top-k width, P prefix tokens, n response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npd.config.settings import AnnotateConfig, RolloutConfig
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.models.families.config import load_sizes
from megatron_npd.records import LOG_TAIL_FLOOR
from megatron_npd.serving.pool import ServerPool
from megatron_npd.serving.protocol import UNDEFINED, Failure, Malformed, field, is_defined
from megatron_npd.store.scores import Ids, OnForward, Scores, Sequences, empty_scores, response_starts
from megatron_npd.weights import model_fingerprint

Positions = list[dict[int, float]]  # of each response token: token id -> log-probability


class ServerScorer:
    """``store.scores.TokenScorer`` over HTTP; a context manager. Servers are found or launched by the first call.

    Args:
        teacher_dir: Hugging Face directory of the teacher, of which one server is launched where ``cfg.urls`` is empty.
        cfg: Settings of the annotation stage.
        log_dir: Directory of the log of a launched server; None: a private one among the temporary files.
    """

    def __init__(self, teacher_dir: str | Path, cfg: AnnotateConfig, *, log_dir: str | Path | None = None) -> None:
        self.teacher_dir, self.top_k, self.log_dir = teacher_dir, cfg.top_k, log_dir
        self.cfg = RolloutConfig(
            urls=cfg.urls,
            token_file=cfg.token_file,
            max_model_len=min(cfg.seq_length + 1, load_sizes(teacher_dir)[1]),  # a server insists on generating a token
            concurrency=cfg.concurrency,
            dtype="bfloat16" if cfg.bf16 else "float32",
            server_args=("--max-logprobs", str(cfg.top_k)),
        )
        self.pool: ServerPool | None = None

    def __enter__(self) -> ServerScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop what was launched; the next call launches it again."""
        if self.pool is not None:
            self.pool.close()
            self.pool = None

    def check(self) -> None:
        """Find or launch the servers, and insist that they serve the teacher as the stage needs it.

        Raises:
            UserError: They do not.
        """
        self._open()

    def score(
        self, prefixes: Sequences, responses: Sequences, *, top_k: int = 0, on_forward: OnForward | None = None
    ) -> Scores:
        """``store.scores.TokenScorer.score``; what a server refuses is NaN.

        The stage sets such a sample aside, or, where only the response alone was refused, the selection does as
        ``ifd_undefined``.

        Raises:
            UserError: A server died, hangs, or does not give ``top_k`` log-probabilities.
        """
        pool = self._open()
        scores = empty_scores(response_starts(responses), top_k)

        asked = [
            _Question(tokens=[*prefix.tolist(), *response.tolist()], n=len(response), top_k=top_k)
            for prefix, response in zip(prefixes, responses, strict=True)
        ]

        def on_result(index: int, result: Positions | Failure) -> None:
            n, part = len(responses[index]), slice(scores.starts_N[index], scores.starts_N[index + 1])
            if isinstance(result, Failure):
                get_logger().warning("a sequence is not scored: %s (%s)", result.reason, result.detail)
                _fill_nan(scores, part)
            else:
                _fill(scores, part, responses[index], result, top_k)
            if on_forward is not None:
                tokens = len(prefixes[index]) + n - 1
                on_forward(n, tokens, tokens)

        pool.ask(
            range(len(responses)),
            on_result,
            body=lambda index: _body(asked[index]),
            read=lambda index, answer, vocab_size: _read(asked[index], answer, vocab_size),
        )
        return scores

    def _open(self) -> ServerPool:
        """The servers, which give as many log-probabilities as the stage will ask for."""
        if self.pool is None:
            self.pool = ServerPool.open(self.teacher_dir, self.cfg, version="teacher", log_dir=self.log_dir)
            self.pool.check()
            for url in self.pool.urls:
                self._check_model(self.pool, url)
            refused: list[Failure] = []
            probe = [_Question(tokens=[0, 0], n=1, top_k=self.top_k)] * len(self.pool.urls)
            self.pool.ask(
                probe,
                lambda _, result: refused.append(result) if isinstance(result, Failure) else None,
                body=_body,
                read=_read,
            )
            if refused:
                raise UserError(
                    f"the teacher's servers must give {self.top_k} (top_k) prompt_logprobs, got {refused[0].detail}; "
                    f"start them with --max-logprobs {self.top_k}, or lower top_k"
                )
        return self.pool

    def _check_model(self, pool: ServerPool, url: str) -> None:
        """Refuse a server of another model."""
        held = pool.call_worker(url, "npd_describe").get("fingerprint")
        if held != model_fingerprint(self.teacher_dir):
            raise UserError(
                f"the server {url} must serve the teacher {self.teacher_dir}, got a model with other files; give its "
                "own directory as the teacher, or another server"
            )


@dataclass(frozen=True, kw_only=True)
class _Question:
    """Tokens to score, of which the last ``n`` are the response."""

    tokens: list[int]
    n: int
    top_k: int


def _body(asked: _Question) -> dict[str, Any]:
    sampling = {"max_tokens": 1, "temperature": 0.0, "detokenize": False, "prompt_logprobs": asked.top_k}
    return {"token_ids": asked.tokens, "sampling_params": sampling}


def _read(asked: _Question, answer: Any, vocab_size: int) -> Positions | Failure:
    """What was sent for each response token: the most likely tokens, and itself."""
    positions = field(answer, "prompt_logprobs")
    if not isinstance(positions, list) or len(positions) != len(asked.tokens):
        raise Malformed(f"prompt_logprobs for other than {len(asked.tokens)} tokens")
    result: Positions = []
    for token, position in zip(asked.tokens[-asked.n :], positions[-asked.n :], strict=True):
        if not isinstance(position, dict) or str(token) not in position or len(position) < asked.top_k:
            raise Malformed(f"{str(position)[:100]} in place of the {asked.top_k} most likely tokens and {token}")
        if not all(key.isdecimal() and int(key) < vocab_size for key in position):
            raise Malformed(f"token ids {str(list(position))[:100]} in place of ids below {vocab_size}")
        logprobs = {int(key): field(entry, "logprob") for key, entry in position.items()}
        if not all(map(is_defined, logprobs.values())):
            return Failure(reason=UNDEFINED, detail=f"log-probabilities {list(logprobs.values())[:8]}")
        result.append(logprobs)
    return result


def _fill(scores: Scores, part: slice, response: Ids, positions: Positions, top_k: int) -> None:
    """The scores of one response, from what was sent for each of its tokens: the most likely K, and itself."""
    sampled = [position[token] for token, position in zip(response.tolist(), positions, strict=True)]
    scores.sampled_logprobs_R[part] = sampled
    if scores.ids_RK is None or scores.logprobs_RK is None or scores.log_tail_R is None:
        return
    first = [sorted(position.items(), key=lambda item: -item[1])[:top_k] for position in positions]
    scores.ids_RK[part] = [[token for token, _ in row] for row in first]
    scores.logprobs_RK[part] = logprobs_nK = np.array([[logprob for _, logprob in row] for row in first])
    rest_n = 1 - np.exp(logprobs_nK).sum(axis=1)
    scores.log_tail_R[part] = np.maximum(np.log(np.maximum(rest_n, np.exp(LOG_TAIL_FLOOR))), LOG_TAIL_FLOOR)


def _fill_nan(scores: Scores, part: slice) -> None:
    for array in (scores.sampled_logprobs_R, scores.logprobs_RK, scores.log_tail_R):
        if array is not None:
            array[part] = np.nan
    if scores.ids_RK is not None:
        scores.ids_RK[part] = 0
