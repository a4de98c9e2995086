"""The journals of a round: finished responses on disk as they arrive, so that a killed round asks only for the rest.

A shard has a journal of its own, which goes when the shard is sealed: the disk, and the memory of a restart, hold the
responses of unsealed shards alone. A line is ``crc32 of the rest, a space, a JSON array``. The first holds the settings
that the responses depend on, each other one a response: sample index, finish reason, base64 of int32 token ids,
base64 of float32 log-probabilities. A line that a kill has cut, or that was damaged, is dropped alone; without the
first one nothing is trusted.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npd.durable import fsync
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A finished response of n tokens: ``token_ids`` int32 [n], ``logprobs`` float32 [n]."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str


class Journal:
    """The journal of one shard, open for appending.

    Args:
        path: The file; created where it is missing.
        settings: What the responses depend on.

    Attributes:
        responses: Sample index -> response, of what the file held when it was opened.

    Raises:
        UserError: The file was written with other settings.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]) -> None:
        self.responses: dict[int, Recorded] = {}
        path = Path(path)
        good_bytes = self._read(path, settings) if path.exists() else 0
        self._stream = open(path, "ab")  # noqa: SIM115
        self._stream.truncate(good_bytes)
        self._synced = True
        if not good_bytes:
            self._write(settings)
            fsync(self._stream.fileno(), path)

    def append(self, index: int, response: Recorded) -> None:
        """Write one response; it survives a kill of this process at once, of the machine after ``sync``."""
        ids, logprobs = (base64.b64encode(x).decode() for x in (response.token_ids.data, response.logprobs.data))
        self._write([index, response.finish_reason, ids, logprobs])
        self._synced = False

    def sync(self) -> None:
        """Flush to the disk what was appended."""
        if not self._synced:
            fsync(self._stream.fileno(), self._stream.name)
            self._synced = True

    def close(self) -> None:
        """Flush to the disk and close."""
        self.sync()
        self._stream.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, value: Any) -> None:
        text = json.dumps(value, separators=(",", ":")).encode()
        self._stream.write(b"%08x %s\n" % (binascii.crc32(text), text))
        self._stream.flush()

    def _read(self, path: Path, settings: dict[str, Any]) -> int:
        """Fill ``responses``; the number of bytes up to the end of the last whole line."""
        whole_bytes, bad = 0, 0
        with open(path, "rb") as stream:
            for number, line in enumerate(stream):
                cut = line[-1:] != b"\n"
                if cut or len(line) < 10 or line[:8] != b"%08x" % binascii.crc32(line[9:-1]):
                    bad += 1
                    if number == 0:
                        break
                elif number == 0:
                    check_settings(path, json.loads(line[9:]), settings)
                else:
                    index, finish_reason, ids, logprobs = json.loads(line[9:])
                    self.responses[index] = Recorded(
                        token_ids=np.frombuffer(base64.b64decode(ids), np.int32),
                        logprobs=np.frombuffer(base64.b64decode(logprobs), np.float32),
                        finish_reason=finish_reason,
                    )
                whole_bytes += 0 if cut else len(line)
        if bad:
            what = f"{bad} of its lines were" if whole_bytes else "its first line was"
            get_logger().warning("%s: %s cut or damaged; what is lost is asked for again", path, what)
        return whole_bytes


def check_settings(path: Path, written: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Insist that a shard or its journal, ``path``, was written with the round's settings.

    Raises:
        UserError: It was not.
    """
    for name in settings.keys() | written.keys():
        if written.get(name) != settings.get(name):
            raise UserError(
                f"{name} must be what {path.parent} was begun with ({written.get(name)}), got {settings.get(name)}; "
                f"change it back, or remove {path.parent} to begin anew"
            )
