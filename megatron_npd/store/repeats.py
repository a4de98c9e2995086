"""Samples that stand twice in a store in the making, found by hashes of their ids and contents: 16 bytes per sample."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from megatron_npd.errors import UserError
from megatron_npd.records import SAMPLES_FILE
from megatron_npd.store.streams import stream_items


def sample_hashes(shard: Path, top_k: int) -> npt.NDArray[np.uint64]:
    """Hash of the id and hash of the content of each sample of a sealed shard, read back from it [n, 2]."""
    table = pq.read_table(shard / SAMPLES_FILE, columns=["sample_id", "prompt_len", "response_len"])
    names = table["sample_id"].to_pylist()
    prompt_lens, response_lens = (table[name].to_numpy().astype(np.int64) for name in table.column_names[1:])
    hashes = []
    with ExitStack() as files:
        tokens = files.enter_context(open(shard / "tokens.bin", "rb"))
        streams = [
            (files.enter_context(open(shard / f"{name}.bin", "rb")), item.itemsize)
            for name, item in stream_items(top_k).items()
        ]
        for name, prompt_len, n in zip(names, prompt_lens.tolist(), response_lens.tolist(), strict=True):
            content = hashlib.blake2b(f"{prompt_len} ".encode(), digest_size=8)
            content.update(tokens.read(4 * (prompt_len + n)))
            for stream, size in streams:
                content.update(stream.read(n * size))
            hashes += [hashlib.blake2b(name.encode(), digest_size=8).digest(), content.digest()]
    return np.frombuffer(b"".join(hashes), "<u8").reshape(-1, 2)


def find_repeated(
    hashes: Sequence[npt.NDArray[np.uint64]], shards: Sequence[Path], explain: Callable[[str, list[int]], UserError]
) -> dict[int, list[int]]:
    """Of each shard, by its number, the places of samples that were there before, in it or in an earlier one.

    Args:
        hashes: ``sample_hashes`` of each shard.
        shards: Where they are.
        explain: The error for a sample id with two contents, from the id and the numbers of the shards it is in.

    Raises:
        UserError: One id stands for two contents.
    """
    bounds = [0, *accumulate(map(len, hashes))]
    ids_N, contents_N = np.concatenate([np.zeros((0, 2), np.uint64), *hashes]).T
    order_N = np.argsort(ids_N, kind="stable")
    again = 1 + np.flatnonzero(np.diff(ids_N[order_N]) == 0)
    places, places_before = order_N[again], order_N[again - 1]

    def located(place: int) -> tuple[int, int]:
        shard = bisect_right(bounds, place) - 1
        return shard, place - bounds[shard]

    if (other := np.flatnonzero(contents_N[places] != contents_N[places_before])).size:
        first = int(other[np.argmin(places[other])])
        (shard, _), (number, place) = located(int(places_before[first])), located(int(places[first]))
        name = pq.read_table(shards[number] / SAMPLES_FILE, columns=["sample_id"])["sample_id"][place]
        raise explain(name.as_py(), sorted({shard, number}))
    repeated: dict[int, list[int]] = {}
    for shard, place in map(located, places.tolist()):
        repeated.setdefault(shard, []).append(place)
    return repeated
