"""What differs between the megatron-cores that this package runs on: 0.16.1 (Python 3.11) and 0.19.2 (from 3.12 on).

What both take in one form is written in that form, where it is used; here is the rest.
"""

from __future__ import annotations

import importlib.util
import logging
import runpy
import warnings
from pathlib import Path
from typing import Any


def _version() -> str:
    """Of the megatron.core that an import would find: a checkout may stand before the installed one."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.origin is not None
    return runpy.run_path(str(Path(spec.origin).with_name("package_info.py")))["__version__"]


MCORE = _version()
NEWER = tuple(map(int, MCORE.split(".")[:2])) >= (0, 19)

# For ``dist_checkpointing.save``, whose request is carried out by models/checkpoint_writer.py: else a newer one asks
# for a package of its own to do that.
SAVE_OPTIONS: dict[str, Any] = {"async_strategy": "mcore"} if NEWER else {}

# Where a newer one keeps, among the tensors of a checkpoint, what an older one keeps in common.pt.
COMMON_OBJECT = "common_state/shard_0_1"

# What a newer one logs in each process, though it is meant or nothing is to be done: by logger, how the line begins.
_MEANT = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",  # its successor is not in an older one
    "megatron.core.transformer.transformer_layer": "Rewrapping ModuleSpec",  # the form that both take
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",  # checkpoints of an older one
    "torch.utils.cpp_extension": "No CUDA runtime is found",  # which it imports, where there is a compiler for CUDA
}
# The same of what torch says of how a newer one loads checkpoints.
_MEANT_OF_TORCH = r"The argument order of load has|torch\.distributed is disabled, unavailable or uninitialized"


def silence_meant_warnings() -> None:
    """Drop those lines."""
    warnings.filterwarnings("ignore", message=_MEANT_OF_TORCH, module=r"torch\.distributed\.checkpoint")
    for name, begin in _MEANT.items():
        logging.getLogger(name).addFilter(_without(begin))


def _without(begin: str) -> Any:
    return lambda record: not record.getMessage().startswith(begin)
