"""Prompts as users write them, turned into token ids once, in a sealed directory of kind ``prompts``.

``generation_prompt_len`` counts the last tokens of ``prompt_ids`` that open the assistant's turn. It is 0 where the
prompt has no generation prompt (no chat template, or one that opens the response with nothing): the response alone is
then conditioned on ``tokenizer.document_start``, which is no suffix of the prompt.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from megatron_npd.data.conversation import REASONING, Codec, Conversation, more_than_content
from megatron_npd.data.held_out import REASON, hold_out
from megatron_npd.data.prompt_files import Source, read_batches
from megatron_npd.data.seen import Seen
from megatron_npd.data.template import limits
from megatron_npd.data.tokenizer import (
    ModelTokens,
    check_vocabularies,
    generation_prompt,
    tokenizer_hash,
)
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger, progress
from megatron_npd.manifest import Manifest, config_hash, file_sha256, seal, sealed_from, writing
from megatron_npd.quarantine import QUARANTINE_FILE, check_quarantined
from megatron_npd.records import PROMPT_SCHEMA, PROMPTS_FILE, BadRecord
from megatron_npd.user_files import parse_json

__all__ = ["check_vocabularies", "prepare_prompts"]

_RESPONSE_TOKENS = 32768
_ARGUMENTS = "its arguments must be an object, or the JSON text of one"


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    """A checked record: a conversation, or a plain text for a tokenizer without a chat template."""

    source: Source
    prompt_id: str
    content_hash: str
    conversation: Conversation
    extras: str


def prepare_prompts(
    source: str | Path,
    out_dir: str | Path,
    *,
    model: ModelTokens,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    max_prompt_len: int,
    max_response_len: int | None = None,
    max_quarantined: float = 0.1,
    held_out: int = 0,
    special_tokens_in_text: bool = False,
) -> Manifest:
    """Read prompts, apply the chat template once and seal ``out_dir`` with the token ids (``records.PROMPT_SCHEMA``).

    A record holds ``messages`` (a chat; a last assistant message is its response) or ``prompt`` (a string; one user
    message where the tokenizer has a chat template), optionally ``response`` and ``id``; other columns go to
    ``extras`` as JSON. Without ``id`` it is a hash of conversation and response. ``response_ids`` ends in the first
    of the model's stop ids, which are in the manifest for all who generate from these prompts. Bad records are set
    aside in ``quarantine.jsonl`` with line number, byte offset and reason; the rest goes on in the file's order. A
    sealed ``out_dir`` made from the same input is left as it is.

    Args:
        source: ``.jsonl`` or ``.parquet`` file.
        out_dir: Directory to seal.
        model: Of the student, or of whatever model is to be trained or asked.
        teacher_tokenizer: The teacher's; vocabularies are compared, and ``teacher_prompt_ids`` is filled where its
            chat template gives other ids. A teacher without a chat template sees the student's ids.
        max_prompt_len: Longest prompt, in tokens.
        max_response_len: Longest given response, in tokens, its stop token among them; None: the longest prompt, or
            32768 where that is more.
        max_quarantined: Share of the records that may be quarantined; repeated ones do not count.
        held_out: Prompts to keep from training, to measure on (``data/held_out.py``).
        special_tokens_in_text: Take special tokens that users' texts spell for control tokens.

    Returns:
        The manifest; counts: ``in`` = ``kept`` + sum of ``quarantined`` (repeated records under ``duplicate``, those
        kept from training under ``held_out``).

    Raises:
        UserError: No such file, one id for two contents, too few usable prompts, or ``out_dir`` has other prompts.
    """
    source, out_dir = Path(source), Path(out_dir)
    _check_file(source)
    tokenizer = model.tokenizer
    generation_prompt(tokenizer)  # refuses a tokenizer that leaves L(y) undefined before anything is read
    if teacher_tokenizer is not None:
        check_vocabularies(tokenizer, teacher_tokenizer)
        if teacher_tokenizer.chat_template is None or _template(teacher_tokenizer) == _template(tokenizer):
            teacher_tokenizer = None
    provenance = {
        "source_sha256": file_sha256(source),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "stop_ids": list(model.stop_ids),
        "teacher_tokenizer_hash": tokenizer_hash(teacher_tokenizer) if teacher_tokenizer else None,
        "max_prompt_len": max_prompt_len,
        "held_out": held_out,
        "special_tokens_in_text": special_tokens_in_text,
    }
    if max_response_len is None:
        max_response_len = max(max_prompt_len, _RESPONSE_TOKENS)
    else:
        provenance["max_response_len"] = max_response_len
    if manifest := sealed_from(out_dir, kind="prompts", provenance=provenance):
        return manifest
    tokenizers = [tokenizer, *([teacher_tokenizer] if teacher_tokenizer else [])]
    sides = [Codec(side, model.stop_ids, spelled=special_tokens_in_text) for side in tokenizers]
    with writing(out_dir) as directory:
        counts = _write(source, directory, model, sides, max_prompt_len, max_response_len)
        dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(counts["quarantined"].items()))
        if not counts["kept"]:
            got = f"{counts['in']} records and {dropped or 'nothing else'}; see {directory / QUARANTINE_FILE}"
            raise UserError(f"{source} must hold a usable prompt, got {got}")
        check_quarantined(counts["quarantined"], counts["in"], max_quarantined, source)
        if held_out and (number := hold_out(directory, held_out)):
            counts["kept"] -= number
            counts["quarantined"][REASON] = number
        manifest = seal(directory, kind="prompts", provenance=provenance, counts=counts)
    note = f"; quarantined: {dropped} (see {out_dir / QUARANTINE_FILE})" if dropped else ""
    get_logger().info("%d of %d prompts of %s kept%s", counts["kept"], counts["in"], source, note)
    return manifest


def _check_file(source: Path) -> None:
    if not source.is_file():
        raise UserError(f"prompts must be a JSONL or Parquet file, got no file at {source}; check the path")
    if source.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"prompts must end in .jsonl or .parquet, got {source}; convert or rename it")


def _template(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    return tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token


def _write(
    source: Path,
    out_dir: Path,
    model: ModelTokens,
    sides: list[Codec],
    max_prompt_len: int,
    max_response_len: int,
) -> dict[str, Any]:
    seen = Seen()
    reasons: Counter[str] = Counter()
    kept = total = 0
    with (
        pq.ParquetWriter(out_dir / PROMPTS_FILE, PROMPT_SCHEMA) as table,
        open(out_dir / QUARANTINE_FILE, "w", encoding="utf-8") as quarantine,
        progress(None, "prompts", "prompt") as bar,
    ):
        for batch in read_batches(source):
            prompts: list[_Prompt] = []
            bad: list[tuple[Source, BadRecord]] = []
            for item in batch:
                try:
                    prompts.append(_admit(item, seen))
                except BadRecord as problem:
                    bad.append((item, problem))
            rows = []
            for prompt, row in _tokenise(prompts, model, sides, max_prompt_len, max_response_len):
                if isinstance(row, BadRecord):
                    bad.append((prompt.source, row))
                else:
                    rows.append(row)
            table.write_table(pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA))
            for item, problem in sorted(bad, key=lambda pair: pair[0].line):
                reasons[problem.reason] += 1
                entry = {"line": item.line, "byte_offset": item.byte_offset, "reason": problem.reason}
                quarantine.write(json.dumps(entry | {"detail": str(problem)[:500]}) + "\n")
            kept, total = kept + len(rows), total + len(batch)
            bar.update(len(batch))
    return {"in": total, "kept": kept, "quarantined": dict(reasons)}


def _admit(source: Source, seen: Seen) -> _Prompt:
    """Check one record's types and its id against those ``seen``, which it joins."""
    if source.bad:
        raise source.bad
    try:
        prompt = _parse(source)
    except RecursionError as error:
        raise BadRecord("bad_json", f"a record must have fewer levels of lists and objects: {error}") from error
    if first := seen.add(prompt.prompt_id, prompt.content_hash, source.line):
        same, line = first
        if not same:
            raise UserError(
                f"ids of prompts must be unique, got {prompt.prompt_id!r} with different content on lines {line} and "
                f"{source.line}; rename one or leave the id column out"
            )
        raise BadRecord("duplicate", f"the same record as on line {line}")
    return prompt


