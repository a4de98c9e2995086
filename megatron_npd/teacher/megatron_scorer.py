"""Scores given tokens with a megatron-core model: one packed prefill, no decoding.

Sequences are packed into fixed rows with attention and positions of their own; only the hidden states that predict
response tokens reach the output layer. Tensor-, pipeline- and context-parallel ranks call together with the same
sequences, and so do copies of the model that share experts: each token meets the experts of all, so copies go forward
in step, each with rows of its own.

Legend: T tokens of a micro-batch, or of a context-parallel rank's share of it, H hidden, R response tokens, K top-k
width, N sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_npd.data.batch import PackedBatch
from megatron_npd.data.packing import pack_lengths
from megatron_npd.models.attention import context_share
from megatron_npd.models.build import (
    build_model,
    head_weight,
    load_hf_weights,
    load_spec,
    packed_params,
    without_output_layer,
)
from megatron_npd.models.zigzag import ContextShare
from megatron_npd.ops.topk import topk_logprobs
from megatron_npd.records import LOG_TAIL_FLOOR
from megatron_npd.store.scores import OnForward, Scores, Sequences, empty_scores, response_starts

HEAD_ROWS = 1024  # rows of logits that exist at a time: 0.6 GB of fp32 at a vocabulary of 152k


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Packed rows to score.

    Attributes:
        batch: The rows, or this rank's share of them.
        places_R: int64, where its response tokens belong in ``Scores``.
        tokens: Tokens without padding, of the rows that copies which share experts have at a time.
        response_tokens: Response tokens of those rows.
    """

    batch: PackedBatch
    places_R: npt.NDArray[np.int64]
    tokens: int
    response_tokens: int


