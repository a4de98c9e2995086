"""Weights between Hugging Face directories and megatron-core models, in any tensor- and pipeline-parallel layout."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from megatron_npd.errors import UserError
from megatron_npd.lock import LOCK
from megatron_npd.log import get_logger
from megatron_npd.manifest import config_hash, is_sealed, seal, writing
from megatron_npd.models.build import build_model
from megatron_npd.models.checkpoint import load_checkpoint, save_checkpoint
from megatron_npd.models.families.base import ModelSpec, Rule, load_spec
from megatron_npd.models.hf_checkpoint import HFCheckpoint, ShardWriter
from megatron_npd.models.mapping import (
    global_parameters,
    hf_shapes,
    local_shape,
    parameter_rules,
    pieces,
    rule_shapes,
)
from megatron_npd.paths import latest_checkpoint
from megatron_npd.platform.initialize import initialize_distributed
from megatron_npd.weights import has_weights

MAX_SHARD_BYTES = 5 * 10**9
# What makes a directory a model for transformers and vLLM, beside the weights; copied as they are.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
)


def load_hf_weights(model: nn.Module, spec: ModelSpec) -> None:
    """Fill a model with the weights of ``spec.path``; every rank reads only the slices that it holds.

    Numbers are cast to the parameters' type. Padding rows of the vocabulary become 0.

    Args:
        model: This rank's megatron-core GPTModel, bare or wrapped, built from ``spec``.
        spec: The model's shape, with the directory to read.

    Raises:
        UserError: No weights, a damaged file, or a tensor that is missing, unexpected, undefined or of another shape
            or type.
    """
    checkpoint = open_checkpoint(spec)
    rank, size = _tensor_parallel()
    rules = parameter_rules(spec)
    with torch.no_grad():
        for name, parameter in global_parameters(model):
            rule = rules[name]
            assert tuple(parameter.shape) == local_shape(rule, spec, size), (name, parameter.shape)
            local = torch.zeros(parameter.shape, dtype=_widest(rule, checkpoint.dtypes))
            for piece in pieces(rule, spec, rank, size):
                local[piece.target] = checkpoint.read(piece.name, piece.source)
            if not torch.stack(local.aminmax()).isfinite().all():
                raise UserError(
                    f"{' and '.join(rule.hf)} in {spec.path} must hold finite numbers, got NaN or infinity; use "
                    "weights from before they arose"
                )
            parameter.copy_(local)


def export_hf(
    model: nn.Module,
    spec: ModelSpec,
    out_dir: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write the model as a directory that transformers and vLLM load; its files appear whole, its manifest last.

    Collective over the tensor- and pipeline-parallel groups of the first data-parallel replica; ranks of other
    replicas return at once. Only rank 0 writes and knows when the directory is there: put a barrier behind the call
    where others go on to read it. Tensors have the types of ``spec.path``'s own (where that has no weights,
    the configuration's). Configuration, tokenizer and chat template are copied from there byte for byte.

    Args:
        model: This rank's megatron-core GPTModel, bare or wrapped, built from ``spec``.
        spec: The model's shape, with the directory to take everything but the weights from.
        out_dir: Directory to make; sealed, kind ``policy``.
        max_shard_bytes: Largest weight file.
        provenance: What the manifest says beside the architecture (policy version, iteration, ...).

    Raises:
        UserError: ``out_dir`` is there already, another process is writing it, or a weight is NaN or infinite.
    """
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        return
    out = Path(out_dir)
    group: Any = parallel_state.get_model_parallel_group()
    refusal = [_refusal(out) if dist.get_rank() == 0 else None]  # another rank would look while rank 0 makes it
    dist.broadcast_object_list(refusal, src=0, group=group)
    if refusal[0] is not None:
        raise UserError(refusal[0])
    dtypes = _export_dtypes(spec)
    _refuse_not_finite(model, spec, dtypes, out)
    if dist.get_rank() != 0:
        for _ in _gather(model, spec, dtypes):
            pass
        return
    with writing(out) as directory:
        writer = ShardWriter(directory, hf_shapes(spec), dtypes, max_shard_bytes)
        for name, tensor in _gather(model, spec, dtypes):
            writer.add(name, tensor)
        writer.finalize()
        for companion in COMPANIONS:
            if (file := Path(spec.path) / companion).is_file():
                shutil.copyfile(file, directory / companion)
        _open_to_servers(directory)
        about = {"architecture": spec.architecture, "config_hash": config_hash(spec.hf_config)}
        about["weights"] = writer.content.hexdigest()
        seal(directory, kind="policy", provenance={**about, **(provenance or {})})
        (out / LOCK).unlink()


