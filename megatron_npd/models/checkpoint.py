"""Training checkpoints: megatron-core's distributed format in fresh, sealed directories.

Tensors are stored whole, so a checkpoint of one parallel layout loads into any other. The format holds pickles: a
directory's manifest is verified before any of them is read, and classes that only hold data are all that they may name.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn import Module

from megatron_npd.errors import Damaged, UserError
from megatron_npd.log import get_logger
from megatron_npd.manifest import MANIFEST, PART, read_manifest, seal, unlisted, verified_file, verify_files, writing
from megatron_npd.models.checkpoint_files import (
    KIND,
    MALFORMED,
    STATE_FILE,
    WEIGHTS_ALONE,
    check_common,
    common_place,
    first_failure,
    malformed,
    of_another_kind,
    plain,
    read_content,
)
from megatron_npd.models.checkpoint_writer import Writing, load_strategy
from megatron_npd.models.mapping import global_parameters
from megatron_npd.models.unpickle import known_classes_only, refused

Model = Module | Sequence[Module]  # one, or this rank's parts of one under the interleaved schedule
_STREAM_ERROR = "iostream error"  # all that torch.save says where it opens the file itself and the disk fails
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


class Saving:
    """A checkpoint ``root/iter_0000100`` in the making; all ranks make it together, and ``finish`` it together.

    Until it is finished it has no manifest, and nothing takes it for a checkpoint. What a killed attempt left of the
    same iteration is removed first.

    Args:
        root: Directory of the run's checkpoints, shared by all ranks.
        iteration: Optimizer steps done.
        model: The model or this rank's parts of it, wrapped in DistributedDataParallel or not.
        optimizer: Its optimizer; None: weights alone.
        scheduler: Its learning-rate schedule.
        state: The position in the data and whatever else the run wants back; it must fit into JSON.
        provenance: What made it, for its manifest.
        in_background: Training goes on while a thread of each rank writes; else all is on the disk at the return.

    Attributes:
        path: The checkpoint's directory.

    Raises:
        UserError: The iteration has a sealed checkpoint already, another process writes it, or a weight is NaN or
            infinite.
    """

    def __init__(
        self,
        root: str | Path,
        iteration: int,
        *,
        model: Model,
        optimizer: MegatronOptimizer | None = None,
        scheduler: OptimizerParamScheduler | None = None,
        state: Mapping[str, Any],
        provenance: Mapping[str, Any] | None = None,
        in_background: bool = False,
    ) -> None:
        self.path = Path(root) / f"iter_{iteration:07d}"
        self._iteration, self._provenance = iteration, provenance
        self._content = {
            "state": dict(state),
            "optimizer": optimizer and _kind(optimizer),
            "scheduler": scheduler is not None,
        }
        with together():
            _refuse_not_finite(model, iteration)
        with ExitStack() as stack:
            with together():
                if dist.get_rank() == 0:
                    stack.enter_context(writing(self.path))
            tensors = _sharded_state(model, optimizer, scheduler, is_loading=False)
            if optimizer is not None:
                with together():
                    wrong = _parameters_of_another_state(optimizer, tensors["optimizer"])
                    assert not wrong, f"the optimizer's copy of {wrong} is not the model's"
            with self._disk_errors():
                self._writing = Writing(tensors, self.path / PART, in_background=in_background)
            self._stack = stack.pop_all()

    def done(self) -> bool:
        """Whether this rank's part is on the disk."""
        return self._writing.done()

    def finish(self) -> Path:
        """Wait until the parts of all ranks are on the disk, and seal them; the checkpoint's directory.

        Raises:
            UserError: The disk is full, or the directory was taken over.
        """
        part = self.path / PART
        with self._stack:
            with self._disk_errors():
                hashes = self._writing.finish()
            with together():
                if dist.get_rank() == 0:
                    (part / STATE_FILE).write_text(json.dumps(self._content, indent=1) + "\n")
                    counts = {"iteration": self._iteration}
                    seal(part, kind=KIND, provenance=self._provenance, counts=counts, hashes=hashes)
        return self.path

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except (CheckpointException, RuntimeError) as error:
            if isinstance(error, RuntimeError) and _STREAM_ERROR not in str(error):
                raise
            raise UserError(
                f"{self.path} must be writable, got: {_reason(error)}; mend that and run the same command again"
            ) from error


def save_checkpoint(root: str | Path, iteration: int, **content: Any) -> Path:
    """Write and seal a checkpoint; arguments, result and errors as of ``Saving`` and its ``finish``."""
    return Saving(root, iteration, **content).finish()


