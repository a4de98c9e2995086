"""Turn a JSONL or Parquet file of prompts into a sealed directory of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_npd.config.command_line import parse_config
from megatron_npd.errors import UserError
from megatron_npd.log import wrote


@dataclass(frozen=True, kw_only=True)
class PromptsCommand:
    """Turn a JSONL or Parquet file of prompts into a sealed directory of token ids."""

    prompts: str
    """JSONL or Parquet of prompts (messages or prompt, optional response)."""
    out: str
    """Directory to seal."""
    student: str
    """Hugging Face directory whose tokenizer and chat template are used."""
    teacher: str = ""
    """Hugging Face directory of the teacher, whose vocabulary is compared and whose chat template may differ."""
    max_prompt_len: int = 1024
    """Longest prompt, in tokens; longer ones are quarantined."""
    max_response_len: int = 0
    """Longest given response, in tokens; 0: max_prompt_len, or 32768 where that is more."""
    max_quarantined: float = 0.1
    """Share of the records that may be quarantined before nothing is sealed."""
    special_tokens_in_text: bool = False
    """Take special tokens that users' texts spell (<|im_end|>) for control tokens rather than for text."""

    def __post_init__(self) -> None:
        if self.max_prompt_len <= 0:
            raise UserError(f"max_prompt_len must be at least 1, got {self.max_prompt_len}; give a positive number")
        if self.max_response_len < 0:
            raise UserError(f"max_response_len must be at least 0, got {self.max_response_len}; leave it out")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the configuration and prepare the prompts."""
    config = parse_config(PromptsCommand, argv)
    from megatron_npd.data.prompts import prepare_prompts
    from megatron_npd.data.tokenizer import load_model_tokens, load_tokenizer

    prepare_prompts(
        config.prompts,
        config.out,
        model=load_model_tokens(config.student),
        teacher_tokenizer=load_tokenizer(config.teacher) if config.teacher else None,
        max_prompt_len=config.max_prompt_len,
        max_response_len=config.max_response_len or None,
        max_quarantined=config.max_quarantined,
        special_tokens_in_text=config.special_tokens_in_text,
    )
    wrote(config.out, f"npd rollout --prompts {config.out} --model {config.student} --out ROLLOUTS")
