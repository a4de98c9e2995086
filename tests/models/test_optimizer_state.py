"""The optimizer's state in checkpoints: of the parameters that it is saved with, in every layout, and refused else."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_npd.errors import UserError
from tests.dist import run_distributed
from tests.helpers import make_tiny_model
from tests.models.common import TinyTrainer, chained, full_state, make_trainer, restore, save

# By number of processes: vocabulary, (tensor, pipeline) sizes, options. The rest is data-parallel; in one stage of two
# the tied embedding is followed by other parameters, and 128 x DP divides neither 305 rows (alone or halved) nor 304.
CELLS: dict[int, list[tuple[int, tuple[int, int], dict[str, Any]]]] = {
    2: [(305, (1, 2), {}), (305, (1, 2), {"bf16": True}), (305, (2, 1), {}), (305, (1, 2), {"distributed": False})],
    4: [(305, (2, 2), {})],
    6: [(304, (1, 2), {}), (305, (1, 2), {})],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied models, by the size of their vocabulary."""
    root = tmp_path_factory.mktemp("hf")
    for size in (304, 305):
        make_tiny_model(root / str(size), vocab_size=size)
    return root


def _moments(trainer: TinyTrainer) -> dict[str, torch.Tensor]:
    """What one process holds of the whole optimizer: its own copy of each parameter and both moments, by name."""
    (optimizer,) = chained(trainer.optimizer)
    return {
        f"{key} {name}": value.clone()
        for name, parameter in trainer.model.named_parameters()
        for key, value in optimizer._get_main_param_and_optimizer_states(parameter).items()
    }


def _stop_and_go_on(trainer: TinyTrainer, again: Any, root: Path) -> None:
    """A checkpoint after two steps, loaded into ``again``: the same state, and the same two steps after it."""
    for iteration in range(2):
        trainer.step(iteration)
    path = save(trainer, root, 2)
    at_save = full_state(trainer)
    losses = [trainer.step(iteration) for iteration in range(2, 4)]
    resumed = again()
    restore(resumed, path)
    restored = full_state(resumed)
    assert restored.keys() == at_save.keys()
    assert [name for name in at_save if not torch.equal(at_save[name], restored[name])] == []
    assert [resumed.step(iteration) for iteration in range(2, 4)] == losses


def _grid(rank: int, world: int, models: Path, root: Path) -> None:
    for number, (vocab_size, layout, options) in enumerate(CELLS[world]):
        model = models / str(vocab_size)
        trainer = make_trainer(model, *layout, **options)
        _stop_and_go_on(trainer, partial(make_trainer, model, *layout, load=False, **options), root / str(number))


def _stored(rank: int, world: int, models: Path, root: Path, cells: list[Any]) -> None:
    """In each checkpoint, loaded whole by one process, the optimizer's parameters are the model's."""
    for number, (vocab_size, _, options) in enumerate(cells):
        trainer = make_trainer(models / str(vocab_size), load=False, **options)
        restore(trainer, root / str(number) / "iter_0000002")
        held = _moments(trainer) if options.get("distributed", True) else {}
        for name, weight in trainer.model.named_parameters() if held else ():
            assert torch.equal(held[f"param {name}"].to(weight), weight.detach().flatten()), (number, name)
            assert float(held[f"exp_avg_sq {name}"].abs().max()) > 0, (number, name)


@pytest.mark.parametrize("world", CELLS)
def test_every_layout_goes_on_bit_by_bit(models: Path, tmp_path: Path, world: int) -> None:
    run_distributed(_grid, world, models, tmp_path)
    run_distributed(_stored, 1, models, tmp_path, CELLS[world])


def _like_an_older_version(rank: int, world: int, model: Path, root: Path) -> str:
    from megatron_npd.models import checkpoint

    trainer = make_trainer(model, 1, 2)
    trainer.step(0)
    checkpoint._padding_kept = lambda optimizer: nullcontext()
    checkpoint._parameters_of_another_state, check = lambda *_: [], checkpoint._parameters_of_another_state
    path = save(trainer, root, 1)
    checkpoint._parameters_of_another_state = check
    with pytest.raises(UserError) as caught:
        restore(make_trainer(model, 1, 2, load=False), path)
    return str(caught.value)


def test_a_shifted_state_is_refused(models: Path, tmp_path: Path) -> None:
    for message in run_distributed(_like_an_older_version, 2, models / "305", tmp_path):
        assert "iter_0000001 must hold the optimizer's state of its own weights, got another one for " in message
        assert "npd convert --direction megatron-to-hf" in message


def _flip(rank: int, world: int, model: Path, root: Path) -> list[str]:
    kinds: tuple[dict[str, Any], ...] = ({}, {"bf16": True}, {"distributed": False})
    messages = []
    for number, before in enumerate(kinds):
        trainer = make_trainer(model, **before)
        trainer.step(0)
        path = save(trainer, root / str(number), 1)
        for after in kinds:
            if after != before:
                with pytest.raises(UserError) as caught:
                    restore(make_trainer(model, load=False, **after), path)
                messages.append(str(caught.value))
    return messages


def test_settings_that_change_what_the_optimizer_holds_are_refused(models: Path, tmp_path: Path) -> None:
    (messages,) = run_distributed(_flip, 1, models / "304", tmp_path)
    assert len(messages) == 6
    assert all("must be as in the run that wrote" in text for text in messages)
    assert "(DistributedOptimizer in fp32), got FP32Optimizer in fp32; give the old" in messages[1]


def _other_rates(rank: int, world: int, model: Path, root: Path) -> None:
    from megatron.core.optimizer import distrib_optimizer, optimizer

    # As megatron-core 0.19 does, which finds a loaded group by these too.
    keys = (*optimizer.param_group_identifier_keys, "max_lr", "min_lr")
    optimizer.param_group_identifier_keys = distrib_optimizer.param_group_identifier_keys = keys
    for distributed in (True, False):
        trainer = make_trainer(model, distributed=distributed)
        trainer.step(0)
        path = save(trainer, root / str(distributed), 1)
        again = make_trainer(model, load=False, distributed=distributed, lr=2e-2)
        restore(again, path)
        assert {group["max_lr"] for group in again.optimizer.param_groups} == {2e-2}
        assert again.step(1) == trainer.step(1)  # whose warm-up step has not yet used the rate


def test_another_learning_rate_loads(models: Path, tmp_path: Path) -> None:
    run_distributed(_other_rates, 1, models / "304", tmp_path)
