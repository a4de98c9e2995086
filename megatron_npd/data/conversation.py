"""A conversation as token ids: no part of it dropped in silence, and what users spell like a control token is text.

Both are seen by rendering once more with marks in the users' texts, words that nobody can guess: a part whose mark the
chat template does not write would be lost, and the template's own control tokens are those that no user's text holds.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_npd.data.marks import Marks
from megatron_npd.data.template import render
from megatron_npd.data.tokenizer import suffix_after
from megatron_npd.errors import UserError
from megatron_npd.records import BadRecord

# What a message says. In turns before the trained one templates leave reasoning out on purpose (Qwen3), and what else
# a message holds (name, ids of calls) is for the template to use or not.
_SAID = ("content", "tool_calls", "function_call")
REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXTS = ("content", *REASONING)
_ENCODED = 2**20  # characters encoded together: they take some 500 times as much until their ids are taken out
_PER_TOKEN = 8  # characters, more than usual
_OPENED = re.compile(r"<[\w:]+>\s*$")  # a tag that a generation prompt opens


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A checked record.

    Attributes:
        messages: The prompt; a string is one user message, or the plain text for a tokenizer without chat template.
        tools: JSON schemas of the functions that may be called.
        response: What the assistant answers, as text.
        trained: In its place, the assistant's message where it has more than content.
    """

    messages: list[dict[str, Any]] | str
    tools: list[dict[str, Any]] | None = None
    response: str | None = None
    trained: dict[str, Any] | None = None

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The prompt's messages."""
        return [{"role": "user", "content": self.messages}] if isinstance(self.messages, str) else self.messages


def more_than_content(message: Mapping[str, Any]) -> bool:
    """Whether an assistant's message holds calls or reasoning."""
    return any(message.get(name) for name in (*_SAID[1:], *REASONING))


