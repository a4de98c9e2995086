"""What is evaluated, when, and with whose prompts; the real engines' numbers are in ``test_loop.py``."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_npd.config.run import EvalConfig, NPDConfig
from megatron_npd.config.settings import AnnotateConfig, RolloutConfig
from megatron_npd.pipeline.evaluation import Accuracies, measure_line
from megatron_npd.run_dir import RunDir
from tests.helpers import make_tiny_tokenizer
from tests.serving.fake import EOS, FakeServer


def test_the_teacher_answers_in_its_own_template(tmp_path: Path) -> None:
    """A stand-in answers rightly, but for one problem, what is asked as the teacher's template writes it."""
    student, teacher = (make_tiny_tokenizer(tmp_path / name) for name in ("student", "teacher"))
    teacher.chat_template = teacher.chat_template.replace("assistant\\n", "assistant:\\n")
    teacher.save_pretrained(str(tmp_path / "teacher"))
    (tmp_path / "teacher" / "config.json").write_text('{"vocab_size": 304}')
    texts = [f"What is {n} + 1?" for n in range(4)]
    lines = [{"prompt": text, "response": f"#### {n + 1}"} for n, text in enumerate(texts)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    turns = [[{"role": "user", "content": text}] for text in texts]
    rendered = [teacher.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]
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
    entry = {"policy": 1, "prompts": 64, "kl": 0.66, "kl_error": 0.0123, "top1_agreement": 0.7, "response_tokens": 60}
    words = "v0001 on 64 held-out prompts: KL to the teacher 0.660 +- 0.012 nats a token, top-1 agreement 70.0 %, "
    assert measure_line(entry) == words + "60.0 response tokens"
    undefined = entry | {"kl": None, "kl_error": None, "top1_agreement": None}
    assert measure_line(undefined) == "v0001 on 64 held-out prompts: 60.0 response tokens"
