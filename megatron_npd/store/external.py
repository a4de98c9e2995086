"""One sample of teacher data made elsewhere: a record or a server's saved answer, checked, as the store holds it.

A *record* has ``prompt_ids`` and ``response_ids`` (or ``token_ids`` and ``prompt_len``), and for each response token
``top_ids`` with ``top_logprobs``, or with ``top_logits`` and ``logsumexp``: the columns of ``store/export.py``.
An *answer* is what a vLLM or OpenAI-style server replied to the teacher's request for the whole text, as saved, with
``prompt_len`` beside: ``prompt_logprobs``, or ``echo`` with ``logprobs`` and tokens as ``token_id:17``.

Legend: P prompt tokens, n response tokens, k top-k width of the store, C >= k columns given.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_npd.records import (
    LOG_TAIL_FLOOR,
    NO_LOGPROB,
    SOURCES,
    BadRecord,
    defined_logprobs,
    sample_id,
    teacher_record_dtype,
)
from megatron_npd.store.streams import undefined_logprobs
from megatron_npd.store.teacher_records import RECORD_RULES, broken_records

LOSSES = ("teacher_loss", "teacher_loss_unconditional", "student_loss", "student_loss_unconditional")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the store keeps of a record.

    Attributes:
        tokens: int32 [P + n].
        streams: Items of the store's streams by name, [n] each: ``generator``, and ``teacher`` where k > 0.
        row: The fields of ``records.SAMPLE_SCHEMA``.
    """

    tokens: npt.NDArray[np.int32]
    streams: dict[str, np.ndarray]
    row: dict[str, Any]


