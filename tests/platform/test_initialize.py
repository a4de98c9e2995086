"""Process groups and seeds, and the test harness itself."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_npd.errors import UserError
from megatron_npd.platform import get_platform, initialize
from megatron_npd.platform.initialize import initialize_distributed, shutdown
from tests.dist import run_distributed
from tests.helpers import present


def _sizes_change(rank: int, world_size: int) -> list[tuple[int, int, int]]:
    from megatron.core import parallel_state

    seen = []
    for tensor, pipeline in ((1, 1), (1, 1), (2, 1), (1, 2), (1, 1)):
        initialize_distributed(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
        seen.append(
            (
                parallel_state.get_tensor_model_parallel_world_size(),
                parallel_state.get_pipeline_model_parallel_world_size(),
                parallel_state.get_data_parallel_world_size(),
            )
        )
        total = torch.ones(1)
        dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
        assert total.item() == tensor * pipeline
    return seen


def _sizes_return(rank: int, world_size: int) -> list[int]:
    from megatron.core import parallel_state

    counts = []
    for round_index in range(3):
        for tensor, pipeline in ((2, 1), (1, 1), (1, 2)):
            initialize_distributed(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
            assert parallel_state.get_pipeline_model_parallel_rank() == (rank if pipeline == 2 else 0)
            for group, size in (
                (parallel_state.get_tensor_model_parallel_group(), tensor),
                (parallel_state.get_data_parallel_group_gloo(), 2 // (tensor * pipeline)),
            ):
                total = torch.ones(1)
                dist.all_reduce(total, group=group)
                assert total.item() == size, round_index
        counts.append(len(dist.distributed_c10d._world.pg_map))
    return counts


def test_sizes_that_return_make_no_new_groups() -> None:
    for first, *later in run_distributed(_sizes_return, 2):
        assert later == [first, first]


def test_sizes_may_change_in_one_process() -> None:
    assert run_distributed(_sizes_change, 2) == [[(1, 1, 2), (1, 1, 2), (2, 1, 1), (1, 2, 1), (1, 1, 2)]] * 2


def _indivisible(rank: int, world_size: int) -> str:
    with pytest.raises(UserError) as caught:
        initialize_distributed(tensor_model_parallel_size=3)
    return str(caught.value)


def test_indivisible_world_is_a_user_error() -> None:
    for message in run_distributed(_indivisible, 2):
        assert "multiple of tensor_model_parallel_size = 3, got 2" in message


def _random_streams(rank: int, world_size: int) -> tuple[float, float]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    initialize_distributed(tensor_model_parallel_size=2, seed=7)
    first = torch.rand(1).item()
    with present(get_cuda_rng_tracker()).fork():
        forked = torch.rand(1).item()
    initialize_distributed(tensor_model_parallel_size=2, seed=7)
    assert torch.rand(1).item() == first
    with present(get_cuda_rng_tracker()).fork():
        assert torch.rand(1).item() == forked
    return first, forked


def test_random_streams_are_shared_or_by_tensor_rank() -> None:
    (first0, forked0), (first1, forked1) = run_distributed(_random_streams, 2)
    assert first0 == first1
    assert forked0 != forked1


def test_single_process_without_torchrun() -> None:
    get_platform()
    for _ in range(2):
        initialize_distributed(seed=3)
        assert dist.get_world_size() == 1
        shutdown()
    assert not dist.is_initialized()


def test_a_store_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent died while its ranks started: they must not wait for it as long as they may wait for one another."""
    monkeypatch.setattr(initialize, "_STORE_PATIENCE", timedelta(seconds=1))
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in (environment | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"store at 127.0.0.1:{port} must answer within 0:00:01"):
            initialize._join("gloo")
    assert not dist.is_initialized()


def _fails_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("broken on purpose")
    dist.barrier()


def test_harness_reports_a_failing_rank() -> None:
    with pytest.raises(AssertionError, match="broken on purpose"):
        run_distributed(_fails_on_rank_one, 2)
