"""The order in which a round asks for its responses: the longest that are expected first, so that its end is short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import inf
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_npd.errors import UserError
from megatron_npd.manifest import verified_file
from megatron_npd.records import ROLLOUTS_FILE, parquet_batches
from megatron_npd.rollout.shard import Shard
from megatron_npd.serving.protocol import Request

_LAST = 2  # shards that are asked for together at the end: the last one alone may be small
_BATCH = 1024  # samples read at a time


def longest_first(shards: Sequence[Shard], earlier: Path | None) -> Iterator[Request]:
    """What shards ask for: shard by shard, within one (and within the last two) by what their prompts' responses took.

    Responses of one prompt stay together, for the server's prefix cache. A prompt without a response in the earlier
    round (it may have taken too long) comes first; where no prompt has one, the order is that of the file.

    Args:
        shards: Of one round, in order.
        earlier: Rollouts of an earlier round with the same prompts in shards of the same names; None: there are none.
    """
    for window in [*([shard] for shard in shards[:-_LAST]), shards[-_LAST:]]:
        asked = [(shard, index) for shard in window for index in shard.unanswered()]
        tokens = {}
        for shard in window if earlier is not None else ():
            tokens |= expected_tokens(earlier / shard.path.name)
        if tokens:
            asked.sort(key=lambda item: tokens.get(item[0].prompt_id(item[1]), inf), reverse=True)  # ties stay
        yield from (shard.request(index) for shard, index in asked)


def expected_tokens(shard_dir: Path) -> dict[str, float]:
    """Mean tokens of the responses to each prompt of a shard of rollouts, by its id.

    Nothing depends on them but the order: of a shard that is not there, or cannot be read, there are none.
    """
    total, number = Counter[str](), Counter[str]()
    with suppress(UserError, OSError, KeyError, pa.ArrowException):
        file = pq.ParquetFile(verified_file(shard_dir, ROLLOUTS_FILE, kind="rollouts-shard", verify=False))
        for batch in parquet_batches(file, _BATCH, columns=("prompt_id", "response_ids", "copies")):
            ids, lengths = batch["prompt_id"].to_pylist(), batch["response_ids"].value_lengths().to_pylist()
            for prompt_id, length, copies in zip(ids, lengths, batch["copies"].to_pylist(), strict=True):
                total[prompt_id] += length * copies
                number[prompt_id] += copies
    return {prompt_id: total[prompt_id] / number[prompt_id] for prompt_id in number}
