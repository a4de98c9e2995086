"""Exact top-k of a language model's logits, with the log of the mass outside it, over a vocabulary sharded or whole.

A row is cut into tiles: its k largest logits are in the k tiles of largest maximum. So one pass over the logits, for
the maximum and the log-sum-exp of each tile, and a look into those few tiles give the top-k, and the mass outside it
from the other tiles and the rest of these. Equal logits are ordered by id, smallest first, whatever the cut: selection
compares 64-bit keys made of logit and id.

Legend: T tokens, C tokens of a chunk, V columns of this rank's slice, N tiles, K top-k, J tiles looked into,
R ranks of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_npd.errors import UserError
from megatron_npd.ops.implementation import Impl, use_triton
from megatron_npd.ops.vocab_parallel import VocabShard, vocab_shard

TILE = 128
CHUNK_ELEMENTS = 1 << 19
"""Elements of the fp32 buffer: 2 MiB stay in a core's cache between the passes over a chunk."""
CANDIDATES = 1 << 20
"""Columns of the tiles looked into at once."""
_ABSENT = 0x7FFFFFFF  # an id behind every real one


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The most probable ids of each token under the softmax over the whole vocabulary.

    Attributes:
        ids_TK: int32, most probable first; of equal logits the smaller id first.
        logprobs_TK: fp32, descending.
        log_tail_T: fp32, log of the mass outside the K; -inf where K is the vocabulary.
        sampled_logprobs_T: fp32, log-probabilities of the ids asked for; None without them.
    """

    ids_TK: Tensor
    logprobs_TK: Tensor
    log_tail_T: Tensor
    sampled_logprobs_T: Tensor | None


@torch.no_grad()
def topk_logprobs(
    logits_TV: Tensor,
    k: int,
    *,
    vocab_size: int,
    sampled_ids_T: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
) -> TopK:
    """Exact top-k, log tail and the sampled ids' log-probabilities in one pass over the logits, which stay as they are.

    Args:
        logits_TV: ``[T, V]`` fp32, bf16 or fp16: this rank's slice of the vocabulary's columns.
        k: Ids a token, at most ``vocab_size``.
        vocab_size: Size of the whole vocabulary; columns at and after it count as -inf.
        sampled_ids_T: ``[T]`` integer ids in the whole vocabulary whose log-probabilities are wanted too.
        group: Tensor-parallel group whose ranks hold the slices in order; one all-gather of ``[T, 2 K + 2]`` fp32.
        impl: ``torch``, ``triton`` (CUDA) or ``auto``: Triton where it can run.

    Returns:
        The same on every rank; ids do not depend on how the vocabulary is sharded.

    Raises:
        UserError: An argument breaks a rule above.
    """
    if logits_TV.dim() != 2 or logits_TV.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        got = f"{logits_TV.dtype} {list(logits_TV.shape)}"
        raise UserError(f"logits_TV must be float32, bfloat16 or float16 of shape [T, V], got {got}; convert it")
    tile_stats = _implementation(impl, logits_TV.device)
    shard = vocab_shard(logits_TV.shape[1], vocab_size, group)
    if not 1 <= k <= vocab_size:
        raise UserError(f"k must be in [1, {vocab_size}] (vocab_size), got {k}; ask for fewer ids")
    if sampled_ids_T is not None:
        _check_sampled(sampled_ids_T, len(logits_TV), vocab_size)
        sampled_ids_T = sampled_ids_T.long()
    local = _merge(_local(logits_TV, k, sampled_ids_T, shard, tile_stats), shard)
    lse_T1 = torch.logaddexp(local.logits_TK.logsumexp(1), local.lse_off_T)[:, None]
    return TopK(
        ids_TK=local.ids_TK.int(),
        logprobs_TK=local.logits_TK - lse_T1,
        log_tail_T=local.lse_off_T - lse_T1[:, 0],
        sampled_logprobs_T=None if sampled_ids_T is None else local.sampled_T - lse_T1[:, 0],
    )


TileStats = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def _implementation(impl: Impl, device: torch.device) -> TileStats:
    if not use_triton(impl, device):
        return _tile_stats
    from megatron_npd.ops.topk_triton import tile_stats

    return tile_stats


def _check_sampled(sampled_ids_T: Tensor, num_tokens: int, vocab_size: int) -> None:
    if sampled_ids_T.shape != (num_tokens,) or sampled_ids_T.is_floating_point():
        got = f"{sampled_ids_T.dtype} {list(sampled_ids_T.shape)}"
        raise UserError(f"sampled_ids_T must be integer of shape [{num_tokens}], got {got}; give one id a token")
    if bool(((sampled_ids_T < 0) | (sampled_ids_T >= vocab_size)).any()):
        got = f"{int(sampled_ids_T.min())} to {int(sampled_ids_T.max())}"
        raise UserError(f"sampled_ids_T must be in [0, {vocab_size}), got {got}; check the vocabulary")


@dataclass(frozen=True, kw_only=True)
class _Top:
    """Top logits with their ids in the whole vocabulary, the log-sum-exp of all others, the sampled ids' logits."""

    logits_TK: Tensor
    ids_TK: Tensor
    lse_off_T: Tensor
    sampled_T: Tensor


