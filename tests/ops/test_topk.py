"""Top-k extraction against a stable sort of fp64 log-probabilities, whole and cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_npd.choices import Impl
from megatron_npd.errors import UserError
from megatron_npd.ops import topk
from megatron_npd.ops.topk import TopK, topk_logprobs
from tests.dist import run_distributed
from tests.ops.reference import INTERPRETED, device_of

# Less than a tile, a tile and a cut one, and more tiles than are looked into.
WIDTHS = (37, 200, 5003)


def random_logits(num_tokens: int, vocab_size: int, dtype: torch.dtype, *, seed: int = 0, levels: int = 0) -> Tensor:
    """Normal logits; with ``levels`` rounded to so few values that most of them are tied."""
    logits = torch.randn(num_tokens, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    return ((logits * levels).round() / levels if levels else logits).to(dtype)


def run(logits_TV: Tensor, k: int, *, impl: Impl, **options: Any) -> TopK:
    """``topk_logprobs`` where ``impl`` can run."""
    device = device_of(impl)
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    result = topk_logprobs(logits_TV.to(device), k, impl=impl, **options)
    here: dict[str, Any] = {name: None if tensor is None else tensor.cpu() for name, tensor in vars(result).items()}
    return TopK(**here)


def check(result: TopK, logits_TV: Tensor, k: int, sampled_T: Tensor) -> None:
    order_TV = torch.sort(logits_TV.double(), dim=1, descending=True, stable=True).indices
    log_p_TV = logits_TV.double().log_softmax(1)
    ids_TK = order_TV[:, :k]
    assert result.ids_TK.dtype == torch.int32
    assert torch.equal(result.ids_TK.long(), ids_TK)
    torch.testing.assert_close(result.logprobs_TK.double(), log_p_TV.gather(1, ids_TK), atol=2e-6, rtol=1e-6)
    log_tail_T = log_p_TV.scatter(1, ids_TK, -torch.inf).logsumexp(1)
    torch.testing.assert_close(result.log_tail_T.double(), log_tail_T, atol=2e-6, rtol=1e-6)
    assert result.sampled_logprobs_T is not None
    sampled_logprobs_T = log_p_TV.gather(1, sampled_T[:, None])[:, 0]
    torch.testing.assert_close(result.sampled_logprobs_T.double(), sampled_logprobs_T, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("levels", [0, 2], ids=["distinct", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab_size", WIDTHS)
@pytest.mark.parametrize("k", [1, 10, 37])
def test_equals_a_stable_sort(k: int, vocab_size: int, dtype: torch.dtype, levels: int, impl: Impl) -> None:
    logits_TV = random_logits(9, vocab_size, dtype, levels=levels)
    padded_TV = torch.cat([logits_TV, torch.full((9, 5), 99.0, dtype=dtype)], dim=1)
    sampled_T = torch.arange(9) * 4
    before_TV = padded_TV.clone()
    result = run(padded_TV, k, impl=impl, vocab_size=vocab_size, sampled_ids_T=sampled_T)
    check(result, logits_TV, k, sampled_T)
    assert torch.equal(padded_TV, before_TV)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_TV = random_logits(9, 5003, torch.bfloat16)
    whole = topk_logprobs(logits_TV, 10, vocab_size=5003)
    monkeypatch.setattr(topk, "CHUNK_ELEMENTS", 2 * 5003)
    monkeypatch.setattr(topk, "CANDIDATES", 3 * 10 * topk.TILE)
    chunked = topk_logprobs(logits_TV, 10, vocab_size=5003)
    assert torch.equal(whole.ids_TK, chunked.ids_TK) and torch.equal(whole.log_tail_T, chunked.log_tail_T)
    assert whole.sampled_logprobs_T is None


def test_tail_far_below_the_top_is_exact(impl: Impl) -> None:
    """1 - sum in fp32 has nothing left of a tail of 1e-9, and exp(z - max) nothing of one of exp(-500)."""
    logits_TV = random_logits(4, 5003, torch.float32)
    logits_TV[:, 7] += torch.tensor([20.0, 30.0, 500.0, 1e4])
    sampled_T = torch.full((4,), 7)
    check(run(logits_TV, 1, impl=impl, vocab_size=5003, sampled_ids_T=sampled_T), logits_TV, 1, sampled_T)


@pytest.mark.parametrize("vocab_size", [37, 5003])
def test_infinite_columns_and_bad_rows(vocab_size: int, impl: Impl) -> None:
    logits_TV = random_logits(5, vocab_size, torch.float32)
    clean = run(logits_TV, 10, impl=impl, vocab_size=vocab_size)
    logits_TV[1, 3:] = -torch.inf  # 3 columns have all the mass: the other 7 ids are the smallest of the rest
    logits_TV[3, 20] = torch.nan
    sampled_T = torch.tensor([0, 5, 0, 0, 0])
    result = run(logits_TV, 10, impl=impl, vocab_size=vocab_size, sampled_ids_T=sampled_T)
    for row in (0, 2, 4):
        assert torch.equal(result.ids_TK[row], clean.ids_TK[row])
        assert torch.equal(result.logprobs_TK[row], clean.logprobs_TK[row])
    assert sorted(result.ids_TK[1, :3].tolist()) == [0, 1, 2] and result.ids_TK[1, 3:].tolist() == list(range(3, 10))
    assert result.log_tail_T[1] == -torch.inf
    assert result.sampled_logprobs_T is not None and result.sampled_logprobs_T[1] == -torch.inf
    assert result.logprobs_TK[3].isnan().all()


def test_whole_vocabulary_has_no_tail() -> None:
    result = topk_logprobs(random_logits(3, 37, torch.float32), 37, vocab_size=37)
    assert (result.log_tail_T == -torch.inf).all()
    torch.testing.assert_close(result.logprobs_TK.exp().sum(1), torch.ones(3))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 700), st.integers(0, 2**31), st.integers(1, 3), st.data())
def test_tiles_find_what_a_stable_sort_finds(num_tokens: int, width: int, seed: int, levels: int, data: st.DataObject):
    """Small tiles with many ties, on any width."""
    k = data.draw(st.integers(1, width))
    z_CV = random_logits(num_tokens, width, torch.float32, seed=seed, levels=levels)
    z_CV[z_CV < -4] = -torch.inf
    columns_CK = torch.sort(z_CV, dim=1, descending=True, stable=True).indices[:, :k]
    tile = topk.TILE
    try:
        topk.TILE = 8
        top_CK, index_CK, lse_off_C = topk._top_of_tiles(z_CV, k, topk._tile_stats)
    finally:
        topk.TILE = tile
    assert torch.equal(index_CK, columns_CK) and torch.equal(top_CK, z_CV.gather(1, columns_CK))
    expected_C = z_CV.double().scatter(1, columns_CK, -torch.inf).logsumexp(1)
    torch.testing.assert_close(lse_off_C.double(), expected_C, atol=2e-6, rtol=1e-6)


def _parallel(rank: int, world_size: int, impl: Impl) -> int:
    count = 0
    calls = []
    all_gather = dist.all_gather
    dist.all_gather = lambda *args, **kwargs: (calls.append(args[1].shape), all_gather(*args, **kwargs))[1]
    for vocab_size in (5, 37, 200, 20011):
        for k in {1, 5, min(10, vocab_size), min(128, vocab_size)}:
            for levels in (0, 1):
                logits_TV = random_logits(8, vocab_size, torch.bfloat16, levels=levels)
                width = -(-vocab_size // world_size)
                padded_TV = torch.nn.functional.pad(logits_TV, (0, width * world_size - vocab_size), value=50.0)
                sampled_T = torch.arange(8) % vocab_size
                result = topk_logprobs(
                    padded_TV[:, rank * width : (rank + 1) * width],
                    k,
                    vocab_size=vocab_size,
                    sampled_ids_T=sampled_T,
                    group=dist.group.WORLD,
                    impl=impl,
                )
                check(result, logits_TV, k, sampled_T)
                tail_RT = [torch.empty(8) for _ in range(world_size)]
                all_gather(tail_RT, result.log_tail_T)
                assert all(torch.equal(tail_T, tail_RT[0]) for tail_T in tail_RT), "every rank has the same bits"
                assert calls == [(8, 2 * k + 2)], "one exchange"
                calls.clear()
                count += 1
    return count


@pytest.mark.parametrize("impl", ["torch", INTERPRETED])
@pytest.mark.parametrize("world_size", [2, 4])
def test_vocabulary_parallel(world_size: int, impl: Impl) -> None:
    """Ids of the stable sort of the whole rows, ties included; a vocabulary of 5 leaves the fourth rank no column."""
    assert min(run_distributed(_parallel, world_size, impl)) >= 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 38}, "k must be in"),
        ({"k": 0}, "k must be in"),
        ({"vocab_size": 39}, "vocab_size must be in"),
        ({"logits_TV": torch.zeros(3)}, "logits_TV must be"),
        ({"logits_TV": torch.zeros(3, 37, dtype=torch.float64)}, "logits_TV must be"),
        ({"sampled_ids_T": torch.zeros(2, dtype=torch.int64)}, "sampled_ids_T must be integer"),
        ({"sampled_ids_T": torch.zeros(3)}, "sampled_ids_T must be integer"),
        ({"sampled_ids_T": torch.tensor([0, 37, 1])}, "sampled_ids_T must be in"),
    ],
)
def test_bad_arguments_are_refused(change: dict, words: str) -> None:
    arguments = {"logits_TV": torch.zeros(3, 38), "k": 4, "vocab_size": 37} | change
    with pytest.raises(UserError, match=words):
        topk_logprobs(arguments.pop("logits_TV"), arguments.pop("k"), **arguments)
