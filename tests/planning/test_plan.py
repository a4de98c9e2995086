"""A plan: layouts that fit and those that are refused, hours, splits of the nodes, and what the command prints."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_npd.config.command_line import parse_config
from megatron_npd.config.plan import PlanConfig
from megatron_npd.config.settings import AnnotateConfig
from megatron_npd.errors import UserError
from megatron_npd.models.families import load_spec
from megatron_npd.models.flops import forward_flops
from megatron_npd.planning.hours import Machine, decoding, prefill_seconds, step_time
from megatron_npd.planning.layouts import layouts
from megatron_npd.planning.memory import server_memory
from megatron_npd.planning.model import Layout, cache_bytes, parameters, rank_parameters
from megatron_npd.planning.plan import Plan, make_plan
from megatron_npd.planning.splits import RoundTime, run_seconds
from megatron_npd.planning.table import as_dict, as_text
from megatron_npd.platform.accelerators import ACCELERATORS
from tests.models.test_families import LLAMA32_1B, QWEN3_06B, QWEN3_30B, QWEN25_7B, write

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "examples" / "recipes" / "npd_72b_to_7b.yaml"
QWEN25_72B = QWEN25_7B | {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
}
# openPangu-Embedded 7B and 1B without their biases, which are few.
_PANGU = {"vocab_size": 153376, "max_position_embeddings": 32768, "head_dim": 128, "rope_scaling": None}
PANGU_7B = LLAMA32_1B | _PANGU
PANGU_7B |= {"num_hidden_layers": 34, "hidden_size": 4096, "intermediate_size": 12800, "tie_word_embeddings": False}
PANGU_1B = LLAMA32_1B | _PANGU | {"num_hidden_layers": 26, "hidden_size": 1536, "intermediate_size": 6144}
PANGU_1B |= {"num_attention_heads": 12, "num_key_value_heads": 6}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("configs")
    configs = {"72b": QWEN25_72B, "7b": QWEN25_7B, "qwen3": QWEN3_06B, "llama": LLAMA32_1B, "30b": QWEN3_30B}
    for name, fields in (configs | {"pangu-7b": PANGU_7B, "pangu-1b": PANGU_1B}).items():
        (root / name).mkdir()
        write(root / name, fields)
    return root


def plan_of(models: Path, *flags: str, teacher: str = "72b", student: str = "7b") -> Plan:
    own = [f"--config={RECIPE}", f"--teacher={models / teacher}", f"--student={models / student}"]
    return make_plan(parse_config(PlanConfig, [*own, "--num-prompts=100000", "--gpus-per-node=8", *flags]))


def test_published_sizes(models: Path) -> None:
    sizes = {name: parameters(load_spec(models / name)) for name in ("72b", "7b", "qwen3", "llama")}
    assert sizes == {"72b": 72_706_203_648, "7b": 7_615_616_512, "qwen3": 596_049_920, "llama": 1_235_814_400}


def test_a_forward_takes_two_flops_per_parameter_and_token(models: Path) -> None:
    spec = load_spec(models / "72b")
    without_embedding = parameters(spec) - spec.vocab_size * spec.hidden_size
    assert forward_flops(spec, 100, head_tokens=100, context=0) == pytest.approx(200 * without_embedding, rel=1e-3)
    attended = forward_flops(spec, 1, head_tokens=0, context=1000) - forward_flops(spec, 1, head_tokens=0, context=0)
    assert attended == 4 * 80 * 64 * 128 * 1000


def test_of_experts_all_are_held_and_a_few_are_computed(models: Path) -> None:
    """Qwen3-30B-A3B: 30.5 billion parameters, 3.3 of which a token meets (with the embedding)."""
    spec = load_spec(models / "30b")
    assert parameters(spec) == 30_532_122_624
    flops = forward_flops(spec, 1, head_tokens=1, context=0)
    assert flops / 2 + spec.vocab_size * spec.hidden_size == pytest.approx(3.35e9, rel=0.01)
    halves = rank_parameters(spec, Layout(tp=2, pp=2, dp=1))
    assert sum(halves) * 2 == pytest.approx(parameters(spec), rel=1e-3)


def test_the_recipe_for_72b_to_7b_fits_and_its_layouts_are_the_ones_planned(models: Path) -> None:
    plan = plan_of(models, "--nodes=6", "--gpu=h200-141g")
    best = plan.splits[0]
    assert best.annotate is not None
    assert (best.annotate.layout.tp, best.annotate.layout.pp) == (8, 1)
    four = next(split for split in plan.splits if (split.train_nodes, split.server_nodes) == (4, 2))
    assert four.train.layout == Layout(tp=4, pp=1, dp=8)


def test_a_trainer_that_lives_on_and_an_annotator_must_fit_side_by_side(models: Path) -> None:
    """On 80 GB devices each of the recipe's two fits alone, both do not: in turns, or in one round, one comes after."""
    reason = "memory of the trainer, which lives through the rounds, and of the annotator beside it must be at most"
    plan = plan_of(models, "--nodes=6", "--take-turns=false")
    assert next(words for words, nodes in plan.refused.items() if 4 in nodes).startswith(reason)
    assert [(split.train_nodes, split.server_nodes) for split in plan.splits if split.train_nodes == 4] == []
    smaller = ("--pack.seq-length=16384", "--train.global-batch-size=64")
    for flags in (("--take-turns=true",), ("--updates=0",), smaller):
        splits = plan_of(models, "--nodes=6", "--take-turns=false", *flags).splits
        assert (4, 2) in [(split.train_nodes, split.server_nodes) for split in splits]
        leads = {split.max_lead for split in splits if split.server_nodes}
        assert leads == ({0} if "--take-turns=true" in flags else {0, 1})


