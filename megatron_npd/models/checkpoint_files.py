"""The small files of a checkpoint, and what must stand in them: hashes vouch for what somebody sealed again, too."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException, maybe_load_config
from torch.distributed.checkpoint.api import CheckpointException

from megatron_npd.errors import UserError
from megatron_npd.platform.mcore_versions import MCORE, NEWER

KIND = "checkpoint"
INDEX_FILE = ".metadata"  # torch's: where each piece of each tensor lies
STATE_FILE = "state.json"
WEIGHTS_ALONE = "hf_model made by npd convert --direction megatron-to-hf"  # of a checkpoint, to start from
COMMON_FILE = "common.pt"  # megatron-core's: all that is no tensor of its own; newer ones put it among the tensors
# What torch and megatron-core raise at content that has another form than what they wrote.
MALFORMED = (AssertionError, AttributeError, EOFError, LookupError, RecursionError, TypeError, ValueError)
_NEEDED = {"betas", "eps", "step"}  # of a group of parameters, which the next step looks up


def malformed(file: Path, error: BaseException | str) -> UserError:
    """The error for a file of another form than ``save_checkpoint`` gives it."""
    what = error if isinstance(error, str) else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return UserError(f"{file} must be as save_checkpoint wrote it, got {what}; use another checkpoint")


def read_content(file: Path) -> dict[str, Any]:
    """What ``save_checkpoint`` put into ``state.json``: its manifest may vouch for a file that somebody changed."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise malformed(file, error) from error
    kinds = {"state": dict, "optimizer": (str, bool, type(None)), "scheduler": bool}
    for key, kind in kinds.items():
        if not isinstance(content, dict) or not isinstance(content.get(key, ...), kind):
            raise malformed(file, f"no {key}, or one of another type")
    for key in {"iteration", "rows_consumed", "seed"} & content["state"].keys():
        if type(value := content["state"][key]) is not int or value < 0:
            raise malformed(file, f"{key} {str(value)[:50]!r}")
    return content


def check_common(path: Path) -> None:
    """Refuse files of megatron-core's at which it would end in errors without a file's name."""
    try:
        maybe_load_config(str(path))
    except (*MALFORMED, CheckpointingException) as error:
        raise malformed(path / "metadata.json", error) from error
    place = common_place(path)
    try:
        common = _read_common(path)
    except UserError:
        raise
    except (*MALFORMED, OSError, RuntimeError) as error:
        raise malformed(place, error) from error
    except CheckpointException as error:
        if isinstance(first := first_failure(error), pickle.UnpicklingError):
            raise first from error
        raise malformed(place, first) from error
    if not isinstance(common, dict):
        raise malformed(place, f"a {type(common).__name__}")


def _read_common(path: Path) -> Any:
    if (path / COMMON_FILE).exists():
        return torch.load(path / COMMON_FILE, map_location="cpu", weights_only=True)
    if NEWER:
        return dist_checkpointing.load_common_state_dict(str(path))
    raise UserError(
        f"{path} must have a {COMMON_FILE}, as megatron-core {MCORE} writes it, got none, as newer ones leave it out; "
        f"go on with the Python that wrote it, or start from its weights alone ({WEIGHTS_ALONE})"
    )


def common_place(path: Path) -> Path:
    """What an error in ``COMMON_FILE`` is said of: that file, or the checkpoint that has its content elsewhere."""
    return path / COMMON_FILE if (path / COMMON_FILE).exists() else path


def first_failure(error: BaseException) -> BaseException:
    """The failure of one rank, of those that torch collects."""
    failures = list(error.failures.values()) if isinstance(error, CheckpointException) else []
    return failures[0][0] if failures else error


def plain(state: Any) -> Any:
    """The numbers and strings of a state, without its tensors."""
    if isinstance(state, dict):
        return {name: plain(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return [plain(value) for value in state]
    return state if isinstance(state, bool | int | float | str) else None


def of_another_kind(ours: Any, loaded: Any, where: str = "state") -> str:
    """The first plain value of a loaded state that is of another kind than ours; "" where none is."""
    if isinstance(ours, dict) and isinstance(loaded, dict):
        if missing := _NEEDED & ours.keys() - loaded.keys():
            return f"{where} without {min(missing)}"
        parts = [(ours[name], loaded[name], f"{where}.{name}") for name in ours if name in loaded]
    elif isinstance(ours, list) and isinstance(loaded, list | tuple):
        parts = [(one, other, f"{where}.{index}") for index, (one, other) in enumerate(zip(ours, loaded))]  # noqa: B905
    else:
        same = ours is None or type(ours) is type(loaded)
        if type(ours) in (int, float):
            same = type(loaded) in (int, float) and abs(loaded) < 2**63  # no NaN, no infinity
        return "" if same else f"{where} {loaded!r:.50}"
    return next(filter(None, (of_another_kind(*part) for part in parts)), "")
