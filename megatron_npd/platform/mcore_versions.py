"""What differs between the megatron-cores that this package runs on: 0.16.1 (Python 3.11) and 0.19.2 (from 3.12 on).

What both take in one form is written in that form, where it is used; here is the rest.
"""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Any

MCORE = version("megatron-core")
NEWER = tuple(map(int, MCORE.split(".")[:2])) >= (0, 19)

# For ``dist_checkpointing.save``, whose request is carried out by models/checkpoint_writer.py: else a newer one asks
# for a package of its own to do that.
SAVE_OPTIONS: dict[str, Any] = {"async_strategy": "mcore"} if NEWER else {}

# Where a newer one keeps, among the tensors of a checkpoint, what an older one keeps in common.pt.
COMMON_OBJECT = "common_state/shard_0_1"

# What a newer one warns of in each process, though it is meant: by logger under megatron.core, how the line begins.
_MEANT = {
    "models.gpt.gpt_model": "GPTModel IS DEPRECATED",  # its successor is not in an older one
    "transformer.transformer_layer": "Rewrapping ModuleSpec",  # the form that both take
    "distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    "dist_checkpointing.strategies.common": "load_common is deprecated",  # checkpoints of an older one
}


def silence_meant_warnings() -> None:
    """Drop those lines of megatron-core's log."""
    for name, begin in _MEANT.items():
        logging.getLogger(f"megatron.core.{name}").addFilter(_without(begin))


def _without(begin: str) -> Any:
    return lambda record: not record.getMessage().startswith(begin)
