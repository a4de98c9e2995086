"""Methods are recipes: each one under examples/methods runs through the same stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from megatron_npd.config.command_line import parse_config
from megatron_npd.config.run import NPDConfig
from megatron_npd.errors import UserError
from megatron_npd.manifest import read_manifest
from megatron_npd.platform import get_platform
from megatron_npd.records import ROLLOUTS_FILE
from megatron_npd.serving.pool import ServerPool
from megatron_npd.serving.refresh import refresh

get_platform("cpu")

from megatron_npd.audit.report import write_report  # noqa: E402
from megatron_npd.audit.verify import verify_run  # noqa: E402
from megatron_npd.pipeline.runner import run_npd  # noqa: E402

METHODS = Path(__file__).resolve().parents[2] / "examples" / "methods"
SMALL: dict[str, Any] = {
    "rollout.max_tokens": 8,
    "rollout.max_model_len": 128,
    "pack.seq_length": 256,
    "train.train_iters": 2,
    "train.global_batch_size": 1,
    "train.lr_warmup_iters": 0,
    "platform": "cpu",
}


def recipe(method: str, **fields: Any) -> NPDConfig:
    flags = [f"--{name}={value}" for name, value in (SMALL | fields).items()]
    return parse_config(NPDConfig, ["--config", str(METHODS / f"{method}.yaml"), *flags])


@pytest.mark.server
def test_seqkd_trains_on_the_teachers_responses_without_its_scores(
    tmp_path: Path, tiny_model_dir: Path, served_pool: ServerPool, token_file: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{n} + 1?"}) + "\n" for n in range(4)))
    servers = {"urls": json.dumps(served_pool.urls), "token_file": token_file}
    inputs = {"run_dir": tmp_path / "run", "prompts": tmp_path / "prompts.jsonl", "student": tiny_model_dir}
    cfg = recipe(
        "seqkd",
        **inputs,
        teacher=tiny_model_dir,
        **{f"annotate.{name}": value for name, value in servers.items()},
    )
    refresh(served_pool, tiny_model_dir, "teacher")
    try:
        table = run_npd(cfg, write_report)
    finally:
        refresh(served_pool, tiny_model_dir, "v0000")  # as other tests expect to find it
    run = tmp_path / "run"
    assert sorted(path.name for path in (run / "rounds/0000").iterdir()) == ["packs", "rollouts", "store"]
    rows = pq.read_table(next((run / "rounds/0000/rollouts").glob("shard-*")) / ROLLOUTS_FILE)
    assert set(rows["source"].to_pylist()) == {"teacher"} and set(rows["policy_version"].to_pylist()) == {"teacher"}
    metrics = [json.loads(line) for line in (run / "report/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in metrics] == [1, 2] and "kd" not in metrics[0] and table
    assert read_manifest(run / "policies/v0001").kind == "policy" and verify_run(run).problems == []
    trained = load_file(run / "policies/v0001/model.safetensors")
    assert not trained["model.norm.weight"].equal(load_file(tiny_model_dir / "model.safetensors")["model.norm.weight"])


@pytest.mark.server
@pytest.mark.parametrize("method", ["on_policy", "gkd"])
def test_on_policy_every_step_trains_on_responses_of_the_policy_before_it(
    tmp_path: Path, tiny_model_dir: Path, served_pool: ServerPool, token_file: Path, method: str
) -> None:
    """With GKD some of them are the data set's, which that policy has scored."""
    lines = [{"prompt": f"{n} + 1?", "response": f"{n + 1}"} for n in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    inputs = {"run_dir": tmp_path / "run", "prompts": tmp_path / "prompts.jsonl", "teacher": tiny_model_dir}
    servers = {"rollout.urls": json.dumps(served_pool.urls), "rollout.token_file": token_file}
    steps = {"updates": 2, "train.train_iters": 3, "rollout.prompts_per_round": 2, "annotate.seq_length": 256}
    cfg = recipe(method, **inputs, student=tiny_model_dir, **servers, **steps, **{"annotate.top_k": 4})
    try:
        run_npd(cfg, write_report)
    finally:
        refresh(served_pool, tiny_model_dir, "v0000")
    run, asked, sources = tmp_path / "run", [], []
    for index in range(3):
        shards = sorted((run / f"rounds/{index:04d}/rollouts").glob("shard-*"))
        rows = pq.read_table(shards[0] / ROLLOUTS_FILE).to_pydict()
        assert len(shards) == 1 and set(rows["policy_version"]) == {f"v{index:04d}"}
        asked += rows["prompt_id"]
        sources.append(set(rows["source"]))
    assert len(asked) == len(set(asked)) == 5
    metrics = [json.loads(line) for line in (run / "report/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in metrics] == [1, 2, 3] and verify_run(run).problems == []
    assert set.union(*sources) == ({"student"} if method == "on_policy" else {"student", "dataset"})
    # On the policy that is trained, the ratio of policy and generator is 1 but for their engines' rounding.
    lags = [line.get("lag_k3") for line in metrics]
    assert [lag is None for lag in lags] == ["student" not in source for source in sources]
    assert all(lag is None or lag < 1e-6 for lag in lags)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"train.objective": "distill"}, "objective must be sft with annotate.backend none, got distill"),
        ({"updates": 1}, "updates must be 0 with responses teacher, got 1"),
        ({"annotate.follow_seconds": 5}, "follow_seconds must be 0 with backend none"),
        (
            {"annotate.backend": "megatron", "annotate.unconditional": False},
            "unconditional must be true with select.filter delta_ifd",
        ),
    ],
)
def test_parts_of_a_method_that_do_not_go_together_are_refused(flags: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        recipe("seqkd", **flags)


def test_unscored_responses_train_on_several_processes() -> None:
    assert recipe("seqkd", nproc_per_node=2).world_size == 2
