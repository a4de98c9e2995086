"""What must hold of the distillation loss for any numbers, on random small problems."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_npd.ops.arguments import MODES
from tests.ops.reference import Case, make_case, run

# fp32 results with tolerances of fp32.
problems = st.builds(
    lambda vocab_size, share, seed, scale: make_case(
        4, vocab_size, max(1, round(share * vocab_size)), seed=seed, scale=scale
    ),
    st.integers(2, 60),
    st.floats(0, 1),
    st.integers(0, 2**31),
    st.sampled_from([0.1, 1.0, 5.0]),
)


@settings(deadline=None, max_examples=60)
@given(problems, st.sampled_from(MODES), st.sampled_from([0.0, 0.5, 1.0]))
def test_gradient_sums_to_zero_and_logits_may_shift(case: Case, mode: str, alpha: float) -> None:
    result, grad_TV = run(case, case.logits_TV, mode=mode, alpha=alpha)
    assert grad_TV.sum(1).abs().max() < 1e-5
    shifted, shifted_TV = run(case, case.logits_TV + 3.0, mode=mode, alpha=alpha)
    torch.testing.assert_close(shifted.loss_T, result.loss_T, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(shifted_TV, grad_TV, atol=1e-5, rtol=1e-4)


@settings(deadline=None, max_examples=60)
@given(problems)
def test_tail_is_between_zero_and_the_full_divergence(case: Case) -> None:
    """Never negative without a clamp, and below the KL over the whole vocabulary, which k = V gives."""
    top_k = case.teacher["teacher_ids_TK"].shape[1]
    whole = make_whole(case)
    kd_T = run(case, case.logits_TV, alpha=1.0)[0].kd_T
    full_T = run(whole, whole.logits_TV, alpha=1.0)[0].kd_T
    assert (kd_T > -1e-5).all() and (kd_T <= full_T + 1e-5).all()
    assert top_k <= whole.vocab_size


def make_whole(case: Case) -> Case:
    """The same student with a whole teacher that agrees with the case's on S: its tail spread evenly."""
    ids_TK = case.teacher["teacher_ids_TK"]
    top_k = ids_TK.shape[1]
    rest = case.vocab_size - top_k
    log_p_TV = torch.full_like(case.logits_TV, -torch.inf)
    if rest:
        log_p_TV[:] = (case.teacher["teacher_log_tail_T"] - torch.log(torch.tensor(float(rest))))[:, None]
    log_p_TV.scatter_(1, ids_TK, case.teacher["teacher_logprobs_TK"])
    order_TV = log_p_TV.argsort(1, descending=True)
    teacher = {"teacher_ids_TK": order_TV, "teacher_logprobs_TK": log_p_TV.gather(1, order_TV)}
    return Case(case.logits_TV, case.labels_T, teacher)


@settings(deadline=None, max_examples=40)
@given(problems, st.sampled_from(["tail", "renorm_both"]))
def test_zero_where_teacher_and_student_agree(case: Case, mode: str) -> None:
    top_k = case.teacher["teacher_ids_TK"].shape[1]
    log_q_TV, order_TV = case.logits_TV.double().log_softmax(1).sort(dim=1, descending=True)
    teacher = {"teacher_ids_TK": order_TV[:, :top_k], "teacher_logprobs_TK": log_q_TV[:, :top_k].float()}
    if top_k < case.vocab_size:
        teacher["teacher_log_tail_T"] = log_q_TV[:, top_k:].logsumexp(1).float()
    result, grad_TV = run(Case(case.logits_TV, case.labels_T, teacher), case.logits_TV, mode=mode, alpha=1.0)
    assert result.kd_T.abs().max() < 2e-6 and grad_TV.abs().max() < 2e-6
