"""Arguments of the distillation loss that break a rule, and the choice of an implementation."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest
import torch

from megatron_npd import ops
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.ops import distill_loss_triton, implementation
from megatron_npd.ops.distill_loss import distill_loss
from megatron_npd.ops.implementation import use_triton
from tests.ops.reference import T, make_case


def bad(**change: Any) -> dict[str, Any]:
    case = make_case(T, 37, 10)
    return {"logits_TV": case.logits_TV, "labels_T": case.labels_T, **case.teacher} | change


IDS, LOGPROBS = "teacher_ids_TK", "teacher_logprobs_TK"
TWICE = torch.arange(10).repeat(T, 1).clamp(min=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logits_TV": torch.zeros(1, T, 37)}, r"logits_TV must be of shape \[T, V\], got \[1, 12, 37\]"),
        ({"logits_TV": torch.zeros(T, 37, dtype=torch.float64)}, "logits_TV must be float32"),
        ({"labels_T": torch.zeros(T + 1, dtype=torch.int64)}, r"labels_T must be of shape \[12\]"),
        ({"labels_T": torch.zeros(T)}, "labels_T must be of an integer dtype"),
        ({"labels_T": torch.full((T,), 37)}, r"labels_T must be in \[0, 37\), got 37 in row 0"),
        ({"labels_T": torch.full((T,), -1)}, r"labels_T must be in \[0, 37\), got -1"),
        ({"mask_T": torch.ones(T, 1)}, "mask_T must be of shape"),
        ({"weights_T": torch.ones(3)}, "weights_T must be of shape"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"mode": "reverse"}, "mode must be one of tail"),
        ({"divergence": "kl"}, "divergence must be one of forward_kl"),
        (
            {"divergence": "reverse_kl", "mode": "truncated"},
            "mode must be tail or renorm_both for divergence reverse_kl",
        ),
        ({"divergence": "jsd", "mode": "renorm_teacher"}, "mode must be tail or renorm_both for divergence jsd"),
        ({"divergence": "jsd", "beta": 1.0}, r"beta must be in \(0, 1\), got 1.0"),
        ({"divergence": "skew_kl", "skew": 1.0}, r"skew must be in \[0, 1\), got 1.0"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"temperature": -1.0, "mode": "renorm_both"}, "temperature must be a finite number > 0"),
        ({"temperature": 2.0}, "temperature must be 1 for mode tail.*renorm_teacher"),
        ({"temperature": 2.0, "mode": "truncated"}, "temperature must be 1 for mode truncated"),
        ({"vocab_size": 38}, r"vocab_size must be in \[1, 37\].*got 38"),
        ({"vocab_size": 9}, "teacher_ids_TK must be at most 9 .* wide, got 10"),
        ({"impl": "fast"}, "impl must be auto, torch or triton, got 'fast'"),
        ({IDS: None}, "must be given together"),
        ({LOGPROBS: None}, "must be given together"),
        ({IDS: None, LOGPROBS: None}, "alpha must be 0 without teacher_ids_TK, got 0.9"),
        ({"teacher_log_tail_T": None}, "teacher_log_tail_T must be given for mode tail"),
        ({"teacher_log_tail_T": torch.zeros(3)}, "teacher_log_tail_T must be floating, of shape"),
        ({IDS: torch.zeros(3, 10, dtype=torch.int64)}, "teacher_ids_TK must be of shape"),
        ({IDS: torch.zeros(T, 0, dtype=torch.int64)}, "teacher_ids_TK must be of shape"),
        ({IDS: torch.zeros(T, 10)}, "teacher_ids_TK must be of an integer dtype"),
        ({LOGPROBS: torch.zeros(T, 9)}, "teacher_logprobs_TK must be floating, of teacher_ids_TK's shape"),
        ({IDS: torch.arange(28, 38).repeat(T, 1)}, r"teacher_ids_TK must be in \[0, 37\)"),
        ({IDS: TWICE}, r"teacher_ids_TK must be distinct in a row, got \[1, 1, 2"),
        ({LOGPROBS: torch.linspace(-9, -5, 10).repeat(T, 1)}, "teacher_logprobs_TK must be descending"),
        ({LOGPROBS: torch.full((T, 10), -2.3)}, "mass <= 1 .* got a mass of 1.0025"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], words: str) -> None:
    arguments = bad(**change)
    logits_TV, labels_T = arguments.pop("logits_TV").requires_grad_(), arguments.pop("labels_T")
    before_TV = logits_TV.detach().clone()
    with pytest.raises(UserError, match=words):
        distill_loss(logits_TV, labels_T, **arguments)
    assert torch.equal(logits_TV, before_TV), "refused before anything is written"


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_takes_triton_on_cuda_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: lines.append(record.getMessage()))
    implementation._log_once.cache_clear()
    get_logger().addHandler(handler)
    try:
        assert [use_triton("auto", device) for device in (CUDA, CPU, CUDA, CPU)] == [True, False, True, False]
        with monkeypatch.context() as patch:  # where it is not installed
            patch.delattr(ops, "distill_loss_triton")
            patch.setitem(sys.modules, "megatron_npd.ops.distill_loss_triton", None)
            assert not use_triton("auto", CUDA)
            with pytest.raises(UserError, match="impl must be one that can run, got 'triton' with no Triton"):
                use_triton("triton", CUDA)
    finally:
        get_logger().removeHandler(handler)
    assert [line.split(" (")[0] for line in lines] == [
        "ops: impl auto is triton",
        "ops: impl auto is torch, with tensors on cpu",
        "ops: impl auto is torch, with no Triton",
    ]


def test_a_choice_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill_loss_triton, "INTERPRETED", False)
    assert use_triton("triton", CUDA) and not use_triton("torch", CUDA)
    with pytest.raises(UserError, match="got 'triton' with tensors on cpu; use auto, or set TRITON_INTERPRET=1"):
        distill_loss(**bad(), impl="triton")
