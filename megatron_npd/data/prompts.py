"""Prompts as users write them, turned into token ids once, in a sealed directory of kind ``prompts``.

``header_len`` counts the last tokens of ``prompt_ids`` that open the assistant's turn. It is 0 where the prompt has no
such header (no chat template, or one that opens the answer with nothing): the response alone is then conditioned on
``tokenizer.document_start``, which is no suffix of the prompt.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from megatron_npd.data.held_out import REASON, hold_out
from megatron_npd.data.tokenizer import (
    ModelTokens,
    check_vocabularies,
    encode,
    render,
    suffix_after,
    tokenizer_hash,
    turn_header,
)
from megatron_npd.log import UserError, get_logger, progress
from megatron_npd.manifest import Manifest, check_quarantined, config_hash, file_sha256, seal, sealed_from, writing
from megatron_npd.records import PROMPT_SCHEMA, PROMPTS_FILE, QUARANTINE_FILE

__all__ = ["check_vocabularies", "prepare_prompts"]

_BATCH = 1024  # records tokenised at a time
_LONGEST_LINE = 2**25  # bytes; longer ones are passed over without being held in memory


class _BadRecord(Exception):
    """A record that is set aside: its reason, and what was seen."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class _Source:
    """One record of the file. ``line`` counts lines (JSONL) or rows (Parquet) from 1; Parquet has no byte offset."""

    line: int
    byte_offset: int | None
    value: Any = None
    bad: _BadRecord | None = None


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    """A checked record: a conversation, or a plain text for a tokenizer without a chat template."""

    source: _Source
    prompt_id: str
    content_hash: str
    messages: list[dict[str, str]] | str
    response: str | None
    extras: str