def _open_to_servers(directory: Path) -> None:
    """Give weights the mode of the other files: safetensors makes them private, and a server may be another user's."""
    for file in directory.glob("*.safetensors"):
        with suppress(OSError):  # file systems without permissions give all files the same
            shutil.copymode(directory / "config.json", file)


def hf_to_megatron(hf_dir: str | Path, out_dir: str | Path) -> Path:
    """Convert a Hugging Face directory into a megatron dist checkpoint, in one process, without a GPU.

    The checkpoint is independent of the layout: any tensor- and pipeline-parallel size loads it. Weights stay bfloat16
    where all of them are, else they become float32.

    Args:
        hf_dir: Hugging Face directory with safetensors.
        out_dir: Root under which ``iter_0000000`` is written.

    Returns:
        The checkpoint's directory.
    """
    _single_process()
    spec = load_spec(hf_dir)
    checkpoint = open_checkpoint(spec)
    model = build_model(spec, bf16=set(checkpoint.dtypes.values()) == {torch.bfloat16})
    load_hf_weights(model, spec)
    path = save_checkpoint(out_dir, 0, model=model, state={"iteration": 0})
    get_logger().info("converted %s into %s", hf_dir, path)
    return path


def megatron_to_hf(checkpoint_dir: str | Path, hf_dir: str | Path, out_dir: str | Path) -> None:
    """Convert a megatron dist checkpoint of any layout into a Hugging Face directory, in one process, without a GPU.

    Args:
        checkpoint_dir: One checkpoint (``iter_0000100``) or the root above, whose newest sealed one is taken.
        hf_dir: Hugging Face directory that the model started from: configuration, tokenizer, tensor types.
        out_dir: Directory to make.
    """
    _single_process()
    if (refusal := _refusal(Path(out_dir))) is not None:  # before the work rather than after it
        raise UserError(refusal)
    spec = load_spec(hf_dir)
    path = latest_checkpoint(checkpoint_dir) or Path(checkpoint_dir)
    model = build_model(spec, bf16=set(_export_dtypes(spec).values()) == {torch.bfloat16})
    load_checkpoint(path, model=model)
    export_hf(model, spec, out_dir, provenance={"checkpoint": path.name})
    get_logger().info("converted %s into %s", path, out_dir)


def _single_process() -> None:
    initialize_distributed()
    if dist.get_world_size() != 1:
        raise UserError(f"conversion must run in one process, got {dist.get_world_size()}; start it without torchrun")


def _refusal(path: Path) -> str | None:
    """Why a directory cannot be made there."""
    begun = (path / LOCK).is_file() and not is_sealed(path)  # by an attempt that was killed
    if path.exists() and not begun and (not path.is_dir() or any(path.iterdir())):
        return f"{path} must not exist yet, got a full directory or a file; choose another or remove it"
    return None


def open_checkpoint(spec: ModelSpec) -> HFCheckpoint:
    """The weights of ``spec.path``, their headers compared with the model that ``config.json`` describes.

    Raises:
        UserError: As for ``HFCheckpoint``, or a tensor is missing, unexpected or of another shape.
    """
    checkpoint = HFCheckpoint(spec.path)
    checkpoint.check(hf_shapes(spec))
    return checkpoint


