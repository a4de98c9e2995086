"""Exact-match accuracy of the served policy on problems with reference answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_npd.data.prompt_rows import PromptRows
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger, progress
from megatron_npd.manifest import read_manifest
from megatron_npd.serving.pool import ServerPool
from megatron_npd.serving.protocol import Failure, Request, Response

_WRONG_KEPT = 5


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The outcome of an evaluation.

    Attributes:
        correct: Problems with the reference's answer.
        total: Problems asked.
        tokens: Tokens generated.
        wrong: The first wrong ones, by problem: ``prompt_id``, ``expected``, ``got`` (None: the response has no
            answer) and ``response``.
    """

    correct: int
    total: int
    tokens: int
    wrong: tuple[dict[str, Any], ...]

    @property
    def accuracy(self) -> float:
        """Percentage of correct answers."""
        return 100.0 * self.correct / self.total


def exact_match(
    pool: ServerPool,
    prompts_dir: str | Path,
    *,
    answer_regex: str,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
) -> Accuracy:
    """Compare greedy responses with the references of a prompts directory.

    An answer is the first group of ``answer_regex`` at its last match in a text, without commas and a final full stop
    (``1,200.`` is ``1200``). A prompt that does not fit the context counts as wrong.

    Args:
        pool: The servers.
        prompts_dir: Sealed directory of kind ``prompts`` whose every prompt has a response.
        answer_regex: With at least one group.
        tokenizer: The student's.
        max_tokens: Longest response, in tokens.

    Raises:
        UserError: A reference without an answer, a regex without a group, or a server that died.
    """
    pattern = compile_regex(answer_regex)
    stop_ids = read_manifest(prompts_dir, kind="prompts").provenance["stop_ids"]
    problems, expected = read_problems(prompts_dir, answer_regex)
    responses: dict[int, str] = {}
    tokens = 0

    def on_result(request: Request, result: Response | Failure) -> None:
        nonlocal tokens
        if isinstance(result, Failure):
            prompt_id = problems[request.key]["prompt_id"]
            raise UserError(
                f"every problem must be answered, got {result.reason} for {prompt_id} ({result.detail}); rerun"
            )
        if result.versions != (served,):
            raise UserError(
                f"all answers must come from {served}, got one from {', '.join(result.versions)}; "
                "evaluate while nobody loads other weights"
            )
        tokens += len(result.token_ids)
        text_ids = result.token_ids[:-1] if result.finish_reason == "stop" else result.token_ids
        responses[request.key] = str(tokenizer.decode(text_ids, skip_special_tokens=True))
        bar.update()

    context = pool.cfg.max_model_len
    served = pool.check()
    with progress(len(problems), "evaluate", "problem") as bar:
        pool.run(
            (
                Request(key=i, token_ids=ids, max_tokens=min(max_tokens, context - len(ids)), stop_ids=stop_ids)
                for i, problem in enumerate(problems)
                if 0 < len(ids := problem["prompt_ids"]) < context
            ),
            on_result,
        )
    if missing := len(problems) - len(responses):
        get_logger().warning("%d of %d problems do not fit the context and count as wrong", missing, len(problems))
    got = [find_answer(responses.get(i, ""), pattern) for i in range(len(problems))]
    wrong = [
        {"prompt_id": problem["prompt_id"], "expected": right, "got": answer, "response": responses.get(i, "")}
        for i, (problem, right, answer) in enumerate(zip(problems, expected, got, strict=True))
        if right != answer
    ]
    return Accuracy(
        correct=len(problems) - len(wrong), total=len(problems), tokens=tokens, wrong=tuple(wrong[:_WRONG_KEPT])
    )


def find_answer(text: str, pattern: re.Pattern[str]) -> str | None:
    """The first group of the pattern's last match, without commas and a final full stop; None: no match."""
    matches = list(pattern.finditer(text))
    if not matches or matches[-1].group(1) is None:
        return None
    return matches[-1].group(1).replace(",", "").strip().rstrip(".")


def read_problems(prompts_dir: str | Path, answer_regex: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The problems of a prompts directory, and the reference's answer to each.

    Raises:
        UserError: There are none, or a response has no answer.
    """
    pattern = compile_regex(answer_regex)
    batches = PromptRows(prompts_dir).batches("prompt_id", "prompt_ids", "response")
    problems = [problem for batch in batches for problem in batch.to_pylist()]
    if not problems:
        raise UserError(f"{prompts_dir} must hold at least one problem, got none; prepare it from another file")
    return problems, [_reference(problem, pattern, prompts_dir) for problem in problems]


def compile_regex(answer_regex: str) -> re.Pattern[str]:
    """An answer's regular expression, with a group for the answer.

    Raises:
        UserError: It is none, or has no group.
    """
    try:
        pattern = re.compile(answer_regex)
    except re.error as error:
        raise UserError(f"answer_regex must be a regular expression, got {answer_regex!r}: {error}") from error
    if pattern.groups < 1:
        raise UserError(f"answer_regex must have a group for the answer, got {answer_regex!r}; put it in parentheses")
    return pattern


def _reference(problem: dict[str, Any], pattern: re.Pattern[str], prompts_dir: str | Path) -> str:
    answer = find_answer(problem["response"] or "", pattern)
    if answer is None:
        raise UserError(
            f"every problem of {prompts_dir} must have a response that answer_regex matches, got "
            f"{problem['response']!r} for {problem['prompt_id']}; mend the file or the regex"
        )
    return answer
