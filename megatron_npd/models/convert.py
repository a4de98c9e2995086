"""Weights from a Hugging Face directory to a megatron dist checkpoint and back, in one process, some rows at a time.

Neither a model is built nor a process group joined: what memory holds is the rows that are on their way, whatever
the size of model and tensors. It may run in a thread.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_npd.errors import UserError
from megatron_npd.lock import LOCK
from megatron_npd.log import get_logger
from megatron_npd.manifest import config_hash, is_sealed, seal, writing
from megatron_npd.models.checkpoint_files import KIND
from megatron_npd.models.dist_checkpoint import DistCheckpoint, DistWriter, Stored, stored_as
from megatron_npd.models.families.base import ModelSpec, Rule
from megatron_npd.models.families.config import DTYPES, load_spec
from megatron_npd.models.hf_checkpoint import HFCheckpoint, open_checkpoint, write_weights
from megatron_npd.models.known import known_logprobs
from megatron_npd.models.mapping import Run, hf_shapes, local_shape, parameter_rules, row_runs
from megatron_npd.models.streams import Block, blocks, default_workers, in_order
from megatron_npd.paths import find_checkpoint
from megatron_npd.probe import PROBE
from megatron_npd.weights import has_weights, read_object

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
_PIECE_BYTES = 2**26  # of a stored tensor: loading looks at every piece of it
_LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer")


def hf_to_megatron(
    hf_dir: str | Path, out_dir: str | Path, *, dtype: str = "", workers: int = 0, verify: bool = False
) -> Path:
    """Convert a Hugging Face directory into a megatron dist checkpoint.

    The checkpoint is independent of the layout: any tensor- and pipeline-parallel size loads it.

    Args:
        hf_dir: Hugging Face directory with safetensors.
        out_dir: Root under which ``iter_0000000`` is written.
        dtype: Type of the checkpoint's tensors; "": bfloat16 where all weights are, else float32.
        workers: Threads that read and convert; 0: up to four.
        verify: Read it back before it is sealed, and compare.

    Returns:
        The checkpoint's directory.

    Raises:
        UserError: No weights, a damaged file, a tensor that is missing, unexpected, undefined or of another shape or
            type, or the checkpoint is there already.
    """
    spec, workers = load_spec(hf_dir), workers or default_workers()
    source = open_checkpoint(spec)
    stored = stored_type(source, dtype)
    parts = {part.name: part for part in _parts(spec)}
    dtypes = dict.fromkeys(parts, stored)
    work = [block for part in parts.values() for block in blocks(part.name, part.shape, stored, _PIECE_BYTES)]

    def fill(block: Block, tensor: Tensor) -> None:
        _fill(source, parts[block.name], block.first, tensor, spec)

    path = Path(out_dir) / "iter_0000000"
    with writing(path) as directory:
        writer = DistWriter(directory)
        made = in_order(fill, work, dtypes, workers)
        try:
            for block, tensor in made:
                part = parts[block.name]
                writer.add(*_place(part, block.first, spec), tensor)
                if block.last and part.first == 0 and part.rule.mcore.removesuffix(".weight").endswith(_LINEAR):
                    writer.add_object(_extra_state(part.rule, spec), [None])
                if block is work[-1]:
                    writer.close()  # while its numbers are there to be hashed
        finally:
            writer.close()
            made.close()
        hashes = writer.finish({"iteration": 0})
        if verify:
            back = DistCheckpoint(directory, hashes)

            def read_back(block: Block, tensor: Tensor) -> None:
                part = parts[block.name]
                shape = local_shape(part.rule, spec, 1)
                back.read(back.find(part.rule.mcore, shape), part.first + block.first, tensor)

            _compare(fill, read_back, work, dtypes, workers, directory)
        seal(directory, kind=KIND, counts={"iteration": 0}, hashes=hashes)
    get_logger().info("converted %s into %s", hf_dir, path)
    return path


def megatron_to_hf(
    checkpoint_dir: str | Path,
    hf_dir: str | Path,
    out_dir: str | Path,
    *,
    dtype: str = "",
    workers: int = 0,
    verify: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Convert a megatron dist checkpoint of any layout into a directory that transformers and vLLM load.

    Its files appear whole, its manifest last. Configuration, tokenizer and chat template are copied byte for byte. The
    manifest says what the weights give for a few tokens (``models/known.py``): servers of the policy are compared with
    it.

    Args:
        checkpoint_dir: One checkpoint (``iter_0000100``) or the root above, whose newest sealed one is taken. One that
            Megatron-LM wrote (torch_dist) is taken too.
        hf_dir: Hugging Face directory that the model started from: configuration, tokenizer, tensor types (where it
            has no weights, the configuration's type).
        out_dir: Directory to make; sealed, kind ``policy``.
        dtype: Type of all tensors, in place of those of ``hf_dir``; ``config.json`` then says so.
        workers: Threads that read and convert; 0: up to four.
        verify: Read it back before it is sealed, and compare.
        max_shard_bytes: Largest weight file.

    Raises:
        UserError: ``out_dir`` is there already, another process is writing it, the checkpoint is damaged or holds
            another model, or a weight is NaN or infinite.
    """
    out = Path(out_dir)
    if (refusal := _refusal(out)) is not None:  # before the work rather than after it
        raise UserError(refusal)
    spec, workers = load_spec(hf_dir), workers or default_workers()
    path = find_checkpoint(checkpoint_dir)
    dtypes = export_types(spec, dtype)
    source = DistCheckpoint.open(path, workers)
    places, shapes = find_all(source, spec), hf_shapes(spec)

    def fill(block: Block, tensor: Tensor) -> None:
        stored, runs = places[block.name]
        for run in runs:
            low, high = _overlap(run.source, run.rows, block.first, len(tensor))
            if low < high:
                source.read(stored, run.target + low - run.source, tensor[low - block.first : high - block.first])

    with writing(out) as directory:
        content, hashes = write_weights(
            directory,
            shapes,
            dtypes,
            fill,
            max_shard_bytes=max_shard_bytes,
            workers=workers,
        )
        _copy_companions(spec, directory, dtype)
        if verify:
            back = HFCheckpoint(directory)
            work = [block for name in shapes for block in blocks(name, shapes[name], dtypes[name], _PIECE_BYTES)]

            def read_back(block: Block, tensor: Tensor) -> None:
                back.read_into(block.name, block.first, tensor)

            _compare(fill, read_back, work, dtypes, workers, directory)
        about: dict[str, Any] = {"architecture": spec.architecture, "config_hash": config_hash(spec.hf_config)}
        about |= {"weights": content, "checkpoint": path.name}
        if (known := known_logprobs(directory, spec.vocab_size)) is not None:
            about[PROBE] = known
        seal(directory, kind="policy", provenance=about, hashes=hashes)
        (out / LOCK).unlink()
    get_logger().info("converted %s into %s", path, out_dir)


