"""Exact top-k of a language model's logits, with the log of the mass outside it, over a vocabulary cut or whole.

A wide row is cut into tiles: its k + 1 largest logits are in the k + 1 tiles of largest maximum, so one pass for the
maxima and a look into those few tiles find them. Equal logits are ordered by id, smallest first, whatever the cut:
selection compares 64-bit keys made of logit and id.

Legend: T tokens, C tokens of a chunk, V columns of this rank's slice, K top-k, J = K + 1, R ranks of the group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_npd.log import UserError
from megatron_npd.ops.vocab_parallel import VocabShard, vocab_shard

TILE = 128
PLAIN_COLUMNS = 4096
"""Narrower rows are searched without tiles."""
CHUNK_ELEMENTS = 1 << 19
"""Elements of the fp32 buffers: 2 MiB stay in a core's cache between the passes over a chunk."""
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
) -> TopK:
    """Exact top-k, log tail and the sampled ids' log-probabilities in one pass over the logits, which stay as they are.

    Args:
        logits_TV: ``[T, V]`` fp32, bf16 or fp16: this rank's slice of the vocabulary's columns.
        k: Ids a token, at most ``vocab_size``.
        vocab_size: Size of the whole vocabulary; columns at and after it count as -inf.
        sampled_ids_T: ``[T]`` integer ids in the whole vocabulary whose log-probabilities are wanted too.
        group: Tensor-parallel group whose ranks hold the slices in order; one all-gather of ``[T, 2 K + 2]`` fp32.

    Returns:
        The same on every rank; ids do not depend on how the vocabulary is cut.

    Raises:
        UserError: An argument breaks a rule above.
    """
    if logits_TV.dim() != 2 or logits_TV.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        got = f"{logits_TV.dtype} {list(logits_TV.shape)}"
        raise UserError(f"logits_TV must be float32, bfloat16 or float16 of shape [T, V], got {got}; convert it")
    shard = vocab_shard(logits_TV.shape[1], vocab_size, group)
    if not 1 <= k <= vocab_size:
        raise UserError(f"k must be in [1, {vocab_size}] (vocab_size), got {k}; ask for fewer ids")
    if sampled_ids_T is not None:
        _check_sampled(sampled_ids_T, len(logits_TV), vocab_size)
        sampled_ids_T = sampled_ids_T.long()
    local = _merge(_local(logits_TV, k, sampled_ids_T, shard), shard)
    lse_T1 = torch.logaddexp(local.logits_TK.logsumexp(1), local.lse_off_T)[:, None]
    return TopK(
        ids_TK=local.ids_TK.int(),
        logprobs_TK=local.logits_TK - lse_T1,
        log_tail_T=local.lse_off_T - lse_T1[:, 0],
        sampled_logprobs_T=None if sampled_ids_T is None else local.sampled_T - lse_T1[:, 0],
    )


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


def _local(logits_TV: Tensor, k: int, sampled_ids_T: Tensor | None, shard: VocabShard) -> _Top:
    """The top of this rank's slice; what it lacks of k is -inf under an id behind every real one."""
    num_tokens, columns = len(logits_TV), shard.columns
    logits_TK = logits_TV.new_full((num_tokens, k), -torch.inf, dtype=torch.float32)
    ids_TK = torch.full((num_tokens, k), _ABSENT, dtype=torch.int64, device=logits_TV.device)
    lse_off_T, sampled_T = logits_TK.new_full((2, num_tokens), -torch.inf).unbind(0)
    top = _Top(logits_TK=logits_TK, ids_TK=ids_TK, lse_off_T=lse_off_T, sampled_T=sampled_T)
    if not columns or not num_tokens:
        return top
    height = max(1, min(num_tokens, CHUNK_ELEMENTS // columns))
    buffer = torch.empty(height, columns, dtype=torch.float32, device=logits_TV.device)
    held = min(k, columns)
    for lo in range(0, num_tokens, height):
        hi = min(lo + height, num_tokens)
        e, z = buffer[: hi - lo], logits_TV[lo:hi, :columns]
        if z.dtype != torch.float32:
            z = e.copy_(z)
        if sampled_ids_T is not None:
            index_C = shard.local(sampled_ids_T[lo:hi])
            picked_C = z.gather(1, index_C.clamp(max=columns - 1)[:, None])[:, 0]
            sampled_T[lo:hi] = torch.where(index_C < columns, picked_C, -torch.inf)
        ids_CJ = _select(z, min(k + 1, columns))
        top_CJ = z.gather(1, ids_CJ)
        logits_TK[lo:hi, :held] = top_CJ[:, :held]
        ids_TK[lo:hi, :held] = ids_CJ[:, :held] + shard.rank * shard.width
        if columns > k:
            # The largest logit outside the top-k is the shift, so that a tail far below the top stays exact.
            shift_C1 = top_CJ[:, k:].clamp(min=torch.finfo(torch.float32).min)
            torch.sub(z, shift_C1, out=e).exp_().scatter_(1, ids_CJ[:, :k], 0.0)
            lse_off_T[lo:hi] = top_CJ[:, k] + e.sum(1).log()
    return top


def _keys(logits: Tensor, ids: Tensor) -> Tensor:
    """int64 keys whose descending order is that of the fp32 logits, and of ids ascending where logits are equal."""
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 makes -0.0 the equal of 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # two's complement runs backwards below zero
    return (ordered.long() << 32) + (_ABSENT - ids)


def _select(z_CV: Tensor, j: int) -> Tensor:
    """Columns of the ``j`` largest of each row, in order, int64 ``[C, J]``."""
    width = z_CV.shape[1]
    whole = width // TILE
    if width <= PLAIN_COLUMNS or whole <= j:
        return _keys(z_CV, torch.arange(width, device=z_CV.device)).topk(j).indices
    maxima = z_CV[:, : whole * TILE].unflatten(1, (whole, TILE)).amax(2)
    if whole * TILE < width:
        maxima = torch.cat([maxima, z_CV[:, whole * TILE :].amax(1, keepdim=True)], dim=1)
    tiles_CJ = _keys(maxima, torch.arange(maxima.shape[1], device=z_CV.device)).topk(j).indices
    columns = (tiles_CJ[:, :, None] * TILE + torch.arange(TILE, device=z_CV.device)).flatten(1)
    inside = columns < width
    candidates = z_CV.gather(1, columns.clamp(max=width - 1)).masked_fill(~inside, -torch.inf)
    return columns.gather(1, _keys(candidates, columns).topk(j).indices)


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
