"""Exact-match accuracy of a policy on problems with reference answers, through vLLM.

``npd evaluate --prompts FILE_OR_DIR --model DIR``
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from megatron_npd.config.command_line import parse_config
from megatron_npd.config.run import EvalConfig
from megatron_npd.config.settings import RolloutConfig
from megatron_npd.errors import UserError
from megatron_npd.log import wrote
from megatron_npd.manifest import is_sealed, read_manifest


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(RolloutConfig):
    """Exact-match accuracy of a policy on problems with reference answers, through vLLM."""

    prompts: str
    """JSONL or Parquet of problems with reference responses, or a sealed directory of prompts."""
    model: str
    """Hugging Face directory of the policy, with its tokenizer; with urls the servers serve it already."""
    answer_regex: str = EvalConfig.answer_regex
    """Its first group, at its last match, is the answer, in reference and response alike (GSM8K's form by default)."""
    out: str = ""
    """JSON file for the result; empty: none."""
    log_dir: str = ""
    """Directory of the logs of servers started here; empty: logs/ beside the result, or a private one in /tmp."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompts:
            raise UserError("--prompts must name problems, got nothing; give a file or a sealed directory")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the configuration, evaluate, and print the accuracy."""
    cfg = parse_config(EvaluateCommand, argv)
    from megatron_npd.data.prompts import prepare_prompts
    from megatron_npd.data.tokenizer import load_model_tokens
    from megatron_npd.rollout.evaluate import exact_match
    from megatron_npd.serving.pool import ServerPool

    model = load_model_tokens(cfg.model)
    with TemporaryDirectory() as scratch:
        prompts = Path(cfg.prompts)
        if not is_sealed(prompts):
            prompts = Path(scratch) / "prompts"
            prepare_prompts(cfg.prompts, prompts, model=model, max_prompt_len=cfg.max_model_len - 1)
        read_manifest(prompts, kind="prompts")  # refused before a server is started
        log_dir = cfg.log_dir or (Path(cfg.out).parent / "logs" if cfg.out else None)
        with ServerPool.open(cfg.model, cfg, version="evaluated", log_dir=log_dir) as pool:
            result = exact_match(
                pool, prompts, answer_regex=cfg.answer_regex, tokenizer=model.tokenizer, max_tokens=cfg.max_tokens
            )
    if cfg.out:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        Path(cfg.out).write_text(json.dumps(asdict(result) | {"accuracy": result.accuracy}, indent=1) + "\n")
        wrote(cfg.out)
    print(f"accuracy {result.accuracy:.2f} % ({result.correct} of {result.total})")
