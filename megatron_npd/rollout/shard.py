"""One shard of a round in the making: what is asked for, the responses and their journal, until it is sealed.

Samples are numbered ``prompt * paths + path`` over the whole round; a shard holds those of consecutive prompts.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_npd.config.settings import RolloutConfig
from megatron_npd.data.prompt_rows import PromptRows
from megatron_npd.manifest import Manifest, is_sealed, seal, writing
from megatron_npd.quarantine import write_quarantine
from megatron_npd.records import ROLLOUT_SCHEMA, ROLLOUTS_FILE, SEEDS, sample_id, sample_seed
from megatron_npd.rollout.journal import Journal, Recorded
from megatron_npd.serving.protocol import Failure, Request

_PROMPT_COLUMNS = (
    "prompt_id",
    "prompt_ids",
    "generation_prompt_len",
    "teacher_prompt_ids",
)  # the others may be of any size


class Shard:
    """A shard that is not sealed yet; what its journal holds of an earlier call is taken.

    Args:
        path: Directory to seal.
        samples: Numbers of its samples.
        prompts: The round's prompts, of which this shard's are read when one is needed.
        lengths: Tokens of each of its prompts.
        cfg: Paths, sampling and lengths.
        settings: What the files depend on.

    Attributes:
        responses: Sample number -> response, of those that are finished.

    Raises:
        UserError: Its journal was written with other settings.
    """

    def __init__(
        self,
        path: Path,
        samples: range,
        prompts: PromptRows,
        lengths: npt.NDArray[np.int32],
        cfg: RolloutConfig,
        settings: dict[str, Any],
    ) -> None:
        self.path, self.samples, self.cfg, self.settings = path, samples, cfg, settings
        self.paths = cfg.greedy_paths + cfg.sampled_paths
        self.responses: dict[int, Recorded | Failure] = {}
        self._prompts, self._lengths = prompts, lengths
        self._journal: Journal | None = None
        known = self._open_journal().responses if self._journal_file.exists() else {}
        for index in samples:
            response = self._unanswerable(index) or known.pop(index, None)
            if response is not None:
                self.take(index, response)
        self.__dict__.pop("_table_of_prompts", None)  # read again when its shard is asked: those of all are too much

    @property
    def missing(self) -> int:
        """Samples without a response."""
        return len(self.samples) - len(self.responses)

    def unanswered(self) -> list[int]:
        """Numbers of the samples without a response."""
        return [index for index in self.samples if index not in self.responses]

    def prompt_id(self, index: int) -> str:
        """The prompt of a sample."""
        return self._prompt(index, "prompt_id")

    def request(self, index: int) -> Request:
        """What to ask for a sample."""
        seed, temperature, top_p = self._sampling(index)
        return Request(
            key=index,
            token_ids=self._asked(index),
            max_tokens=min(self.cfg.max_tokens, self.cfg.max_model_len - self._length(index)),
            stop_ids=self.settings["stop_ids"],
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            given=self._prompt(index, "response_ids") if self._is_given(index) else (),
        )

    def _asked(self, index: int) -> list[int]:
        """The prompt as the model that answers reads it: a teacher may have a chat template of its own."""
        if self.settings["source"] == "teacher" and (own := self._prompt(index, "teacher_prompt_ids")) is not None:
            return own
        return self._prompt(index, "prompt_ids")

    def record(self, index: int, response: Recorded | Failure) -> None:
        """Keep a response that arrived, on disk too; a failure is asked for again by a later call."""
        if isinstance(response, Recorded):
            self._open_journal().append(index, response)
        self.take(index, response)

    def take(self, index: int, response: Recorded | Failure) -> None:
        """Keep a response until the shard is whole; one that says nothing has failed."""
        if isinstance(response, Recorded) and len(response.token_ids) <= (response.finish_reason == "stop"):
            response = Failure(reason="empty_response", detail=f"finish reason {response.finish_reason}")
        self.responses[index] = response

    def reasons(self) -> Counter[str]:
        """How many responses are quarantined so far, by reason."""
        return Counter(response.reason for response in self.responses.values() if isinstance(response, Failure))

    def sync(self) -> None:
        """Flush the journal to the disk."""
        if self._journal is not None:
            self._journal.sync()

    def close(self) -> None:
        """Flush and close the journal."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def seal(self) -> Manifest:
        """Write and seal the shard, which must miss nothing; then its journal has done its work."""
        assert not self.missing
        kept = {i: response for i in self.samples if isinstance(response := self.responses[i], Recorded)}
        quarantine = [
            self._identity(i) | {"reason": response.reason, "detail": response.detail}
            for i in self.samples
            if isinstance(response := self.responses[i], Failure)
        ]
        copies = self._merge(kept, quarantine) if self.cfg.merge_identical else {}
        with writing(self.path) as directory:
            pq.write_table(self._table(kept, copies), directory / ROLLOUTS_FILE, compression="zstd")
            if quarantine:
                write_quarantine(directory, quarantine)
            counts = {
                "in": len(kept) + len(quarantine),
                "kept": len(kept),
                "quarantined": dict(Counter(line["reason"] for line in quarantine)),
                "pending": 0,
                "tokens": sum(len(response.token_ids) for response in kept.values()),
                "stopped": sum(response.finish_reason == "stop" for response in kept.values()),
            }
            manifest = seal(directory, kind="rollouts-shard", provenance=self.settings, counts=counts)
        self.close()
        forget_journal(self.path)
        return manifest

    @property
    def _journal_file(self) -> Path:
        return _journal_file(self.path)

    def _open_journal(self) -> Journal:
        if self._journal is None:
            self._journal = Journal(self._journal_file, self.settings)
        return self._journal

    @cached_property
    def _table_of_prompts(self) -> pa.Table:
        first, after = self.samples.start // self.paths, self.samples.stop // self.paths
        given = ("response_ids",) if self.cfg.dataset_fraction else ()
        return self._prompts.read(first, after, *_PROMPT_COLUMNS, *given)

    def _place(self, index: int) -> int:
        """The row of a sample's prompt among the shard's."""
        return (index - self.samples.start) // self.paths

    def _prompt(self, index: int, column: str) -> Any:
        return self._table_of_prompts[column][self._place(index)].as_py()

    def _length(self, index: int) -> int:
        return int(self._lengths[self._place(index)])

    def _unanswerable(self, index: int) -> Failure | None:
        length = self._length(index)
        if length == 0:
            return Failure(reason="empty_prompt", detail="a prompt must have at least one token")
        if length > self.cfg.max_model_len - 1:
            return Failure(reason="prompt_too_long", detail=f"{length} tokens, max_model_len {self.cfg.max_model_len}")
        if self._is_given(index):
            response = self._prompt(index, "response_ids")
            if not response:
                return Failure(reason="no_response", detail="the prompt has none, for dataset_fraction")
            if length + len(response) > self.cfg.max_model_len - 1:  # the server adds a token to what it scores
                detail = f"{length} + {len(response)} tokens, max_model_len {self.cfg.max_model_len}"
                return Failure(reason="response_too_long", detail=detail)
        return None

    def _is_given(self, index: int) -> bool:
        """Whether a sample's response is the data set's."""
        share = self.cfg.dataset_fraction
        return share > 0 and self._sampling(index)[0] < share * SEEDS

    def _sampling(self, index: int) -> tuple[int, float, float]:
        """Seed, temperature and top_p of a sample; the first ``greedy_paths`` paths of a prompt are greedy."""
        path = index % self.paths
        seed = sample_seed(self.cfg.seed, self.settings["round"], self._prompt(index, "prompt_id"), path)
        if path < self.cfg.greedy_paths:
            return seed, 0.0, 1.0
        return seed, self.cfg.temperature, self.cfg.top_p

    def _identity(self, index: int) -> dict[str, Any]:
        prompt_id, path = self._prompt(index, "prompt_id"), index % self.paths
        return {
            "sample_id": sample_id(prompt_id, self.settings["round"], path),
            "prompt_id": prompt_id,
            "path": path,
        }

    def _merge(self, kept: dict[int, Recorded], quarantine: list[dict[str, Any]]) -> dict[int, int]:
        """Leave one of the identical responses to a prompt in ``kept``; how many each then stands for.

        A sampled one stands for the greedy one: the policy lag is defined for it.
        """
        alike: dict[tuple[int, bool, str, bytes], list[int]] = {}
        for index, response in kept.items():
            content = (index // self.paths, self._is_given(index), response.finish_reason, response.token_ids.tobytes())
            alike.setdefault(content, []).append(index)
        copies = {}
        for indices in alike.values():
            stays = next((index for index in indices if index % self.paths >= self.cfg.greedy_paths), indices[0])
            copies[stays] = len(indices)
            for index in indices:
                if index != stays:
                    del kept[index]
                    detail = f"the same response as {self._identity(stays)['sample_id']}"
                    quarantine.append(self._identity(index) | {"reason": "duplicate", "detail": detail})
        return copies

    def _table(self, kept: dict[int, Recorded], copies: dict[int, int]) -> pa.Table:
        identities = [self._identity(index) for index in kept]
        sampling = [self._sampling(index) for index in kept]
        prompts = self._table_of_prompts.take(pa.array(map(self._place, kept), pa.int64()))
        columns = {name: [identity[name] for identity in identities] for name in ("sample_id", "prompt_id", "path")}
        columns |= {name: prompts[name] for name in ("prompt_ids", "generation_prompt_len", "teacher_prompt_ids")}
        columns |= {
            "response_ids": [response.token_ids for response in kept.values()],
            "logprobs": [response.logprobs for response in kept.values()],
            "finish_reason": [response.finish_reason for response in kept.values()],
            "copies": [copies.get(index, 1) for index in kept],
            "seed": [seed for seed, _, _ in sampling],
            "temperature": [temperature for _, temperature, _ in sampling],
            "top_p": [top_p for _, _, top_p in sampling],
            "source": ["dataset" if self._is_given(index) else self.settings["source"] for index in kept],
            "policy_version": [self.settings["policy_version"]] * len(kept),
        }
        return pa.table({field.name: columns[field.name] for field in ROLLOUT_SCHEMA}, schema=ROLLOUT_SCHEMA)


def forget_journal(shard: Path) -> None:
    """Remove the journal of a sealed shard, where a call that was killed between the two has left it."""
    assert is_sealed(shard)
    _journal_file(shard).unlink(missing_ok=True)


def _journal_file(shard: Path) -> Path:
    return shard.with_name(shard.name.replace("shard-", "responses-") + ".journal")
