"""Files that are flipped, cut or made up: readers refuse them with a clear error before they use anything."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_npd.config.settings import AnnotateConfig, PackConfig
from megatron_npd.data import prompts as prompts_reader
from megatron_npd.data.packed_dataset import PackedRows, Streams
from megatron_npd.data.packing import pack_selection
from megatron_npd.data.prompt_files import read_batches
from megatron_npd.data.row_schedule import load_schedule
from megatron_npd.data.seen import Seen
from megatron_npd.errors import UserError
from megatron_npd.lock import hold_lock
from megatron_npd.manifest import MANIFEST, read_manifest
from megatron_npd.records import BadRecord
from megatron_npd.rollout import generate
from megatron_npd.rollout.journal import Journal, Recorded
from megatron_npd.store.annotation_store import AnnotationStore
from megatron_npd.weights import read_weights
from tests.faults.world import OUTPUTS, ROLLOUT

HANG_SECONDS = 20
Reader = Callable[[], object]


class Readers:
    """A copy of a whole run, and for each kind of file the reader that a later stage opens it with.

    Attributes:
        files: Kind -> files.
        read: Kind -> reader; it raises UserError, or has read the file as it was written.
    """

    def __init__(self, whole: Path, inputs: Path, root: Path) -> None:
        from megatron_npd.models.build import build_model, load_spec
        from megatron_npd.models.checkpoint import load_checkpoint
        from megatron_npd.models.hf_checkpoint import HFCheckpoint
        from megatron_npd.platform.initialize import initialize_distributed
        from megatron_npd.teacher import annotate
        from megatron_npd.teacher.samples import read_samples

        self.root, self.run = root, root / "run"
        shutil.copytree(whole, self.run, ignore=shutil.ignore_patterns(".lock"))
        here = self.run / "rounds/0000"
        initialize_distributed()
        model = build_model(load_spec(inputs / "student"), bf16=False)
        setting = annotate.check_setting(
            inputs / "teacher", inputs / "student", AnnotateConfig(top_k=4, seq_length=128)
        )
        cfg = PackConfig(seq_length=64, segment_align=8)

        def rollouts() -> None:
            read_manifest(here / "rollouts", kind="rollouts")
            for shard in sorted((here / "rollouts").glob("shard-*")):
                read_samples(shard, setting)

        self.read: dict[str, Reader] = {
            "prompts": lambda: generate._settings(self.run / "prompts", ROLLOUT, 0, "v0000"),
            "rollouts": rollouts,
            "journal": self._make_journal(here / "rollouts"),
            "annotations": lambda: AnnotationStore(here / "annotations"),
            "selection": lambda: pack_selection(here / "annotations", here / "selection", here / "packs", cfg),
            "packs": lambda: PackedRows(here / "packs", streams=Streams()),
            "schedule": lambda: load_schedule(self.run / "schedule.jsonl"),
            "checkpoint": lambda: load_checkpoint(self.run / OUTPUTS["checkpoint"], model=model),
            "policy": lambda: HFCheckpoint(self.run / OUTPUTS["policy"]),
        }
        self.files = {kind: self._files(self.run / out) for kind, out in OUTPUTS.items()}
        self.files["journal"] = [self.journal]
        for reader in self.read.values():
            reader()

    def _files(self, out: Path) -> list[Path]:
        files = [out] if out.is_file() else sorted(file for file in out.rglob("*") if file.is_file())
        return [file for file in files if file.stat().st_size]

    def _make_journal(self, rollouts: Path) -> Reader:
        """A journal of the round's responses, and a reader that insists on every answer but those that were damaged."""
        import pyarrow.parquet as pq

        self.journal, settings = self.root / "answers.journal", {"round": 0}
        truth: dict[int, Any] = {}
        with Journal(self.journal, settings) as journal:
            for shard in sorted(rollouts.glob("shard-*")):
                table = pq.read_table(shard / "rollouts.parquet", columns=["response_ids", "logprobs", "finish_reason"])
                for ids, logprobs, finish in zip(*(column.to_numpy() for column in table.columns), strict=True):
                    answer = Recorded(token_ids=ids, logprobs=logprobs, finish_reason=finish)
                    truth[len(truth)] = answer
                    journal.append(len(truth) - 1, answer)

        def read() -> None:
            before = self.journal.read_bytes()
            with Journal(self.journal, settings) as journal:
                answers = journal.responses
            self.journal.write_bytes(before)
            for index, answer in answers.items():
                same = truth[index].token_ids.tolist() == answer.token_ids.tolist()
                same &= truth[index].logprobs.tolist() == answer.logprobs.tolist()
                assert same and truth[index].finish_reason == answer.finish_reason, f"answer {index} is another"
            if len(answers) < len(truth):
                raise UserError(f"{len(truth) - len(answers)} answers are asked for again")

        return read

    def damage(self, rng: random.Random, number: int, how: str) -> tuple[dict[str, Counter[str]], list[str]]:
        """Flip a bit of, or cut, ``number`` files, all kinds in turn: what readers said, and what was overlooked."""
        results: dict[str, Counter[str]] = {kind: Counter() for kind in self.read}
        wrong = []
        for turn in range(number):
            kind = list(self.read)[turn % len(self.read)]
            file = rng.choice(self.files[kind])
            whole = file.read_bytes()
            place = rng.randrange(len(whole))
            damaged = whole[:place]
            if how == "flip":
                damaged = bytearray(whole)
                damaged[place] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            try:
                self.read[kind]()
                verdict = "overlooked"
            except UserError:
                verdict = "refused"
            except Exception as error:
                verdict = f"crashed with {type(error).__name__}"
            harmless = kind == "journal" and verdict == "overlooked" and _only_separator(whole, place, how)
            if harmless:
                verdict = "refused"
            results[kind][verdict] += 1
            if verdict != "refused":
                wrong.append(f"{kind}: {how} at byte {place} of {file.relative_to(self.root)}: {verdict}")
            file.write_bytes(whole)
        return results, wrong


