"""The distillation loss against fp64 autograd of the written formulas, on one slice of the vocabulary."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from megatron_npd.choices import Impl
from megatron_npd.ops import distill_loss_torch, distill_loss_triton
from megatron_npd.ops.arguments import MODES
from tests.ops.reference import DTYPES, MASKS, Case, T, compare, make_case, outside, reference, run, small_tails


def some(impl: Impl, variants: Iterable[Any], count: int, *key: Any) -> list[Any]:
    """All variants, or for the interpreter, which is slow, a few that depend on ``key``."""
    variants = list(variants)
    return random.Random(str(key)).sample(variants, count) if impl == "triton" else variants


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("vocab_size", "top_k"), [(37, 1), (37, 10), (37, 37), (1003, 10), (1003, 128)])
def test_equals_the_formula(vocab_size: int, top_k: int, dtype: torch.dtype, mode: str, impl: Impl) -> None:
    """Labels in and out of S, all masks, weights, both alphas' ends and padded columns."""
    case = make_case(T, vocab_size, top_k)
    logits_TV = case.logits_TV.to(dtype)
    padded_TV = torch.cat([logits_TV, torch.full((T, 5), 30.0, dtype=dtype)], dim=1)
    weights_T, grad_T = torch.rand(2, T, generator=torch.Generator().manual_seed(3)).unbind(0)
    variants = itertools.product(MASKS, ((0.9, False), (0.3, True), (1.0, False), (0.0, True)), (True, False))
    for mask, (alpha, weighted), inplace in some(impl, variants, 1, vocab_size, top_k, dtype, mode):
        weights = weights_T if weighted else None
        options = {"mask_T": MASKS[mask], "alpha": alpha, "mode": mode, "weights_T": weights, "entropy": inplace}
        scale_T = grad_T if weighted else None
        expected = reference(logits_TV, case.labels_T, case.teacher, grad_T=scale_T, **options)
        options |= {"vocab_size": vocab_size, "inplace": inplace}
        result, grad_TV = run(case, padded_TV, impl=impl, grad_T=scale_T, **options)
        compare(result, grad_TV[:, :vocab_size], expected)
        assert not grad_TV[:, vocab_size:].any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mode", ["renorm_teacher", "renorm_both"])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature(temperature: float, mode: str, dtype: torch.dtype, impl: Impl) -> None:
    case = make_case(T, 203, 10)
    logits_TV = case.logits_TV.to(dtype)
    for alpha in some(impl, (0.0, 0.7, 1.0), 1, temperature, mode, dtype):
        options = {"alpha": alpha, "mode": mode, "temperature": temperature, "mask_T": MASKS["runs"], "entropy": True}
        compare(
            *run(case, logits_TV, impl=impl, **options), reference(logits_TV, case.labels_T, case.teacher, **options)
        )


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
def test_other_divergences(divergence: dict[str, Any], dtype: torch.dtype, impl: Impl) -> None:
    """With the tail bucket and renormalised, also at another temperature, with k = V and k = 1."""
    weights_T = torch.rand(T, generator=torch.Generator().manual_seed(3))
    ways = (("tail", 1.0, 1.0), ("tail", 1.0, 0.6), ("renorm_both", 2.0, 0.6))
    variants = itertools.product(((203, 10), (37, 37), (203, 1)), ways)
    for (vocab_size, top_k), (mode, temperature, alpha) in some(impl, variants, 2, divergence, dtype):
        case = make_case(T, vocab_size, top_k)
        logits_TV = case.logits_TV.to(dtype)
        options = {"mode": mode, "temperature": temperature, "alpha": alpha, "weights_T": weights_T} | divergence
        options["mask_T"] = MASKS["runs"]
        expected = reference(logits_TV, case.labels_T, case.teacher, **options)
        compare(*run(case, logits_TV, impl=impl, **options), expected)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda options: "-".join(map(str, options.values())))