def verify_together(path: str | Path) -> None:
    """Check every file of a checkpoint, each rank a share of them; all ranks call it together.

    Raises:
        Damaged: A file, or the manifest, is; on all ranks.
        UserError: It is not a sealed checkpoint, cannot be read, or a file lies there that no hash vouches for.
    """
    path = Path(path)
    known: list[Any] = [None]
    with together():
        if dist.get_rank() == 0:
            manifest = read_manifest(path, kind=KIND, verify=False)
            # Nothing may lie there that no hash vouches for: it could be a pickle that megatron-core opens.
            if foreign := unlisted(path, manifest):
                raise UserError(f"{path} must hold what its {MANIFEST} lists, got {foreign[0]} too; move that away")
            known = [manifest]
    dist.broadcast_object_list(known, src=0)
    (manifest,) = known
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name]["bytes"], name))
    with together():
        verify_files(path, manifest, by_size[dist.get_rank() :: dist.get_world_size()])


def saved_state(path: str | Path) -> dict[str, Any]:
    """The ``state`` of a checkpoint alone, without its tensors.

    Raises:
        UserError: It is not a sealed checkpoint, or its state is damaged.
    """
    return read_content(verified_file(path, STATE_FILE, kind=KIND))["state"]


def load_checkpoint(
    path: str | Path,
    *,
    model: Model,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
) -> dict[str, Any]:
    """Load a checkpoint of any parallel layout into this one, in place; all ranks call it together.

    Args:
        path: A directory that ``save_checkpoint`` wrote.
        model: The model or this rank's parts of it, wrapped in DistributedDataParallel or not.
        optimizer: Its optimizer; from a checkpoint of weights alone it starts anew on the loaded weights.
        scheduler: Its learning-rate schedule, likewise.

    Returns:
        The ``state`` that was saved.

    Raises:
        UserError: The directory is not a sealed checkpoint, a file is damaged, or it holds another model, another kind
            of optimizer, or optimizer state that is not of its weights.
    """
    path = Path(path)
    verify_together(path)
    content = read_content(path / STATE_FILE)
    with_optimizer = optimizer is not None and content["optimizer"]
    kind = optimizer and _kind(optimizer)
    if with_optimizer and content["optimizer"] not in (True, kind):  # True: of an older version
        raise UserError(
            f"use_distributed_optimizer, bf16 and expert_model_parallel_size must be as in the run that wrote {path} "
            f"({content['optimizer']}), got {kind}; give the old settings, or start from its weights alone "
            f"({WEIGHTS_ALONE})"
        )
    with_scheduler = scheduler is not None and content["scheduler"]
    wanted = _sharded_state(
        model, optimizer if with_optimizer else None, scheduler if with_scheduler else None, is_loading=True
    )
    ours = plain({name: wanted.get(name) for name in ("optimizer", "scheduler")})
    try:
        with ExitStack() as stack:
            with together():
                stack.enter_context(known_classes_only(path, read_manifest(path, verify=False).files))
                check_common(path)
            loaded: Any = dist_checkpointing.load(wanted, str(path), load_strategy())
    except UserError:
        raise
    except (CheckpointingException, CheckpointException, pickle.UnpicklingError) as error:
        if (planted := refused(path, first_failure(error))) is not None:
            raise planted from error
        raise UserError(
            f"{path} must hold this model, got: {_reason(error)}; give the model that was trained"
        ) from error
    except OSError as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else error
        raise malformed(Path(error.filename or path), what) from error
    except MALFORMED as error:
        raise malformed(common_place(path), error) from error
    if other := of_another_kind(ours, loaded):
        raise malformed(common_place(path), other)
    try:
        _apply(path, loaded, model, optimizer, scheduler if with_scheduler else None, bool(with_optimizer))
    except MALFORMED as error:
        if isinstance(error, UserError):
            raise
        raise malformed(common_place(path), error) from error
    return content["state"]


def _apply(path: Path, loaded: Any, model: Model, optimizer: Any, scheduler: Any, with_optimizer: bool) -> None:
    """Put a loaded state into the model, the optimizer and the schedule."""
    for name, part in _modules(model).items():
        part.load_state_dict(loaded[name])
    if optimizer is not None and with_optimizer:
        _refuse_another_state(path, optimizer, loaded["optimizer"])
        _keep_rates(optimizer, loaded["optimizer"])
        optimizer.load_state_dict(loaded["optimizer"])
    elif optimizer is not None:
        get_logger().info("%s holds weights alone: the optimizer starts anew", path)
        optimizer.reload_model_params()
    if scheduler is not None:
        scheduler.load_state_dict(loaded["scheduler"])


def _refuse_not_finite(model: Model, iteration: int) -> None:
    parameters = (pair for part in _modules(model).values() for pair in global_parameters(part))
    for name, parameter in parameters:
        if not torch.stack(parameter.detach().aminmax()).isfinite().all():
            raise UserError(
                f"{name} after step {iteration} must hold finite numbers, got NaN or infinity: nothing was saved; "
                "go on from an earlier checkpoint, with a lower learning rate"
            )


def _modules(model: Model) -> dict[str, Any]:
    """The bare parts by their name in a state: ``model``, or ``model0``, ``model1``, ... as Megatron-LM has it."""
    if isinstance(model, Module):
        model = [model]
    names = ["model"] if len(model) == 1 else [f"model{index}" for index in range(len(model))]
    return dict(zip(names, map(unwrap_model, model), strict=True))