def find_all(source: DistCheckpoint, spec: ModelSpec) -> dict[str, tuple[Stored, list[Run]]]:
    """Where the rows of each Hugging Face tensor lie in a checkpoint.

    Raises:
        UserError: The checkpoint holds another model.
    """
    places: dict[str, tuple[Stored, list[Run]]] = {}
    for rule in parameter_rules(spec).values():
        if places.keys() >= rule.hf.keys():
            continue  # a tied output layer
        stored = source.find(rule.mcore, local_shape(rule, spec, 1))
        for name in rule.hf:
            places[name] = stored, [run for run in row_runs(rule, spec) if run.name == name]
    source.check_all_used(stored for stored, _ in places.values())
    return places


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Rows of a parameter that megatron-core stores as a tensor of their own: of gate and up, each.

    Attributes:
        rule: The parameter's.
        first: The first of its rows.
        shape: The piece's.
        runs: What it is made of.
    """

    rule: Rule
    first: int
    shape: tuple[int, ...]
    runs: list[Run]

    @property
    def name(self) -> str:
        return f"{self.rule.mcore}[{self.first}]"


def _parts(spec: ModelSpec) -> Iterable[_Part]:
    """The pieces that megatron-core makes of a model that is not cut: gate and up are one each."""
    seen: set[str] = set()
    for rule in parameter_rules(spec).values():
        if seen.issuperset(rule.hf):
            continue  # a tied output layer
        seen.update(rule.hf)
        runs, shape = row_runs(rule, spec), local_shape(rule, spec, 1)
        for group in [[run] for run in runs] if rule.kind == "gate_up" else [runs]:
            rows = sum(run.rows for run in group)
            yield _Part(rule=rule, first=group[0].target, shape=(rows, *shape[1:]), runs=group)


def _fill(source: HFCheckpoint, part: _Part, first: int, tensor: Tensor, spec: ModelSpec) -> None:
    """Give rows of a part, from ``first`` on, their numbers."""
    for run in part.runs:
        at = run.target - part.first
        low, high = _overlap(at, run.rows, first, len(tensor))
        if low < high:
            source.read_into(run.name, run.source + low - at, tensor[low - first : high - first])
    if not torch.stack(tensor.aminmax()).isfinite().all():
        raise UserError(
            f"{' and '.join(dict.fromkeys(run.name for run in part.runs))} in {spec.path} must hold finite numbers, "
            f"got NaN or infinity; use weights from before they arose, or a dtype that holds them"
        )


def _overlap(start: int, rows: int, other: int, other_rows: int) -> tuple[int, int]:
    return max(start, other), min(start + rows, other + other_rows)


def _stack(rule: Rule, spec: ModelSpec) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Key of the stored tensor that a parameter is a part of, its place in it, and how many there are each way."""
    key, place = stored_as(rule.mcore)[0]
    return key, place, (spec.num_layers, spec.experts.number if spec.experts else 0)[: len(place)]


