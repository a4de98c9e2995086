"""Builders of small models and tokenizers for the tests: offline, deterministic, and a second or less each."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

from megatron_npd.log import get_logger

VOCAB_SIZE = 304  # of the tiny model; its tokenizer has 300 entries, so a few embedding rows are padding

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = (
    "Tom has 12 apples and buys 7 more. How many apples does he have? He has 12 + 7 = 19 apples. #### 19",
    "A box holds 6 pens. How many pens are in 4 boxes? There are 6 * 4 = 24 pens. #### 24",
)


_T = TypeVar("_T")


def present(value: _T | None) -> _T:
    """An optional value that has to be there, as a gradient after a backward."""
    assert value is not None
    return value


def pair(items: Iterable[_T]) -> tuple[_T, _T]:
    """Two items, which a type checker can count."""
    one, two = items
    return one, two


def triple(items: Iterable[_T]) -> tuple[_T, _T, _T]:
    """Three items, which a type checker can count."""
    one, two, three = items
    return one, two, three


def make_tiny_tokenizer(path: str | Path, *, vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Write a byte-level BPE tokenizer with a Qwen-like chat template into ``path`` and return it.

    Ids 0, 1, 2 are ``<|endoftext|>`` (padding), ``<|im_start|>`` and ``<|im_end|>`` (end of sequence); any text
    round-trips.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    assert tokenizer.get_vocab_size() == vocab_size
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(str(path))
    return fast


_FIELDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},
}


def make_tiny_model(path: str | Path, *, family: str = "qwen2", seed: int = 0, **overrides: Any) -> Path:
    """Write a small random Hugging Face model with its tokenizer into ``path`` and return the path.

    Two layers, hidden 64, two heads of size 32 (qwen3: 128), one kv head, fp32, tied embeddings; of four experts
    (qwen3_moe) two a token. Biases and norm weights are random too, so that a forgotten one shows; weights are large
    enough for distributions that differ visibly.

    Args:
        path: Directory to create.
        family: Name of an entry of ``FAMILIES``: what transformers calls its model type, or exports of it have.
        seed: Seed of the weights.
        overrides: Fields of the configuration: ``vocab_size=310``, ``tie_word_embeddings=False``, ...
    """
    from transformers import AutoModelForCausalLM

    from megatron_npd.models.families import FAMILIES

    overrides = _FIELDS.get(family, {}) | overrides
    table = next(entry for entry in FAMILIES.values() if entry.name == family)
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.1,
        "dtype": "float32",
    }
    config = AutoConfig.for_model(**{"model_type": family, **fields, **table.export, **overrides})
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0.0, 0.1)
                elif "norm" in name:
                    parameter.normal_(1.0, 0.1)
    finally:
        torch.random.set_rng_state(state)
    model.save_pretrained(str(path))
    if table.export:  # transformers knows it by another architecture
        file = Path(path) / "config.json"
        written = json.loads(file.read_text()) | {"architectures": [table.architecture]}
        file.write_text(json.dumps(written, indent=2) + "\n")
    make_tiny_tokenizer(path)
    return Path(path)


def failing(number: int) -> Callable[..., Any]:
    """A stand-in for a call of the operating system that a file system does not have."""

    def call(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


def hear_interrupts() -> None:
    """For ``preexec_fn``: what a shell started in the background ignores SIGINT, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(what: Callable[[], Any], process: subprocess.Popen[Any], seconds: float = 300.0) -> Any:
    """What the function finds, looked for until it finds something, while the process runs."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.005)
    return found


@contextmanager
def logged() -> Iterator[list[str]]:
    """What this process logs within it: a process of ``run_distributed`` has another test's standard error."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    get_logger().addHandler(handler)
    try:
        yield said
    finally:
        get_logger().removeHandler(handler)
