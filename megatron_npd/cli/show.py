"""Show a sample's life as text: prompt, response, scores, zone, the teacher's choices at each token, training rows.

``npd show RUN --sample ID``. ``--export FILE.parquet`` writes a round's annotations instead, tokens and
the teacher's records as plain numbers, which any tool reads and ``npd preprocess`` takes back.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_npd.choices import PlatformName
from megatron_npd.config.command_line import parse_config
from megatron_npd.errors import UserError
from megatron_npd.log import wrote
from megatron_npd.manifest import read_manifest
from megatron_npd.platform import get_platform


@dataclass(frozen=True, kw_only=True)
class ShowCommand:
    """Show a sample's whole life as text, or export a round's annotations to Parquet."""

    POSITIONAL: ClassVar[str] = "run"
    run: str
    """Directory of a run, whose flag's name may be left out; to export, an annotations directory will do."""
    sample: str = ""
    """Id of a sample, as in rollouts.parquet."""
    export: str = ""
    """Parquet file to write a round's annotations to."""
    round: int = -1
    """Round to export; -1: the last that is annotated."""
    tokenizer: str = ""
    """Hugging Face directory; empty: the run's student."""
    platform: PlatformName = "auto"
    """Device platform; auto: cuda, npu or cpu, the first that is there."""

    def __post_init__(self) -> None:
        if bool(self.sample) == bool(self.export):
            both = "both" if self.sample else "neither"
            raise UserError(f"one of --sample and --export must be given, got {both}; give one")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the sample, or write the file."""
    cfg = parse_config(ShowCommand, argv)
    if not Path(cfg.run).is_dir():  # before anything heavy is imported
        raise UserError(f"--run must be the directory of a run, got no directory at {cfg.run!r}; check the path")
    get_platform(cfg.platform)
    if cfg.export:
        from megatron_npd.store.export import export_store, find_annotations

        annotations = find_annotations(cfg.run, cfg.round if cfg.round >= 0 else None)
        Path(cfg.export).parent.mkdir(parents=True, exist_ok=True)
        number = export_store(annotations, cfg.export)
        which = read_manifest(annotations, verify=False).provenance["round"]
        print(f"{number} samples of round {which} ({annotations}) in {cfg.export}")
        wrote(cfg.export, f"npd preprocess --input {cfg.export} --hf-model STUDENT --out DIR")
        return
    from megatron_npd.audit.sample import describe_sample  # after the platform is chosen

    decode = None
    if directory := cfg.tokenizer or _student(Path(cfg.run)):
        from megatron_npd.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(directory)
        decode = lambda ids: str(tokenizer.decode(ids))  # noqa: E731
    print(describe_sample(cfg.run, cfg.sample, decode), end="")


def _student(run: Path) -> str:
    """The student that the run began with, where it is still there; its tokenizer is every policy's."""
    config = run / "config.json"
    try:
        student = json.loads(config.read_text())["student"] if config.is_file() else ""
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{config} must name the run's student, got {error!r}; give --tokenizer") from error
    return student if student and Path(student).is_dir() else ""
