"""Training against plain torch: an unpacked transformers model, the loss by its formula, and torch's AdamW."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_npd.data.packed_dataset import PackedRows, Streams
from megatron_npd.store.annotation_store import AnnotationStore
from megatron_npd.training.trainer import train
from tests.helpers import VOCAB_SIZE
from tests.store.make_store import decode_teacher
from tests.training.make_run import column, config, make_packs

SAMPLES, STEPS, LR, MIN_LR, ALPHA, CLIP = 16, 4, 3e-3, 1e-4, 0.7, 0.3
PARTS = ("loss", "ce", "entropy", "kd", "teacher_mass", "student_mass", "lag_k1", "lag_k3")


def _sample_sums(model: torch.nn.Module, store: AnnotationStore, index: int) -> torch.Tensor:
    """Sums over one sample's response tokens, in the order of ``PARTS``; differentiable."""
    prompt, tokens = int(store.prompt_lens[index]), torch.from_numpy(store.tokens(index).astype("int64"))
    logits = model(input_ids=tokens[None]).logits[0, prompt - 1 : -1]
    log_q = torch.log_softmax(logits.double(), dim=-1)
    ids, log_p, log_tail = decode_teacher(store.teacher(index), VOCAB_SIZE)
    log_p, log_tail = log_p.double(), log_tail.double()
    log_q_ids = log_q.gather(1, ids.long())
    log_q_tail = log_q.scatter(1, ids.long(), -math.inf).logsumexp(1)
    kd = (log_p.exp() * (log_p - log_q_ids)).sum(1) + log_tail.exp() * (log_tail - log_q_tail)
    label = log_q.gather(1, tokens[prompt:, None])[:, 0]
    ratio = label - torch.from_numpy(store.generator(index).astype("float64"))
    loss = -(1 - ALPHA) * label + ALPHA * kd
    entropy = torch.special.entr(log_q.exp()).sum(1)
    parts = (loss, -label, entropy, kd, log_p.exp().sum(1), log_q_ids.exp().sum(1), -ratio, ratio.exp() - 1 - ratio)
    return torch.stack([part.sum() for part in parts])


def _reference(model_dir: Path, store: AnnotationStore, weights: list[float]) -> tuple[list[list[float]], list[float]]:
    """Means over response tokens and gradient norms of each step over all samples."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    embedding.padding_idx = None  # transformers leaves that row's gradient out
    decayed = [p for p in model.parameters() if p.dim() > 1]
    kept = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    response_tokens = int(store.response_lens.sum())
    means, norms = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = MIN_LR + 0.5 * (1 + math.cos(math.pi * step / STEPS)) * (LR - MIN_LR)
        optimizer.zero_grad()
        each = torch.stack([_sample_sums(model, store, index) for index in range(len(store))])
        loss = each[:, :1] * torch.tensor(weights)[:, None]  # the parts are told without weights
        sums = torch.cat([loss, each[:, 1:]], dim=1).sum(0) / response_tokens
        sums[0].backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        means.append(sums.tolist())
    return means, norms


@pytest.mark.parametrize(("seq_length", "weighted"), [(64, False), (128, False), (64, True)])
def test_steps_equal_unpacked_transformers_and_adamw(
    tmp_path: Path, tiny_model_dir: Path, seq_length: int, weighted: bool
) -> None:
    weights = [0.25 + index % 4 if weighted else 1.0 for index in range(SAMPLES)]
    packs = make_packs(tmp_path, samples=SAMPLES, seq_length=seq_length, weights=weights)
    rows = len(PackedRows(packs, streams=Streams()))  # each global batch holds every sample once
    means, norms = _reference(tiny_model_dir, AnnotationStore(tmp_path / "annotations"), weights)

    result = train(
        config(
            tiny_model_dir,
            packs,
            metrics_path=str(tmp_path / "metrics.jsonl"),
            train_iters=STEPS,
            global_batch_size=rows,
            kd_alpha=ALPHA,
            lr=LR,
            min_lr=MIN_LR,
            lr_warmup_iters=0,
            weight_decay=0.1,
            clip_grad=CLIP,
            log_entropy=True,
        )
    )

    assert result.rows_consumed == STEPS * rows
    for index, name in enumerate(PARTS):
        expected = [step[index] for step in means]
        assert column(result.metrics_path, name) == pytest.approx(expected, rel=2e-5), name
    assert column(result.metrics_path, "grad_norm") == pytest.approx(norms, rel=1e-4)
    assert min(norms) > CLIP, "clipping must take part"
