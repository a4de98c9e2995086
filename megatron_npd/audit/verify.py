"""The books of a run, counted again from its files: nothing lost between stages, no file cut, changed or foreign."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_npd.audit.books import RECOUNTS, Books, check_rollouts, check_store_shard, set_aside
from megatron_npd.data.packed_dataset import PackedRows, Streams
from megatron_npd.data.prompt_rows import rows_of_round
from megatron_npd.data.row_schedule import PACKS_KIND, load_schedule
from megatron_npd.errors import UserError
from megatron_npd.links import link_in_words, links_of
from megatron_npd.lock import LOCK
from megatron_npd.log import progress
from megatron_npd.manifest import MANIFEST, Manifest, file_sha256, is_sealed, read_manifest, unlisted
from megatron_npd.pipeline.stages import STAGES
from megatron_npd.records import sample_id
from megatron_npd.run_dir import RunDir
from megatron_npd.store.annotation_store import SHARD_KIND, STORE_KIND, AnnotationStore

# By kind: where its input lies, relative to it, and what its manifest calls the hash of the input's manifest.
_INPUTS = {stage.kind: next(iter(stage.inputs.items())) for stage in STAGES.values() if stage.inputs}


@dataclass(kw_only=True)
class Verification:
    """The rows of the table (directory, kind, in, kept, quarantined, pending, files, bytes) and what is wrong."""

    rows: list[tuple[Any, ...]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def table(self) -> str:
        """The rows as text, then the problems or the word that there are none."""
        header = ("directory", "kind", "in", "kept", "quarantined", "pending", "files", "MB")
        cells: list[tuple[str, ...]] = [header]
        for directory, kind, entered, kept, reasons, pending, files, size in self.rows:
            aside = ", ".join(f"{number} {reason}" for reason, number in reasons.items()) or "0"
            numbers = ["-" if value is None else str(value) for value in (entered, kept)]
            cells.append(
                (
                    directory,
                    kind,
                    *numbers,
                    aside if kept is not None else "-",
                    str(pending),
                    str(files),
                    f"{size / 1e6:.1f}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        files, size = sum(row[6] for row in self.rows), sum(row[7] for row in self.rows)
        verdict = f"{len(self.problems)} problem(s)" if self.problems else "every book balances, every file is whole"
        lines.append(f"{files} files, {size / 1e6:.1f} MB in {self.seconds:.1f} s: {verdict}")
        return "\n".join([*lines, *(f"PROBLEM {problem}" for problem in self.problems)])


def verify_run(run: str | Path, *, full: bool = False) -> Verification:
    """Hash every file of a run, count every stage again, and compare each stage's input with the output before it.

    Args:
        run: Directory of the run, or of any part of it.
        full: Hash whatever is known of a file, and check every number of rollouts and teacher records.

    Returns:
        The table and the problems. A stage that is not sealed is no problem: its rest is pending.

    Raises:
        UserError: ``run`` holds nothing that a stage wrote.
    """
    run, started = Path(run), time.monotonic()
    audit = _Audit(run, full)
    audit.result.problems += map(link_in_words, links_of(run))
    stages = [path for path in _directories(run) if not path.name.startswith("shard-")]
    if not stages and not audit.result.problems:
        raise UserError(f"{run} must hold sealed directories, got none; give the directory of a run")
    with progress(len(stages), "verify", "stage") as bar:
        for path in sorted(stages, key=_order):
            audit.stage(path)
            bar.update()
    if (schedule := RunDir(run).schedule).exists():
        audit.schedule(schedule)
    audit.result.seconds = time.monotonic() - started
    return audit.result


def _directories(run: Path) -> list[Path]:
    """Directories that are sealed, or were begun."""
    found = []
    for folder, names, files in os.walk(run):
        parent = any("iter_" in name for name in names)  # checkpoints; the lock is their trainer's
        names[:] = [name for name in names if not name.startswith((".", "damaged_iter_"))]  # set aside
        if MANIFEST in files or (LOCK in files and Path(folder) != run and not parent):
            found.append(Path(folder))
    return found


def _order(path: Path) -> tuple[str, int, str]:
    """Rounds in their order, and in each the stages in theirs, so that inputs come before outputs."""
    of_a_run = ["prompts", "eval_prompts"]
    of_a_round = ["store", *(stage.kind for stage in STAGES.values() if stage.inputs)]  # directories of that name
    stages = of_a_run + of_a_round
    place = stages.index(path.name) if path.name in stages else len(stages)
    return ("" if path.name in of_a_run else str(path.parent), place, str(path))


class _Audit:
    """One verification in progress: the books of the stages seen so far."""

    def __init__(self, run: Path, full: bool) -> None:
        self.run, self.full, self.result = run, full, Verification()
        self.books: dict[Path, Books] = {}
        self.files, self.bytes = 0, 0

    def problem(self, text: object) -> None:
        self.result.problems.append(str(text))

    def stage(self, path: Path) -> None:
        """One line of the table: a stage with its shards."""
        self.files = self.bytes = 0
        manifest = self._read(path) if is_sealed(path) else None
        kind = manifest.kind if manifest else path.name
        books, complete = Books(), manifest is not None or not is_sealed(path)
        for shard in sorted(path.glob("shard-*")):
            part = self._read(shard) if is_sealed(shard) else None
            if part is not None:
                self._compare_policy(shard, part)
            if part is not None and part.kind == SHARD_KIND:
                source, key = _INPUTS[STORE_KIND]
                self._compare_origin(shard, part, (path / source).resolve() / shard.name, key)
            if part is not None and (counted := self._recount(shard, part)) is not None:
                books += counted
            complete &= part is not None or not is_sealed(shard)
        counted = self._recount(path, manifest) if manifest else None
        if counted is not None:
            books += counted
        known = manifest is None or kind in RECOUNTS or kind in (STORE_KIND, "rollouts")
        if known and complete:
            if kind != PACKS_KIND:  # nothing is compared with packs
                self.books[path.resolve()] = books
            pending = self._compare_with_input(path, kind, manifest, books)
            if manifest is not None:
                self._compare(path, manifest, books)
                self._compare_policy(path, manifest)
                self._look_inside(path, manifest)
            entered = len(books.kept) + len(books.aside) + (pending or 0)
            numbers = (entered, len(books.kept), books.reasons(), "?" if pending is None else pending)
        else:
            numbers = (None, None, {}, 0)
        state = kind if manifest else f"{kind}, not sealed"
        self.result.rows.append((str(path.relative_to(self.run)), state, *numbers, self.files, self.bytes))

    def _read(self, path: Path) -> Manifest | None:
        """The manifest of a directory whose files are all as it says; None, with the problem noted, otherwise."""
        try:
            manifest = read_manifest(path, full=self.full)
        except UserError as error:
            self.problem(error)
            return None
        self.files += len(manifest.files)
        self.bytes += sum(entry["bytes"] for entry in manifest.files.values())
        for name in unlisted(path, manifest):
            self.problem(f"{path} must hold what its {MANIFEST} lists, got {name} too; move it away")
        return manifest

    def _recount(self, path: Path, manifest: Manifest) -> Books | None:
        """What the files of one directory, without its shards, hold."""
        books = Books(aside=set_aside(path))
        if (recount := RECOUNTS.get(manifest.kind)) is not None:
            try:
                recount(path, books)
                if self.full and manifest.kind == "rollouts-shard":
                    check_rollouts(path)
            except (pa.ArrowException, KeyError, OSError, UserError) as error:
                self.problem(f"{path} must hold readable tables of its kind, got {error}")
                return None
        if manifest.kind.endswith("-shard"):
            self._compare(path, manifest, books)
        return books

    def _compare(self, path: Path, manifest: Manifest, books: Books) -> None:
        """The counts of a manifest with those of the files."""
        counts, total = manifest.counts, len(books.kept) + len(books.aside)
        found = {"in": total, "kept": len(books.kept), "quarantined": books.reasons(), "pending": 0, **books.sums}
        for name in counts.keys() & found.keys():
            if counts[name] != found[name]:
                self.problem(
                    f"{path / MANIFEST} must count {name} as the files do, got {counts[name]}, not {found[name]}"
                )
        if "in" in counts and "kept" in counts:
            aside, pending = sum(counts.get("quarantined", {}).values()), counts.get("pending", 0)
            if counts["in"] != counts["kept"] + aside + pending:
                self.problem(
                    f"the books of {path} must balance, got in {counts['in']}, kept {counts['kept']}, "
                    f"quarantined {aside}, pending {pending}"
                )

    def _compare_with_input(self, path: Path, kind: str, manifest: Manifest | None, books: Books) -> int | None:
        """Every sample of the input is here once, kept or quarantined; the number of those that are not yet.

        None where that is not known.
        """
        here = [*books.kept, *(identity for identity, _ in books.aside)]
        if kind not in _INPUTS:
            return 0 if manifest else None
        found = set(here)
        if len(found) < len(here):
            identity, number = Counter(here).most_common(1)[0]
            self.problem(f"{path} must hold each sample once, got {identity} {number} times")
        name, key = _INPUTS[kind]
        source = (path / name).resolve()
        # Compared with once, but for prompts: the ids of two stages are in memory at a time, not those of all rounds.
        before = self.books.get(source) if kind == "rollouts" else self.books.pop(source, None)
        if before is None or (manifest and key not in manifest.provenance):
            return 0 if manifest else None
        if manifest and not self._compare_origin(path, manifest, source, key):
            return 0
        expected = before.kept
        if kind == "rollouts":
            settings = manifest or next(map(_manifest_or_none, sorted(path.glob("shard-*"))), None)
            if settings is None:
                return None
            about = settings.provenance
            paths = range(about["greedy_paths"] + about["sampled_paths"])
            rows = rows_of_round(len(before.kept), about.get("prompts_per_round", 0), about["round"])
            asked = before.kept[rows.start :: rows.step]
            expected = [sample_id(prompt, about["round"], number) for prompt in asked for number in paths]
        lost, foreign = set(expected) - found, found - set(expected)
        for identity in sorted(foreign)[:1]:
            self.problem(f"{path} must hold samples of {source}, got {identity} and {len(foreign) - 1} more of none")
        for identity in sorted(lost)[:1] if manifest else ():
            self.problem(
                f"{path} must account for every sample of {source}, got {len(lost)} lost, the first {identity}"
            )
        return 0 if manifest else len(lost)

    def _compare_origin(self, path: Path, manifest: Manifest, source: Path, key: str) -> bool:
        """Whether a directory names its input as it is now, where both are there to be compared."""
        same = (
            key not in manifest.provenance
            or not is_sealed(source)
            or manifest.provenance[key] == file_sha256(source / MANIFEST)
        )
        if not same:
            self.problem(f"{path} must come from {source} as it is now, got another {key}")
        return same

    def _compare_policy(self, path: Path, manifest: Manifest) -> None:
        """Rollouts name the weights of the run's policy; v0000, the student as given, is not among the policies."""
        about = manifest.provenance
        policy = RunDir(self.run).policies / str(about.get("policy_version"))
        made = _manifest_or_none(policy) if "weights" in about else None
        if made is not None and about["weights"] != made.provenance.get("weights"):
            self.problem(
                f"{path} must hold responses of {policy} as it is now, got weights {about['weights']} for "
                f"{made.provenance.get('weights')}"
            )

    def _look_inside(self, path: Path, manifest: Manifest) -> None:
        """What only the readers know: indices that fit their data; with ``full``, every teacher record."""
        try:
            if manifest.kind == PACKS_KIND:
                PackedRows(path, streams=Streams(teacher=False))
            if manifest.kind == STORE_KIND:
                store = AnnotationStore(path)
                for shard in sorted(path.glob("shard-*")) if self.full else ():
                    check_store_shard(shard, store)
        except UserError as error:
            self.problem(error)

    def schedule(self, path: Path) -> None:
        """Each line names sealed packs of its round and policy."""
        entries = []
        try:
            entries = load_schedule(path)
            for entry in entries:
                about = read_manifest(path.parent / entry.packs, kind=PACKS_KIND, verify=False).provenance
                if (about["round"], about["policy_version"]) != (entry.round, entry.policy_version):
                    self.problem(f"{path} must name packs of the same round and policy, got {entry}")
        except UserError as error:
            self.problem(error)
        row = (path.name, "schedule", len(entries), len(entries), {}, 0, 1, path.stat().st_size)
        self.result.rows.append(row)


def _manifest_or_none(path: Path) -> Manifest | None:
    try:
        return read_manifest(path, verify=False)
    except UserError:
        return None