def _local(logits_TV: Tensor, k: int, sampled_ids_T: Tensor | None, shard: VocabShard, tile_stats: TileStats) -> _Top:
    """The top of this rank's slice; what it lacks of k is -inf under an id behind every real one."""
    num_tokens, columns = len(logits_TV), shard.columns
    logits_TK = logits_TV.new_full((num_tokens, k), -torch.inf, dtype=torch.float32)
    ids_TK = torch.full((num_tokens, k), _ABSENT, dtype=torch.int64, device=logits_TV.device)
    lse_off_T, sampled_T = logits_TK.new_full((2, num_tokens), -torch.inf).unbind(0)
    top = _Top(logits_TK=logits_TK, ids_TK=ids_TK, lse_off_T=lse_off_T, sampled_T=sampled_T)
    if not columns or not num_tokens:
        return top
    z_TV = logits_TV[:, :columns]
    if sampled_ids_T is not None:
        index_T = shard.local(sampled_ids_T)
        picked_T = z_TV.gather(1, index_T.clamp(max=columns - 1)[:, None])[:, 0].float()
        sampled_T.copy_(torch.where(index_T < columns, picked_T, -torch.inf))
    held, height = min(k, columns), max(1, CANDIDATES // (k * TILE))
    for lo in range(0, num_tokens, height):
        hi = min(lo + height, num_tokens)
        top_CK, index_CK, lse_off_T[lo:hi] = _top_of_tiles(z_TV[lo:hi], held, tile_stats)
        logits_TK[lo:hi, :held] = top_CK
        ids_TK[lo:hi, :held] = index_CK + shard.rank * shard.width
    return top


def _top_of_tiles(z_CV: Tensor, k: int, tile_stats: TileStats) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k logits of each row, fp32 ``[C, K]``, their columns, and the log-sum-exp of all other columns ``[C]``."""
    width = z_CV.shape[1]
    max_CN, lse_CN = tile_stats(z_CV, TILE)
    num_tiles = max_CN.shape[1]
    tiles_CJ = _keys(max_CN, torch.arange(num_tiles, device=z_CV.device)).topk(min(k, num_tiles)).indices
    columns = (tiles_CJ[:, :, None] * TILE + torch.arange(TILE, device=z_CV.device)).flatten(1)
    candidates = z_CV.gather(1, columns.clamp(max=width - 1)).float().masked_fill_(columns >= width, -torch.inf)
    chosen_CK = _keys(candidates, columns).topk(k).indices
    top_CK, index_CK = candidates.gather(1, chosen_CK), columns.gather(1, chosen_CK)
    others = [lse_CN.scatter_(1, tiles_CJ, -torch.inf), candidates.scatter_(1, chosen_CK, -torch.inf)]
    return top_CK, index_CK, torch.cat(others, dim=1).logsumexp(1)


def _tile_stats(z_TV: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Largest logit and log-sum-exp of each ``tile`` columns, fp32 ``[T, N]``, in one pass; the last may have fewer."""
    num_tokens, width = z_TV.shape
    num_tiles = -(-width // tile)
    max_TN, sum_TN = torch.empty(2, num_tokens, num_tiles, dtype=torch.float32, device=z_TV.device).unbind(0)
    height = max(1, min(num_tokens, CHUNK_ELEMENTS // width))
    buffer = torch.empty(height, width, dtype=torch.float32, device=z_TV.device)
    for lo in range(0, num_tokens, height):
        hi = min(lo + height, num_tokens)
        z, e = z_TV[lo:hi], buffer[: hi - lo]
        if z.dtype != torch.float32:
            z = e.copy_(z)
        whole = width // tile
        parts = [(slice(0, whole), slice(0, whole * tile), whole), (slice(whole, None), slice(whole * tile, None), 1)]
        for tiles, inside, count in parts[: 1 + (whole < num_tiles)] if whole else parts[1:]:
            max_CN, z_CNV = max_TN[lo:hi, tiles], z[:, inside].unflatten(1, (count, -1))
            torch.amax(z_CNV, 2, out=max_CN)
            shift_CN1 = max_CN[:, :, None].clamp(min=torch.finfo(torch.float32).min)  # -inf - -inf is not a number
            terms = torch.sub(z_CNV, shift_CN1, out=e[:, inside].unflatten(1, (count, -1))).exp_()
            torch.sum(terms, 2, out=sum_TN[lo:hi, tiles])
    return max_TN, max_TN + sum_TN.log_()


def _keys(logits: Tensor, ids: Tensor) -> Tensor:
    """int64 keys whose descending order is that of the fp32 logits, and of ids ascending where logits are equal."""
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 makes -0.0 the equal of 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # two's complement runs backwards below zero
    return (ordered.long() << 32) + (_ABSENT - ids)


def _merge(top: _Top, shard: VocabShard) -> _Top:
    """The top of the whole vocabulary from the slices' tops: one exchange, then the same arithmetic on every rank."""
    if shard.size == 1 or not len(top.ids_TK):
        return top
    k = top.ids_TK.shape[1]
    rest_T2 = torch.stack([top.lse_off_T, top.sampled_T], dim=1)
    sent = torch.cat([top.logits_TK, top.ids_TK.int().view(torch.float32), rest_T2], dim=1)
    gathered = sent.new_empty(shard.size, *sent.shape)
    dist.all_gather(list(gathered.unbind(0)), sent, group=shard.group)
    logits_TRK = gathered[:, :, :k].permute(1, 0, 2).flatten(1)
    ids_TRK = gathered[:, :, k : 2 * k].contiguous().view(torch.int32).long().permute(1, 0, 2).flatten(1)
    chosen_TK = _keys(logits_TRK, ids_TRK).topk(k).indices
    off = torch.cat([gathered[:, :, 2 * k].t(), logits_TRK.scatter(1, chosen_TK, -torch.inf)], dim=1)
    return _Top(
        logits_TK=logits_TRK.gather(1, chosen_TK),
        ids_TK=ids_TRK.gather(1, chosen_TK),
        lse_off_T=off.logsumexp(1),
        sampled_T=gathered[:, :, 2 * k + 1].amax(0),
    )
