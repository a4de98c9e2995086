"""Chat templates, which come with a model and run on users' records: rendered within limits of time and memory."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from megatron_npd.errors import UserError
from megatron_npd.limits import memory_growth
from megatron_npd.records import BadRecord

SECONDS = 10.0  # of CPU time that a rendering may take; usual ones take some 20 us
_MEMORY = 2**30  # bytes that a process may grow by while it renders
_LONGEST = 2**25  # characters of a rendered conversation


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template that cannot be rendered, whatever the conversation.

    Raises:
        UserError: There are named templates without ``default``, or a template raises to a power (``**``), which
            neither limit could stop.
    """
    templates = tokenizer.chat_template
    if templates is None:
        return
    where = f"the chat template of {tokenizer.name_or_path}"
    if isinstance(templates, dict) and "default" not in templates:
        names = ", ".join(sorted(templates)) or "none"
        raise UserError(f"{where} must have a default among its named ones, got {names}; name one of them default")
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        try:
            tokens = list(jinja2.Environment().lex(template))
        except jinja2.TemplateError as error:
            raise UserError(f"{where} must be a Jinja template, got: {error}; restore it") from error
        if any(kind == "operator" and text == "**" for _, kind, text in tokens):
            raise UserError(f"{where} must not raise to powers, got an expression with **; take that out")


@contextmanager
def limits() -> Iterator[None]:
    """Within it, ``render`` is stopped when it takes too long, and the process grows by a GiB at most.

    Entered once for many records: it costs as much as rendering one. Only the main thread can be stopped so.
    """
    handler = signal.signal(signal.SIGPROF, _too_slow)
    timer = signal.setitimer(signal.ITIMER_PROF, 0.0)
    try:
        with memory_growth(_MEMORY):
            yield
    finally:
        signal.signal(signal.SIGPROF, handler)
        signal.setitimer(signal.ITIMER_PROF, *timer)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """A conversation as the text of the tokenizer's chat template; to be called within ``limits``.

    Raises:
        BadRecord: The template raised, or a limit was passed (``chat_template``).
    """
    text, problem = None, ""
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=None if tools is None else list(tools),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template is a program of somebody else's, and fails on a record as programs do
        problem = f"{type(error).__name__}: {error}"  # the error itself would keep alive what filled the memory
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
    if isinstance(text, str) and len(text) <= _LONGEST:
        return text
    raise BadRecord("chat_template", problem or f"it must write text of at most {_LONGEST} characters")


def _too_slow(*_: object) -> None:
    raise TimeoutError(f"it took more than {SECONDS:g} s of CPU time")
