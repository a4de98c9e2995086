"""Process groups and seeds: torch.distributed, megatron-core's parallel state and its random streams."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from math import prod
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_npd.errors import UserError
from megatron_npd.lifeline import end_with_starter
from megatron_npd.platform import get_platform
from megatron_npd.platform.base import local_rank

_STORE_PATIENCE = timedelta(minutes=10)
# Where megatron-core keeps the size of each axis; data parallelism takes what the world has left.
_SIZES = {
    "tensor_model_parallel_size": "get_tensor_model_parallel_world_size",
    "pipeline_model_parallel_size": "get_pipeline_model_parallel_world_size",
    "context_parallel_size": "get_context_parallel_world_size",
    "virtual_pipeline_model_parallel_size": "get_virtual_pipeline_model_parallel_world_size",
    "expert_model_parallel_size": "get_expert_model_parallel_world_size",
}
_layouts: dict[tuple[int, ...] | None, dict[str, Any]] = {}  # megatron-core's private names in each; None: in none


def initialize_distributed(*, seed: int = 1234, **sizes: int) -> None:
    """Set up this process for model-parallel work; call it again at will, with other sizes or another seed.

    Under torchrun the process joins its peers; without torchrun's environment it is a world of its own. The
    data-parallel size is what remains of the world size. Stages of one process may ask for different sizes one after
    another; each layout's groups are made once. Models are used in the layout that they were built in.

    Args:
        seed: Seed of the random streams (the tensor-parallel one differs by rank, as megatron-core has it).
        sizes: ``tensor_model_parallel_size``, ranks that share a layer; ``pipeline_model_parallel_size``, that share
            the depth; ``context_parallel_size``, that share a row; ``virtual_pipeline_model_parallel_size``, parts of
            the depth of one of those ranks; ``expert_model_parallel_size``, that share the experts of a layer, taken
            from the data-parallel ones. Each is 1 where it is not given.

    Raises:
        UserError: The world size is not a multiple of the sizes' product, or this machine has no device for this
            process.
    """
    platform = get_platform()
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        check_devices(local_rank() + 1)
        platform.set_device(local_rank())
        _join(platform.distributed_backend)
    check_world_size(
        dist.get_world_size(), **{name: size for name, size in sizes.items() if not name.startswith("virtual")}
    )
    _lay_out(tuple(sizes.get(name, 1) for name in _SIZES))
    platform.seed(seed)
    model_parallel_cuda_manual_seed(seed)


def _lay_out(sizes: tuple[int, ...]) -> None:
    """Make the groups of a layout, or take up those that it had before; ``sizes`` in the order of ``_SIZES``.

    megatron-core keeps one layout, in its module's private names, and forgets most groups of the one before without
    destroying them: a round annotated in waves, student and teacher by turns, would make new ones until none are left.
    """
    from megatron.core import parallel_state

    current = None
    if parallel_state.model_parallel_is_initialized():
        current = tuple(getattr(parallel_state, getter)() or 1 for getter in _SIZES.values())
        if current == sizes:
            return
        parallel_state.get_global_memory_buffer().buffer.clear()  # as large as activations
    names = parallel_state.__dict__
    _layouts[current] = {name: value for name, value in names.items() if re.match("_[^_]", name)}
    names.update(_layouts.get(sizes, _layouts[None]))
    if not parallel_state.model_parallel_is_initialized():
        arguments: dict[str, Any] = {name: size for name, size in zip(_SIZES, sizes, strict=True) if size > 1}
        parallel_state.initialize_model_parallel(**arguments)


def check_devices(processes: int) -> None:
    """Refuse more processes on this machine than it has devices; a CPU takes any number.

    Raises:
        UserError: There are more.
    """
    platform = get_platform()
    devices = len(platform.device_names())
    if devices < processes and platform.name != "cpu":
        raise UserError(
            f"processes on a machine (nproc-per-node) must be at most the {platform.name} devices that are seen there "
            f"({devices}), got {processes}; start fewer, or look at {platform.visible_devices_env}"
        )


def check_world_size(world: int, **sizes: int) -> None:
    """Refuse a number of processes that copies of a model so cut cannot share.

    Raises:
        UserError: It is no multiple of the product of ``sizes``, named as in ``initialize_distributed``.
    """
    assert sizes.keys() <= _SIZES.keys(), sizes
    for other in ("expert_model_parallel_size", "context_parallel_size"):  # experts are shared along the latter too
        cut = {name: size for name, size in sizes.items() if size > 1 and name != other}
        if world % prod(cut.values()):
            raise UserError(
                f"number of processes must be a multiple of {' x '.join(cut)} = {' x '.join(map(str, cut.values()))}, "
                f"got {world}; start another number of processes or change the sizes"
            )


def _join(backend: str) -> None:
    # All ranks together only ever wait for each other: for rank 0 that hashes files, for one that scores a shard more.
    # Ten minutes, the default with NCCL, are too few; groups that compute together keep megatron-core's own patience.
    patience = timedelta(hours=2)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        end_with_starter()
        shared = _shares_store()
        try:  # torchrun's agent holds the store before it starts a rank: who waits longer waits for the dead
            store, rank, world = next(rendezvous("env://", timeout=_STORE_PATIENCE))
        except dist.DistError as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(
                f"torchrun's store at {where} must answer within {_STORE_PATIENCE}, got {str(error).splitlines()[0]}; "
                "see whether torchrun still runs on that node, and start it again on all"
            ) from error
        if shared:  # with the ranks that torchrun restarted, whose addresses stand in it
            attempt = f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}"
            store = dist.PrefixStore(attempt, store)  # pyright: ignore[reportPrivateImportUsage]
        store.set_timeout(patience)
        dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=world)
    else:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  (documented under this name)
        dist.init_process_group(backend, timeout=patience, store=store, rank=0, world_size=1)


def _shares_store() -> bool:
    """Whether torchrun's ranks meet in a store of its own, which outlives them.

    Raises:
        UserError: Then several nodes are to be restarted: each counts by itself how often.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        raise UserError(
            f"max-restarts of torchrun on several nodes must be 0 where the ranks meet in its store, got {restarts}; "
            "give --rdzv-backend c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, and they meet in one of their own"
        )
    return True


def shutdown() -> None:
    """Leave all process groups; ``initialize_distributed`` may be called again afterwards."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    _layouts.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