def test_other_divergences_of_small_tails(divergence: dict[str, Any], impl: Impl) -> None:
    """A student's tail of 1e-9: finite, and within 1e-5 of fp64."""
    case = small_tails(9, ratio=10.0)
    expected = reference(case.logits_TV, case.labels_T, case.teacher, alpha=1.0, **divergence)
    compare(*run(case, case.logits_TV, impl=impl, alpha=1.0, **divergence), expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_without_a_teacher_it_is_cross_entropy(dtype: torch.dtype, impl: Impl) -> None:
    case = make_case(T, 203, 10)
    logits_TV = case.logits_TV.to(dtype)
    for mask_T in MASKS.values():
        options = {"alpha": 0.0, "mask_T": mask_T, "entropy": True}
        expected = reference(logits_TV, case.labels_T, {}, **options)
        result, grad_TV = run(Case(logits_TV, case.labels_T, {}), logits_TV, impl=impl, **options)
        compare(result, grad_TV, expected)
        assert not result.kd_T.any() and not result.teacher_mass_T.any() and not result.student_mass_T.any()


@pytest.mark.parametrize("mask", MASKS)
def test_chunks_do_not_matter(mask: str, impl: Impl, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk, several, and chunks of one row; rows that follow one another and rows that do not; Triton's tiles."""
    case = make_case(T, 203, 10)
    options = {"mask_T": MASKS[mask], "mode": "renorm_teacher", "temperature": 2.0}
    whole, whole_TV = run(case, case.logits_TV, **options)
    for rows, inplace in some(impl, itertools.product((1, 2, 5), (True, False)), 1, mask):
        monkeypatch.setattr(distill_loss_torch, "CHUNK_ELEMENTS", rows * 204)
        monkeypatch.setattr(distill_loss_triton, "BLOCK", 64)
        chunked, chunked_TV = run(case, case.logits_TV, impl=impl, inplace=inplace, **options)
        torch.testing.assert_close(chunked_TV, whole_TV, atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(chunked.loss_T, whole.loss_T)


@pytest.mark.parametrize("exponent", range(1, 13))
def test_small_tails_are_exact(exponent: int, impl: Impl) -> None:
    """A student's tail of 1e-1 to 1e-12 under a teacher's that is ten times larger, and ten times smaller."""
    for ratio in some(impl, (0.1, 10.0), 1, exponent):
        case = small_tails(exponent, ratio)
        expected = reference(case.logits_TV, case.labels_T, case.teacher, alpha=1.0, entropy=True)
        result, grad_TV = run(case, case.logits_TV, impl=impl, alpha=1.0, entropy=True)
        compare(result, grad_TV, expected)
        # Off S alone, relative to the largest there: the gradient's share of t_q - t_p is right too.
        off_N, expected_off_N = grad_TV.double()[outside(case)], expected["grad_TV"][outside(case)]
        assert (off_N - expected_off_N).abs().max() <= 1e-5 * expected_off_N.abs().max()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "divergence",
    [
        {"divergence": "forward_kl"},
        {"divergence": "reverse_kl"},
        {"divergence": "jsd", "beta": 0.1},
        *({"divergence": name, "skew": skew} for name in ("skew_kl", "skew_reverse_kl") for skew in (0.0, 1e-6, 0.1)),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_gaps_between_teacher_and_student(
    divergence: dict[str, Any], mode: str, dtype: torch.dtype, impl: Impl
) -> None:
    """Ids that one is sure of and the other is not: exp of the gaps, 50 to 200, and its inverse leave fp32."""
    if divergence["divergence"] != "forward_kl" and mode in ("truncated", "renorm_teacher"):
        return  # refused together
    case = make_case(T, 203, 10)
    for gap in some(impl, (50.0, 87.0, 90.0, 104.0, 130.0, 200.0), 1, divergence, mode, dtype):
        logits_TV = case.logits_TV.clone()
        ids_TK = case.teacher["teacher_ids_TK"]
        logits_TV[torch.arange(6), ids_TK[:6, 0]] -= gap  # the teacher's first choice
        logits_TV[torch.arange(6, T), ids_TK[6:, -1]] += gap  # one that the teacher all but rules out
        teacher = {name: tensor.clone() for name, tensor in case.teacher.items()}
        teacher["teacher_logprobs_TK"][6:, -1] = -gap
        logits_TV = logits_TV.to(dtype)
        for alpha in (1.0, 0.5):
            options = {"mode": mode, "alpha": alpha, **divergence}
            expected = reference(logits_TV, case.labels_T, teacher, **options)
            result, grad_TV = run(Case(logits_TV, case.labels_T, teacher), logits_TV, impl=impl, **options)
            assert grad_TV.isfinite().all() and expected["grad_TV"].isfinite().all()
            compare(result, grad_TV, expected)


@pytest.mark.parametrize("mode", MODES)
def test_extreme_logits(mode: str, impl: Impl) -> None:
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
    expected = reference(logits_TV, case.labels_T, teacher, mode=mode, entropy=True)
    result, grad_TV = run(Case(logits_TV, case.labels_T, teacher), logits_TV, impl=impl, mode=mode, entropy=True)
    for tensor in (result.loss_T, grad_TV):
        assert tensor.isfinite().all()
    compare(result, grad_TV, expected)


def test_columns_off_s_all_at_minus_infinity(impl: Impl) -> None:
    """A student without a tail: finite gradient; the loss is infinite exactly where the teacher has one."""
    case = make_case(T, 37, 10)
    logits_TV = torch.full_like(case.logits_TV, -torch.inf)
    ids_TK = case.teacher["teacher_ids_TK"]
    logits_TV.scatter_(1, ids_TK, case.logits_TV.gather(1, ids_TK))
    for mode in MODES:
        result, grad_TV = run(case, logits_TV, impl=impl, mode=mode, alpha=1.0)
        assert (result.loss_T == torch.inf).all() if mode == "tail" else result.loss_T.isfinite().all()
        assert grad_TV.isfinite().all()


@pytest.mark.parametrize("inplace", [True, False])
def test_a_row_of_nan_touches_no_other(inplace: bool, impl: Impl) -> None:
    case = make_case(T, 37, 10)
    clean, clean_TV = run(case, case.logits_TV, impl=impl, inplace=inplace)
    logits_TV = case.logits_TV.clone()
    logits_TV[3, 5], logits_TV[6], logits_TV[9, 0] = torch.nan, torch.inf, torch.inf
    result, grad_TV = run(case, logits_TV, impl=impl, inplace=inplace)
    good_T = torch.ones(T, dtype=torch.bool)
    good_T[[3, 6, 9]] = False
    assert result.loss_T[~good_T].isnan().all()
    assert torch.equal(grad_TV[good_T], clean_TV[good_T])
    for name, tensor in vars(result).items():
        assert torch.equal(tensor[good_T], getattr(clean, name)[good_T])


@pytest.mark.parametrize("inplace", [True, False])
def test_nothing_of_a_masked_token_is_read(inplace: bool, impl: Impl) -> None:
    """NaN logits, ids and labels out of range, duplicates and masses above 1: gradient 0 and no complaint."""
    case = make_case(T, 37, 10)
    mask_T = MASKS["runs"]
    assert mask_T is not None
    masked_T = mask_T == 0
    clean, clean_TV = run(case, case.logits_TV, impl=impl, mask_T=mask_T, inplace=inplace)
    logits_TV, labels_T = case.logits_TV.clone(), case.labels_T.clone()
    teacher = {name: tensor.clone() for name, tensor in case.teacher.items()}
    logits_TV[masked_T], labels_T[masked_T] = torch.nan, -100
    teacher["teacher_ids_TK"][masked_T] = 10**9
    teacher["teacher_logprobs_TK"][masked_T] = 7.0
    result, grad_TV = run(Case(logits_TV, labels_T, teacher), logits_TV, impl=impl, mask_T=mask_T, inplace=inplace)
    assert torch.equal(grad_TV, clean_TV) and not grad_TV[masked_T].any()
    for name, tensor in vars(result).items():
        assert torch.equal(tensor, getattr(clean, name)) and not tensor[masked_T].any()