def test_every_layout_is_listed_once_and_fits_or_has_a_reason(models: Path) -> None:
    plan = plan_of(models, "--nodes=8")
    nodes = plan.splits[0].train_nodes
    for candidates, cfg in ((plan.training, plan.cfg.train), (plan.annotation, plan.cfg.annotate)):
        sizes = [(one.layout.tp, one.layout.pp) for one in candidates]
        assert sorted(sizes) == sorted({(one.tp, one.pp) for one in layouts(cfg, nodes, 8)})
        assert all((one.seconds is None) == bool(one.refused) for one in candidates)
        assert all(one.layout.tp * one.layout.pp * one.layout.dp == 8 * nodes for one in candidates)


@pytest.mark.parametrize(
    ("flags", "layout", "reason"),
    [
        ((), (8, 1), "attention heads must be a multiple of tensor_model_parallel_size (8), got 28"),
        ((), (1, 8), "layers must be a multiple of pipeline_model_parallel_size (8), got 28"),
        ((), (1, 1), "global_batch_size must be a multiple of micro_batch_size x data-parallel ranks = 1 x 64, got 32"),
        (("--gpu=l40s-48g",), (4, 1), "memory must be at most 40.5 GiB per rank, got 5"),
        (
            ("--train.tensor-model-parallel-size=3",),
            (3, 1),
            "number of processes must be a multiple of tensor_model_parallel_size = 3, got 64; start",
        ),
    ],
)
def test_a_layout_is_refused_by_the_stage_s_own_words(
    models: Path, flags: tuple[str, ...], layout: tuple[int, int], reason: str
) -> None:
    plan = plan_of(models, "--nodes=8", *flags)
    found = next(one for one in plan.training if (one.layout.tp, one.layout.pp) == layout)
    assert found.refused.startswith(reason) and found.seconds is None


def test_what_does_not_fit_anywhere_is_said(models: Path) -> None:
    long = ("--pack.seq-length=262144", "--train.global-batch-size=4")
    plan = plan_of(models, "--nodes=1", "--gpu=a100-40g", *long)
    assert plan.splits == []
    (reason,) = plan.refused
    assert reason.startswith("training: memory must be at most 36.0 GiB per rank, got ")
    assert "hours: no split of the nodes fits\nrefused where 1 train: training: memory" in as_text(plan)


def machine(**assume: Any) -> Machine:
    cfg = parse_config(PlanConfig, [f"--assume.{name}={value}" for name, value in assume.items()])
    return Machine(device=ACCELERATORS["h100-80g"], per_node=8, assume=cfg.assume)


