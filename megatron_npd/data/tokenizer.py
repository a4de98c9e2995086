"""What the stages need of a tokenizer: the ids that open and end an answer, its hash, whether two agree."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_npd.log import UserError, get_logger
from megatron_npd.manifest import config_hash

_PROBE = "q7probe"  # a word that no chat template holds by itself


def load_tokenizer(hf_dir: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local Hugging Face directory.

    Raises:
        UserError: The directory or its tokenizer files are missing or cannot be read.
    """
    if not Path(hf_dir).is_dir():
        raise UserError(f"{hf_dir} must be a Hugging Face directory, got nothing there; check the path")
    try:
        return AutoTokenizer.from_pretrained(str(hf_dir), local_files_only=True)
    except Exception as error:  # tokenizers raises it bare where tokenizer.json is malformed
        raise UserError(
            f"{hf_dir} must hold a tokenizer that transformers loads, got: {error}; copy the tokenizer files there"
        ) from error


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, add_generation_prompt: bool = True
) -> str:
    """A conversation as the text of the tokenizer's chat template."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert isinstance(text, str)
    return text


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool) -> list[list[int]]:
    """Token ids of texts; ``special`` adds the tokenizer's own BOS (or EOS), which a chat template writes itself."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]  # type: ignore[return-value]


def document_start(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id on which a response alone is conditioned where no turn header opens it (METHOD section 3).

    The BOS token, or the end-of-document token of a tokenizer without BOS.

    Raises:
        UserError: The tokenizer has neither.
    """
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    raise UserError(
        "the tokenizer must have a chat template, a BOS or an end-of-document token, got none of them; "
        "set bos_token or eos_token in tokenizer_config.json"
    )


def turn_header(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that open an answer: the chat template's turn header, else ``[document_start]``."""
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": _PROBE}]
        texts = [render(tokenizer, messages), render(tokenizer, messages, add_generation_prompt=False)]
        header = suffix_after(*encode(tokenizer, texts, special=False))
        if header:
            return header
    return [document_start(tokenizer)]


def suffix_after(longer: list[int], shorter: list[int]) -> list[int]:
    """What ``longer`` holds after the tokens that it shares with the start of ``shorter``."""
    shared = 0
    while shared < min(len(longer), len(shorter)) and longer[shared] == shorter[shared]:
        shared += 1
    return longer[shared:]


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The stop token: the first special token that the chat template writes after an answer, else EOS.

    Raises:
        UserError: There is neither.
    """
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": _PROBE}]
        after = render(tokenizer, turns, add_generation_prompt=False).rpartition(_PROBE)[2]
        for token_id in encode(tokenizer, [after], special=False)[0] if after else []:
            if token_id in tokenizer.all_special_ids or token_id in tokenizer.added_tokens_decoder:
                return token_id
    if isinstance(tokenizer.eos_token_id, int):
        return tokenizer.eos_token_id
    raise UserError(
        "the tokenizer must have a stop token, got none in its chat template and no eos_token; "
        "set eos_token in tokenizer_config.json"
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits over vocabulary, special tokens and chat template."""
    return config_hash(
        {
            "vocab": tokenizer.get_vocab(),
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "chat_template": tokenizer.chat_template,
        }
    )


def check_vocabularies(student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a teacher whose token ids mean something else than the student's.

    Every id that both tokenizers use must be the same token, and every token that both know must have one id.
    Tokens that only one of them knows are logged: they cannot be confused with another. Padded embedding rows, which
    no tokenizer names, do not matter.

    Raises:
        UserError: An id or a token differs; the first three are shown.
    """
    student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if student == teacher:
        return
    teacher_tokens = {token_id: token for token, token_id in teacher.items()}
    differing = sorted(
        (token_id, token, teacher_tokens.get(token_id), teacher.get(token))
        for token, token_id in student.items()
        if teacher_tokens.get(token_id, token) != token or teacher.get(token, token_id) != token_id
    )
    if differing:
        shown = "; ".join(
            f"id {token_id} is {token!r} for the student and {'no token' if other is None else repr(other)} for the "
            f"teacher, whose id of {token!r} is {'none' if moved is None else moved}"
            for token_id, token, other, moved in differing[:3]
        )
        raise UserError(
            f"teacher and student must share their token ids, got {len(differing)} that differ: {shown}; "
            "choose a teacher of the student's model family"
        )
    for name, extra in (("student", student.keys() - teacher.keys()), ("teacher", teacher.keys() - student.keys())):
        if extra:
            shown = ", ".join(repr(token) for token in islice(sorted(extra), 3))
            get_logger().warning("%d tokens are known to the %s only, such as %s", len(extra), name, shown)