def _place(part: _Part, first: int, spec: ModelSpec) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Key and shape of the stored tensor of which rows of a part are a piece, and the piece's place in it."""
    (key, place, sizes), shape = _stack(part.rule, spec), local_shape(part.rule, spec, 1)
    return key, (*sizes, *shape), (*place, part.first + first, *(0 for _ in shape[1:]))


def _extra_state(rule: Rule, spec: ModelSpec) -> str:
    """The state that a linear layer of megatron-core has beside its weights, empty without FP8: loading asks for it."""
    key, place, sizes = _stack(rule, spec)
    name = key.removesuffix("weight") + "_extra_state"
    return f"{name}/shard_{'.'.join(map(str, place))}_{'.'.join(map(str, sizes))}" if place else name


def stored_type(source: HFCheckpoint, dtype: str) -> torch.dtype:
    """Type of a checkpoint's tensors: ``dtype``, or bfloat16 where all of the source's are, else float32."""
    if dtype:
        return DTYPES[dtype]
    return torch.bfloat16 if set(source.dtypes.values()) == {torch.bfloat16} else torch.float32


def export_types(spec: ModelSpec, dtype: str) -> Mapping[str, torch.dtype]:
    """Type of each exported tensor: ``dtype``, or that in ``spec.path``, or the configuration's."""
    if not dtype and has_weights(spec.path):
        return open_checkpoint(spec).dtypes
    return dict.fromkeys(hf_shapes(spec), DTYPES[dtype] if dtype else spec.dtype)


def _copy_companions(spec: ModelSpec, directory: Path, dtype: str) -> None:
    for companion in COMPANIONS:
        if (file := Path(spec.path) / companion).is_file():
            shutil.copyfile(file, directory / companion)
    config = spec.export_config()
    if dtype:
        names = {"dtype", "torch_dtype"} & config.keys() or {"dtype"}
        config |= dict.fromkeys(names, dtype)
    if config != spec.hf_config:
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    file = directory / "tokenizer_config.json"
    if spec.family.export and file.is_file() and (tokenizer := read_object(file)).pop("auto_map", None) is not None:
        file.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False) + "\n")  # tokenizer.json stays
    _open_to_servers(directory)


def _open_to_servers(directory: Path) -> None:
    """Give weights the mode of the other files: a server that reads them may be another user's."""
    for file in directory.glob("*.safetensors"):
        with suppress(OSError):  # file systems without permissions give all files the same
            shutil.copymode(directory / "config.json", file)


def _compare(
    fill: Callable[[Block, Tensor], object],
    read_back: Callable[[Block, Tensor], object],
    work: Sequence[Block],
    dtypes: Mapping[str, torch.dtype],
    workers: int,
    directory: Path,
) -> None:
    """Insist that what was written is what the source gives once more."""

    def compare(block: Block, tensor: Tensor) -> None:
        fill(block, tensor)
        read_back(block, written := torch.empty_like(tensor))
        if not torch.equal(written, tensor):
            raise UserError(
                f"{block.name} in {directory} must be as its source has it, got other numbers; check disk and memory"
            )

    for _ in in_order(compare, work, dtypes, workers):
        pass


def _refusal(path: Path) -> str | None:
    """Why a directory cannot be made there."""
    begun = (path / LOCK).is_file() and not is_sealed(path)  # by an attempt that was killed
    if path.exists() and not begun and (not path.is_dir() or any(path.iterdir())):
        return f"{path} must not exist yet, got a full directory or a file; choose another or remove it"
    return None
