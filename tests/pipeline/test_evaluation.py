"""What is evaluated, when, and with whose prompts; the real engines' numbers are in ``test_loop.py``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_npd.audit.report import write_report
from megatron_npd.config.run import EvalConfig, NPDConfig
from megatron_npd.config.settings import AnnotateConfig, RolloutConfig
from megatron_npd.errors import UserError
from megatron_npd.manifest import seal
from megatron_npd.pipeline import work
from megatron_npd.pipeline.evaluation import Accuracies, measure_line, read_measures
from megatron_npd.pipeline.launch import Launcher
from megatron_npd.pipeline.servers import Servers
from megatron_npd.run_dir import RunDir
from megatron_npd.serving.pool import ServerPool
from tests.helpers import make_tiny_tokenizer
from tests.serving.fake import EOS, FakeServer, write_prompts


def test_the_teacher_answers_in_its_own_template(tmp_path: Path) -> None:
    """A stand-in answers rightly, but for one problem, what is asked as the teacher's template writes it."""
    student, teacher = (make_tiny_tokenizer(tmp_path / name) for name in ("student", "teacher"))
    teacher.chat_template = str(teacher.chat_template).replace("assistant\\n", "assistant:\\n")
    teacher.save_pretrained(str(tmp_path / "teacher"))
    (tmp_path / "teacher" / "config.json").write_text('{"vocab_size": 304}')
    texts = [f"What is {n} + 1?" for n in range(4)]
    lines = [{"prompt": text, "response": f"#### {n + 1}"} for n, text in enumerate(texts)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    turns = [[{"role": "user", "content": text}] for text in texts]
    rendered = [str(teacher.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)) for turn in turns]
    asked = {tuple(teacher(text)["input_ids"]): number for number, text in enumerate(rendered)}
    with FakeServer() as server:

        def answer(body: dict) -> dict | None:
            number = asked.get(tuple(body["token_ids"]))
            if number is None:
                return None
            tokens = [*student("#### 0" if number == 2 else f"#### {number + 1}")["input_ids"], EOS]
            return {"token_ids": tokens, "logprobs": {"content": [{"logprob": -1.0}] * len(tokens)}}

        server.trouble = answer
        cfg = NPDConfig(
            teacher=str(tmp_path / "teacher"),
            student=str(tmp_path / "student"),
            rollout=RolloutConfig(max_model_len=64, urls=("http://the.student",)),
            annotate=AnnotateConfig(backend="vllm", urls=(server.url,)),
            eval=EvalConfig(prompts=str(tmp_path / "test.jsonl"), teacher=True),
        )
        accuracies = Accuracies(RunDir(tmp_path), cfg)
        assert accuracies.lack(None) and accuracies.lack(0)
        accuracies.add_teacher()
    known = json.loads((tmp_path / "report" / "accuracy.json").read_text())
    assert known == {"start": None, "rounds": [], "teacher": 75.0}
    later = Accuracies(RunDir(tmp_path), cfg)
    assert not later.lack(None) and later.lack(0)


def test_without_problems_or_regex_nothing_is_lacking(tmp_path: Path) -> None:
    for settings in (EvalConfig(teacher=True), EvalConfig(prompts="test.jsonl", answer_regex="", teacher=True)):
        accuracies = Accuracies(RunDir(tmp_path), NPDConfig(eval=settings))
        assert not accuracies.lack(None) and not accuracies.lack(0)


def test_a_measure_in_words_leaves_out_what_is_undefined() -> None:
    entry = {
        "policy": 1,
        "reason": None,
        "prompts": 64,
        "kl": 0.66,
        "kl_error": 0.0123,
        "top1_agreement": 0.7,
        "response_tokens": 60,
    }
    words = "v0001 on 64 held-out prompts: KL to the teacher 0.660 +- 0.012 nats per token, top-1 agreement 70.0 %, "
    assert measure_line(entry) == words + "60.0 response tokens"
    undefined = entry | {"kl": None, "kl_error": None, "top1_agreement": None}
    assert measure_line(undefined) == "v0001 on 64 held-out prompts: 60.0 response tokens"


def test_a_measure_without_a_kept_response_does_not_stop_the_run(tmp_path: Path) -> None:
    """Every request is refused; the report says so, in table and page, where a real trouble still ends the run."""
    write_prompts(tmp_path / "held_out" / "prompts", [5, 6, 7])
    with FakeServer() as server:
        server.trouble = lambda body: 400 if body["sampling_params"]["max_tokens"] > 1 else None
        cfg = NPDConfig(rollout=RolloutConfig(max_model_len=64, urls=(server.url,)), eval=EvalConfig(answer_regex=""))
        run = RunDir(tmp_path)
        ctx = work.Context(run=run, cfg=cfg, servers=Servers(run, cfg), launcher=Launcher(cfg))
        ctx.servers._pool, ctx.servers._served = ServerPool([server.url], cfg.rollout), 0
        work.answer_held_out(ctx, 0)
        assert work.held_out_is_answered(ctx, 0) and work.is_measured(ctx, 0)
        assert not work.held_out_is_answered(ctx, 1) and not work.is_measured(ctx, 1)
        ctx.servers._served = 1
        with pytest.raises(UserError, match="must serve policy v0001"):
            work.answer_held_out(ctx, 1)
    why = "no response was kept (quarantined: 6 request_failed)"
    (entry,) = read_measures(RunDir(tmp_path))
    assert entry["reason"] == why and entry["kl"] is None
    assert measure_line(entry) == f"v0000 could not be measured on held-out prompts: {why}"
    table = write_report(tmp_path)
    assert ["start", "-", "-", "-"] in [line.split() for line in table.splitlines()]
    assert f"No distance from the teacher before the run: {why}." in table
    assert why in (tmp_path / "report" / "report.html").read_text()


def test_a_measure_without_a_scored_response_has_its_reason(tmp_path: Path) -> None:
    """What the annotation leaves where nothing is scored, and what an interrupted one does."""
    write_prompts(tmp_path / "held_out" / "prompts", [5, 6, 7, 8])
    shards = {"0000": [0, 0], "0001": [0, 3], "0002": [], "0003": [0]}  # kept of the four in each shard
    for name, kept in shards.items():
        path = tmp_path / "held_out" / "rounds" / name
        for number, count in enumerate(kept):
            shard = path / "annotations" / f"shard-{number:05d}"
            shard.mkdir(parents=True)
            counts = {"in": 4, "kept": count, "quarantined": {"too_long": 4 - count}}
            seal(shard, kind="annotations-shard", counts=counts)
        (path / "rollouts").mkdir(parents=True, exist_ok=True)
        seal(path / "rollouts", kind="rollouts", counts={"in": 8, "kept": 8, "quarantined": {}})
    (entry,) = read_measures(RunDir(tmp_path))
    assert (entry["policy"], entry["reason"]) == (0, "no response was scored (quarantined: 8 too_long)")