def test_a_step_takes_six_flops_per_parameter_and_token_and_what_ranks_tell_one_another(models: Path) -> None:
    spec, cfg = load_spec(models / "7b"), parse_config(PlanConfig, ["--train.bf16"]).train
    where, sizes = machine(train_share=0.5), {"rows": 32, "row_tokens": 4096, "segment": 1024}
    alone = step_time(spec, cfg, Layout(tp=1, pp=1, dp=1), where, **sizes)
    rule = 6 * parameters(spec) * 32 * 4096 / (989e12 * 0.5)
    assert alone.compute == pytest.approx(rule, rel=0.08)
    assert (alone.tensor, alone.pipeline, alone.data, alone.bubble) == (0, 0, 0, 0)
    cut = step_time(spec, cfg, Layout(tp=4, pp=2, dp=1), where, **sizes)
    head = 6 * spec.vocab_size * spec.hidden_size * 32 * 4096 / (4 * 989e12 * 0.5)
    assert cut.compute == pytest.approx((alone.compute / 4 - head) / 2 + head), "the last stage has the output layer"
    assert cut.bubble == pytest.approx((cut.compute - head) / 32)
    assert cut.tensor > 0 and cut.pipeline > 0
    near, far = (step_time(spec, cfg, Layout(tp=1, pp=1, dp=dp), where, **sizes).data for dp in (8, 16))
    assert far == pytest.approx(near * (15 / 16) / (7 / 8) * 450 / 50)


def test_decoding_reads_weights_and_cache(models: Path) -> None:
    spec, where = load_spec(models / "7b"), machine(bandwidth_share=1, decode_overhead=0)
    memory = server_memory(spec, 1, 2, where.memory)
    assert memory is not None
    lengths = {"bf16": True, "prompt_tokens": 100, "response_tokens": 1000}
    one, many = (decoding(spec, memory, where, concurrency=number, **lengths) for number in (1, 128))
    assert one.step == pytest.approx((2 * parameters(spec) + 600 * cache_bytes(spec, 2)) / 3350e9)
    assert many.batch == 128 and 50 < many.per_second / one.per_second < 128
    full = decoding(spec, memory, where, concurrency=10**6, **lengths)
    assert full.batch == memory.cache_tokens // 600


def test_a_round_of_few_shards_leaves_annotators_idle(models: Path) -> None:
    plan = plan_of(models, "--nodes=8", "--num-prompts=4096", "--rollout.greedy-paths=0")  # one shard
    one, eight = (
        next(one for one in plan.annotation if (one.layout.tp, one.layout.pp) == sizes) for sizes in ((8, 8), (8, 1))
    )
    assert one.seconds is not None and eight.seconds is not None and eight.seconds > 4 * one.seconds
    spec, cfg = load_spec(models / "7b"), AnnotateConfig(bf16=True)
    work = {"tokens": 1e9, "responses": 1e9, "segment": 1000, "shard_rows": 1000}
    half, whole = (prefill_seconds(spec, cfg, Layout(tp=1, pp=1, dp=dp), machine(), **work) for dp in (8, 16))
    assert half == 2 * whole


def test_a_small_round_takes_as_long_as_one_response(models: Path) -> None:
    few, many = (plan_of(models, "--nodes=1", "--updates=0", f"--num-prompts={number}") for number in (8, 1 << 20))
    server = many.server
    assert server is not None
    each_token = many.splits[0].seconds.rollout / (2 * 2**20 * 2048 / (8 * server.decoding.devices))
    assert 1 / each_token == pytest.approx(server.per_device * server.decoding.devices, rel=0.01)
    assert few.splits[0].seconds.rollout > 2048 * 5e-3, "no faster than its decoding steps"


def test_rounds_in_turns_and_beside_one_another() -> None:
    each = RoundTime(rollout=10, annotate=3, train=4)
    assert run_seconds(3, each, max_lead=0, follow=False) == 3 * 17
    assert run_seconds(3, each, max_lead=1, follow=False) == 3 * 10 + 3 + 4
    assert run_seconds(3, each, max_lead=0, follow=True) == 3 * (10 + 4)
    assert run_seconds(3, RoundTime(rollout=1, annotate=3, train=4), max_lead=1, follow=False) == 1 + 3 * 7


@pytest.mark.parametrize("follow", [False, True])
def test_no_stage_is_cut_short_and_a_lead_never_costs(follow: bool) -> None:
    for rollout, annotate, train, rounds in itertools.product((1, 5), (0, 2), (1, 7), (1, 2, 4)):
        each = RoundTime(rollout=rollout, annotate=annotate, train=train)
        times = [run_seconds(rounds, each, max_lead=lead, follow=follow) for lead in (0, 1, 2)]
        assert times == sorted(times, reverse=True)
        assert times[-1] >= max(rounds * rollout + train, rounds * (annotate + train), rollout + train)
        assert follow or times[0] == rounds * (rollout + annotate + train)


