"""A small tokenizer and two small Llama models with random weights, as Hugging Face directories.

The tokenizer knows the problems' words, every number below 100 as one token (few facts to learn, and every one of them
can be tested) and every byte, so any text can be written with it. The teacher has 3 layers of width 128, the student 3
of width 64; heads are 32 wide, the smallest that vLLM's CPU kernels take.

    python examples/quickstart/models.py --out DIR [--seed 1]
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from problems import GAINS, HOLDERS, LOSSES, NAMES, QUESTIONS, THINGS

PAD, BOS, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Shape of one of the two models.

    Attributes:
        hidden_size: Width.
        num_layers: Depth.
        ffn_hidden_size: Width of the gated MLP.
        tied: Whether the output head is the embedding.
    """

    hidden_size: int
    num_layers: int
    ffn_hidden_size: int
    tied: bool


HEAD_DIM = 32
CONTEXT = 512
SIZES = {
    "teacher": Size(hidden_size=128, num_layers=3, ffn_hidden_size=384, tied=False),
    "student": Size(hidden_size=64, num_layers=3, ffn_hidden_size=192, tied=True),
}


def _words() -> list[str]:
    """The words of the problems and answers, with the space that stands before them."""
    texts = " ".join((*GAINS, *LOSSES, *QUESTIONS, *NAMES, *NAMES.values(), *THINGS, *HOLDERS))
    words = set(re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", texts))) | {"First", "Then", "has", "of"}
    starts = {*NAMES, *NAMES.values(), "How", "First", "Then"}  # these also open a text or a line
    numbers = [str(number) for number in range(10, 100)]  # the digits are bytes
    return [*sorted(starts | {f" {word}" for word in words}), "####", *numbers]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: special tokens, all bytes, the problems' words, the numbers below 100; nothing is trained."""
    specials = [PAD, BOS, END, SYSTEM, USER, ASSISTANT]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    pieces = [byte_level.pre_tokenize_str(word)[0][0] for word in _words()]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Scores only have to make a word cheaper than its bytes.
    vocabulary = [(token, -20.0) for token in specials + alphabet] + [(piece, -1.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(size: Size, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama model of this size with random float32 weights."""
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=size.ffn_hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.hidden_size // HEAD_DIM,
        num_key_value_heads=size.hidden_size // HEAD_DIM,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=size.tied,
        initializer_range=size.hidden_size**-0.5 / 2,
        **special,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    model.generation_config = GenerationConfig(**special)
    return model


def write_models(out_dir: str | Path, seed: int = 1) -> dict[str, Path]:
    """Write ``<out_dir>/teacher`` and ``<out_dir>/student``: weights, configuration and tokenizer.

    Returns:
        The directory of each model.
    """
    tokenizer = build_tokenizer()
    paths = {}
    for offset, (name, size) in enumerate(SIZES.items()):
        paths[name] = Path(out_dir) / name
        build_model(size, tokenizer, seed + offset).save_pretrained(paths[name])
        tokenizer.save_pretrained(paths[name])
    return paths


def main() -> None:
    """Command line: write both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="directory under which teacher/ and student/ are written")
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights")
    arguments = parser.parse_args()
    for path in write_models(arguments.out, arguments.seed).values():
        print(path)


if __name__ == "__main__":
    main()
