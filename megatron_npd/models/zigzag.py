"""Which tokens of a packed row a context-parallel rank holds: of each segment two chunks, so that all have equal work.

A segment of n tokens is cut into 2 * CP chunks, n a multiple of that; rank r holds chunk r and chunk 2 * CP - 1 - r, so
that the early one, which attends to few keys, and the late one, which attends to many, cost the same on every rank. A
rank holds its chunks one after another, segment by segment: T / CP tokens.

Legend: T tokens of the row, S segments, C = 2 * S chunks of a rank (S where CP is 1), K keys that its chunks attend to.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_npd.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ContextShare:
    """A rank's share of every packed row.

    Attributes:
        rank: Of the context-parallel group.
        size: Ranks of that group, CP.
    """

    rank: int = 0
    size: int = 1

    def runs(self, start: int, end: int) -> list[range]:
        """The tokens of a segment from ``start`` to ``end`` that this rank holds, in its order."""
        if self.size == 1:
            return [range(start, end)]
        assert (end - start) % (2 * self.size) == 0, "segments are multiples of 2 x CP: check_alignment"
        chunk = (end - start) // (2 * self.size)
        return [range(start + index * chunk, start + (index + 1) * chunk) for index in self._chunks]

    @property
    def _chunks(self) -> tuple[int, int]:
        return self.rank, 2 * self.size - 1 - self.rank

    def chunk_lengths(self, cu_seqlens: Tensor) -> Tensor:
        """Tokens of each of this rank's chunks, int64 [C]; ``cu_seqlens`` [S + 1] is of the whole row."""
        lengths = cu_seqlens.long().diff()
        return lengths if self.size == 1 else (lengths // (2 * self.size)).repeat_interleave(2)

    def key_lengths(self, cu_seqlens: Tensor) -> Tensor:
        """Keys that each chunk attends to, int64 [C]: its segment from the beginning to the chunk's own last token."""
        chunks = self.chunk_lengths(cu_seqlens)
        return chunks if self.size == 1 else chunks * (1 + chunks.new_tensor(self._chunks)).repeat(len(chunks) // 2)

    def positions(self, cu_seqlens: Tensor, tokens: int) -> Tensor:
        """Place in its segment of each token of this rank, int64 [T / CP], on the device of ``cu_seqlens``.

        Args:
            cu_seqlens: int [S + 1], of the whole row.
            tokens: T / CP, which the host knows; nothing waits for the device.
        """
        chunks = self.chunk_lengths(cu_seqlens)
        # What precedes a chunk's first token in its segment, less what does on this rank.
        shift = self.key_lengths(cu_seqlens) - chunks.cumsum(0)
        return torch.arange(tokens, device=chunks.device) + torch.repeat_interleave(shift, chunks, output_size=tokens)

    def keys(self, cu_seqlens: Tensor) -> Tensor:
        """Where the keys of each chunk are among those of all ranks, laid rank after rank: int64 [K] in 0 .. T - 1."""
        segments = list(pairwise(cu_seqlens.tolist()))
        ranks = [ContextShare(rank=rank, size=self.size) for rank in range(self.size)]
        runs = [run for share in ranks for segment in segments for run in share.runs(*segment)]
        gathered = torch.cat([torch.arange(run.start, run.stop) for run in runs])
        place_T = torch.empty_like(gathered)
        place_T[gathered] = torch.arange(len(gathered))
        return torch.cat([place_T[start : run.stop] for start, end in segments for run in self.runs(start, end)])


def check_alignment(segment_align: int, context_parallel_size: int, where: str) -> None:
    """Refuse segments that context-parallel ranks cannot share.

    Args:
        segment_align: Segments start at multiples of it.
        context_parallel_size: Ranks that share a row.
        where: What sets it, for the message.

    Raises:
        UserError: 2 x ``context_parallel_size`` does not divide ``segment_align``.
    """
    if context_parallel_size > 1 and segment_align % (2 * context_parallel_size):
        raise UserError(
            f"{where} must be a multiple of 2 x context_parallel_size = {2 * context_parallel_size}, got "
            f"{segment_align}; pack with --segment-align {2 * context_parallel_size} or a multiple of it"
        )
