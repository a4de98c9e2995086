"""The shards of a round of rollouts, whole or still being generated, in waves to annotate."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_npd.config.settings import AnnotateConfig
from megatron_npd.errors import UserError
from megatron_npd.manifest import MANIFEST, Manifest, file_sha256, is_sealed, read_manifest, sealed_from
from megatron_npd.quarantine import check_quarantined
from megatron_npd.store.annotation_store import SHARD_KIND, STORE_KIND

_POLL_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Wave:
    """Shards to annotate now; none of them only says that the wait goes on.

    Attributes:
        shards: What the annotation of each shard is sealed with, by the shard's name.
        round_size: Samples of the round, once it is sealed.
    """

    shards: dict[str, dict[str, Any]]
    round_size: int | None


class ShardFollower:
    """Which rollout shards are sealed, and which of these are annotated; one process looks for all.

    Args:
        rollouts_dir: The round: sealed, or with ``cfg.follow_seconds`` on its way to it.
        out_dir: The store in the making.
        cfg: Settings of the stage.
        models: What the scores depend on beside the rollouts; part of the provenance.
    """

    def __init__(self, rollouts_dir: Path, out_dir: Path, cfg: AnnotateConfig, models: Mapping[str, Any]) -> None:
        self.path, self.out_dir, self.cfg, self.models = rollouts_dir, out_dir, cfg, models
        self._rollouts: Manifest | None = None  # once it is sealed
        self._shards: dict[str, dict[str, Any]] = {}  # all that were seen
        self._done: set[str] = set()
        self._seen: object = None
        self._since = time.monotonic()

    def provenance(self, rollouts: Path) -> dict[str, Any]:
        """What the annotation of a round, or of one of its shards, is made from."""
        about = read_manifest(rollouts, verify=False).provenance
        digest = file_sha256(rollouts / MANIFEST)
        return {"rollouts_sha256": digest, **self.models, **{name: about[name] for name in ("round", "policy_version")}}

    def finished(self) -> Manifest | None:
        """The manifest of a store that is sealed from this round already."""
        if self.cfg.follow_seconds and not is_sealed(self.path):
            return None
        self._rollouts = read_manifest(self.path, kind="rollouts")
        return sealed_from(self.out_dir, kind=STORE_KIND, provenance=self.provenance(self.path))

    def next(self) -> Wave | None:
        """The shards that were sealed since the last wave, after a short wait where there are none; None: all is done.

        Raises:
            UserError: The round is not sealed and got no response for ``cfg.follow_seconds``, or more of it was set
                aside than may be.
        """
        if self._rollouts is None and is_sealed(self.path):  # asked first: its last shard is sealed before it
            self._rollouts = read_manifest(self.path, kind="rollouts")
        for name in self._sealed():
            if name not in self._shards:
                self._shards[name] = self.provenance(self.path / name)
            if sealed_from(self.out_dir / name, kind=SHARD_KIND, provenance=self._shards[name]) is not None:
                self._done.add(name)
        pending = {name: self._shards[name] for name in sorted(self._shards.keys() - self._done)}
        size = None if self._rollouts is None else self._rollouts.counts["kept"]
        if size is not None:
            check_quarantined(self.reasons(), size, self.cfg.max_quarantined, self.path)
            if not pending:
                return None
        if not pending:
            self._wait()
        return Wave(shards=pending, round_size=size)

    def _sealed(self) -> list[str]:
        """Sealed shards that are not known to be annotated."""
        if self._rollouts is None:
            names = {path.name for path in self.path.glob("shard-*") if is_sealed(path)}
        else:
            files = (PurePosixPath(name) for name in self._rollouts.files)
            names = {str(name.parent) for name in files if name.name == MANIFEST}
        return sorted(names - self._done)

    def _wait(self) -> None:
        """Let a moment pass, while responses arrive: shards are sealed, or a journal of the rollout stage grows."""
        seen: list[object] = [*sorted(self._shards)]
        for file in sorted(self.path.glob("*.journal")):
            with suppress(FileNotFoundError):  # it goes when its shard is sealed
                seen.append((file.name, file.stat().st_size))
        now = time.monotonic()
        if seen != self._seen:
            self._seen, self._since = seen, now
        if now - self._since > self.cfg.follow_seconds:
            raise UserError(
                f"{self.path} must be sealed or get responses, got none in {self.cfg.follow_seconds:g} s "
                "(follow_seconds); see whether npd rollout runs, then run both again"
            )
        time.sleep(_POLL_SECONDS)

    def books(self) -> list[Mapping[str, Any]]:
        """The counts of the annotated shards, in their order."""
        return [read_manifest(self.out_dir / name, verify=False).counts for name in sorted(self._done)]

    def reasons(self) -> Counter[str]:
        """What was quarantined in them."""
        reasons: Counter[str] = Counter()
        for book in self.books():
            reasons.update(book["quarantined"])
        return reasons