def _only_separator(whole: bytes, place: int, how: str) -> bool:
    """Whether the damage left every answer: the blank behind a checksum, or a cut between two bytes of nothing."""
    start = whole.rfind(b"\n", 0, place) + 1
    return how == "flip" and place == start + 8


def fuzz(readers: Readers, rng: random.Random, number: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Give ``number`` made-up inputs to the readers of text and indices; none may crash or hang."""
    targets = _targets(readers)
    results: dict[str, Counter[str]] = {name: Counter() for name in targets}
    wrong: list[str] = []
    for turn in range(number):
        name = list(targets)[turn % len(targets)]
        file, seeds, read = targets[name]
        data = _mutate(rng, rng.choice(seeds))
        file.write_bytes(data)
        try:
            with _deadline():
                read()
            verdict = "read"
        except UserError:
            verdict = "refused"
        except Exception as error:
            verdict = f"crashed with {type(error).__name__}"
            wrong.append(f"{name}: fuzz, {verdict} {str(error)[:200]} for {data[:200]!r}")
        results[name][verdict] += 1
        file.write_bytes(seeds[0])
    return results, wrong


def _targets(readers: Readers) -> dict[str, tuple[Path, list[bytes], Reader]]:
    """Name -> the file that is replaced, what it is made from, its reader; hashes out of the way where they can be."""
    run, root = readers.run, readers.root
    lines = root / "prompts.jsonl"
    records = [
        {"prompt": "What is 2 + 3?", "id": "a", "response": "5"},
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "b"}], "level": 3},
    ]
    text = b"".join(json.dumps(record).encode() + b"\n" for record in records)

    def jsonl() -> None:
        seen = Seen()
        for source in chain.from_iterable(read_batches(lines)):
            try:
                prompts_reader._admit(source, seen)
            except BadRecord as bad:
                assert bad.reason

    store = run / OUTPUTS["annotations"]
    index = store / "shard-00000" / "tokens.idx"
    bare = root / "bare"  # a policy without a manifest
    shutil.copytree(run / OUTPUTS["policy"], bare, dirs_exist_ok=True)
    (bare / MANIFEST).unlink(missing_ok=True)
    weights = bare / "model.safetensors"
    head = weights.read_bytes()
    manifest, schedule, lock = run / "prompts" / MANIFEST, run / "schedule.jsonl", root / ".lock"
    journal = readers.journal

    def locked() -> None:
        with hold_lock(root):
            pass

    def journaled() -> None:
        with Journal(journal, {"round": 0}):
            pass

    return {
        "prompts.jsonl": (lines, [text], jsonl),
        "manifest": (manifest, [manifest.read_bytes()], lambda: read_manifest(run / "prompts", kind="prompts")),
        "tokens.idx": (index, [index.read_bytes()], lambda: AnnotationStore(store, verify=False)),
        "schedule.jsonl": (schedule, [schedule.read_bytes()], lambda: load_schedule(schedule)),
        "safetensors": (weights, [head[: 2**14], head[:900]], lambda: read_weights(bare)),
        "journal": (journal, [journal.read_bytes()], journaled),
        "lock": (lock, [b'{"epoch": 3, "pid": 4, "host": "node7", "boot": "x"}\n'], locked),
    }


_NASTY = [
    b"\x00",
    b"\xff\xfe",
    b"[" * 3000,
    b'{"a":' * 500,
    b"NaN",
    b"1e999",
    b"-1",
    b"9" * 5000,
    b"\n",
    b'"',
    b"\\ud800",
]
_NASTY += [b"null", b"../../etc/passwd", b"\xf0\x9f\x92\xa9", (2**63 - 1).to_bytes(8, "little"), b"{}", b"[]", b"true"]


def _mutate(rng: random.Random, seed: bytes) -> bytes:
    """A seed with one to six accidents: flips, cuts, doublings, random bytes, and what parsers stumble over."""
    data = bytearray(seed if rng.random() < 0.95 else rng.randbytes(rng.randrange(300)))
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(data) + 1)
        end = min(len(data), place + rng.choice((1, 1, 2, 8, 64)))
        accident = rng.randrange(6)
        if accident == 0 and end > place:
            data[place] ^= 1 << rng.randrange(8)
        elif accident == 1:
            del data[place:end]
        elif accident == 2:
            data[place:place] = data[place:end]
        elif accident == 3:
            data[place:end] = rng.randbytes(end - place)
        elif accident == 4:
            data[place:end] = rng.choice(_NASTY)
        else:
            del data[place:]
    return bytes(data)


@contextmanager
def _deadline() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"no answer in {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
