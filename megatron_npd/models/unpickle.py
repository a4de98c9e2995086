"""The pickles in a checkpoint, opened with an allow-list: classes of torch and megatron-core that only hold data.

Whoever can write a checkpoint can also write its manifest, so hashes do not make a pickle safe to open.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

from megatron_npd.errors import UserError

# What torch's index of a checkpoint (.metadata) is made of, beside torch's dtypes.
_KNOWN = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    "pathlib": ("PosixPath",),
}
# megatron-core's own classes of the same, until 0.15.
_OLDER = {"MCoreMetadata": Metadata, "MCoreSavePlan": SavePlan}
# What content of another form ends in.
_NO_INDEX = (AssertionError, AttributeError, EOFError, LookupError, MemoryError, OverflowError, RuntimeError)
_NO_INDEX += (TypeError, ValueError)
_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.load takes what megatron-core registered with torch as safe, only
_ANYTHING = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


# The one in Python: of the other one no step can be changed. Its type leaves out what a step needs.
_PythonUnpickler: Any = pickle._Unpickler
_torch_reader: Any = filesystem  # whose pickle is exchanged below


class _Unpickler(_PythonUnpickler):
    dispatch = dict(_PythonUnpickler.dispatch)  # noqa: RUF012

    def load_build(self) -> None:
        """Set the state of an object; that of a class would change it for the whole process."""
        if isinstance(built := self.stack[-2], type | FunctionType):
            raise pickle.UnpicklingError(f"GLOBAL {built.__module__}.{built.__name__} to be changed")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if module == "megatron.core.dist_checkpointing.strategies.torch" and name in _OLDER:
            return _OLDER[name]
        module = "pathlib" if module == "pathlib._local" else module  # Python 3.13's name, unknown to others
        if name in _KNOWN.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


class TensorLayout(NamedTuple):
    """How the numbers of a tensor lie in the file that torch.save made of it.

    Attributes:
        storage: ("storage", their type, the name of their record, device, count).
        first: Where the tensor begins among them.
        size: Its shape.
        stride: Its strides, in numbers.
    """

    storage: tuple[str, torch.dtype, str, str, int]
    first: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


_STORAGES = {"FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16}


class _LayoutUnpickler(_Unpickler):
    """Gives the layout of a tensor in place of the tensor."""

    def persistent_load(self, pid: Any) -> Any:
        return pid

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *parts: TensorLayout(*parts[:4])  # and requires_grad, hooks
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        return _STORAGES[name] if module == "torch" and name in _STORAGES else super().find_class(module, name)


def read_layout(data: bytes) -> TensorLayout:
    """Read the pickle that torch.save writes beside a tensor's numbers.

    Raises:
        pickle.UnpicklingError: It is another one; ``refused`` has the words.
    """
    try:
        layout = _LayoutUnpickler(io.BytesIO(data)).load()
        assert isinstance(layout, TensorLayout), "it holds no tensor"
        return layout
    except _NO_INDEX as error:
        raise pickle.UnpicklingError(f"no tensor: {error}") from error


def read_index(path: Path, files: Collection[str]) -> Metadata:
    """Read a checkpoint's index.

    Args:
        path: The file.
        files: Names of the checkpoint's files; the index may lead to no other.

    Raises:
        pickle.UnpicklingError: It is something else; ``refused`` has the words.
        OSError: It cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            index = _Unpickler(stream).load()
        assert _is_whole(index), "its parts are not those of one"
        places = {str(place.relative_path) for place in index.storage_data.values()}
    except _NO_INDEX as error:
        raise pickle.UnpicklingError(f"no index: {error}") from error
    if elsewhere := places.difference(files):
        raise pickle.UnpicklingError(f"GLOBAL {min(elsewhere)}")
    return index


def _is_whole(index: Any) -> bool:
    """Whether an index has the parts that torch reads, and each tensor's pieces make up the whole of it.

    torch itself would log tracebacks, or leave what no piece covers as it is in memory.
    """
    tensors = [entry for entry in index.state_dict_metadata.values() if not isinstance(entry, BytesStorageMetadata)]
    return (
        isinstance(index, Metadata)
        and isinstance(index.storage_meta, StorageMeta | None)
        and all(isinstance(key, MetadataIndex) for key in index.storage_data)
        and all(min(place.offset, place.length) >= 0 for place in index.storage_data.values())
        and all(_covers(entry) for entry in tensors)
    )


def _covers(entry: TensorStorageMetadata) -> bool:
    """Whether the pieces of a tensor lie in it and have as many numbers together."""
    inside = all(
        first >= 0 and length >= 0 and first + length <= whole
        for piece in entry.chunks
        for first, length, whole in zip(piece.offsets, piece.sizes, entry.size, strict=True)
    )
    return inside and sum(prod(piece.sizes) for piece in entry.chunks) == prod(entry.size)


@contextmanager
def known_classes_only(path: Path, files: Collection[str]) -> Iterator[None]:
    """Within it torch and megatron-core read a checkpoint's pickles without running what somebody planted there.

    Args:
        path: The checkpoint.
        files: Names of its files; its index may lead to no other.

    Raises:
        pickle.UnpicklingError: At its begin or inside, at a pickle of anything else; ``refused`` has the words.
    """
    index = read_index(path / ".metadata", files)
    before = {name: os.environ.pop(name, None) for name in (_ONLY, _ANYTHING)}
    os.environ[_ONLY] = "1"
    # torch would open the index itself, with pickle.load and nothing to set.
    _torch_reader.pickle, module = SimpleNamespace(load=lambda _: index), _torch_reader.pickle
    try:
        yield
    finally:
        _torch_reader.pickle = module
        del os.environ[_ONLY]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def refused(path: Path, error: BaseException) -> UserError | None:
    """The error for a checkpoint with a pickle that was not let in, if that is what ``error`` says."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    found = re.search(r"GLOBAL (\S+)", str(error))
    return UserError(
        f"{path} must hold tensors and what torch and megatron-core write beside them, got a pickle with "
        f"{found[1] if found else str(error).splitlines()[0]}; do not use it: somebody changed it, to run code where "
        "it is loaded"
    )
