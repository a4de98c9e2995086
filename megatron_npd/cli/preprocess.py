"""Turn teacher data made elsewhere, saved responses of a server, or texts into an annotations directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_npd.choices import PlatformName
from megatron_npd.config.command_line import parse_config
from megatron_npd.errors import UserError
from megatron_npd.log import wrote
from megatron_npd.platform import get_platform


@dataclass(frozen=True, kw_only=True)
class PreprocessCommand:
    """Turn teacher data made elsewhere, saved responses of a server, or texts into an annotations directory.

    Records have prompt_ids and response_ids (or token_ids and prompt_len) and, for each response token, top_ids with
    top_logprobs, or with top_logits and logsumexp; docs/formats.md lists all fields. Saved responses are those of a
    vLLM or OpenAI-style server to a request with prompt_logprobs (or echo), one JSON per line, with prompt_len beside.
    """

    input: tuple[str, ...]
    """JSONL or Parquet files, in order: --input a.jsonl b.parquet."""
    out: str
    """Directory to seal, which npd select and npd pack take as --annotations."""
    top_k: int = 10
    """Teacher columns kept a response token; 0: tokens alone, for supervised training."""
    vocab_size: int = 0
    """Vocabulary of the student; 0: that of hf_model."""
    hf_model: str = ""
    """Hugging Face directory of the student: its vocabulary, and the tokenizer of texts."""
    teacher: str = ""
    """Hugging Face directory of the teacher that made the data, to check that its vocabulary is the student's."""
    text: bool = False
    """The records are texts (messages or prompt, and response); no teacher."""
    max_prompt_len: int = 32768
    """Longest prompt of a text, in tokens."""
    policy_version: str = "data"
    """Version of the policy that generated the responses; a record that names another one is quarantined."""
    shard_size: int = 4096
    """Records a sealed shard."""
    workers: int = 1
    """Processes; the result is the same for any number."""
    max_quarantined: float = 0.1
    """Share of the records that may be quarantined before the command stops."""
    platform: PlatformName = "auto"
    """Device platform; auto: cuda, npu or cpu, the first that is there."""

    def __post_init__(self) -> None:
        if bool(self.vocab_size) == bool(self.hf_model):
            raise UserError(
                f"one of vocab_size and hf_model must be given, got {self.vocab_size} and {self.hf_model!r}"
            )
        if (self.text or self.teacher) and not self.hf_model:
            raise UserError("hf_model must be given with text or teacher, got none; its tokenizer is needed")
        if self.text and len(self.input) != 1:
            raise UserError(f"input must be one file of texts, got {len(self.input)}; join them")


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(PreprocessCommand, argv)
    get_platform(config.platform)
    vocab_size = config.vocab_size
    if config.hf_model:
        from megatron_npd.data.tokenizer import check_vocabularies, load_tokenizer
        from megatron_npd.models.families import load_spec

        vocab_size = load_spec(config.hf_model).vocab_size
        if config.teacher:
            check_vocabularies(load_tokenizer(config.hf_model), load_tokenizer(config.teacher))
    if config.text:
        from megatron_npd.data.prompts import prepare_prompts
        from megatron_npd.data.tokenizer import load_model_tokens
        from megatron_npd.store.unscored import store_prompts

        prompts = Path(config.out).with_name(f"{Path(config.out).name}.prompts")
        prepare_prompts(
            config.input[0],
            prompts,
            model=load_model_tokens(config.hf_model),
            max_prompt_len=config.max_prompt_len,
            max_quarantined=config.max_quarantined,
        )
        store_prompts(prompts, config.out, vocab_size=vocab_size)
        wrote(config.out, f"npd pack --annotations {config.out} --out PACKS")
        return
    from megatron_npd.store.preprocess import preprocess

    preprocess(
        config.input,
        config.out,
        top_k=config.top_k,
        vocab_size=vocab_size,
        policy_version=config.policy_version,
        shard_size=config.shard_size,
        workers=config.workers,
        max_quarantined=config.max_quarantined,
    )
    if config.top_k:
        wrote(config.out, f"npd select --annotations {config.out} --out SELECTION")
    else:
        wrote(config.out, f"npd pack --annotations {config.out} --out PACKS")