def parse_sample(value: Any, *, top_k: int, vocab_size: int, policy_version: str) -> Sample:
    """Check a record or an answer and turn it into a sample.

    Args:
        value: What the JSON line or the Parquet row holds.
        top_k: k; 0: tokens alone. Of more columns the most probable are kept.
        vocab_size: V*.
        policy_version: Of the store; a record that names another one is refused.

    Raises:
        BadRecord: A rule of the format is broken, or no distribution could have left these numbers.
    """
    if not isinstance(value, Mapping):
        raise BadRecord("wrong_type", f"a record must be an object, got {type(value).__name__}")
    record = {name: item for name, item in value.items() if item is not None}
    if "choices" in record or "response" in record:
        record = _from_answer(record, teacher=top_k > 0)
    prompt, response = _tokens(record)
    tokens, n = np.concatenate([prompt, response]), len(response)
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise BadRecord("token_outside_vocabulary", f"ids must be in 0..{vocab_size - 1}, got {tokens.max()}")
    generator_n = None
    if "generator_logprobs" in record:
        generator_n = _logprobs("generator_logprob_undefined", _numbers(record, "generator_logprobs", (n,)))
    if (source := record.get("source", "dataset" if generator_n is None else "student")) not in SOURCES:
        raise BadRecord("wrong_type", f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    on_distribution = record.get("on_distribution", generator_n is not None and source == "student")
    if not isinstance(on_distribution, bool):
        raise BadRecord("wrong_type", f"on_distribution must be true or false, got {on_distribution!r}")
    sampled_n, streams = np.full(n, np.nan), {"generator": undefined_logprobs(n)}
    if generator_n is not None and on_distribution:
        streams["generator"][:] = generator_n
    if top_k:
        ids_nC, logprobs_nC = _columns(record, n, vocab_size)
        streams["teacher"] = teacher = _records(record, ids_nC, logprobs_nC, top_k, vocab_size)
        if (broken_n := broken_records(teacher, vocab_size)).any():
            token = int(np.flatnonzero(broken_n)[0])
            reason, rule = RECORD_RULES[broken_n[token] - 1]
            raise BadRecord(reason, f"{rule.format(last=vocab_size - 1)}; response token {token}")
        own_nC = ids_nC == response[:, None]
        sampled_n = np.where(own_nC.any(axis=1), np.where(own_nC, logprobs_nC, -np.inf).max(axis=1), np.nan)
    if "teacher_logprobs" in record and _array(record, "teacher_logprobs").size:
        sampled_n = _numbers(record, "teacher_logprobs", (n,))
    _logprobs("sampled_logprob_undefined", sampled_n)
    row = _row(record, tokens, len(prompt), sampled_n, generator_n, policy_version)
    row |= {"source": source, "on_distribution": on_distribution}
    return Sample(tokens=tokens.astype(np.int32), streams=streams, row=row)


def _logprobs(reason: str, values_n: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Log-probabilities of a response's own tokens, NaN where one is not known, as a model can have given them."""
    with np.errstate(over="ignore"):
        stored_n = values_n.astype(np.float32)
    if (bad_n := ~(defined_logprobs(stored_n) | np.isnan(stored_n))).any():
        token = int(np.flatnonzero(bad_n)[0])
        raise BadRecord(
            reason, f"log-probs must be above {NO_LOGPROB:g} and <= 0, got {values_n[token]} at response token {token}"
        )
    return values_n


def _row(
    record: Mapping[str, Any],
    tokens: np.ndarray,
    prompt_len: int,
    sampled_n: npt.NDArray[np.float64],
    generator_n: npt.NDArray[np.float64] | None,
    policy_version: str,
) -> dict[str, Any]:
    given_id = record.get("prompt_id", record.get("id", ""))
    if isinstance(given_id, bool) or not isinstance(given_id, str | int):
        raise BadRecord("wrong_type", f"id must be a string or an integer, got {given_id!r}")
    prompt_id = str(given_id) or hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()[:16]
    path, reason = record.get("path", 0), record.get("finish_reason", "stop")
    if type(path) is not int or not 0 <= path < 2**31:
        raise BadRecord("wrong_type", f"path must be an integer >= 0, got {path!r}")
    if reason not in ("stop", "length"):
        raise BadRecord("wrong_type", f"finish_reason must be stop or length, got {reason!r}")
    copies = record.get("copies", 1)
    if type(copies) is not int or not 1 <= copies < 2**31:
        raise BadRecord("wrong_type", f"copies must be an integer >= 1, got {copies!r}")
    if (version := record.get("policy_version", policy_version)) != policy_version:
        raise BadRecord("policy_version", f"policy_version must be {policy_version}, got {version!r}")
    own_id = record.get("sample_id") or sample_id(prompt_id, 0, path)
    if not isinstance(own_id, str):
        raise BadRecord("wrong_type", f"sample_id must be a string, got {own_id!r}")
    losses = {
        "teacher_loss": float(-sampled_n.mean()),
        "student_loss": math.nan if generator_n is None else float(-generator_n.mean()),
    } | {name: float(_numbers(record, name, ())) for name in LOSSES if name in record}
    row = {
        "sample_id": own_id,
        "prompt_id": prompt_id,
        "path": path,
        "prompt_len": prompt_len,
        "response_len": len(tokens) - prompt_len,
        "finish_reason": reason,
        "copies": copies,
        "policy_version": policy_version,
        "teacher_logprobs": sampled_n.astype(np.float32) if not np.isnan(sampled_n).all() else [],
    }
    return row | {name: losses.get(name, math.nan) for name in LOSSES}


def _tokens(record: Mapping[str, Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ids of prompt and response."""
    if "prompt_ids" in record:
        prompt, response = (_integers(record, name, 1) for name in ("prompt_ids", "response_ids"))
    else:
        tokens, prompt_len = _integers(record, "token_ids", 1), record.get("prompt_len")
        if type(prompt_len) is not int or prompt_len < 0:
            raise BadRecord("no_prompt_len", f"prompt_len must be an integer beside token_ids, got {prompt_len!r}")
        prompt, response = tokens[:prompt_len], tokens[prompt_len:]
    if not len(prompt):
        raise BadRecord("no_prompt", "the prompt must have a token or more")
    if not len(response):
        raise BadRecord("empty_response", "the response must have a token or more")
    return prompt, response


def _columns(record: Mapping[str, Any], n: int, vocab_size: int) -> tuple[np.ndarray, npt.NDArray[np.float64]]:
    """Ids and log-probs [n, C], most probable first."""
    ids_nC = _integers(record, "top_ids", 2)
    if len(ids_nC) != n:
        raise BadRecord("length_mismatch", f"top_ids must have a row a response token ({n}), got {len(ids_nC)}")
    if "top_logprobs" in record:
        logprobs_nC = _numbers(record, "top_logprobs", ids_nC.shape)
    else:
        logprobs_nC = _numbers(record, "top_logits", ids_nC.shape)
        if "logsumexp" in record:
            logprobs_nC = logprobs_nC - _numbers(record, "logsumexp", (n,))[:, None]
        elif ids_nC.shape[1] == vocab_size:
            logprobs_nC = logprobs_nC - np.logaddexp.reduce(logprobs_nC, axis=1, keepdims=True)
        else:
            raise BadRecord("no_logsumexp", "top_logits need logsumexp, over the whole vocabulary, a response token")
    order_nC = np.argsort(-logprobs_nC, axis=1, kind="stable")
    return np.take_along_axis(ids_nC, order_nC, axis=1), np.take_along_axis(logprobs_nC, order_nC, axis=1)


def _records(
    record: Mapping[str, Any], ids_nC: np.ndarray, logprobs_nC: npt.NDArray[np.float64], top_k: int, vocab_size: int
) -> np.ndarray:
    n, columns = ids_nC.shape
    if columns < top_k:
        raise BadRecord("too_few_ids", f"top_ids must have {top_k} (top_k) columns or more, got {columns}")
    if ids_nC.size and (ids_nC.min() < 0 or ids_nC.max() >= vocab_size):  # before they are cut to 32 bits
        raise BadRecord(RECORD_RULES[0][0], f"ids must be in 0..{vocab_size - 1}, got {ids_nC.max()}")
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # what makes no sense is refused afterwards
        if "log_tail" in record:
            dropped_n = np.logaddexp.reduce(logprobs_nC[:, top_k:], axis=1, initial=-np.inf)
            log_tail_n = np.logaddexp(_numbers(record, "log_tail", (n,)), dropped_n)
        elif top_k == vocab_size:
            log_tail_n = np.full(n, LOG_TAIL_FLOOR)
        else:
            log_tail_n = np.log(np.maximum(1 - np.exp(logprobs_nC[:, :top_k]).sum(axis=1), 0))
        result = np.zeros(n, teacher_record_dtype(top_k))
        result["ids"], result["logprobs"] = ids_nC[:, :top_k], logprobs_nC[:, :top_k]
        result["log_tail"] = np.maximum(log_tail_n, LOG_TAIL_FLOOR)
    return result


def _from_answer(value: Mapping[str, Any], *, teacher: bool) -> dict[str, Any]:
    """The record in a saved answer; what stands beside the answer stays (``id``, ``generator_logprobs``, ...)."""
    value = {name: item.tolist() if isinstance(item, np.ndarray) else item for name, item in value.items()}
    answer = value.get("response", value)
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise BadRecord("no_choice", "an answer must have one choice")
    choice, request = choices[0], value.get("request") or {}
    record = {name: item for name, item in value.items() if name not in ("choices", "response", "request", "usage")}
    echo = choice.get("logprobs") or {}
    tokens = choice.get("prompt_token_ids") or answer.get("prompt_token_ids") or record.get("token_ids")
    if not tokens and isinstance(request, Mapping):
        tokens = request.get("prompt")
    if not isinstance(tokens, list) and isinstance(echo, Mapping) and echo.get("tokens"):
        tokens = [_token_id(name) for name in echo["tokens"]][: _prompt_tokens(answer)]
    if not isinstance(tokens, list):
        raise BadRecord("no_token_ids", "an answer must hold prompt_token_ids (ask for return_token_ids), or token_ids")
    record["token_ids"] = tokens
    record.pop("finish_reason", None)  # of the scoring request, where it stands there
    if not teacher:
        return record
    prompt, _ = _tokens(record)
    positions = choice.get("prompt_logprobs") or answer.get("prompt_logprobs")
    if positions is None and isinstance(echo, Mapping):
        positions = echo.get("top_logprobs")
    if not isinstance(positions, list) or len(positions) < len(tokens):
        raise BadRecord("no_prompt_logprobs", "an answer must hold prompt_logprobs (or echo) for each token it scored")
    scored = [_alternatives(item) for item in positions[len(prompt) : len(tokens)]]
    own = [dict(zip(*item, strict=True)).get(token) for item, token in zip(scored, tokens[len(prompt) :], strict=True)]
    if None in own:
        raise BadRecord("no_prompt_logprobs", "an answer must hold the log-prob of each token it scored")
    # A token that is none of the k stands beside them, k + 1 in all: the fewest that any position has are common.
    columns = min(len(ids) for ids, _ in scored)
    record["top_ids"] = [ids[:columns] for ids, _ in scored]
    record["top_logprobs"] = [logprobs[:columns] for _, logprobs in scored]
    return {"teacher_logprobs": own, **record}


def _prompt_tokens(answer: Mapping[str, Any]) -> int:
    """How many of an echo's tokens were asked about; the server's own follow, as many as it had to generate."""
    usage = answer.get("usage")
    number = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    if type(number) is not int or number < 1:
        raise BadRecord("no_prompt_tokens", f"an echo must come with usage.prompt_tokens, got {number!r}")
    return number


def _alternatives(position: Any) -> tuple[list[int], list[float]]:
    """Ids and log-probs at a position, most probable first."""
    if not isinstance(position, Mapping) or not position:
        raise BadRecord("no_prompt_logprobs", f"a scored position must have log-probs by token, got {position!r}")
    pairs = []
    for name, item in position.items():
        logprob = item.get("logprob") if isinstance(item, Mapping) else item
        if not isinstance(logprob, int | float) or math.isnan(logprob):
            raise BadRecord("wrong_type", f"a log-prob must be a number, got {logprob!r}")
        pairs.append((-float(logprob), _token_id(name)))
    pairs.sort(key=lambda pair: pair[0])
    return [token for _, token in pairs], [-negative for negative, _ in pairs]


def _token_id(name: Any) -> int:
    try:
        return int(str(name).removeprefix("token_id:"))
    except ValueError:
        raise BadRecord("no_token_ids", f"tokens must be ids (return_tokens_as_token_ids), got {name!r}") from None


def _integers(record: Mapping[str, Any], name: str, dimensions: int) -> npt.NDArray[np.int64]:
    array = _array(record, name)
    if array.size == 0 and array.ndim <= dimensions:
        return np.zeros((0,) * dimensions, np.int64)
    if array.dtype.kind not in "iu" or array.ndim != dimensions:
        raise BadRecord("wrong_type", f"{name} must be a {dimensions}-dimensional list of integers")
    return array.astype(np.int64)


def _numbers(record: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    array = _array(record, name)
    if array.dtype.kind not in "iuf":
        raise BadRecord("wrong_type", f"{name} must hold numbers")
    if array.shape != shape:
        raise BadRecord("length_mismatch", f"{name} must have the shape {list(shape)}, got {list(array.shape)}")
    return array.astype(np.float64)


def _array(record: Mapping[str, Any], name: str) -> np.ndarray:
    if name not in record:
        raise BadRecord("missing_field", f"{name} must be given")
    try:
        return np.array(record[name])
    except (ValueError, OverflowError, RecursionError) as error:  # lists of unequal lengths
        raise BadRecord("wrong_type", f"{name} must be a regular list: {error}") from error
