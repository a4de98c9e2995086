"""What is asked of a server and what comes back: requests, responses, and the checks that a response must pass.

A server is another program, on another machine, of another release: whatever it sends is checked before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_npd.records import LOGPROB_ROUNDING, NO_LOGPROB

UNDEFINED = "undefined_logprob"  # the reason of a failure after which a server's cache is cleared


class Malformed(Exception):
    """A response is not what was asked for; it is worth asking again."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one response is asked for with.

    Attributes:
        key: The caller's own mark; it is not sent.
        token_ids: The prompt.
        max_tokens: Longest response, in tokens.
        stop_ids: Ids that end it; the server's own are among them.
        temperature: 0 is greedy.
        top_p: Nucleus probability.
        seed: Seed of the sampling.
        given: The response, where it is there already: its log-probabilities are all that is asked for.
    """

    key: int
    token_ids: Sequence[int]
    max_tokens: int
    stop_ids: Sequence[int]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    given: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Response:
    """One finished response.

    Attributes:
        token_ids: n ids; the stop token is the last one exactly when ``finish_reason`` is ``stop``.
        logprobs: n log-probabilities of the raw, full-vocabulary distribution at temperature 1; empty where not asked.
        finish_reason: ``stop`` or ``length``.
        versions: The policy versions that generated it, in order: one, unless weights changed half-way.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    versions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a request has no response: a reason to count by, and what was seen."""

    reason: str
    detail: str


def generate_body(request: Request) -> dict[str, Any]:
    """The JSON object that asks for a response, with the log-probabilities of its own tokens alone."""
    if request.given:
        return scoring_body([*request.token_ids, *request.given])
    sampling = {
        "max_tokens": request.max_tokens,
        "stop_token_ids": list(request.stop_ids),
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "detokenize": False,
        "logprobs": 0,
    }
    return {"token_ids": request.token_ids, "sampling_params": sampling}


def scoring_body(token_ids: Sequence[int]) -> dict[str, Any]:
    """The JSON object that asks for the log-probabilities of given tokens."""
    sampling = {"max_tokens": 1, "temperature": 0.0, "detokenize": False, "prompt_logprobs": 0}
    return {"token_ids": token_ids, "sampling_params": sampling}


def read_scores(token_ids: Sequence[int], body: Any) -> list[float]:
    """Log-probabilities of all given tokens but the first, defined or not, from the JSON value that came back.

    Raises:
        Malformed: It does not hold them.
    """
    positions = field(body, "prompt_logprobs")
    if not isinstance(positions, list) or len(positions) != len(token_ids):
        raise Malformed(f"prompt_logprobs for other than {len(token_ids)} tokens")
    pairs = zip(token_ids[1:], positions[1:], strict=True)
    return [field(field(position, str(token)), "logprob") for token, position in pairs]


def read_response(request: Request, body: Any, vocab_size: int) -> Response | Failure:
    """The response to a request, or why there is none.

    Args:
        request: What was asked.
        body: The JSON value that came back.
        vocab_size: Of the served model.

    Raises:
        Malformed: It is no response to the request.
    """
    choice = first_of(field(body, "choices"), "choices")
    if request.given:
        return _read_given(request, body, choice)
    ids, reason = field(choice, "token_ids"), field(choice, "finish_reason")
    if reason not in ("stop", "length"):  # "abort" of a server that was interrupted, "error", null
        raise Malformed(f"finish reason {str(reason)[:100]} in place of stop or length")
    check_ids(ids, vocab_size)
    if not 0 < len(ids) <= request.max_tokens:
        raise Malformed(f"{len(ids)} tokens where 1 to {request.max_tokens} were asked for")
    if reason == "stop" and ids[-1] not in request.stop_ids:
        raise Malformed(f"a stop at {ids[-1]}, which is none of the stop ids {list(request.stop_ids)}")
    if passed := set(ids[:-1] if reason == "stop" else ids).intersection(request.stop_ids):
        raise Malformed(f"no stop at {min(passed)}, which is one of the stop ids {list(request.stop_ids)}")
    content = field(field(choice, "logprobs"), "content")
    if not isinstance(content, list) or len(content) != len(ids):
        raise Malformed(f"no log-probability for each of {len(ids)} tokens")
    logprobs = [field(entry, "logprob") for entry in content]
    if not all(map(is_defined, logprobs)):
        return Failure(reason=UNDEFINED, detail=f"log-probabilities {logprobs[:8]}")
    return Response(token_ids=ids, logprobs=logprobs, finish_reason=reason, versions=_versions(choice))


def _read_given(request: Request, body: Any, choice: Any) -> Response | Failure:
    ids = list(request.given)
    logprobs = read_scores([*request.token_ids, *ids], body)[-len(ids) :]
    if not all(map(is_defined, logprobs)):
        return Failure(reason=UNDEFINED, detail=f"log-probabilities {logprobs[:8]}")
    reason = "stop" if ids[-1] in request.stop_ids else "length"
    return Response(token_ids=ids, logprobs=logprobs, finish_reason=reason, versions=_versions(choice))


def _versions(choice: Any) -> tuple[str, ...]:
    first_of(spans := field(choice, "weight_versions"), "weight_versions")
    return tuple(str(field(span, "version")) for span in spans)


def json_of(content: bytes) -> Any:
    """The JSON value of a server's response.

    Raises:
        Malformed: It is none.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"no JSON: {error}") from error


def field(value: Any, name: str) -> Any:
    """A field of a JSON object.

    Raises:
        Malformed: It is no object, or has no such field.
    """
    if not isinstance(value, dict) or name not in value:
        raise Malformed(f"no {name} in {str(value)[:100]}")
    return value[name]


def first_of(value: Any, what: str) -> Any:
    """The first item of a JSON list.

    Raises:
        Malformed: It is no list, or empty.
    """
    if not isinstance(value, list) or not value:
        raise Malformed(f"{what} {str(value)[:100]} in place of a list of one or more")
    return value[0]


def check_ids(ids: Any, vocab_size: int) -> None:
    """Raise Malformed unless ``ids`` is a list of token ids of the vocabulary."""
    if not isinstance(ids, list) or not all(type(item) is int and 0 <= item < vocab_size for item in ids):
        raise Malformed(f"token ids {str(ids)[:100]} in place of integers from 0 to {vocab_size - 1}")


def is_defined(logprob: Any) -> bool:
    """Whether a log-probability is one: neither NaN nor what stands for it, and not above 0 but for rounding."""
    if logprob is not None and type(logprob) not in (int, float):
        raise Malformed(f"log-probability {str(logprob)[:100]} in place of a number")
    return logprob is not None and NO_LOGPROB < logprob <= LOGPROB_ROUNDING