def test_the_paper_s_annotation_and_training_within_a_factor_of_1_5(models: Path) -> None:
    """1.2M samples, ten epochs, one node of 8 NPUs (METHOD section 5); docs/planner.md says what is assumed."""
    rows = 1_200_000 * 1756 / 32768
    plan = plan_of(
        models,
        *("--nodes=1", "--gpu=ascend-910b-64g", "--num-prompts=1200000", "--updates=0", "--select.filter=none"),
        *("--rollout.greedy-paths=0", "--response-tokens=1500", f"--train.train-iters={10 * rows / 32:.0f}"),
        *("--annotate.tensor-model-parallel-size=1", "--train.tensor-model-parallel-size=1"),
        teacher="pangu-7b",
        student="pangu-1b",
    )
    hours = {name: seconds / 3600 for name, seconds in vars(plan.splits[0].seconds).items()}
    assert 18 / 1.5 < hours["annotate"] < 18 * 1.5
    assert 42 / 1.5 < hours["train"] < 42 * 1.5
    assert hours["rollout"] == pytest.approx(300 / 33, rel=0.1), "docs/planner.md says why it is not the paper's"


def test_text_and_json_hold_the_same(models: Path) -> None:
    plan = plan_of(models, "--nodes=8", "--gpu=h200-141g")
    text, values = as_text(plan), json.loads(json.dumps(as_dict(plan)))
    assert max(map(len, text.splitlines())) <= 120
    for words in (
        "teacher  72.71B",
        "TP 4, PP 1, DP 16 (as set)",
        "all in turns",
        "--take-turns=true --nnodes=8 --train-nodes=8 --max-lead=0",
        "in all",
    ):
        assert words in text
    assert values["splits"][0]["total"] == plan.splits[0].total
    assert values["training_layouts"][0]["memory"]["total"] == sum(
        part for name, part in values["training_layouts"][0]["memory"].items() if name != "total"
    )
    assert "bf16 is false" not in text
    assert "note: train.bf16 is false" in as_text(plan_of(models, "--nodes=8", "--train.bf16=false"))


def test_a_stage_s_parts_given_by_their_layers_do_not_stay_beside_the_plan_s_own(models: Path) -> None:
    parts = ("--train.pipeline-model-parallel-size=4", "--train.num-layers-per-virtual-pipeline-stage=1")
    plan = plan_of(models, "--nodes=8", *parts)
    assert plan.cfg.train.virtual_pipeline_model_parallel_size == 7
    assert plan.splits[0].train.layout.pp != 4  # that does not fit
    assert "--train.num-layers-per-virtual-pipeline-stage=0" in as_text(plan)


def test_prompts_are_counted_where_a_file_is_given(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n\n' * 7)
    assert plan_of(models, "--nodes=1", f"--prompts={file}", "--num-prompts=0").work.prompts == 7
    with pytest.raises(UserError, match="--num-prompts must be given, or --prompts a file, got ''; say how many"):
        plan_of(models, "--nodes=1", "--num-prompts=0")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--train.expert-model-parallel-size=2",),
            "train.expert_model_parallel_size must be 1, got 2; npd plan has all experts on a rank",
        ),
        (
            ("--annotate.expert-model-parallel-size=2",),
            "annotate.expert_model_parallel_size must be 1, got 2; npd plan has all experts on a rank",
        ),
        (("--gpu=h100",), "--gpu must be one of a100-40g, "),
        (("--response-tokens=5000",), "response_tokens must be at most rollout.max_tokens (256), got 5000; raise"),
        (("--assume.train-share=2",), "assume.train_share must be in (0, 1], got 2.0; "),
        (("--teacher=/nowhere",), "--teacher must be a Hugging Face model directory, got '/nowhere'"),
    ],
)
def test_bad_input_gets_one_line_before_anything_heavy(models: Path, flags: tuple[str, ...], message: str) -> None:
    code = "import sys; sys.modules |= dict.fromkeys(('torch', 'megatron.core', 'pyarrow', 'numpy')); "
    code += "from megatron_npd.__main__ import main; main('plan')"
    given = [f"--teacher={models / '72b'}", f"--student={models / '7b'}", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *given], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_the_command_plans_without_weights(models: Path) -> None:
    given = [f"--teacher={models / '72b'}", f"--student={models / '7b'}", "--num-prompts=1000", "--json"]
    command = [sys.executable, "-m", "megatron_npd", "plan", f"--config={RECIPE}", "--gpus-per-node=8", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["teacher_parameters"] == 72_706_203_648 and done.stderr == ""