def prepare_prompts(
    source: str | Path,
    out_dir: str | Path,
    *,
    model: ModelTokens,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    max_prompt_len: int,
    max_quarantined: float = 0.1,
    held_out: int = 0,
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
        max_quarantined: Share of the records that may be set aside; repeated ones do not count.
        held_out: Prompts to keep from training, to measure on (``data/held_out.py``).

    Returns:
        The manifest; counts: ``in`` = ``kept`` + sum of ``quarantined`` (repeated records under ``duplicate``, those
        kept from training under ``held_out``).

    Raises:
        UserError: No such file, unknown extension, one id for two contents, too few usable prompts, or ``out_dir`` is
            sealed with other prompts.
    """
    source, out_dir = Path(source), Path(out_dir)
    if not source.is_file():
        raise UserError(f"prompts must be a JSONL or Parquet file, got no file at {source}; check the path")
    if source.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"prompts must end in .jsonl or .parquet, got {source}; convert or rename it")
    tokenizer = model.tokenizer
    turn_header(tokenizer)  # refuses a tokenizer that leaves L(y) undefined before anything is read
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
    }
    if manifest := sealed_from(out_dir, kind="prompts", provenance=provenance):
        return manifest
    with writing(out_dir) as directory:
        counts = _write(source, directory, model, teacher_tokenizer, max_prompt_len)
        dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(counts["quarantined"].items()))
        if not counts["kept"]:
            raise UserError(
                f"{source} must hold a usable prompt, got {counts['in']} records and {dropped or 'nothing else'}; "
                f"see {directory / QUARANTINE_FILE}"
            )
        check_quarantined(counts["quarantined"], counts["in"], max_quarantined, source)
        if held_out and (number := hold_out(directory, held_out)):
            counts["kept"] -= number
            counts["quarantined"][REASON] = number
        manifest = seal(directory, kind="prompts", provenance=provenance, counts=counts)
    note = f"; quarantined: {dropped} (see {out_dir / QUARANTINE_FILE})" if dropped else ""
    get_logger().info("%d of %d prompts of %s kept%s", counts["kept"], counts["in"], source, note)
    return manifest


def _template(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    return tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token


def _write(
    source: Path,
    out_dir: Path,
    model: ModelTokens,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    max_prompt_len: int,
) -> dict[str, Any]:
    seen: dict[str, tuple[str, int]] = {}  # id -> content hash, line
    reasons: Counter[str] = Counter()
    kept = total = 0
    read = _read_jsonl if source.suffix == ".jsonl" else _read_parquet
    with (
        pq.ParquetWriter(out_dir / PROMPTS_FILE, PROMPT_SCHEMA) as table,
        open(out_dir / QUARANTINE_FILE, "w", encoding="utf-8") as quarantine,
        progress(None, "prompts", "prompt") as bar,
    ):
        sources = read(source)
        while batch := list(islice(sources, _BATCH)):
            prompts: list[_Prompt] = []
            bad: list[tuple[_Source, _BadRecord]] = []
            for item in batch:
                try:
                    prompts.append(_admit(item, seen))
                except _BadRecord as problem:
                    bad.append((item, problem))
            rows = []
            for prompt, row in _tokenise(prompts, model, teacher_tokenizer, max_prompt_len):
                if isinstance(row, _BadRecord):
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


def _read_jsonl(path: Path) -> Iterator[_Source]:
    offset = 0
    with open(path, "rb") as stream:
        for line in count(1):
            raw = stream.readline(_LONGEST_LINE)
            if not raw:
                return
            start, offset = offset, offset + len(raw)
            if len(raw) == _LONGEST_LINE and raw[-1:] != b"\n":
                while (rest := stream.readline(_LONGEST_LINE)) and rest[-1:] != b"\n":
                    offset += len(rest)
                offset += len(rest)
                bad = _BadRecord("line_too_long", f"{offset - start} bytes, at most {_LONGEST_LINE} are read")
                yield _Source(line=line, byte_offset=start, bad=bad)
                continue
            text = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
            if not text.strip():
                continue
            value, bad = None, None
            try:
                value = json.loads(text.decode("utf-8"))
            except UnicodeDecodeError as error:
                bad = _BadRecord("not_utf8", str(error))
            except (ValueError, RecursionError) as error:
                bad = _BadRecord("bad_json", str(error))
            yield _Source(line=line, byte_offset=start, value=value, bad=bad)


def _read_parquet(path: Path) -> Iterator[_Source]:
    try:
        with pq.ParquetFile(path) as file:
            line = 0
            for batch in file.iter_batches(batch_size=_BATCH):
                for value in batch.to_pylist():
                    line += 1
                    yield _Source(line=line, byte_offset=None, value=value)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} must be a readable Parquet file, got: {error}; write it again") from error


def _admit(source: _Source, seen: dict[str, tuple[str, int]]) -> _Prompt:
    """Check one record's types and its id against those ``seen``, which it joins."""
    if source.bad:
        raise source.bad
    prompt = _parse(source)
    content, line = seen.setdefault(prompt.prompt_id, (prompt.content_hash, source.line))
    if content != prompt.content_hash:
        raise UserError(
            f"ids of prompts must be unique, got {prompt.prompt_id!r} with different content on lines {line} and "
            f"{source.line}; rename one or leave the id column out"
        )
    if line != source.line:
        raise _BadRecord("duplicate", f"the same record as on line {line}")
    return prompt


def _parse(source: _Source) -> _Prompt:
    if not isinstance(source.value, dict):
        raise _BadRecord("wrong_type", f"a record must be an object, got {type(source.value).__name__}")
    columns = dict(source.value)
    messages, response = columns.pop("messages", None), columns.pop("response", None)
    given_id = columns.pop("id", None)
    if messages is None:
        messages = columns.pop("prompt", None)
        if not isinstance(messages, str | None):
            raise _BadRecord("wrong_type", f"prompt must be a string, got {type(messages).__name__}")
    else:
        messages = _messages(messages)
    if not messages:
        raise _BadRecord("no_prompt", "neither messages nor prompt holds anything")
    if isinstance(messages, list) and messages[-1]["role"] == "assistant":
        if response is not None:
            raise _BadRecord("two_responses", "the last message is the assistant's and there is a response too")
        response = messages.pop()["content"]
        if not messages:
            raise _BadRecord("no_prompt", "messages hold an answer only")
    if not isinstance(response, str | None):
        raise _BadRecord("wrong_type", f"response must be a string, got {type(response).__name__}")
    if response == "":
        raise _BadRecord("empty_response", "response must hold text where it is given")
    if not isinstance(given_id, str | int | None) or isinstance(given_id, bool) or given_id == "":
        raise _BadRecord("wrong_type", f"id must be a string or an integer, got {given_id!r}")
    content = [messages, response]
    try:
        json.dumps([*content, given_id], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _BadRecord("not_utf8", str(error)) from error
    content_hash = config_hash(content)
    return _Prompt(
        source=source,
        prompt_id=content_hash if given_id is None else str(given_id),
        content_hash=content_hash,
        messages=messages,
        response=response,
        extras=json.dumps(columns, default=str),
    )


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise _BadRecord("wrong_type", f"messages must be a list, got {type(value).__name__}")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise _BadRecord("wrong_type", f"a message must have role and content as strings, got {message!r}")
        messages.append({key: part for key, part in message.items() if part is not None})
    return messages


def _tokenise(
    prompts: list[_Prompt],
    model: ModelTokens,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    max_prompt_len: int,
) -> Iterator[tuple[_Prompt, dict[str, Any] | _BadRecord]]:
    """Each prompt with its row of ``PROMPT_SCHEMA`` or with why it has none."""
    rendered = [_prompt_ids(prompts, model.tokenizer)]
    if teacher_tokenizer is not None:
        rendered.append(_prompt_ids(prompts, teacher_tokenizer))
    answers = [prompt.response for prompt in prompts if prompt.response is not None]
    answer_ids = iter(encode(model.tokenizer, answers, special=False))
    for prompt, *sides in zip(prompts, *rendered, strict=True):
        response_ids = None if prompt.response is None else [*next(answer_ids), model.stop_ids[0]]
        bad = next((side for side in sides if isinstance(side, _BadRecord)), None)
        if bad is None and max(len(ids) for ids, _ in sides) > max_prompt_len:
            longest = max(len(ids) for ids, _ in sides)
            bad = _BadRecord("prompt_too_long", f"{longest} tokens, max_prompt_len is {max_prompt_len}")
        if bad is not None:
            yield prompt, bad
            continue
        (prompt_ids, header_len), teacher_ids = sides[0], sides[-1][0]
        yield (
            prompt,
            {
                "prompt_id": prompt.prompt_id,
                "prompt_ids": prompt_ids,
                "header_len": header_len,
                "teacher_prompt_ids": None if teacher_ids == prompt_ids else teacher_ids,
                "response": prompt.response,
                "response_ids": response_ids,
                "extras": prompt.extras,
            },
        )


def _prompt_ids(prompts: list[_Prompt], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], int] | _BadRecord]:
    """Token ids and header length of each prompt."""
    texts: list[str] = []  # with the generation prompt, then without, for each that could be rendered
    bad: dict[int, _BadRecord] = {}
    for index, prompt in enumerate(prompts):
        try:
            texts.extend(_texts(prompt.messages, tokenizer))
        except (TemplateError, _BadRecord) as error:
            bad[index] = error if isinstance(error, _BadRecord) else _BadRecord("chat_template", str(error))
    ids = iter(encode(tokenizer, texts, special=tokenizer.chat_template is None))
    result: list[tuple[list[int], int] | _BadRecord] = []
    for index in range(len(prompts)):
        if index in bad:
            result.append(bad[index])
            continue
        with_header, without = next(ids), next(ids)
        empty = _BadRecord("no_prompt", "the prompt gives no tokens")
        result.append((with_header, len(suffix_after(with_header, without))) if with_header else empty)
    return result


def _texts(messages: list[dict[str, str]] | str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The prompt as text with the header of the answer's turn, and without it."""
    if tokenizer.chat_template is None:
        if not isinstance(messages, str):
            raise _BadRecord("no_chat_template", "messages need a tokenizer with a chat template; write prompt instead")
        return messages, messages
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    return render(tokenizer, turns), render(tokenizer, turns, add_generation_prompt=False)
