"""One round of answers: prompts in, sealed shards of rollouts out, resumable at any point.

Samples are numbered ``prompt * paths + path`` and a shard holds those of consecutive prompts, so the files do not
depend on the order of arrival or on how often the round was interrupted.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_npd.config import RolloutConfig
from megatron_npd.log import UserError, get_logger, progress
from megatron_npd.manifest import (
    MANIFEST,
    Manifest,
    check_quarantined,
    file_sha256,
    is_sealed,
    read_manifest,
    seal,
    writing,
)
from megatron_npd.records import (
    LOGPROB_ROUNDING,
    PROMPTS_FILE,
    QUARANTINE_FILE,
    ROLLOUT_SCHEMA,
    ROLLOUTS_FILE,
    sample_id,
    sample_seed,
)
from megatron_npd.rollout.journal import Journal, Recorded
from megatron_npd.rollout.pool import Answer, Failure, Request, ServerPool

JOURNAL_FILE = "answers.journal"
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
_LOG_SECONDS = 30.0


def generate_round(
    prompts_dir: str | Path,
    out_dir: str | Path,
    *,
    pool: ServerPool,
    cfg: RolloutConfig,
    round_index: int,
    policy_version: str,
) -> Manifest:
    """Let the pool answer every prompt ``greedy_paths + sampled_paths`` times and seal the answers.

    Answers are kept in a journal as they arrive; a second call asks only for the missing ones. Set aside, by reason,
    in a shard's ``quarantine.jsonl``: ``prompt_too_long`` (over max_model_len - 1), ``empty_prompt``,
    ``empty_response`` (nothing before the stop token), ``mixed_versions``, ``timeout``, ``undefined_logprob``,
    ``token_outside_vocabulary`` and ``request_failed``; a later call asks for the last five again where their shard
    is not sealed yet. ``duplicate`` are answers that another one stands for (``merge_identical``).

    Args:
        prompts_dir: Sealed directory of kind ``prompts``.
        out_dir: Directory to seal, of kind ``rollouts``: shards of kind ``rollouts-shard`` with ``ROLLOUT_SCHEMA``.
        pool: The servers; each must serve ``policy_version``.
        cfg: Paths, sampling, lengths and seed.
        round_index: Round of the run; part of ids and seeds.
        policy_version: The version that every answer must carry.

    Returns:
        The round's manifest; counts: ``in`` = ``kept`` + sum of ``quarantined`` + ``pending`` (0), ``tokens``,
        ``stopped`` (finish reason ``stop``), ``shards``.

    Raises:
        UserError: A server died or serves another policy, ``out_dir`` was begun with other settings, or more than
            ``cfg.max_quarantined`` of the answers were set aside. Whatever had arrived is kept on disk.
    """
    prompts_dir, out_dir = Path(prompts_dir), Path(out_dir)
    settings = _settings(prompts_dir, cfg, round_index, policy_version)
    if is_sealed(out_dir):
        return _read_sealed(out_dir, "rollouts", settings)
    prompts = pq.read_table(prompts_dir / PROMPTS_FILE)
    with writing(out_dir, resume=True):
        with Journal(out_dir / JOURNAL_FILE, settings) as journal:
            _Round(prompts, out_dir, pool, cfg, settings, journal).run()
        (out_dir / JOURNAL_FILE).unlink()  # before the seal: nobody would come back to a sealed round for it
        return _seal_round(out_dir, settings)


def finished_round(
    prompts_dir: str | Path, out_dir: str | Path, *, cfg: RolloutConfig, round_index: int, policy_version: str
) -> Manifest | None:
    """The manifest of a round that is sealed already, or None; arguments and errors as for ``generate_round``."""
    if not is_sealed(out_dir):
        return None
    return _read_sealed(Path(out_dir), "rollouts", _settings(Path(prompts_dir), cfg, round_index, policy_version))


class _Round:
    """The state of a round in progress: what has been answered of the shards that are not sealed yet."""

    def __init__(
        self,
        prompts: pa.Table,
        out_dir: Path,
        pool: ServerPool,
        cfg: RolloutConfig,
        settings: dict[str, Any],
        journal: Journal,
    ) -> None:
        self.prompts, self.out_dir, self.pool, self.cfg = prompts, out_dir, pool, cfg
        self.settings, self.journal = settings, journal
        self.paths = cfg.greedy_paths + cfg.sampled_paths
        self.total = prompts.num_rows * self.paths
        self.size = max(cfg.shard_size // self.paths, 1) * self.paths  # identical answers share a shard
        self.shards = [range(first, min(first + self.size, self.total)) for first in range(0, self.total, self.size)]
        self.prompt_ids = prompts["prompt_id"].to_pylist()
        self.lengths = prompts["prompt_ids"].combine_chunks().value_lengths().to_pylist()
        self.answers: dict[int, Recorded | Failure] = {}
        self.missing: dict[int, int] = {}  # shard -> samples without an answer
        self.set_aside: Counter[str] = Counter()
        self.tokens = 0

    def run(self) -> None:
        for shard, samples in enumerate(self.shards):
            if is_sealed(self._shard_dir(shard)):
                manifest = _read_sealed(self._shard_dir(shard), "rollouts-shard", self.settings)
                self.set_aside.update(manifest.counts["quarantined"])
                continue
            for i in samples:
                known = self._unanswerable(i) or self.journal.answers.get(i)
                if known is not None:
                    self._take(i, known)
            self.missing[shard] = sum(i not in self.answers for i in samples)
        self._check_share()
        self.journal.answers.clear()
        pending = [i for shard in self.missing for i in self.shards[shard] if i not in self.answers]
        for shard in self.missing:
            self._seal_if_complete(shard)
        if not pending:
            return
        self.pool.check(version=self.settings["policy_version"])
        done = self.total - len(pending)
        get_logger().info("round %d: %d of %d answers to generate", self.settings["round"], len(pending), self.total)
        self.started = self.logged = time.monotonic()
        with progress(self.total, "rollout", "answer", initial=done) as self.bar:
            self.pool.run(map(self._request, pending), self._on_result)

    def _shard_dir(self, shard: int) -> Path:
        return self.out_dir / f"shard-{shard:05d}"

    def _unanswerable(self, index: int) -> Failure | None:
        length = self.lengths[index // self.paths]
        if length == 0:
            return Failure(reason="empty_prompt", detail="a prompt must have at least one token")
        if length > self.cfg.max_model_len - 1:
            return Failure(reason="prompt_too_long", detail=f"{length} tokens, max_model_len {self.cfg.max_model_len}")
        return None

    def _sampling(self, index: int) -> tuple[int, float, float]:
        """Seed, temperature and top_p of a sample; the first ``greedy_paths`` paths of a prompt are greedy."""
        prompt, path = divmod(index, self.paths)
        seed = sample_seed(self.cfg.seed, self.settings["round"], self.prompt_ids[prompt], path)
        if path < self.cfg.greedy_paths:
            return seed, 0.0, 1.0
        return seed, self.cfg.temperature, self.cfg.top_p

    def _request(self, index: int) -> Request:
        prompt = index // self.paths
        seed, temperature, top_p = self._sampling(index)
        return Request(
            key=index,
            token_ids=self.prompts["prompt_ids"][prompt].as_py(),
            max_tokens=min(self.cfg.max_tokens, self.cfg.max_model_len - self.lengths[prompt]),
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )

    def _on_result(self, request: Request, result: Answer | Failure) -> None:
        answer = self._checked(result) if isinstance(result, Answer) else result
        if isinstance(answer, Recorded):
            self.journal.append(request.key, answer)
            self.tokens += len(answer.token_ids)
        self._take(request.key, answer)
        self._check_share()
        shard = request.key // self.size
        self.missing[shard] -= 1
        self._seal_if_complete(shard)
        self._report()

    def _take(self, index: int, answer: Recorded | Failure) -> None:
        """Keep an answer until its shard is whole; one that says nothing has failed."""
        if isinstance(answer, Recorded) and len(answer.token_ids) <= (answer.finish_reason == "stop"):
            answer = Failure(reason="empty_response", detail=f"finish reason {answer.finish_reason}")
        if isinstance(answer, Failure):
            self.set_aside[answer.reason] += 1
        self.answers[index] = answer

    def _check_share(self) -> None:
        """Stop before more is generated, and before a shard makes failures final, once the round cannot be used."""
        if self.set_aside.total() < self.total:  # a round that keeps nothing has its own words, with the details
            check_quarantined(self.set_aside, self.total, self.cfg.max_quarantined, f"answers of {self.out_dir}")

    def _checked(self, answer: Answer) -> Recorded | Failure:
        expected = self.settings["policy_version"]
        if len(set(answer.versions)) > 1:
            return Failure(reason="mixed_versions", detail=f"generated by {', '.join(answer.versions)}")
        if answer.token_ids and answer.versions != (expected,):
            raise UserError(
                f"answers must come from policy {expected}, got one from {', '.join(answer.versions) or 'no version'}; "
                "load that policy again with tools/refresh.py and rerun"
            )
        ids, logprobs = np.array(answer.token_ids, np.int64), np.array(answer.logprobs, np.float32)
        if ids.size and not 0 <= ids.min() <= ids.max() <= np.iinfo(np.int32).max:
            return Failure(reason="token_outside_vocabulary", detail=f"ids {ids.min()} to {ids.max()}")
        if not (np.isfinite(logprobs) & (logprobs <= LOGPROB_ROUNDING)).all():
            return Failure(reason="undefined_logprob", detail=f"log-probabilities {logprobs[:8]}")
        return Recorded(
            token_ids=ids.astype(np.int32),
            logprobs=logprobs,
            finish_reason=answer.finish_reason,
        )

    def _report(self) -> None:
        now = time.monotonic()
        rate = self.tokens / max(now - self.started, 1e-9)
        self.bar.set_postfix_str(f"{rate:.0f} tok/s", refresh=False)
        self.bar.update()
        if now - self.logged > _LOG_SECONDS and not sys.stderr.isatty():
            self.logged = now
            left = sum(self.missing.values())
            get_logger().info("%d of %d answers, %.0f tok/s", self.total - left, self.total, rate)

    def _seal_if_complete(self, shard: int) -> None:
        """Write and seal a shard once nothing of it is missing, and forget its answers."""
        if self.missing[shard]:
            return
        kept: dict[int, Recorded] = {}
        quarantine: list[dict[str, Any]] = []
        for index in self.shards[shard]:
            answer = self.answers.pop(index)
            if isinstance(answer, Recorded):
                kept[index] = answer
            else:
                quarantine.append(self._identity(index) | {"reason": answer.reason, "detail": answer.detail})
        copies = self._merge(kept, quarantine) if self.cfg.merge_identical else {}
        with writing(self._shard_dir(shard)) as directory:
            pq.write_table(self._table(kept, copies), directory / ROLLOUTS_FILE, compression="zstd")
            if quarantine:
                lines = "".join(json.dumps(line, sort_keys=True) + "\n" for line in quarantine)
                (directory / QUARANTINE_FILE).write_text(lines)
            counts = {
                "in": len(kept) + len(quarantine),
                "kept": len(kept),
                "quarantined": dict(Counter(line["reason"] for line in quarantine)),
                "pending": 0,
                "tokens": sum(len(answer.token_ids) for answer in kept.values()),
                "stopped": sum(answer.finish_reason == "stop" for answer in kept.values()),
            }
            seal(directory, kind="rollouts-shard", provenance=self.settings, counts=counts)

    def _merge(self, kept: dict[int, Recorded], quarantine: list[dict[str, Any]]) -> dict[int, int]:
        """Leave one of the identical answers to a prompt in ``kept``; how many each then stands for.

        A sampled one stands for the greedy one: the policy lag is defined for it.
        """
        alike: dict[tuple[int, str, bytes], list[int]] = {}
        for index, answer in kept.items():
            alike.setdefault((index // self.paths, answer.finish_reason, answer.token_ids.tobytes()), []).append(index)
        copies = {}
        for indices in alike.values():
            stays = next((index for index in indices if self._sampling(index)[1] > 0), indices[0])
            copies[stays] = len(indices)
            for index in indices:
                if index != stays:
                    del kept[index]
                    detail = f"the same answer as {self._identity(stays)['sample_id']}"
                    quarantine.append(self._identity(index) | {"reason": "duplicate", "detail": detail})
        return copies

    def _identity(self, index: int) -> dict[str, Any]:
        prompt, path = divmod(index, self.paths)
        prompt_id = self.prompt_ids[prompt]
        return {
            "sample_id": sample_id(prompt_id, self.settings["round"], path),
            "prompt_id": prompt_id,
            "path": path,
        }

    def _table(self, kept: dict[int, Recorded], copies: dict[int, int]) -> pa.Table:
        identities = [self._identity(index) for index in kept]
        sampling = [self._sampling(index) for index in kept]
        rows = self.prompts.take(pa.array([index // self.paths for index in kept], pa.int64()))
        columns = {name: [identity[name] for identity in identities] for name in ("sample_id", "prompt_id", "path")}
        columns |= {name: rows[name] for name in ("prompt_ids", "header_len", "teacher_prompt_ids")}
        columns |= {
            "response_ids": [answer.token_ids for answer in kept.values()],
            "logprobs": [answer.logprobs for answer in kept.values()],
            "finish_reason": [answer.finish_reason for answer in kept.values()],
            "copies": [copies.get(index, 1) for index in kept],
            "seed": [seed for seed, _, _ in sampling],
            "temperature": [temperature for _, temperature, _ in sampling],
            "top_p": [top_p for _, _, top_p in sampling],
            "policy_version": [self.settings["policy_version"]] * len(kept),
        }
        return pa.table({field.name: columns[field.name] for field in ROLLOUT_SCHEMA}, schema=ROLLOUT_SCHEMA)


def _settings(prompts_dir: Path, cfg: RolloutConfig, round_index: int, policy_version: str) -> dict[str, Any]:
    """Everything that the round's files depend on."""
    read_manifest(prompts_dir, kind="prompts")
    return {name: getattr(cfg, name) for name in _SETTINGS} | {
        "round": round_index,
        "policy_version": policy_version,
        "prompts": file_sha256(prompts_dir / MANIFEST),
    }


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
            f"a round must keep at least one answer, got none of {counts['in']} ({dict(quarantined)}); see "
            f"{shards[0] / QUARANTINE_FILE}, mend the cause, remove {out_dir} and rerun"
        )
    get_logger().info(
        "round %d: kept %d of %d answers, %d tokens, set aside %s",
        *(settings["round"], counts["kept"], counts["in"], counts["tokens"], dict(quarantined) or "none"),
    )
    return seal(out_dir, kind="rollouts", provenance=settings, counts=counts)


def _read_sealed(directory: Path, kind: str, settings: dict[str, Any]) -> Manifest:
    manifest = read_manifest(directory, kind=kind)
    if differing := [name for name, value in settings.items() if manifest.provenance.get(name) != value]:
        name = differing[0]
        raise UserError(
            f"{name} must be what {directory} was made with ({manifest.provenance.get(name)}), got {settings[name]}; "
            "change it back, or remove the directory to make it anew"
        )
    return manifest
