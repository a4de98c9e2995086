"""The distillation loss against fp64 autograd of the written formulas, on one slice of the vocabulary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from megatron_npd.log import UserError
from megatron_npd.ops import distill_loss_torch
from megatron_npd.ops.arguments import MODES
from megatron_npd.ops.distill_loss import DistillLoss, distill_loss
from tests.ops.reference import Case, compare, make_case, reference

T = 12
MASKS = {
    "all": None,
    "alternating": torch.tensor([0, 1] * 6),
    "runs": torch.tensor([0.0] * 2 + [1.0] * 5 + [0.0] * 2 + [1.0] * 3),
    "one": torch.arange(T) == 7,
    "none": torch.zeros(T, dtype=torch.bool),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(case: Case, logits_TV: Tensor, *, grad_T: Tensor | None = None, **options: Any) -> tuple[DistillLoss, Tensor]:
    """Loss and logits' gradient of a non-leaf tensor that holds ``logits_TV``."""
    leaf_TV = logits_TV.clone().requires_grad_()
    result = distill_loss(leaf_TV * 1.0, case.labels_T, **{**case.teacher, **options})
    (result.loss_T if grad_T is None else result.loss_T * grad_T).sum().backward()
    assert leaf_TV.grad is not None and leaf_TV.grad.dtype == logits_TV.dtype
    return result, leaf_TV.grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("vocab_size", "top_k"), [(37, 1), (37, 10), (37, 37), (1003, 10), (1003, 128)])
def test_equals_the_formula(vocab_size: int, top_k: int, dtype: torch.dtype, mode: str) -> None:
    """Labels in and out of S, all masks, weights, both alphas' ends and padded columns."""
    case = make_case(T, vocab_size, top_k)
    logits_TV = case.logits_TV.to(dtype)
    padded_TV = torch.cat([logits_TV, torch.full((T, 5), 30.0, dtype=dtype)], dim=1)
    weights_T, grad_T = torch.rand(2, T, generator=torch.Generator().manual_seed(3)).unbind(0)
    for mask_T in MASKS.values():
        for alpha, weighted in ((0.9, False), (0.3, True), (1.0, False), (0.0, True)):
            options = {"mask_T": mask_T, "alpha": alpha, "mode": mode, "weights_T": weights_T if weighted else None}
            scale_T = grad_T if weighted else None
            expected = reference(logits_TV, case.labels_T, case.teacher, grad_T=scale_T, **options)
            for inplace in (True, False):
                result, grad_TV = run(
                    case, padded_TV, grad_T=scale_T, vocab_size=vocab_size, inplace=inplace, **options
                )
                compare(result, grad_TV[:, :vocab_size], expected)
                assert not grad_TV[:, vocab_size:].any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mode", ["renorm_teacher", "renorm_both"])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature(temperature: float, mode: str, dtype: torch.dtype) -> None:
    case = make_case(T, 203, 10)
    logits_TV = case.logits_TV.to(dtype)
    for alpha in (0.0, 0.7, 1.0):
        options = {"alpha": alpha, "mode": mode, "temperature": temperature, "mask_T": MASKS["runs"]}
        compare(*run(case, logits_TV, **options), reference(logits_TV, case.labels_T, case.teacher, **options))


DIVERGENCES = [
    {"divergence": "reverse_kl"},
    {"divergence": "jsd", "beta": 0.5},
    {"divergence": "jsd", "beta": 0.1},
    {"divergence": "skew_kl", "skew": 0.1},
    {"divergence": "skew_kl", "skew": 0.0},  # the forward KL again
    {"divergence": "skew_reverse_kl", "skew": 0.3},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda options: "-".join(map(str, options.values())))
def test_other_divergences(divergence: dict[str, Any], dtype: torch.dtype) -> None:
    """With the tail bucket and renormalised, also at another temperature, with k = V and k = 1."""
    for vocab_size, top_k in ((203, 10), (37, 37), (203, 1)):
        case = make_case(T, vocab_size, top_k)
        logits_TV = case.logits_TV.to(dtype)
        weights_T = torch.rand(T, generator=torch.Generator().manual_seed(3))
        for mode, temperature, alpha in (("tail", 1.0, 1.0), ("tail", 1.0, 0.6), ("renorm_both", 2.0, 0.6)):
            options = {"mode": mode, "temperature": temperature, "alpha": alpha, "weights_T": weights_T} | divergence
            expected = reference(logits_TV, case.labels_T, case.teacher, mask_T=MASKS["runs"], **options)
            compare(*run(case, logits_TV, mask_T=MASKS["runs"], **options), expected)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda options: "-".join(map(str, options.values())))
