"""A plan with context parallelism, parts of stages, uneven stages and recompute, and checkpoints that are dropped."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_npd.config.command_line import parse_config
from megatron_npd.config.training import TrainConfig
from megatron_npd.models.families import load_spec
from megatron_npd.models.flops import forward_flops
from megatron_npd.planning.hours import StepTime, step_time
from megatron_npd.planning.model import Layout, parameters
from megatron_npd.planning.storage import checkpoint_bytes
from megatron_npd.planning.table import as_text
from megatron_npd.platform.accelerators import GIB
from tests.planning.test_plan import machine, models, plan_of

__all__ = ["models"]  # the fixture

SPEED = 989e12 * 0.5  # FLOP/s
TOKENS = 32 * 4096  # of a step
FULL = ("--recompute-granularity=full", "--recompute-method=uniform", "--recompute-num-layers=1")
LONG = ("--nodes=1", "--pack.seq-length=65536", "--train.global-batch-size=8")
TIGHT = (*LONG, "--gpu=h100-80g", "--train.tensor-model-parallel-size=4")


def step(models: Path, layout: Layout, *flags: str) -> StepTime:
    sizes = {"rows": 32, "row_tokens": 4096, "segment": 1024}
    cfg = parse_config(TrainConfig, ["--bf16", *flags])
    return step_time(load_spec(models / "7b"), cfg, layout, machine(train_share=0.5), **sizes)


def test_what_is_computed_again_takes_its_flops_and_its_sums(models: Path) -> None:
    layout = Layout(tp=4, pp=1, dp=2)
    spec, plain = load_spec(models / "7b"), step(models, layout)
    whole, without = (forward_flops(spec, TOKENS, head_tokens=0, context=n) / (8 * SPEED) for n in (512, 0))
    mlp = 2 * TOKENS * 28 * 3 * 3584 * 18944 / (8 * SPEED)
    selective = "--recompute-granularity=selective"
    cases: list[tuple[tuple[str, ...], float, float]] = [
        (FULL, whole, 2 / 4),
        ((FULL[0], "--recompute-method=block", "--recompute-num-layers=7"), whole / 4, 2 / 16),
        ((selective,), whole - without, 0),
        ((selective, "--recompute-modules=[mlp]"), mlp, 1 / 4),
    ]
    for flags, more, sums in cases:
        again = step(models, layout, *flags)
        assert again.compute - plain.compute == pytest.approx(more)
        assert again.tensor == pytest.approx((1 + sums) * plain.tensor)


def test_parts_of_stages_shorten_the_bubble_and_uneven_stages_make_room_for_the_output_layer(models: Path) -> None:
    whole, parts = (step(models, Layout(tp=1, pp=4, dp=1, virtual=number)) for number in (1, 7))
    assert parts.bubble == pytest.approx(whole.bubble / 7) and parts.pipeline == pytest.approx(7 * whole.pipeline)
    assert step(models, Layout(tp=1, pp=4, dp=1, last=4)).compute < whole.compute
    assert Layout(tp=1, pp=4, dp=1, first=3, last=5).stage_layers(28) == [3, 10, 10, 5]


def test_ranks_that_share_a_row_gather_keys_and_values(models: Path) -> None:
    shared, alone = step(models, Layout(tp=1, pp=1, cp=2, dp=4)), step(models, Layout(tp=1, pp=1, dp=8))
    keys = 1 / 2 * 28 * TOKENS / 4 * 2 * 4 * 128 * 2  # half of them, of all layers, in bytes
    assert shared.context == pytest.approx(2 * keys / (450e9 * 0.7)) and alone.context == 0
    assert (shared.compute, shared.data) == (pytest.approx(alone.compute), pytest.approx(alone.data))
    assert step(models, Layout(tp=1, pp=1, cp=2, dp=4), *FULL).context == pytest.approx(1.5 * shared.context)


def test_what_is_too_large_by_its_activations_names_recompute(models: Path) -> None:
    plan = plan_of(models, *TIGHT)
    words = r"memory must be at most 71\.\d GiB per rank, got \d+\.\d; recompute_granularity full \(recompute_method "
    words += r"uniform, recompute_num_layers 1\) needs (\d+\.\d)"
    found = {}
    for one in plan.training:
        if one.refused.startswith("memory") and not one.layout.recompute:
            match = re.fullmatch(words, one.refused)
            found[one.layout.tp, one.layout.pp] = float(match[1]) if match else None
    assert {sizes for sizes, least in found.items() if least is None} == {(1, 1)}, "weights and optimizer are too large"
    again = {(one.layout.tp, one.layout.pp): one.memory for one in plan.training if one.layout.recompute}
    for sizes, least in found.items():
        memory = again[sizes]
        assert memory is not None and (least or 95) == pytest.approx(memory.total / GIB, abs=0.1)
    assert "refused TP x PP = 4 x 1: memory must be" in as_text(plan)


def test_where_nothing_fits_layers_are_computed_again_and_rows_are_shared(models: Path) -> None:
    plan = plan_of(models, *TIGHT)
    assert all(one.seconds is None for one in plan.training if not one.layout.recompute)
    assert plan.splits[0].train.layout.recompute
    text = " ".join(as_text(plan).split())
    assert "--train.recompute-granularity=full --train.recompute-method=uniform --train.recompute-num-layers=1" in text
    assert "1 recompute" in text and {one.layout.cp for one in plan.training} == {1}, "segments are aligned to 1"
    wider = plan_of(models, *TIGHT, "--pack.segment-align=16")
    assert {one.layout.cp for one in wider.training} == {1, 2, 4, 8}
    fitting = [one for one in wider.training if one.seconds is not None and not one.layout.recompute]
    assert fitting and all(one.layout.cp > 1 for one in fitting)


def test_axes_that_the_recipe_asks_for_are_planned(models: Path) -> None:
    sizes = ("--train.tensor-model-parallel-size=2", "--train.pipeline-model-parallel-size=2")
    sizes += ("--train.context-parallel-size=2", "--train.virtual-pipeline-model-parallel-size=2")
    uneven = ("--train.decoder-last-pipeline-num-layers=12", "--pack.segment-align=8")
    plan = plan_of(models, "--nodes=2", "--gpu=h200-141g", *sizes, *uneven)
    own = plan.splits[0].train
    assert own.layout == Layout(tp=2, pp=2, cp=2, dp=plan.splits[0].train_nodes, last=12, virtual=2)
    assert own.memory is not None and own.step is not None and own.step.context > 0
    text = as_text(plan)
    assert "TP 2, PP 2, VPP 2, CP 2, DP" in text and "--train.context-parallel-size=2" in text
    others = [one.layout for one in plan.training if one is not own and one.layout != own.layout]
    assert others and {(one.cp, one.virtual, one.last) for one in others} == {(2, 1, 0)}
    refused = plan_of(models, "--nodes=2", *sizes, "--pack.segment-align=2").training[0].refused
    assert refused.startswith("pack.segment_align must be a multiple of 2 x context_parallel_size = 4, got 2")
    annotated = plan_of(models, "--nodes=2", "--annotate.context-parallel-size=2").annotation
    assert {one.layout.cp for one in annotated} == {2}


def test_checkpoints_beyond_the_newest_are_not_stored(models: Path) -> None:
    def stored(*flags: str) -> float:
        plan = plan_of(models, "--nodes=1", "--train.train-iters=100", "--updates=1", *flags)
        return plan.storage["checkpoints"] / checkpoint_bytes(parameters(plan.student), bf16=True)

    every = ("--train.save-interval=10", "--train.save-interval-in-mins=0")
    assert stored(*every) == 10, "two of them are policies"
    assert stored(*every, "--train.most-recent-k=3") == 2 + 3 + 1, "one more while the next is written"
    assert stored(*every, "--train.most-recent-k=20") == 10
    assert stored("--train.save-interval=10", "--train.most-recent-k=3") == 6
