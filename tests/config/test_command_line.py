"""Command lines and recipes with mistakes in them: each is one line that says what was meant, and where it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_npd.cli.preprocess import PreprocessCommand
from megatron_npd.cli.rollout import RolloutCommand
from megatron_npd.cli.show import ShowCommand
from megatron_npd.cli.verify import VerifyCommand
from megatron_npd.config.command_line import parse_config
from megatron_npd.config.run import NPDConfig
from megatron_npd.config.settings import RolloutConfig
from megatron_npd.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def refusal(*argv: str, cls: type = NPDConfig) -> str:
    with pytest.raises(UserError) as error:
        parse_config(cls, argv)
    message = str(error.value)
    assert "\n" not in message and "class '" not in message
    return message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--trian.lr", "3"], "unknown option --trian.lr; did you mean --train.lr? ("),
        (["--train.learning-rate=3"], "unknown option --train.learning_rate ("),
        (["--rollouts.urls=a"], "unknown option --rollouts.urls; did you mean --rollout.urls? ("),
        (["--sampled-paths=3"], "unknown option --sampled_paths; did you mean --rollout.sampled_paths? ("),
        (["--train.lr", "foo"], "--train.lr must be a number, got foo; "),
        (["--train.lr"], "--train.lr must have a value, got none; "),
        (["--train.bf16=3"], "--train.bf16 must be true or false, got 3; "),
        (["--updates=1.5"], "--updates must be an integer, got 1.5; "),
        (
            ["--train.kd-mode=tial"],
            "--train.kd_mode must be one of tail, truncated, renorm_teacher, ",
        ),
        (["--train.lr", "-1e-3"], "lr must be > 0 and finite, got -0.001; "),
        (["--train.lr=.inf"], "lr must be > 0 and finite, got inf; "),
        (["--train.kd-skew=.nan"], "--train.kd_skew must be a number, got nan; "),
        (["--train.adam-beta2=1"], "adam_beta2 must be in [0, 1), got 1.0; "),
        (
            ["--annotate.context-parallel-size=2", "--annotate.seq-length=1022"],
            "seq_length must be a multiple of 2 x context_parallel_size (4), got 1022; ",
        ),
        (
            ["--annotate.context-parallel-size=2", "--annotate.expert-model-parallel-size=3"],
            "expert_model_parallel_size must be a divisor or a multiple of context_parallel_size, got 3; ",
        ),
        (["--train.adam-eps=0"], "adam_eps must be > 0 and finite, got 0.0; "),
        (["--train.weight-decay=-1"], "weight_decay must be at least 0 and finite, got -1.0; "),
        (["--select.tau=foo"], "--select.tau must be a number or null, got foo; "),
        (["--rollout.request-timeout=0"], "request_timeout must be > 0 seconds, got 0.0; "),
        (["--eval.max-tokens=0"], "max_tokens must be at least 1, got 0; "),
        (["--train={}"], "--train must be given by its fields (--train.NAME), got it whole; "),
        (["--rollout.urls+=a"], "unknown option --rollout.urls+; did you mean --rollout.urls? ("),
        (
            ["--rollout.urls=a", "--rollout.urls", "b"],
            "--rollout.urls must be given once, with all its items, got it 2",
        ),
        (["--rollout.urls", '["a"]', "b"], "--rollout.urls must be a list of texts, numbers in quotes, got ["),
        (["recipe.yaml"], "arguments must be flags with their values, got recipe.yaml; "),
        (["--config", "/nowhere.yaml"], "--config must be a YAML file, got /nowhere.yaml (["),
        (["--config", str(ROOT)], f"--config must be a YAML file, got {ROOT} (["),
    ],
)
def test_flags(argv: list[str], words: str) -> None:
    assert refusal(*argv).startswith(words)


@pytest.mark.parametrize(
    "argv",
    [
        ["--input", "a.jsonl", "b.parquet", "--out", "x"],
        ["--out=x", "--input=a.jsonl,b.parquet"],
        ["--input=a.jsonl", "b.parquet", "--out=x"],
        ["--input", "a.jsonl,", "b.parquet", "--out=x"],
        ["--out", "x", "--input", "[a.jsonl, b.parquet]"],
        ["--out", "x", "--input", '["a.jsonl",', '"b.parquet"]'],
    ],
)
def test_a_list_is_written_apart_with_commas_or_in_brackets(argv: list[str]) -> None:
    cfg = parse_config(PreprocessCommand, [*argv, "--vocab-size", "9"])
    assert cfg.input == ("a.jsonl", "b.parquet") and cfg.out == "x"


@dataclass(frozen=True, kw_only=True)
class Lists:
    """Lists of other types, and nested."""

    taus: tuple[float, ...] = ()
    rollout: RolloutConfig = field(default_factory=RolloutConfig)


def test_lists_of_numbers_and_nested_lists_are_written_the_same_way() -> None:
    cfg = parse_config(Lists, ["--taus", "0.1", "0.2", "--rollout.urls", "http://a:1", "http://b:2"])
    assert cfg == Lists(taus=(0.1, 0.2), rollout=RolloutConfig(urls=("http://a:1", "http://b:2")))


def test_a_value_may_begin_with_a_dash() -> None:
    cfg = parse_config(NPDConfig, ["--select.lower", "-1e-3", "--eval.answer-regex", r"-(\d+)", "--train.bf16"])
    assert (cfg.select.lower, cfg.eval.answer_regex, cfg.train.bf16) == (-1e-3, r"-(\d+)", True)
    assert parse_config(Lists, ["--taus", "-1e-3", "2"]).taus == (-1e-3, 2.0)


def test_a_list_with_a_number_that_is_none() -> None:
    assert refusal("--taus", "0.1", ".nan", cls=Lists).startswith("--taus must be a list of numbers, got nan; ")


def test_a_flag_that_must_be_given() -> None:
    assert refusal("--out=x", cls=RolloutCommand).startswith("--prompts must be given, got no value; ")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("updates: 1\ntrain:\n  trian_iters: 3\n", 3, "train.trian_iters is unknown; did you mean train.train_iters?"),
        ("updates: 1\nlr: 1.0\n", 2, "lr is unknown; did you mean train.lr?"),
        ("train:\n  lr: 1e-4\nrolout:\n  max_tokens: 3\n", 3, "rolout is unknown; did you mean rollout?"),
        ("updates: 1\ntrain:\n  lr: bar\n", 3, "train.lr must be a number, got bar; "),
        ("# a remark\ntrain:\n\n  kd_alpha: 7\n", 4, "kd_alpha must be in [0, 1], got 7.0; 1 is KD alone"),
        ("train: 3\n", 1, "train must hold fields, indented below it, got none; "),
        ("updates: 1\nselect:\ntrain:\n  lr: 1.0\n", 2, "select must hold fields, indented below it, got none; "),
        ("updates: 1\ntrain:\n  lr: 1.0\nupdates: 2\n", 4, "updates must be given once, got it at "),
        ("train.lr: 1.0\ntrain:\n  lr: 2.0\n", 3, "train.lr must be given once, got it at "),
        ("train:\n  bf16: true\n  lr:\n", 3, "train.lr must be a number, got null; "),
        ("train:\n  kd_mode: ~\n", 2, "train.kd_mode must be one of tail, truncated, renorm_teacher, renorm_both, got"),
        ("teacher:\nupdates: 1\n", 1, "teacher must be text, got null; "),
        ("rollout:\n  urls: null\n", 2, "rollout.urls must be a list of texts, numbers in quotes, got null; "),
        ("updates: 1\nselect:\n  tau: foo\n", 3, "select.tau must be a number or null, got foo; "),
        ("train:\n  kd_skew: .nan\n", 2, "train.kd_skew must be a number, got nan; "),
        ("teacher: a\nupdates: 1000\n", 2, "updates must be < train.train_iters (100), got 1000; "),
        ("train: &t\n  lr: 1.0\nselect:\n  <<: *t\n", 4, "select.lr is unknown; did you mean train.lr?"),
        ("train:\n  <<: {lr: foo}\n", 2, "train.lr must be a number, got foo; "),
        ("<<: 3\n", 1, "must be YAML, got: << without fields to merge"),
        ("updates: 1\n? [a, b]\n: 3\n", 2, "must be YAML, got: a name that is a list or has fields"),
        ("teacher: a\nupdates: !foo 3\n", 2, "updates must be plain YAML, got !foo; "),
        (
            "updates: !!python/object/apply:os.getpid []\n",
            1,
            "updates must be plain YAML, got tag:yaml.org,2002:python",
        ),
        ("updates: 1\na: b: c\n", 2, "must be YAML, got: mapping values are not allowed"),
        ("updates: 1\ntrain:\n  lr: [\n", 4, "must be YAML, got: expected the node content"),
    ],
)
def test_a_recipe(tmp_path: Path, text: str, line: int, words: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    message = refusal("--config", str(recipe))
    assert message.startswith(f"{recipe} line {line}") and words in message
    assert refusal(f"--config={recipe}") == message


@pytest.mark.parametrize(
    "text", ["", "- a\n", "just text\n", "\x00", "updates: " + "[" * 3000, "# \udce9\nupdates: 1\n"]
)
def test_a_recipe_without_fields(tmp_path: Path, text: str) -> None:
    (recipe := tmp_path / "recipe.yaml").write_bytes(text.encode(errors="surrogateescape"))
    assert str(recipe) in refusal("--config", str(recipe))


def test_a_flag_is_blamed_where_it_overrides_the_recipe(tmp_path: Path) -> None:
    (recipe := tmp_path / "recipe.yaml").write_text("train:\n  lr: 1.0\n  kd_alpha: 0.5\n")
    assert refusal("--config", str(recipe), "--train.lr=x").startswith("--train.lr must be")
    assert refusal("--config", str(recipe), "--train.kd-alpha=7").startswith("kd_alpha must be")
    assert parse_config(NPDConfig, ["--config", str(recipe), "--train.lr=2"]).train.lr == 2.0


def test_merged_fields_of_a_recipe_are_read(tmp_path: Path) -> None:
    (recipe := tmp_path / "recipe.yaml").write_text("train:\n  lr: 1.0\n  <<: [{kd_alpha: 0.5, lr: 2.0}, {lr: 3.0}]\n")
    train = parse_config(NPDConfig, ["--config", str(recipe)]).train
    assert (train.kd_alpha, train.lr) == (0.5, 1.0)
    recipe.write_text("select:\n  tau: null\n")
    assert parse_config(NPDConfig, ["--config", str(recipe)]).select.tau is None


def test_a_first_word_without_a_flag_is_the_commands_subject() -> None:
    for argv, words in [
        (["run", "--ful"], "unknown option --ful; did you mean --full? ("),
        ([], "--run must be given, got no value; "),
        (["a", "b"], "arguments must be flags with their values, got b; "),
    ]:
        with pytest.raises(UserError) as error:
            parse_config(VerifyCommand, argv)
        assert str(error.value).startswith(words)
    assert parse_config(VerifyCommand, ["there", "--full"]) == VerifyCommand(run="there", full=True)
    assert parse_config(ShowCommand, ["there", "--sample", "a"]).run == "there"
    with pytest.raises(UserError, match="one of --sample and --export must be given, got neither"):
        parse_config(ShowCommand, ["there"])


@pytest.mark.parametrize("tool", ["pretrain_npd.py", *(f"tools/{path.name}" for path in ROOT.glob("tools/[a-z]*.py"))])
def test_no_command_answers_a_mistake_with_its_usage(tool: str) -> None:
    """Every command, before it imports anything heavy: an import of torch would fail here."""
    code = f"import sys; sys.modules['torch'] = None; sys.argv = ['{tool}', '--nonsense']; sys.path[0] = 'tools'; "
    code += f"import runpy; runpy.run_path('{tool}', run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert re.fullmatch(r"error: unknown option --nonsense \(npd \w+ --help lists all\)\n", done.stderr)
    assert done.returncode == 2


@pytest.mark.parametrize(
    "argv",
    [
        ["--server-args=--tensor-parallel-size,2"],
        ["--server-args=[--tensor-parallel-size, 2]"],
        ['--server-args=["--tensor-parallel-size", "2"]'],
        ["--server-args=--tensor-parallel-size", "2"],
    ],
)
def test_items_of_a_list_of_texts_may_look_like_numbers(argv: list[str]) -> None:
    assert parse_config(RolloutConfig, argv).server_args == ("--tensor-parallel-size", "2")


def test_replay_and_a_refresh_by_lag_exclude_each_other() -> None:
    with pytest.raises(UserError, match=r"replay must be 0 with refresh by_lag, got 0\.5"):
        parse_config(NPDConfig, ["--train.replay=0.5", "--train.refresh=by_lag", "--train.refresh-interval=2"])


def test_turns_and_lead_exclude_each_other() -> None:
    with pytest.raises(UserError, match="take_turns must be false with max_lead, got True; stages overlap"):
        parse_config(NPDConfig, ["--take-turns", "--max-lead=1"])
