"""Paths that a command is given, checked before it imports anything that takes seconds."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_npd.config.training import TrainConfig
from megatron_npd.errors import UserError
from megatron_npd.lock import LOCK
from megatron_npd.manifest import MANIFEST, is_sealed


def check_model_dir(name: str, given: str) -> None:
    """Insist that the option ``name`` is a Hugging Face directory.

    Raises:
        UserError: It is not.
    """
    if not given or not (Path(given) / "config.json").is_file():
        raise UserError(
            f"{name} must be a Hugging Face model directory, got {given!r} without config.json; "
            "give a directory with config.json, weights and tokenizer"
        )


def check_out_dir(name: str, given: str) -> None:
    """Insist that the option ``name`` is a directory or can become one.

    Raises:
        UserError: A file is in the way.
    """
    for path in (Path(given), *Path(given).parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{name} must be a directory, got {given!r}, where {path} is a file; give another")


def check_sealed(name: str, given: str) -> None:
    """Insist that the option ``name`` is a directory that a stage has finished.

    Raises:
        UserError: It is not.
    """
    if not is_sealed(given):
        raise UserError(f"{name} must be a sealed directory, got {given!r} without {MANIFEST}; run its stage first")


def check_checkpoint(name: str, given: str) -> None:
    """Insist that the option ``name`` is a checkpoint, or a directory of some.

    Raises:
        UserError: It is not.
    """
    path = find_checkpoint(given)
    if not is_megatron_lm(path):
        check_sealed(name, str(path))


def find_checkpoint(given: str | Path) -> Path:
    """The newest checkpoint under a directory, as our trainer or Megatron-LM left it there; else the directory."""
    tracker = Path(given) / "latest_checkpointed_iteration.txt"
    if (newest := latest_checkpoint(given)) is not None:
        return newest
    if tracker.is_file() and (text := tracker.read_text(errors="replace").strip()).isdecimal():
        return Path(given) / f"iter_{int(text):07d}"
    return Path(given)


def is_megatron_lm(path: str | Path) -> bool:
    """Whether a directory is a distributed checkpoint that another program than this one wrote."""
    ours = (MANIFEST, LOCK, "state.json")  # even of a killed attempt
    return (Path(path) / ".metadata").is_file() and not any((Path(path) / name).exists() for name in ours)


def check_training(cfg: TrainConfig) -> None:
    """Check what a training run reads and writes.

    Raises:
        UserError: A path leads to nothing, or to something else.
    """
    check_model_dir("hf_model", cfg.hf_model)
    data = Path(cfg.data_path)
    grows = not is_sealed(data) and any(map(Path.is_dir, (data / "rounds", data / "prompts")))
    if not cfg.data_path or not (data.is_file() or is_sealed(data) or grows):
        raise UserError(
            "data_path must be a sealed directory of packs, a schedule.jsonl or a run's directory, got "
            f"{cfg.data_path!r}; pack first"
        )
    for name in ("save", "tensorboard_dir"):
        check_out_dir(name, getattr(cfg, name))
    if cfg.metrics_path:
        check_out_dir("the directory of metrics_path", str(Path(cfg.metrics_path).parent))
    for name in ("exit_at_iteration", "exit_at_refresh", "exit_duration_in_mins"):
        if getattr(cfg, name) and not cfg.save:
            raise UserError(f"save must be given with {name}, got none; the steps done would be lost")
    if grows and cfg.updates and not cfg.save:
        raise UserError(
            "save must be given with the directory of a run, got none; its policies are made of checkpoints"
        )
    if cfg.load != cfg.save and first_checkpoint(cfg) is None and cfg.load:
        raise UserError(f"load must hold a checkpoint, got none in {cfg.load}; leave it out to start from hf_model")


def first_checkpoint(cfg: TrainConfig) -> Path | None:
    """What a training run goes on from: its own newest checkpoint, else that of ``load``."""
    found = (latest_checkpoint(root) for root in (cfg.save, cfg.load) if root)
    return next(filter(None, found), None)


def latest_checkpoint(root: str | Path) -> Path | None:
    """The sealed checkpoint of the highest iteration under ``root``; None where there is none."""
    return next((path for path in reversed(checkpoints(root).values()) if is_sealed(path)), None)


def checkpoints(root: str | Path) -> dict[int, Path]:
    """Iteration -> checkpoint under ``root``, whole or not, from the lowest on."""
    matches = ((re.fullmatch(r"iter_(\d+)", path.name), path) for path in Path(root).glob("iter_*"))
    return dict(sorted((int(match[1]), path) for match, path in matches if match))
