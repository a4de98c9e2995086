"""What the stages need of a model's tokens: the ids that open and end a response, its hash, whether two agree."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_npd.data.template import check_template, limits, render
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.manifest import config_hash
from megatron_npd.records import BadRecord
from megatron_npd.weights import language_config, read_config, read_object

_PROBE = "q7probe"  # a word that no chat template holds by itself


@dataclass(frozen=True, kw_only=True)
class ModelTokens:
    """What a model's prompts and responses are made of.

    Attributes:
        tokenizer: Its tokenizer.
        stop_ids: The ids that end its responses; training ends them with the first.
        vocab_size: V*, the rows of its embedding: ids below are known to it.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    vocab_size: int


def load_model_tokens(hf_dir: str | Path) -> ModelTokens:
    """The tokens of the model in a local Hugging Face directory.

    Raises:
        UserError: A file is missing or cannot be read, or nothing says what ends a response.
    """
    tokenizer = load_tokenizer(hf_dir)
    vocab_size = language_config(read_config(hf_dir)).get("vocab_size")
    if type(vocab_size) is not int or vocab_size < 1:
        raise UserError(
            f"vocab_size in {Path(hf_dir) / 'config.json'} must be a positive integer, got {vocab_size!r}; mend it"
        )
    return ModelTokens(tokenizer=tokenizer, stop_ids=stop_ids(tokenizer, hf_dir), vocab_size=vocab_size)


def stop_ids(tokenizer: PreTrainedTokenizerBase, hf_dir: str | Path) -> tuple[int, ...]:
    """The ids that end a response of the model in ``hf_dir``, without repetitions.

    First the turn end of the chat template, with which training ends a response; then the tokenizer's EOS and the
    model's own (``generation_config.json``, or ``config.json`` where there is none), at which servers stop unasked.

    Raises:
        UserError: There is none, or ``eos_token_id`` is neither an integer nor a list of them.
    """
    path = Path(hf_dir) / "generation_config.json"
    if path.exists():
        own = read_object(path).get("eos_token_id")
    else:
        path, config = Path(hf_dir) / "config.json", read_config(hf_dir)
        own = (config if config.get("eos_token_id") is not None else language_config(config)).get("eos_token_id")
    own = [] if own is None else own if isinstance(own, list) else [own]
    if not all(type(token_id) is int for token_id in own):
        raise UserError(f"eos_token_id in {path} must be an integer or a list of integers, got {own}; mend it")
    ids = [turn_end(tokenizer), tokenizer.eos_token_id, *own]
    return tuple(dict.fromkeys(token_id for token_id in ids if isinstance(token_id, int)))


def load_tokenizer(hf_dir: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local Hugging Face directory; code that it may bring along is never run.

    Raises:
        UserError: The directory or its tokenizer files are missing or cannot be read.
    """
    if not Path(hf_dir).is_dir():
        raise UserError(f"{hf_dir} must be a Hugging Face directory, got nothing there; check the path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(hf_dir), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises it bare where tokenizer.json is malformed
        raise UserError(
            f"{hf_dir} must hold a tokenizer that transformers loads, got: {error}; copy the tokenizer files there"
        ) from error
    check_template(tokenizer)
    return tokenizer


def _probe(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, opened: bool) -> str:
    """A conversation that every chat template has to write, as text."""
    try:
        with limits():
            return render(tokenizer, messages, add_generation_prompt=opened)
    except BadRecord as error:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} must write a user's message and the response to it, got "
            f"{error}; mend the template"
        ) from error


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


def document_start(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id on which a response alone is conditioned where no generation prompt opens it (METHOD section 3).

    The BOS token, or what ends a document or a turn where there is none.

    Raises:
        UserError: The tokenizer has none of them.
    """
    return tokenizer.bos_token_id if isinstance(tokenizer.bos_token_id, int) else _end(tokenizer, eos_first=True)


def generation_prompt(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that open a response: the chat template's generation prompt, else ``[document_start]``."""
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": _PROBE}]
        opening = suffix_after(
            *(_ids(tokenizer, _probe(tokenizer, messages, opened=opened)) for opened in (True, False))
        )
        if opening:
            return opening
    return [document_start(tokenizer)]


def suffix_after(longer: list[int], shorter: list[int]) -> list[int]:
    """What ``longer`` holds after the tokens that it shares with the start of ``shorter``."""
    shared = 0
    while shared < min(len(longer), len(shorter)) and longer[shared] == shorter[shared]:
        shared += 1
    return longer[shared:]


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The stop token: the first special token that the chat template writes after a response, else EOS.

    Raises:
        UserError: There is neither.
    """
    return _end(tokenizer, eos_first=False)


def _end(tokenizer: PreTrainedTokenizerBase, *, eos_first: bool) -> int:
    """EOS, or the first special token that the chat template writes after a response, in either order."""
    eos = tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else None
    if eos_first and eos is not None:
        return eos
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": _PROBE}]
        after = _probe(tokenizer, turns, opened=False).rpartition(_PROBE)[2]
        for token_id in _ids(tokenizer, after):
            if token_id in tokenizer.all_special_ids or token_id in tokenizer.added_tokens_decoder:
                return token_id
    if eos is not None:
        return eos
    raise UserError(
        f"the tokenizer {tokenizer.name_or_path} must say what ends a response, got no special token after a response "
        "in its chat template and no eos_token; set eos_token in tokenizer_config.json"
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