def test_other_divergences_of_small_tails(divergence: dict[str, Any]) -> None:
    """A student's tail of 1e-9: finite, and within 1e-5 of fp64."""
    case = small_tails(9, ratio=10.0)
    expected = reference(case.logits_TV, case.labels_T, case.teacher, alpha=1.0, **divergence)
    compare(*run(case, case.logits_TV, alpha=1.0, **divergence), expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_without_a_teacher_it_is_cross_entropy(dtype: torch.dtype) -> None:
    case = make_case(T, 203, 10)
    logits_TV = case.logits_TV.to(dtype)
    for mask_T in MASKS.values():
        expected = reference(logits_TV, case.labels_T, {}, alpha=0.0, mask_T=mask_T)
        result, grad_TV = run(Case(logits_TV, case.labels_T, {}), logits_TV, alpha=0.0, mask_T=mask_T)
        compare(result, grad_TV, expected)
        assert not result.kd_T.any() and not result.teacher_mass_T.any() and not result.student_mass_T.any()


@pytest.mark.parametrize("mask", MASKS)
def test_chunks_do_not_matter(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk, several, and chunks of one row; rows that follow one another and rows that do not."""
    case = make_case(T, 203, 10)
    options = {"mask_T": MASKS[mask], "mode": "renorm_teacher", "temperature": 2.0}
    whole, whole_TV = run(case, case.logits_TV, **options)
    for rows in (1, 2, 5):
        monkeypatch.setattr(distill_loss_torch, "CHUNK_ELEMENTS", rows * 204)
        for inplace in (True, False):
            chunked, chunked_TV = run(case, case.logits_TV, inplace=inplace, **options)
            torch.testing.assert_close(chunked_TV, whole_TV, atol=1e-7, rtol=1e-6)
            torch.testing.assert_close(chunked.loss_T, whole.loss_T)


def small_tails(exponent: int, ratio: float) -> Case:
    """A student whose mass off S is 10^-exponent, a teacher whose is ``ratio`` times that."""
    case = make_case(T, 1003, 10)
    ids_TK = case.teacher["teacher_ids_TK"]
    outside_TV = outside(case)
    q_off_T = case.logits_TV.double().masked_fill(~outside_TV, -torch.inf).logsumexp(1)
    q_on_T = case.logits_TV.double().gather(1, ids_TK).logsumexp(1)
    shift_T1 = (-exponent * math.log(10.0) - q_off_T + q_on_T)[:, None]
    logits_TV = torch.where(outside_TV, case.logits_TV + shift_T1, case.logits_TV.double()).float()
    tail = min(0.5, ratio * 10.0**-exponent)
    log_p_TK = case.teacher["teacher_logprobs_TK"].double().log_softmax(1) + math.log1p(-tail)
    teacher = {"teacher_ids_TK": ids_TK, "teacher_logprobs_TK": log_p_TK.float()}
    teacher["teacher_log_tail_T"] = torch.full((T,), math.log(tail))
    return Case(logits_TV, case.labels_T, teacher)


def outside(case: Case) -> Tensor:
    """Which columns are not in S."""
    return torch.ones_like(case.logits_TV, dtype=torch.bool).scatter_(1, case.teacher["teacher_ids_TK"], False)


@pytest.mark.parametrize("exponent", range(1, 13))
def test_small_tails_are_exact(exponent: int) -> None:
    """A student's tail of 1e-1 to 1e-12 under a teacher's that is ten times larger, and ten times smaller."""
    for ratio in (0.1, 10.0):
        case = small_tails(exponent, ratio)
        expected = reference(case.logits_TV, case.labels_T, case.teacher, alpha=1.0)
        result, grad_TV = run(case, case.logits_TV, alpha=1.0)
        compare(result, grad_TV, expected)
        # Off S alone, relative to the largest there: the gradient's share of t_q - t_p is right too.
        off_N, expected_off_N = grad_TV.double()[outside(case)], expected["grad_TV"][outside(case)]
        assert (off_N - expected_off_N).abs().max() <= 1e-5 * expected_off_N.abs().max()


@pytest.mark.parametrize("mode", MODES)
def test_extreme_logits(mode: str) -> None:
    """Logits of +-1e4, columns of -inf outside S, a teacher id of probability 0, a teacher mass of 1 - 1e-7."""
    case = make_case(T, 203, 10)
    logits_TV = case.logits_TV.clone()
    outside_TV = outside(case)
    outside_TV[torch.arange(T), case.labels_T] = False
    logits_TV[0:2] *= 1e4 / logits_TV[0:2].abs().amax(1, keepdim=True)
    logits_TV[2:4] = torch.where(outside_TV[2:4] & (torch.arange(203) % 3 > 0), -torch.inf, logits_TV[2:4])
    teacher = {name: tensor.clone() for name, tensor in case.teacher.items()}
    teacher["teacher_logprobs_TK"][4:6, -1] = -torch.inf
    teacher["teacher_logprobs_TK"][6:8] = teacher["teacher_logprobs_TK"][6:8].log_softmax(1)
    teacher["teacher_log_tail_T"][6:8] = torch.log(torch.tensor(1e-7))
    expected = reference(logits_TV, case.labels_T, teacher, mode=mode)
    result, grad_TV = run(Case(logits_TV, case.labels_T, teacher), logits_TV, mode=mode)
    for tensor in (result.loss_T, grad_TV):
        assert tensor.isfinite().all()
    compare(result, grad_TV, expected)


def test_columns_off_s_all_at_minus_infinity() -> None:
    """A student without a tail: finite gradient; the loss is infinite exactly where the teacher has one."""
    case = make_case(T, 37, 10)
    logits_TV = torch.full_like(case.logits_TV, -torch.inf)
    ids_TK = case.teacher["teacher_ids_TK"]
    logits_TV.scatter_(1, ids_TK, case.logits_TV.gather(1, ids_TK))
    for mode in MODES:
        result, grad_TV = run(case, logits_TV, mode=mode, alpha=1.0)
        assert (result.loss_T == torch.inf).all() if mode == "tail" else result.loss_T.isfinite().all()
        assert grad_TV.isfinite().all()


@pytest.mark.parametrize("inplace", [True, False])
def test_a_row_of_nan_touches_no_other(inplace: bool) -> None:
    case = make_case(T, 37, 10)
    clean, clean_TV = run(case, case.logits_TV, inplace=inplace)
    logits_TV = case.logits_TV.clone()
    logits_TV[3, 5], logits_TV[6], logits_TV[9, 0] = torch.nan, torch.inf, torch.inf
    result, grad_TV = run(case, logits_TV, inplace=inplace)
    good_T = torch.ones(T, dtype=torch.bool)
    good_T[[3, 6, 9]] = False
    assert result.loss_T[~good_T].isnan().all()
    assert torch.equal(grad_TV[good_T], clean_TV[good_T])
    for name, tensor in vars(result).items():
        assert torch.equal(tensor[good_T], getattr(clean, name)[good_T])


@pytest.mark.parametrize("inplace", [True, False])
def test_nothing_of_a_masked_token_is_read(inplace: bool) -> None:
    """NaN logits, ids and labels out of range, duplicates and masses above 1: gradient 0 and no complaint."""
    case = make_case(T, 37, 10)
    mask_T = MASKS["runs"]
    assert mask_T is not None
    masked_T = mask_T == 0
    clean, clean_TV = run(case, case.logits_TV, mask_T=mask_T, inplace=inplace)
    logits_TV, labels_T = case.logits_TV.clone(), case.labels_T.clone()
    teacher = {name: tensor.clone() for name, tensor in case.teacher.items()}
    logits_TV[masked_T], labels_T[masked_T] = torch.nan, -100
    teacher["teacher_ids_TK"][masked_T] = 10**9
    teacher["teacher_logprobs_TK"][masked_T] = 7.0
    result, grad_TV = run(Case(logits_TV, labels_T, teacher), logits_TV, mask_T=mask_T, inplace=inplace)
    assert torch.equal(grad_TV, clean_TV) and not grad_TV[masked_T].any()
    for name, tensor in vars(result).items():
        assert torch.equal(tensor, getattr(clean, name)) and not tensor[masked_T].any()


def test_gradient_takes_the_logits_place_and_reaches_the_weights() -> None:
    """The logits as a model makes them, a linear layer's output: right gradients, in the same storage."""
    case = make_case(T, 203, 10)
    torch.manual_seed(0)
    hidden_TH, weight_VH = torch.randn(T, 16, dtype=torch.float64), torch.randn(203, 16, dtype=torch.float64)
    exact = [tensor.clone().requires_grad_() for tensor in (hidden_TH, weight_VH)]
    logits_TV = torch.nn.functional.linear(*exact)
    expected = reference(logits_TV, case.labels_T, case.teacher)
    logits_TV.backward(expected["grad_TV"])
    ours = [tensor.float().requires_grad_() for tensor in (hidden_TH, weight_VH)]
    logits_1TV = torch.nn.functional.linear(*ours)[None]
    seen: list[Tensor] = []
    logits_1TV.register_hook(seen.append)
    distill_loss(logits_1TV.view(T, -1), case.labels_T, **case.teacher).loss_T.sum().backward()
    assert seen[0].data_ptr() == logits_1TV.data_ptr()
    for tensor, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(tensor.grad, other.grad, atol=1e-5, rtol=1e-5, check_dtype=False)


class _Largest(TorchDispatchMode):
    """Records the largest storage that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.known |= {x.untyped_storage().data_ptr() for x in inputs}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scaled", [False, True])
def test_no_memory_of_the_logits_size(dtype: torch.dtype, scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(T, 4001, 10)
    monkeypatch.setattr(distill_loss_torch, "CHUNK_ELEMENTS", 4096)
    logits_TV = case.logits_TV.to(dtype).requires_grad_()
    with _Largest() as memory:
        result = distill_loss(logits_TV, case.labels_T, **case.teacher)
        (result.loss_T.sum() * (0.5 if scaled else 1.0)).backward()
    assert memory.largest <= 4001 * 4, "one row in fp32"


def test_evaluation_leaves_the_logits_alone() -> None:
    case = make_case(T, 203, 10)
    logits_TV = case.logits_TV.clone().requires_grad_()
    with torch.no_grad():
        result = distill_loss(logits_TV, case.labels_T, **case.teacher)
    assert torch.equal(logits_TV, case.logits_TV) and not result.loss_T.requires_grad
    trained = distill_loss(logits_TV, case.labels_T, **case.teacher)
    assert torch.equal(trained.loss_T, result.loss_T)
    assert trained.loss_T.requires_grad and not any(
        tensor.requires_grad for name, tensor in vars(trained).items() if name != "loss_T"
    )


def test_recomputation_gives_the_same_gradient() -> None:
    case = make_case(T, 203, 10)
    _, expected_TV = run(case, case.logits_TV)
    leaf_TV = case.logits_TV.clone().requires_grad_()

    def step(x_TV: Tensor) -> Tensor:
        return distill_loss(x_TV * 1.0, case.labels_T, **case.teacher).loss_T.sum()

    loss = checkpoint(step, leaf_TV, use_reentrant=False)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert torch.equal(leaf_TV.grad, expected_TV)


def test_autograd_refuses_what_the_overwritten_logits_would_make_wrong() -> None:
    """tanh's backward needs its output, a second backward the unscaled gradient: errors, not wrong numbers."""
    case = make_case(T, 37, 10)
    for inplace in (True, False):
        leaf_TV = (case.logits_TV * 0.1).requires_grad_()
        loss_T = distill_loss(torch.tanh(leaf_TV), case.labels_T, **case.teacher, inplace=inplace).loss_T
        if inplace:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss_T.sum().backward()
        else:
            loss_T.sum().backward()
    loss_T = distill_loss(case.logits_TV.clone().requires_grad_() * 1.0, case.labels_T, **case.teacher).loss_T
    (loss_T * 0.5).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss_T * 0.5).sum().backward()
    logits_TV = case.logits_TV.clone().requires_grad_() * 1.0
    loss_T = distill_loss(logits_TV, case.labels_T, **case.teacher).loss_T
    logits_TV.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_T.sum().backward()


# The maths, on random small problems: fp32 results with tolerances of fp32.
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
        ({"impl": "fast"}, "impl must be auto or torch"),
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
