"""One round of responses: prompts in, sealed shards of rollouts out, resumable at any point.

A shard holds the samples of consecutive prompts (``rollout/shard.py``), so the files do not depend on the order of
arrival or on how often the round was interrupted; what is in memory, and in journals, is what is not sealed yet.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npd.config.settings import RolloutConfig
from megatron_npd.data.prompt_rows import PromptRows
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger, progress
from megatron_npd.manifest import MANIFEST, Manifest, file_sha256, is_sealed, read_manifest, seal, writing
from megatron_npd.quarantine import QUARANTINE_FILE, check_quarantined, in_words
from megatron_npd.records import SOURCES
from megatron_npd.rollout.journal import Recorded, check_settings
from megatron_npd.rollout.order import longest_first
from megatron_npd.rollout.shard import Shard, forget_journal
from megatron_npd.serving.pool import ServerPool
from megatron_npd.serving.protocol import Failure, Request, Response
from megatron_npd.serving.server import tag

_SETTINGS = (
    "greedy_paths",
    "sampled_paths",
    "temperature",
    "top_p",
    "max_tokens",
    "max_model_len",
    "shard_size",
    "merge_identical",
    "seed",
)
_LATER = ("prompts_per_round", "dataset_fraction")  # named where they are not 0: rounds were made before there were any
_LOG_SECONDS = 30.0
_SYNC_SECONDS = 1.0  # between flushes of the journals


def generate_round(
    prompts_dir: str | Path,
    out_dir: str | Path,
    *,
    pool: ServerPool,
    cfg: RolloutConfig,
    round_index: int,
    policy_version: str,
    source: str = "student",
    rounds: Callable[[int], Path] | None = None,
) -> Manifest:
    """Let the pool answer every prompt ``greedy_paths + sampled_paths`` times and seal the responses.

    With ``dataset_fraction`` a share of the responses, which their seeds choose, is that of the prompts (source
    ``dataset``); the pool gives their log-probabilities.

    Responses are kept in their shard's journal as they arrive; a second call asks only for the missing ones.
    Quarantined, by reason, in a shard's ``quarantine.jsonl``: ``prompt_too_long`` (over max_model_len - 1),
    ``empty_prompt``, ``no_response`` and ``response_too_long`` (of the data set's, with ``dataset_fraction``),
    ``empty_response`` (nothing before the stop token), ``mixed_versions``, ``timeout``,
    ``undefined_logprob``, ``token_outside_vocabulary``, ``request_failed`` and ``server_lost``; a later call asks for
    the last six again where their shard is not sealed yet. ``duplicate`` are responses that another one stands for
    (``merge_identical``).

    Args:
        prompts_dir: Sealed directory of kind ``prompts``.
        out_dir: Directory to seal, of kind ``rollouts``: shards of kind ``rollouts-shard`` with ``ROLLOUT_SCHEMA``.
        pool: The servers; each must serve ``policy_version``.
        cfg: Paths, sampling, lengths and seed.
        round_index: Round of the run; part of ids and seeds.
        policy_version: The version that every response must carry, with the hash of the weights that were served when
            the round began.
        source: Of ``records.SOURCES``: whose responses they are, where the servers do not serve the student.
        rounds: Where the rollouts of a round of the run lie, by its number: the prompts with the longest responses in
            the round before with the same prompts are asked first. None, or no such round: as they stand in the file.

    Returns:
        The round's manifest; counts: ``in`` = ``kept`` + sum of ``quarantined`` + ``pending`` (0), ``tokens``,
        ``stopped`` (finish reason ``stop``), ``shards``.

    Raises:
        UserError: A server died or serves another policy, ``out_dir`` was begun with other settings, or more than
            ``cfg.max_quarantined`` of the responses were quarantined. Whatever had arrived is kept on disk.
    """
    prompts_dir, out_dir = Path(prompts_dir), Path(out_dir)
    settings = _settings(prompts_dir, cfg, round_index, policy_version, source)
    if is_sealed(out_dir):
        return _read_sealed(out_dir, settings)
    settings["weights"] = pool.check(version=policy_version).rpartition("-")[2]
    with writing(out_dir, resume=True):
        prompts = PromptRows(prompts_dir, cfg.prompts_per_round, round_index)
        before = round_index - prompts.turns
        _Round(prompts, out_dir, pool, cfg, settings).run(rounds(before) if rounds and before >= 0 else None)
        return _seal_round(out_dir, settings)


def finished_round(
    prompts_dir: str | Path,
    out_dir: str | Path,
    *,
    cfg: RolloutConfig,
    round_index: int,
    policy_version: str,
    source: str = "student",
) -> Manifest | None:
    """The manifest of a round that is sealed already, or None; arguments and errors as for ``generate_round``."""
    if not is_sealed(out_dir):
        return None
    return _read_sealed(Path(out_dir), _settings(Path(prompts_dir), cfg, round_index, policy_version, source))


class _Round:
    """The state of a round in progress: the shards that are not sealed yet."""

    def __init__(
        self, prompts: PromptRows, out_dir: Path, pool: ServerPool, cfg: RolloutConfig, settings: dict[str, Any]
    ) -> None:
        self.out_dir, self.pool, self.cfg, self.settings = out_dir, pool, cfg, settings
        self.paths = cfg.greedy_paths + cfg.sampled_paths
        self.total = len(prompts) * self.paths
        self.size = max(cfg.shard_size // self.paths, 1) * self.paths  # identical responses share a shard
        self.shards: dict[int, Shard] = {}
        self.set_aside: Counter[str] = Counter()
        self.tokens = 0
        self.synced = time.monotonic()
        if self.size * cfg.max_model_len > np.iinfo(np.int32).max:  # what a column of a shard can hold
            raise UserError(
                f"shard_size x max_model_len must be below 2**31 tokens, got {self.size} x {cfg.max_model_len}; lower "
                "shard_size"
            )
        lengths = prompts.lengths()
        for number, first in enumerate(range(0, self.total, self.size)):
            path, samples = out_dir / f"shard-{number:05d}", range(first, min(first + self.size, self.total))
            if is_sealed(path):
                manifest = read_manifest(path, kind="rollouts-shard")
                check_settings(path, manifest.provenance, settings)
                self.set_aside.update(manifest.counts["quarantined"])
                forget_journal(path)
                continue
            own = lengths[samples.start // self.paths : samples.stop // self.paths]
            self.shards[number] = shard = Shard(path, samples, prompts, own, cfg, settings)
            self.set_aside.update(shard.reasons())
        self.missing = sum(shard.missing for shard in self.shards.values())

    def run(self, earlier: Path | None) -> None:
        self._check_share()
        for shard in list(self.shards):
            self._seal_if_complete(shard)
        if not self.missing:
            return
        get_logger().info("round %d: %d of %d responses to generate", self.settings["round"], self.missing, self.total)
        self.started = self.logged = time.monotonic()
        requests = longest_first(list(self.shards.values()), earlier)
        try:
            with progress(self.total, "rollout", "response", initial=self.total - self.missing) as self.bar:
                self.pool.run(requests, self._on_result)
        finally:
            for shard in self.shards.values():
                shard.close()

    def _on_result(self, request: Request, result: Response | Failure) -> None:
        response = self._checked(result) if isinstance(result, Response) else result
        number = request.key // self.size
        shard = self.shards[number]
        shard.record(request.key, response)
        if time.monotonic() - self.synced > _SYNC_SECONDS:
            for other in self.shards.values():
                other.sync()
            self.synced = time.monotonic()
        if isinstance(kept := shard.responses[request.key], Failure):
            self.set_aside[kept.reason] += 1
        self.tokens += len(response.token_ids) if isinstance(response, Recorded) else 0
        self.missing -= 1
        self._check_share()
        self._seal_if_complete(number)
        self._report()

    def _check_share(self) -> None:
        """Stop before more is generated, and before a shard makes failures final, once the round cannot be used."""
        if self.set_aside.total() < self.total:  # a round that keeps nothing has its own words, with the details
            check_quarantined(self.set_aside, self.total, self.cfg.max_quarantined, f"responses of {self.out_dir}")

    def _checked(self, response: Response) -> Recorded | Failure:
        expected = tag(self.settings["policy_version"], self.settings["weights"])
        if len(set(response.versions)) > 1:
            return Failure(reason="mixed_versions", detail=f"generated by {', '.join(response.versions)}")
        if response.versions != (expected,):
            raise UserError(
                f"responses must come from policy {expected}, got one from {', '.join(response.versions)}; "
                "load that policy again with npd refresh and rerun"
            )
        return Recorded(
            token_ids=np.array(response.token_ids, np.int32),
            logprobs=np.array(response.logprobs, np.float32),
            finish_reason=response.finish_reason,
        )

    def _report(self) -> None:
        now = time.monotonic()
        rate = self.tokens / max(now - self.started, 1e-9)
        self.bar.set_postfix_str(f"{rate:.0f} tok/s", refresh=False)
        self.bar.update()
        if now - self.logged > _LOG_SECONDS and not sys.stderr.isatty():
            self.logged = now
            get_logger().info("%d of %d responses, %.0f tok/s", self.total - self.missing, self.total, rate)

    def _seal_if_complete(self, number: int) -> None:
        """Seal a shard once nothing of it is missing, and forget its responses."""
        if not self.shards[number].missing:
            self.shards.pop(number).seal()


def _settings(
    prompts_dir: Path, cfg: RolloutConfig, round_index: int, policy_version: str, source: str = "student"
) -> dict[str, Any]:
    """Everything that the round's files depend on."""
    assert source in SOURCES, source
    prompts = read_manifest(prompts_dir, kind="prompts")
    return (
        {name: getattr(cfg, name) for name in _SETTINGS}
        | {name: getattr(cfg, name) for name in _LATER if getattr(cfg, name)}
        | {
            "stop_ids": prompts.provenance["stop_ids"],
            "round": round_index,
            "source": source,
            "policy_version": policy_version,
            "prompts": file_sha256(prompts_dir / MANIFEST),
        }
    )


def _seal_round(out_dir: Path, settings: dict[str, Any]) -> Manifest:
    """Sum the shards' books and seal the round."""
    shards = sorted(out_dir.glob("shard-*"))
    books = [read_manifest(shard, kind="rollouts-shard").counts for shard in shards]
    quarantined: Counter[str] = Counter()
    for book in books:
        quarantined.update(book["quarantined"])
    counts: dict[str, Any] = {name: sum(book[name] for book in books) for name in books[0] if name != "quarantined"}
    counts |= {"quarantined": dict(sorted(quarantined.items())), "shards": len(shards)}
    if not counts["kept"]:
        raise UserError(
            f"a round must keep at least one response, got none of {counts['in']} ({in_words(quarantined)}); see "
            f"{shards[0] / QUARANTINE_FILE}, mend the cause, remove {out_dir} and rerun"
        )
    get_logger().info(
        "round %d: kept %d of %d responses, %d tokens; %s",
        *(settings["round"], counts["kept"], counts["in"], counts["tokens"], in_words(quarantined)),
    )
    return seal(out_dir, kind="rollouts", provenance=settings, counts=counts)


def _read_sealed(directory: Path, settings: dict[str, Any]) -> Manifest:
    manifest = read_manifest(directory, kind="rollouts")
    made, asked = ({**dict.fromkeys(_LATER, 0), **given} for given in (manifest.provenance, settings))
    if differing := [name for name, value in asked.items() if made.get(name) != value]:
        name = differing[0]
        raise UserError(
            f"{name} must be what {directory} was made with ({made.get(name)}), got {asked[name]}; "
            "change it back, or remove the directory to make it anew"
        )
    return manifest