def _parse(source: Source) -> _Prompt:
    if not isinstance(source.value, dict):
        raise BadRecord("wrong_type", f"a record must be an object, got {type(source.value).__name__}")
    columns = dict(source.value)
    messages, response = columns.pop("messages", None), columns.pop("response", None)
    given_id, tools = columns.pop("id", None), _tools(columns.pop("tools", None))
    if messages is None:
        messages = columns.pop("prompt", None)
        if not isinstance(messages, str | None):
            raise BadRecord("wrong_type", f"prompt must be a string, got {type(messages).__name__}")
    else:
        messages = _messages(messages, nulls=source.byte_offset is not None)  # Parquet writes them by itself
    if not messages:
        raise BadRecord("no_prompt", "neither messages nor prompt holds anything")
    trained = None
    if isinstance(messages, list) and messages[-1]["role"] == "assistant":
        if response is not None:
            raise BadRecord("two_responses", "the last message is the assistant's and there is a response too")
        trained = messages.pop()
        if not messages:
            raise BadRecord("no_prompt", "messages hold a response only")
        if not more_than_content(trained):
            response, trained = trained["content"], None
    if not isinstance(response, str | None):
        raise BadRecord("wrong_type", f"response must be a string, got {type(response).__name__}")
    if response == "":
        raise BadRecord("empty_response", "response must hold text where it is given")
    if not isinstance(given_id, str | int | None) or isinstance(given_id, bool) or given_id == "":
        raise BadRecord("wrong_type", f"id must be a string or an integer, got {given_id!r}")
    content = [messages, response, *([tools, trained] if tools or trained else [])]
    try:
        json.dumps([*content, given_id], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRecord("not_utf8", str(error)) from error
    except TypeError as error:  # Parquet has types that JSON has not: times, decimals, bytes
        raise BadRecord("wrong_type", f"messages and tools must hold JSON values, got another: {error}") from error
    content_hash = config_hash(content)
    return _Prompt(
        source=source,
        prompt_id=content_hash if given_id is None else str(given_id),
        content_hash=content_hash,
        conversation=Conversation(messages=messages, tools=tools, response=response, trained=trained),
        extras=json.dumps(columns, default=str),
    )


def _messages(value: Any, *, nulls: bool) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise BadRecord("wrong_type", f"messages must be a list, got {type(value).__name__}")
    messages = []
    for message in (_message(item, nulls) for item in value):
        if isinstance(message, dict):
            _check_parts(message)
            if more_than_content(message):
                message.setdefault("content", "")
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise BadRecord("wrong_type", f"a message must have role and content as strings, got {message!r}")
        messages.append(message)
    return messages


def _check_parts(message: dict[str, Any]) -> None:
    """Refuse reasoning and calls of a form in which no template, and no look whether it writes them, finds them."""
    if not message.get("tool_calls", True):
        del message["tool_calls"]  # templates ask whether there is a list, though it may be empty
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(map(_is_named, calls)):
        detail = f"tool_calls must be a list of objects with a function's name, got {calls!r}; {_ARGUMENTS}"
        raise BadRecord("wrong_type", detail)
    if (call := message.get("function_call")) and not _is_named(call):
        detail = f"function_call must be an object with a function's name, got {call!r}; {_ARGUMENTS}"
        raise BadRecord("wrong_type", detail)
    for name in REASONING:
        if not isinstance(message.get(name, ""), str):
            raise BadRecord("wrong_type", f"{name} must be a string, got {message[name]!r}")


def _is_named(value: Any) -> bool:
    """Whether a call, or the schema of a function, names the function; arguments are an object, or its JSON text."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict):
        return False
    name, arguments = function.get("name"), function.get("arguments", {})
    return isinstance(name, str) and bool(name.strip()) and isinstance(arguments, str | dict)


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """Schemas of functions, as a list or as its JSON text, which fits a column of a table."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except BadRecord as problem:
            raise BadRecord("wrong_type", f"tools must be a list of objects, or its JSON text: {problem}") from problem
    value = _without_nulls(value)
    if value is not None and (not isinstance(value, list) or not all(map(_is_named, value))):
        detail = f"tools must be a list of objects with a function's name, or its JSON text, got {value!r}"
        raise BadRecord("wrong_type", detail)
    return value or None


def _without_nulls(value: Any) -> Any:
    """A copy without the keys that hold null: a Parquet file has every row's keys in each row."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _message(value: Any, nulls: bool) -> Any:
    """A copy of a message without nulls; ``nulls``: with those in the arguments of its calls, which say something."""
    copy = _without_nulls(value)
    if nulls and isinstance(copy, dict):
        for name in ("tool_calls", "function_call"):
            if name in copy:
                copy[name] = _with_null_arguments(value[name])
    return copy


def _with_null_arguments(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_null_arguments(item) for item in value]
    if not isinstance(value, dict):
        return value
    said = {key: item for key, item in value.items() if item is not None}
    return said | {"function": _with_null_arguments(said["function"])} if "function" in said else said


def _rendered(prompt: _Prompt, side: Codec, whose: str) -> tuple[str, str]:
    try:
        return side.prompt(prompt.conversation)
    except BadRecord as problem:
        raise BadRecord(problem.reason, f"{whose}{problem}") from None


def _tokenise(
    prompts: list[_Prompt], model: ModelTokens, sides: list[Codec], max_prompt_len: int, max_response_len: int
) -> Iterator[tuple[_Prompt, dict[str, Any] | BadRecord]]:
    """Each prompt with its row of ``PROMPT_SCHEMA`` or with why it has none; the first side is the student's."""
    texts: list[tuple[str, str]] = []  # with and without the generation prompt, of each prompt for each side
    responses: list[str | None] = []
    good: list[_Prompt] = []
    bad: list[tuple[_Prompt, BadRecord]] = []
    with limits():
        for prompt in prompts:
            try:
                both = [_rendered(prompt, side, "" if side is sides[0] else "the teacher's: ") for side in sides]
                for side, (text, _) in zip(sides, both, strict=True):
                    side.check_length(text, max_prompt_len, "prompt")
                response = sides[0].response(prompt.conversation, *both[0])
                if response is not None:
                    sides[0].check_length(response, max_response_len, "response")
                responses.append(response)
                texts += both
                good.append(prompt)
            except BadRecord as problem:
                bad.append((prompt, problem))
            except RecursionError as error:
                detail = f"a record must have fewer levels of lists and objects: {error}"
                bad.append((prompt, BadRecord("bad_json", detail)))
    yield from bad
    encoded = [side.prompt_ids(texts[number :: len(sides)], max_prompt_len) for number, side in enumerate(sides)]
    response_ids = iter(sides[0].encode([text for text in responses if text is not None], max_response_len))
    for number, (prompt, response) in enumerate(zip(good, responses, strict=True)):
        (prompt_ids, generation_prompt_len), (teacher_ids, _) = encoded[0][number], encoded[-1][number]
        response_tokens = None if response is None else [*next(response_ids), model.stop_ids[0]]
        longest = max(len(prompt_ids), len(teacher_ids))
        if not prompt_ids or not teacher_ids:
            yield prompt, BadRecord("no_prompt", "the prompt gives no tokens")
        elif longest > max_prompt_len:
            yield prompt, BadRecord("prompt_too_long", f"{longest} tokens or more, max_prompt_len is {max_prompt_len}")
        elif response_tokens and len(response_tokens) > max_response_len:
            detail = f"{len(response_tokens)} tokens or more, max_response_len is {max_response_len}"
            yield prompt, BadRecord("response_too_long", detail)
        elif (unknown := max(prompt_ids + (response_tokens or []))) >= model.vocab_size:
            token = model.tokenizer.convert_ids_to_tokens(unknown)
            detail = (
                f"token {unknown} ({token!r}) of the {'prompt' if unknown in prompt_ids else 'response'} has no row in "
                f"the embedding, whose vocab_size is {model.vocab_size}; resize the embedding of the model (and of the "
                "teacher), or use the tokenizer that it was trained with"
            )
            yield prompt, BadRecord("token_outside_vocabulary", detail)
        else:
            yield (
                prompt,
                {
                    "prompt_id": prompt.prompt_id,
                    "prompt_ids": prompt_ids,
                    "generation_prompt_len": generation_prompt_len,
                    "teacher_prompt_ids": None if teacher_ids == prompt_ids else teacher_ids,
                    "response": prompt.conversation.response or (response and sides[0].text(response)),
                    "response_ids": response_tokens,
                    "extras": prompt.extras,
                },
            )
