"""A teacher behind vLLM servers: scores of given tokens from ``prompt_logprobs``, for models that no family covers.

The numbers are megatron-core's within the difference of the engines, but for two things. A server sends
log-probabilities alone, so log t_p is log(1 - sum), which is coarse below 1e-6. And its softmax spans the teacher's
whole vocabulary: where columns from V* on are among the top-k, the sample is set aside.

Legend: R response tokens of all sequences, K top-k width, P prefix tokens, n response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npd.config import AnnotateConfig, RolloutConfig
from megatron_npd.data.scores import Ids, OnForward, Scores, empty_scores, response_starts
from megatron_npd.log import UserError, get_logger
from megatron_npd.models.families.base import load_sizes
from megatron_npd.models.hf_checkpoint import model_fingerprint
from megatron_npd.records import LOG_TAIL_FLOOR, NO_LOGPROB
from megatron_npd.rollout.pool import Failure, ServerPool

Positions = list[Mapping[str, Mapping[str, Any]]]  # of each response token: token id -> {"logprob": ...}


class ServerScorer:
    """``data.scores.TokenScorer`` over HTTP; a context manager. Servers are found or launched by the first call.

    Args:
        teacher_dir: Hugging Face directory of the teacher, of which one server is launched where ``cfg.urls`` is empty.
        cfg: Settings of the annotation stage.
    """

    def __init__(self, teacher_dir: str | Path, cfg: AnnotateConfig) -> None:
        self.teacher_dir, self.top_k = teacher_dir, cfg.top_k
        self.cfg = RolloutConfig(
            urls=cfg.urls,
            max_model_len=min(cfg.seq_length + 1, load_sizes(teacher_dir)[1]),  # a server insists on generating a token
            concurrency=cfg.concurrency,
            dtype="bfloat16" if cfg.bf16 else "float32",
            server_args=("--max-logprobs", str(cfg.top_k)),
        )
        self.pool: ServerPool | None = None

    def __enter__(self) -> ServerScorer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.close()

    def score(
        self,
        prefixes: Sequence[Ids],
        responses: Sequence[Ids],
        *,
        top_k: int = 0,
        on_forward: OnForward | None = None,
    ) -> Scores:
        """``data.scores.TokenScorer.score``; what a server refuses is NaN.

        The stage sets such a sample aside, or, where only the response alone was refused, the selection does as
        ``ifd_undefined``.

        Raises:
            UserError: A server died, hangs, or does not give ``top_k`` log-probabilities.
        """
        pool = self._open()
        scores = empty_scores(response_starts(responses), top_k)

        def body(index: int) -> dict[str, Any]:
            return _body([*prefixes[index].tolist(), *responses[index].tolist()], top_k)

        def on_result(index: int, result: Positions | Failure) -> None:
            n, part = len(responses[index]), slice(scores.starts_N[index], scores.starts_N[index + 1])
            if isinstance(result, Failure):
                get_logger().warning("a sequence is not scored: %s (%s)", result.reason, result.detail)
                _fill_nan(scores, part)
            else:
                _fill(scores, part, responses[index], result[-n:], top_k)
            if on_forward is not None:
                tokens = len(prefixes[index]) + n - 1
                on_forward(n, tokens, tokens)

        pool.ask(range(len(responses)), on_result, body=body, read=_read)
        return scores

    def _open(self) -> ServerPool:
        """The servers, which give as many log-probabilities as the stage will ask for."""
        if self.pool is None:
            self.pool = ServerPool.open(self.teacher_dir, self.cfg)
            self.pool.check()
            for url in self.pool.urls:
                self._check_model(self.pool, url)
            refused: list[Failure] = []
            probe = [_body([0, 0], self.top_k)] * len(self.pool.urls)
            self.pool.ask(
                probe,
                lambda _, result: refused.append(result) if isinstance(result, Failure) else None,
                body=dict,
                read=_read,
            )
            if refused:
                raise UserError(
                    f"the teacher's servers must give {self.top_k} (top_k) prompt_logprobs, got {refused[0].detail}; "
                    f"start them with --max-logprobs {self.top_k}, or lower top_k"
                )
        return self.pool

    def _check_model(self, pool: ServerPool, url: str) -> None:
        """Refuse a server of another model; where its directory cannot be seen from here, say so."""
        root = pool.control(url, "/v1/models", method="GET")["data"][0].get("root")
        served = Path(root or "/nowhere")
        if not (served / "config.json").is_file():
            get_logger().warning(
                "%s serves %s, which cannot be compared with %s from here", url, root, self.teacher_dir
            )
        elif model_fingerprint(served) != model_fingerprint(self.teacher_dir):
            raise UserError(
                f"the server {url} must serve the teacher {self.teacher_dir}, got {served} with other files; give its "
                "own directory as the teacher, or another server"
            )


def _body(tokens: list[int], top_k: int) -> dict[str, Any]:
    sampling = {"max_tokens": 1, "temperature": 0.0, "detokenize": False, "prompt_logprobs": top_k}
    return {"token_ids": tokens, "sampling_params": sampling}


def _read(answer: dict[str, Any]) -> Positions | Failure:
    positions = answer.get("prompt_logprobs")
    if not positions:
        return Failure(reason="request_failed", detail="an answer without prompt_logprobs")
    return positions


def _fill(scores: Scores, part: slice, response: Ids, positions: Positions, top_k: int) -> None:
    """The scores of one response, from what was sent for each of its tokens: the most likely K, and itself."""
    sampled = [position[str(token)]["logprob"] for token, position in zip(response.tolist(), positions, strict=True)]
    scores.sampled_logprobs_R[part] = np.where(np.array(sampled) > NO_LOGPROB, sampled, np.nan)
    if scores.ids_RK is None or scores.logprobs_RK is None or scores.log_tail_R is None:
        return
    first = [sorted(position.items(), key=lambda item: -item[1]["logprob"])[:top_k] for position in positions]
    scores.ids_RK[part] = [[int(token) for token, _ in row] for row in first]
    logprobs_nK = np.array([[entry["logprob"] for _, entry in row] for row in first])
    scores.logprobs_RK[part] = np.where(logprobs_nK > NO_LOGPROB, logprobs_nK, np.nan)
    rest_n = 1 - np.exp(logprobs_nK).sum(axis=1)
    scores.log_tail_R[part] = np.maximum(np.log(np.maximum(rest_n, np.exp(LOG_TAIL_FLOOR))), LOG_TAIL_FLOOR)


def _fill_nan(scores: Scores, part: slice) -> None:
    for array in (scores.sampled_logprobs_R, scores.logprobs_RK, scores.log_tail_R):
        if array is not None:
            array[part] = np.nan
    if scores.ids_RK is not None:
        scores.ids_RK[part] = 0