def _sharded_state(
    model: Model,
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    *,
    is_loading: bool,
) -> dict[str, Any]:
    metadata = dict(_METADATA)  # megatron-core keeps the process group of its first use in it
    weights = {name: part.sharded_state_dict(metadata=metadata) for name, part in _modules(model).items()}
    result: dict[str, Any] = dict(weights)
    if optimizer is not None:
        with _padding_kept(optimizer):
            result["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    if scheduler is not None:
        result["scheduler"] = scheduler.state_dict()
    return result


def _inner(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Those that megatron-core chains: one more for experts where ranks share them."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _kind(optimizer: MegatronOptimizer) -> str:
    """What must be the same where a state is loaded: each class and precision has a layout of its own."""
    inner = _inner(optimizer)
    shared = parallel_state.get_expert_model_parallel_world_size() if len(inner) > 1 else 1
    kind = f"{type(inner[0]).__name__} in {'bf16' if inner[0].config.bf16 else 'fp32'}"
    return kind if shared == 1 else f"{kind} with experts on {shared} ranks"


@contextmanager
def _padding_kept(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Within it megatron-core gathers optimizer state with the padding at the end of each bucket.

    It would leave that out, and then slice what it gathered by offsets that count it: all that follows a padded bucket
    would be shifted. A pipeline stage with the tied embedding has several buckets.
    """
    buffers = [buffer for inner in _inner(optimizer) for buffer in getattr(inner, "buffers", [])]  # a distributed one's
    parts = [part for buffer in buffers for part in (buffer, *buffer.buckets)]
    unpadded = [part.numel_unpadded for part in parts]
    for part in parts:
        part.numel_unpadded = part.grad_data.numel()
    # Where this did not hold, megatron-core would log a line and save zeros.
    assert all(end <= buffer.numel for buffer in buffers for _, end, _ in buffer.param_index_map.values())
    try:
        yield
    finally:
        for part, numel in zip(parts, unpadded, strict=True):
            part.numel_unpadded = numel


def _parameters_of_another_state(optimizer: MegatronOptimizer, state: Any) -> list[str]:
    """Parameters that a gathered or loaded optimizer state holds otherwise than the model does, by their names.

    megatron-core's distributed optimizer lays its copy of the parameters out as it does the moments: where one is
    right, all are.
    """
    wrong = []
    for inner, own in zip(_inner(optimizer), _states(optimizer, state), strict=True):
        if not isinstance(inner, DistributedOptimizer):
            return []
        for index, parameter in enumerate(one for buffer in inner.buffers for one in buffer.param_index_map):
            copy = own["param_state"][index]["param"].data  # a tensor's, or that of one with its place in the whole
            if not torch.equal(copy.to(parameter), parameter):
                wrong.append(inner._param_name(parameter))
    return wrong


def _states(optimizer: MegatronOptimizer, state: Any) -> list[Any]:
    """A gathered or loaded state, optimizer by optimizer of those that are chained."""
    number = len(_inner(optimizer))
    return [state] if number == 1 else [state[index] for index in range(number)]


def _refuse_another_state(path: Path, optimizer: MegatronOptimizer, state: Any) -> None:
    with together():
        if wrong := _parameters_of_another_state(optimizer, state):
            raise UserError(
                f"{path} must hold the optimizer's state of its own weights, got another one for {wrong[0]} and "
                f"{len(wrong) - 1} more: older versions shifted it where pipeline stages share tied embeddings; move "
                f"it away to go on from an earlier one, or start from its weights alone ({WEIGHTS_ALONE})"
            )


def _keep_rates(optimizer: MegatronOptimizer, state: Any) -> None:
    """Put the configuration's learning rates into a loaded state: newer megatron-core finds its groups by them."""
    rates = {name: optimizer.param_groups[0][name] for name in ("max_lr", "min_lr")}
    for own in _states(optimizer, state):
        for group in own.get("optimizer", own)["param_groups"]:
            group.update(rates)


def _reason(error: BaseException) -> str:
    """What failed, without the tracebacks of all ranks."""
    first = first_failure(error)
    if isinstance(first, CheckpointException):
        return "a failure that rank 0 reports"
    if isinstance(error, RuntimeError):
        return f"'{error}' from torch, as of a full disk"
    return str(first) or type(first).__name__


@contextmanager
def together() -> Iterator[None]:
    """Run a block on all ranks; a rank's error in it is raised on every rank, ``Damaged`` if no rank had another."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    told: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if failure is None else (isinstance(failure, Damaged), str(failure)))
    if not (errors := [error for error in told if error is not None]):
        return
    damaged, message = min(errors, key=lambda error: error[0])
    if failure is not None and isinstance(failure, Damaged) == damaged:
        raise failure
    raise (Damaged if damaged else UserError)(message)