class Codec:
    """Conversations and texts of users as ids of one tokenizer.

    Args:
        tokenizer: The tokenizer.
        stop_ids: Of the model; what ends a response is a control token even where the tokenizer does not say so.
        spelled: Take special tokens that users' texts spell for control tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], *, spelled: bool = False) -> None:
        self.tokenizer = tokenizer
        self._ends = [str(tokenizer.decode([token_id])) for token_id in stop_ids]
        self._nonce = f"q7{secrets.token_hex(8)}"
        added = tokenizer.added_tokens_decoder.items()
        self._specials = {token.content: i for i, token in added if token.special or i in stop_ids}
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._guard = re.compile("(?!)" if spelled else self._special.pattern)
        self._backend: Tokenizer | None = None
        self._own_ids: dict[int, int] = {}  # of the backend's aliases -> the tokenizer's
        self._headers: dict[str, list[int]] = {}
        self._before: list[int] | None = None
        self._longest = max(map(len, tokenizer.get_vocab()))

    def check_length(self, text: str, max_tokens: int, what: str) -> None:
        """Refuse a guarded text of more characters than so many tokens can have: to encode it takes GiBs.

        Raises:
            BadRecord: ``prompt_too_long`` or ``response_too_long``, by ``what`` it is.
        """
        if len(text) > max_tokens * self._longest and (length := len(self.text(text))) > max_tokens * self._longest:
            raise BadRecord(f"{what}_too_long", f"{length} characters, max_{what}_len is {max_tokens} tokens")

    # -- conversations as text ---------------------------------------------------------------------------------

    def prompt(self, conversation: Conversation) -> tuple[str, str]:
        """The prompt as guarded text, with the generation prompt and without; call it within ``limits``.

        Raises:
            BadRecord: The template raised, or would lose a part.
        """
        turns, tools = conversation.turns, conversation.tools
        if self.tokenizer.chat_template is None:
            if not isinstance(conversation.messages, str) or tools:
                detail = "messages and tools need a tokenizer with a chat template; write prompt instead"
                raise BadRecord("no_chat_template", detail)
            return (self._guarded(conversation.messages),) * 2
        prompt = self._render(turns, tools, add_generation_prompt=True)
        without = self._render_marked(turns, tools)
        if not prompt.startswith(without):  # the marks changed more than they should
            without = self._render(turns, tools, add_generation_prompt=False)
        return prompt, without

    def response(self, conversation: Conversation, prompt: str, without: str) -> str | None:
        """The response to a rendered ``prompt`` as guarded text, without a stop token; as ``prompt``."""
        if conversation.trained is not None:
            return self._trained(conversation, conversation.trained, prompt)
        text = conversation.response
        if text is not None and (end := next((end for end in self._ends if text.rstrip().endswith(end)), "")):
            text = text.rstrip().removesuffix(end)  # it ends in the stop token already
            if not text:
                raise BadRecord("empty_response", "response must hold text before the stop token")
        header = prompt.removeprefix(without)
        if text and header and (opened := _OPENED.search(header)):
            return self._continued(conversation, text, prompt, opened)
        return text and self._guarded(text)

    def _trained(self, conversation: Conversation, message: dict[str, Any], prompt: str) -> str:
        """What the template writes for the assistant's message after the prompt, without the end of the turn."""
        turns = [*conversation.turns, message]
        text = self._render(turns, conversation.tools, add_generation_prompt=False)
        self._render_marked(turns, conversation.tools, trained=True)
        if not text.startswith(prompt) or self._ends[0] not in text[len(prompt) :]:
            detail = "the chat template must write the prompt, then the trained turn and its end, got another text"
            raise BadRecord("not_in_template", detail)
        return text[len(prompt) :].rpartition(self._ends[0])[0]

    def _continued(self, conversation: Conversation, text: str, prompt: str, opened: re.Match[str]) -> str:
        """The response to a prompt that opens a tag (``<think>``), which the response must not open again.

        It is what the template writes for the whole conversation, where that goes on from the prompt and loses nothing
        of the response; DeepSeek-R1's leaves the reasoning out, there it is the response without the tag.
        """
        tag, body = opened[0].rstrip(), text.lstrip()
        body = body.removeprefix(opened[0] if body.startswith(opened[0]) else tag) if body.startswith(tag) else text
        try:
            whole = self._trained(conversation, {"role": "assistant", "content": text}, prompt)
        except BadRecord:
            whole = ""
        guarded = self._guarded(body)
        return whole if "".join(whole.split()).endswith("".join(guarded.split())) else guarded

    def _render(self, turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None, **options: Any) -> str:
        """With placeholders where users' texts spell special tokens, if the template writes such texts unchanged."""
        text = render(self.tokenizer, turns, tools=tools, **options)
        guarded_turns, guarded_tools = self._guarded(turns), self._guarded(tools)
        if guarded_turns == turns and guarded_tools == tools:
            return text
        guarded = render(self.tokenizer, guarded_turns, tools=guarded_tools, **options)
        if self.text(guarded) != text:
            detail = "the chat template treats a text that spells a special token in a way of its own; change the text"
            raise BadRecord("special_token_in_text", detail)
        return guarded

    def _render_marked(
        self, turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None, *, trained: bool = False
    ) -> str:
        """The text without generation prompt, after a look whether every part of the conversation is in it.

        ``trained``: the last turn trains.
        """
        marks = Marks(self._nonce)
        marked = []
        for index, turn in enumerate(turns):
            names = (*_SAID, *REASONING) if trained and index == len(turns) - 1 else _SAID
            said = {}
            for name in filter(turn.get, names):
                mark = marks.inside if name in _TEXTS else marks.calls
                said[name] = mark(self._guarded(turn[name]), f"messages[{index}].{name}")
            marked.append(turn | said)
        text = render(self.tokenizer, marked, tools=marks.tools(self._guarded(tools)), add_generation_prompt=False)
        if lost := marks.lost(text):
            roles = ", ".join(turn["role"] for turn in turns)
            detail = f"the chat template does not write {lost} (roles: {roles}); change the record or the template"
            raise BadRecord("not_in_template", detail)
        return marks.removed(text)

    def _guarded(self, value: Any) -> Any:
        """A copy with placeholders where texts spell special tokens.

        Raises:
            BadRecord: One does, and the tokenizer has no way to take it for text.
        """
        if isinstance(value, str):
            guarded = self._guard.sub(lambda found: f"{self._nonce}s{self._specials[found[0]]}z", value)
            if guarded != value and not self.tokenizer.is_fast:
                detail = "this tokenizer cannot encode a special token as text; change the text"
                raise BadRecord("special_token_in_text", detail)
            return guarded
        if isinstance(value, list):
            return [self._guarded(item) for item in value]
        if isinstance(value, dict):
            return {self._guarded(key): self._guarded(item) for key, item in value.items()}
        return value

    def text(self, text: str) -> str:
        """A guarded text as users read it."""
        names = {str(token_id): name for name, token_id in self._specials.items()}
        return re.sub(f"{self._nonce}s([0-9]+)z", lambda found: names[found[1]], text)

    # -- text as ids -------------------------------------------------------------------------------------------

    def prompt_ids(self, prompts: Sequence[tuple[str, str]], most: int) -> list[tuple[list[int], int]]:
        """Ids of rendered prompts, ``most`` as in ``encode``, and how many of the last of each open the response."""
        encoded = self.encode([text for text, _ in prompts], most)
        if self.tokenizer.chat_template is None:
            return [([*self._start(), *ids], 0) for ids in encoded]
        return [
            (ids, self._generation_prompt_len(text, without, ids))
            for (text, without), ids in zip(prompts, encoded, strict=True)
        ]

    def _generation_prompt_len(self, text: str, without: str, ids: list[int]) -> int:
        if text.startswith(without):
            header = text[len(without) :]
            if header not in self._headers:
                self._headers[header] = self.encode([header])[0]
            if ids[len(ids) - len(self._headers[header]) :] == self._headers[header]:
                return len(self._headers[header])
        return len(suffix_after(ids, self.encode([without])[0]))

    def _start(self) -> list[int]:
        """What the tokenizer puts before a text (BOS); what it puts behind one (EOS) ends no prompt."""
        if (before := self._before) is None:
            alone, whole = (self.tokenizer("q", add_special_tokens=special)["input_ids"] for special in (False, True))
            starts = [n for n in range(len(whole)) if whole[n : n + len(alone)] == alone]
            if not starts:
                raise UserError(
                    f"the tokenizer {self.tokenizer.name_or_path} must put special tokens around a text, got {whole} "
                    f"for {alone}; give it a chat template"
                )
            before = self._before = whole[: starts[0]]
        return before

    def encode(self, texts: Sequence[str], most: int | None = None) -> list[list[int]]:
        """Ids of guarded texts, without tokens that the tokenizer adds by itself.

        Of a text whose beginning has more than ``most`` ids, it may be those of the beginning alone.
        """
        if most is not None:
            texts = [self._beginning(text, most) for text in texts]
        result: list[list[int]] = [[]] * len(texts)
        plain = [n for n, text in enumerate(texts) if self._nonce not in text]
        parts = accumulate(len(texts[n]) for n in plain)
        for _, part in groupby(zip(plain, parts, strict=True), key=lambda pair: pair[1] // _ENCODED):
            numbers = [n for n, _ in part]
            encoded = self.tokenizer([texts[n] for n in numbers], add_special_tokens=False, return_attention_mask=False)
            for n, ids in zip(numbers, encoded["input_ids"], strict=True):
                result[n] = ids
        for n, text in enumerate(texts):
            if self._nonce in text:
                result[n] = self._encode_guarded(text)
        return result

    def _beginning(self, text: str, most: int) -> str:
        """So much of a text as shows that it has more than ``most`` tokens, or all of it."""
        begin = text[: _PER_TOKEN * most]
        if len(text) < 2 * len(begin) or len(self.encode([begin])[0]) <= most + _PER_TOKEN:  # the cut makes tokens, too
            return text
        return begin

    def _encode_guarded(self, text: str) -> list[int]:
        """Special tokens outside the placeholders are given other names, so that those inside are none."""
        if self._backend is None:
            self._backend = self._other_backend()
        own = self._special.sub(lambda found: f"{self._nonce}a{self._specials[found[0]]}z", text)
        ids = self._backend.encode(self.text(own), add_special_tokens=False).ids
        return [self._own_ids.get(token_id, token_id) for token_id in ids]

    def _other_backend(self) -> Tokenizer:
        """The tokenizer with the special tokens under other names."""
        assert isinstance(self.tokenizer, PreTrainedTokenizerFast), "_guarded lets no other tokenizer come here"
        backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        added = self.tokenizer.added_tokens_decoder
        tokens = {i: added[i] for i in self._specials.values()}
        backend.add_special_tokens([AddedToken(name, special=True) for name in self._specials])
        backend.encode_special_tokens = True  # that is: as text
        for i, token in tokens.items():
            name = f"{self._nonce}a{i}z"
            sides = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
            backend.add_tokens([AddedToken(name, special=False, normalized=False, **sides)])
            alias = backend.token_to_id(name)
            assert alias is not None, "it was just added"
            self._own_ids[alias] = i
        return backend
