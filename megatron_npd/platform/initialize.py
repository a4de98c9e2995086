"""Process groups and seeds: torch.distributed, megatron-core's parallel state and its random streams."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_npd.errors import UserError
from megatron_npd.lifeline import end_with_starter
from megatron_npd.platform import get_platform
from megatron_npd.platform.base import local_rank

_STORE_PATIENCE = timedelta(minutes=10)
_layouts: dict[tuple[int, int] | None, dict[str, Any]] = {}  # megatron-core's private names in each; None: in none


def initialize_distributed(
    *, tensor_model_parallel_size: int = 1, pipeline_model_parallel_size: int = 1, seed: int = 1234
) -> None:
    """Set up this process for model-parallel work; call it again at will, with other sizes or another seed.

    Under torchrun the process joins its peers; without torchrun's environment it is a world of its own. The
    data-parallel size is what remains of the world size. Stages of one process may ask for different sizes one after
    another; each layout's groups are made once. Models are used in the layout that they were built in.

    Args:
        tensor_model_parallel_size: Ranks that share a layer.
        pipeline_model_parallel_size: Ranks that share the depth.
        seed: Seed of the random streams (the tensor-parallel one differs by rank, as megatron-core has it).

    Raises:
        UserError: The world size is not a multiple of the two sizes' product, or this machine has no device for this
            process.
    """
    platform = get_platform()
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        check_devices(local_rank() + 1)
        platform.set_device(local_rank())
        _join(platform.distributed_backend)
    check_world_size(dist.get_world_size(), tensor_model_parallel_size, pipeline_model_parallel_size)
    _lay_out((tensor_model_parallel_size, pipeline_model_parallel_size))
    platform.seed(seed)
    model_parallel_cuda_manual_seed(seed)


def _lay_out(sizes: tuple[int, int]) -> None:
    """Make the groups of a layout (tensor, pipeline), or take up those that it had before.

    megatron-core keeps one layout, in its module's private names, and forgets most groups of the one before without
    destroying them: a round annotated in waves, student and teacher by turns, would make new ones until none are left.
    """
    from megatron.core import parallel_state

    current = None
    if parallel_state.model_parallel_is_initialized():
        current = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
        )
        if current == sizes:
            return
        parallel_state.get_global_memory_buffer().buffer.clear()  # as large as activations
    names = parallel_state.__dict__
    _layouts[current] = {name: value for name, value in names.items() if re.match("_[^_]", name)}
    names.update(_layouts.get(sizes, _layouts[None]))
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes[0], pipeline_model_parallel_size=sizes[1]
        )


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


def check_world_size(world: int, tensor_model_parallel_size: int, pipeline_model_parallel_size: int) -> None:
    """Refuse a number of processes that copies of a model so cut cannot share.

    Raises:
        UserError: It is no multiple of the two sizes' product.
    """
    if world % (tensor_model_parallel_size * pipeline_model_parallel_size):
        raise UserError(
            f"number of processes must be a multiple of tensor_model_parallel_size x pipeline_model_parallel_size = "
            f"{tensor_model_parallel_size} x {pipeline_model_parallel_size}, got {world}; "
            "start another number of processes or change the sizes"
        )


def _join(backend: str) -> None:
    # All ranks together only ever wait for each other: for rank 0 that hashes files, for one that scores a shard more.
    # Ten minutes, the default with NCCL, are too few; groups that compute together keep megatron-core's own patience.
    patience = timedelta(hours=2)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        end_with_starter()
        try:  # torchrun's agent holds the store before it starts a rank: who waits longer waits for the dead
            store, rank, world = next(rendezvous("env://", timeout=_STORE_PATIENCE))
        except dist.DistError as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(
                f"torchrun's store at {where} must answer within {_STORE_PATIENCE}, got {str(error).splitlines()[0]}; "
                "see whether torchrun still runs on that node, and start it again on all"
            ) from error
        store.set_timeout(patience)
        dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=world)
    else:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  (documented under this name)
        dist.init_process_group(backend, timeout=patience, store=store, rank=0, world_size=1)


def shutdown() -> None:
    """Leave all process groups; ``initialize_distributed`` may be called again afterwards."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    _layouts.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