class Scorer:
    """A model on this rank's share of the layout, ready to score.

    Args:
        hf_dir: Hugging Face directory of a supported family.
        seq_length: Tokens of a packed row.
        micro_batch_size: Rows of one forward.
        bf16: Compute in bfloat16 rather than float32.
        vocab_size: V*, the student's vocabulary: columns from V* on are outside the softmax and the top-k. None: the
            model's own.
        options: ``LayoutConfig.transformer_options``.

    Attributes:
        spec: The model's shape.
        columns: Tokens that have a probability: the smaller of V* and the model's vocabulary.

    Raises:
        UserError: The directory, its architecture or the parallel layout is refused.
    """

    def __init__(
        self,
        hf_dir: str | Path,
        *,
        seq_length: int,
        micro_batch_size: int,
        bf16: bool,
        vocab_size: int | None = None,
        **options: Any,
    ) -> None:
        self.spec = load_spec(hf_dir)
        self.columns = min(vocab_size or self.spec.vocab_size, self.spec.vocab_size)
        self.seq_length, self.micro_batch_size = seq_length, micro_batch_size
        self.model = build_model(self.spec, bf16=bf16, **options)
        load_hf_weights(self.model, self.spec)
        self.model.eval().requires_grad_(False)
        self._group: Any = parallel_state.get_tensor_model_parallel_group()
        self._share = context_share()
        self._copy, self._copies = copy_of_those_that_share_experts()
        self.device = next(self.model.parameters()).device

    def score(
        self, prefixes: Sequences, responses: Sequences, *, top_k: int = 0, on_forward: OnForward | None = None
    ) -> Scores | None:
        """``store.scores.TokenScorer.score``; None but on ranks of the last pipeline stage.

        A sequence has P + n - 1 <= ``seq_length`` tokens (its last is predicted only), and ``top_k`` <= ``columns``.
        """
        assert top_k <= self.columns
        last = parallel_state.is_pipeline_last_stage()
        scores = empty_scores(response_starts(responses), top_k) if last else None
        num_micro_batches, micro_batches = self.micro_batches(prefixes, responses)
        if not num_micro_batches:
            return scores

        def forward_step(data: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable[..., None]]:
            micro = next(data)
            batch = micro.batch.to(self.device)
            with without_output_layer(model):  # which then sees response positions only
                hidden_T1H = model(
                    input_ids=batch.tokens,
                    position_ids=batch.position_ids,
                    attention_mask=None,
                    packed_seq_params=packed_params(batch.cu_seqlens),
                )
            if on_forward is not None:
                on_forward(micro.response_tokens, micro.tokens, int(batch.cu_seqlens[-1]) * self._copies)
            return hidden_T1H, partial(self._collect, micro.places_R, batch, scores, top_k)

        with torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=micro_batches,
                model=self.model,
                num_microbatches=num_micro_batches,
                seq_length=self.seq_length * self.micro_batch_size,
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
        if scores is not None and self._share.size * self._copies > 1:
            self._bring_together(scores)
        return scores

    def _bring_together(self, scores: Scores) -> None:
        """Give every rank that scores these sequences what the others did: each token is one rank's, 0 on the others.

        Ranks of several copies are those that share experts; of one copy, the context-parallel ones.
        """
        group = parallel_state.get_context_parallel_group()
        if self._copies > 1:
            group = parallel_state.get_expert_model_parallel_group()
        for values in (scores.sampled_logprobs_R, scores.ids_RK, scores.logprobs_RK, scores.log_tail_R):
            if values is not None:
                total = torch.from_numpy(values).to(self.device)
                dist.all_reduce(total, group=group)
                values[:] = total.cpu().numpy()

    def micro_batches(self, prefixes: Sequences, responses: Sequences) -> tuple[int, Iterator[MicroBatch]]:
        """The packed rows of these sequences, ``micro_batch_size`` at a time, and how many forwards that are.

        Longest first: rows of one micro-batch, those that follow one another through a pipeline, and those that copies
        have at a time are alike. Of copies that share experts one may have padding alone in the last forward.
        """
        starts_N = response_starts(responses)
        inputs_N = np.array([len(prefix) for prefix in prefixes], np.int64) + np.diff(starts_N) - 1
        align = 1 if self._share.size == 1 else 2 * self._share.size
        rows_N, offsets_N = pack_lengths(inputs_N, self.seq_length, align)
        number = -(-(int(rows_N.max(initial=-1)) + 1) // self.micro_batch_size)
        order = np.lexsort((offsets_N, rows_N))
        copy, copies = self._copy, self._copies
        bounds = np.searchsorted(rows_N[order], np.arange(number + copies) * self.micro_batch_size)
        places_N = (rows_N % self.micro_batch_size) * self.seq_length + offsets_N
        whole = self.seq_length * self.micro_batch_size  # what pipeline stages expect of one another
        cut = parallel_state.get_pipeline_model_parallel_world_size() == 1

        def micro_batch(first: int) -> MicroBatch:
            all_copies = order[bounds[first] : bounds[first + copies]]
            own = order[bounds[first + copy] : bounds[first + copy + 1]]
            end = int((places_N + inputs_N)[all_copies].max())
            length = -(-end // align) * align if cut else whole
            batch, places_R = _lay_out(own, places_N[own], length, prefixes, responses, starts_N, self._share)
            tokens, response_tokens = (int(counts_N[all_copies].sum()) for counts_N in (inputs_N, np.diff(starts_N)))
            return MicroBatch(batch=batch, places_R=places_R, tokens=tokens, response_tokens=response_tokens)

        return -(-number // copies), map(micro_batch, range(0, number, copies))

    def _collect(
        self,
        places_R: npt.NDArray[np.int64],
        batch: PackedBatch,
        scores: Scores | None,
        top_k: int,
        hidden_T1H: Tensor,
        non_loss_data: bool,
    ) -> None:
        """Output layer and top-k of one micro-batch, into ``scores``; runs on the last pipeline stage."""
        assert scores is not None and batch.loss_mask is not None and batch.labels is not None
        positions_R, weight_VH = batch.loss_mask[0].nonzero()[:, 0], head_weight(self.model)
        for first in range(0, len(positions_R), HEAD_ROWS):
            rows = positions_R[first : first + HEAD_ROWS]
            places = places_R[first : first + HEAD_ROWS]
            logits_R1V, _ = self.model.output_layer(hidden_T1H[rows], weight=weight_VH)
            top = topk_logprobs(
                logits_R1V[:, 0],
                max(top_k, 1),
                vocab_size=self.columns,
                sampled_ids_T=batch.labels[0, rows],
                group=self._group,
            )
            assert top.sampled_logprobs_T is not None
            scores.sampled_logprobs_R[places] = top.sampled_logprobs_T.cpu().numpy()
            if scores.ids_RK is not None and scores.logprobs_RK is not None and scores.log_tail_R is not None:
                scores.ids_RK[places] = top.ids_TK.cpu().numpy()
                scores.logprobs_RK[places] = top.logprobs_TK.cpu().numpy()
                scores.log_tail_R[places] = top.log_tail_T.clamp(min=LOG_TAIL_FLOOR).cpu().numpy()


def copy_of_those_that_share_experts() -> tuple[int, int]:
    """Which one this rank belongs to of the model's copies that share experts, and how many those are.

    Experts are shared along the context-parallel ranks of a copy first.
    """
    experts = parallel_state.get_expert_model_parallel_world_size()
    copies = max(experts // parallel_state.get_context_parallel_world_size(), 1)
    return parallel_state.get_data_parallel_rank() % copies, copies


def _lay_out(
    samples: npt.NDArray[np.integer],
    offsets: npt.NDArray[np.integer],
    length: int,
    prefixes: Sequences,
    responses: Sequences,
    starts_N: npt.NDArray[np.int64],
    share: ContextShare,
) -> tuple[PackedBatch, npt.NDArray[np.int64]]:
    """Lay sequences into ``length`` tokens at ascending ``offsets``; what lies between them is padding.

    A sequence's segment goes on to the next length that ranks can share. Beside the batch: where its response tokens
    belong in ``Scores``, int64 [R].
    """
    tokens_T, labels_T, places_T = np.zeros(length, np.int64), np.zeros(length, np.int64), np.zeros(length, np.int64)
    mask_T = np.zeros(length, np.float32)
    cuts, align = [0], 1 if share.size == 1 else 2 * share.size
    for sample, offset in zip(samples.tolist(), offsets.tolist(), strict=True):
        prefix, response = prefixes[sample], responses[sample]
        begin = offset + len(prefix)  # of the response
        end = begin + len(response) - 1
        tokens_T[offset:begin] = prefix
        tokens_T[begin:end] = response[:-1]
        labels_T[begin - 1 : end] = response
        mask_T[begin - 1 : end] = 1.0
        places_T[begin - 1 : end] = np.arange(starts_N[sample], starts_N[sample + 1])
        cuts += [offset, -(-end // align) * align]
    bounds = np.unique(np.array([*cuts, length], np.int32))
    runs = [run for start, end in pairwise(bounds.tolist()) for run in share.runs(start, end)]
    own = np.concatenate([np.arange(run.start, run.stop) for run in runs])
    cu_seqlens = torch.from_numpy(bounds)
    batch = PackedBatch(
        tokens=torch.from_numpy(tokens_T[own])[None],
        position_ids=share.positions(cu_seqlens, len(own))[None],
        cu_seqlens=cu_seqlens,
        max_seqlen=int(np.diff(bounds).max()),
        labels=torch.from_numpy(labels_T[own])[None],
        loss_mask=torch.from_numpy(mask_T[own])[None],
        weights=None,
        teacher_ids=None,
        teacher_logprobs=None,
        teacher_log_tail=None,
        generator_logprobs=None,
    )
    return batch, places_T[own][mask_T[own] > 0]
