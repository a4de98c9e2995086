"""The ids of records seen so far, with content and line of the first of each: some 40 bytes a record."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_FEWEST = 2**14  # records in the dictionary, which takes ten times the memory of the table, before it joins the table


class Seen:
    """A table of 64-bit hashes sorted by that of the id, and a dictionary of the latest records.

    Two ids of one hash, which would be taken for one, are among 20 million records with a chance of 1e-5.
    """

    def __init__(self) -> None:
        self._ids: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)
        self._contents = self._ids
        self._lines = self._ids
        self._latest: dict[int, tuple[int, int]] = {}  # id -> content, line

    def add(self, record_id: str, content_hash: str, line: int) -> tuple[bool, int] | None:
        """Remember a record of a new id.

        Args:
            record_id: As users know it.
            content_hash: 16 hex digits.
            line: Of the record, from 1.

        Returns:
            None for a new id; else whether its first record has this content, and that one's line.
        """
        key, content = _hash(record_id), int(content_hash, 16)
        if found := self._latest.get(key) or self._find(key):
            return found[0] == content, found[1]
        self._latest[key] = content, line
        if len(self._latest) >= max(_FEWEST, len(self._ids) // 16):
            self._merge()
        return None

    def _find(self, key: int) -> tuple[int, int] | None:
        place = int(self._ids.searchsorted(np.uint64(key)))
        if place == len(self._ids) or int(self._ids[place]) != key:
            return None
        return int(self._contents[place]), int(self._lines[place])

    def _merge(self) -> None:
        latest = self._latest
        self._latest = {}
        ids = np.concatenate([self._ids, np.fromiter(latest, np.uint64, len(latest))])
        order = np.argsort(ids, kind="stable")
        self._ids = ids[order]
        for name, column in (("_contents", 0), ("_lines", 1)):
            new = np.fromiter((value[column] for value in latest.values()), np.uint64, len(latest))
            setattr(self, name, np.concatenate([getattr(self, name), new])[order])


def _hash(record_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(record_id.encode(), digest_size=8).digest(), "little")