def _export_dtypes(spec: ModelSpec) -> Mapping[str, torch.dtype]:
    return open_checkpoint(spec).dtypes if has_weights(spec.path) else dict.fromkeys(hf_shapes(spec), spec.dtype)


def _refuse_not_finite(model: nn.Module, spec: ModelSpec, dtypes: Mapping[str, torch.dtype], out: Path) -> None:
    """Raise the same error on every rank of the replica: if rank 0 found it alone, the others would wait for it."""
    rules, wrong = parameter_rules(spec), None
    for name, parameter in global_parameters(model):
        local = parameter.detach().to(_widest(rules[name], dtypes))
        if not torch.stack(local.aminmax()).isfinite().all():
            wrong = " and ".join(rules[name].hf)
            break
    group: Any = parallel_state.get_model_parallel_group()
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, wrong, group=group)
    if (first := next((name for name in found if name), None)) is not None:
        raise UserError(
            f"{first} of the model to export into {out} must hold finite numbers, got NaN or infinity; use weights "
            "from before they arose"
        )


def _tensor_parallel() -> tuple[int, int]:
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


def _widest(rule: Rule, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """A type that holds all of a rule's tensors exactly."""
    first, *rest = (dtypes[name] for name in rule.hf)
    for dtype in rest:
        first = torch.promote_types(first, dtype)
    return first


def _gather(model: nn.Module, spec: ModelSpec, dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor of the Hugging Face model, in the order of the network, on rank 0; collective.

    Every other rank of the replica runs it to its end too, and gets nothing. One parameter is on its way at a time.
    """
    rank, size = _tensor_parallel()
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    assert isinstance(pipeline, dist.ProcessGroup)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    local = dict(global_parameters(model))
    held: list[Any] = [None] * dist.get_world_size(pipeline)
    dist.all_gather_object(held, list(local), group=pipeline)
    written: set[str] = set()
    for name, rule in parameter_rules(spec).items():
        if written.issuperset(rule.hf):
            continue  # a tied output layer
        written.update(rule.hf)
        owner = next(index for index, names in enumerate(held) if name in names)
        dtype, shards = _widest(rule, dtypes), 1 if rule.kind == "replicated" else size
        # Bytes travel, so that no backend has to know the type.
        parts_RB = torch.empty(0)
        if stage == owner:
            mine = local[name].detach().to(dtype).contiguous().view(torch.uint8).flatten()
            parts_RB = mine.new_empty(shards, mine.numel())
            if shards > 1:
                group = parallel_state.get_tensor_model_parallel_group()
                dist.all_gather(list(parts_RB), mine, group=group)
            else:
                parts_RB[0] = mine
            if owner != 0 and rank == 0:
                dist.send(parts_RB, parallel_state.get_pipeline_model_parallel_first_rank(), group=pipeline)
        elif stage == 0 and rank == 0:
            numel = torch.Size(local_shape(rule, spec, size)).numel()
            device = next(iter(local.values())).device
            parts_RB = torch.empty(shards, numel * dtype.itemsize, dtype=torch.uint8, device=device)
            dist.recv(parts_RB, dist.get_global_rank(pipeline, owner), group=pipeline)
        if stage == 0 and rank == 0:
            parts = parts_RB.cpu().view(dtype).view(shards, *local_shape(rule, spec, size))
            yield from _assemble(rule, spec, parts, size, dtypes)


def _assemble(
    rule: Rule, spec: ModelSpec, parts: torch.Tensor, tp_size: int, dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The Hugging Face tensors of one rule from all ranks' parameters, [ranks, ...local shape]."""
    tensors = {name: torch.empty(shape, dtype=dtypes[name]) for name, shape in rule_shapes(rule, spec).items()}
    for rank, part in enumerate(parts):
        for piece in pieces(rule, spec, rank, tp_size):
            tensors[piece.name][piece.source] = part[piece.target]
    yield from tensors.items()
