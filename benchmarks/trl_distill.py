"""TRL's on-policy distillation as its users run it, for ``loop.py`` and ``long_tail.py``; run where TRL (1.16) is.

It trains on the student's own responses to the prompts, ``--steps`` batches of ``--batch`` prompts, and leaves
``checkpoint-N`` directories and ``work.json``: where its CPU seconds went, and how long its responses were. The flags'
defaults are the forward KL on responses of the student alone; GKDConfig's own are ``--lmbda 0.5 --beta 0.5
--temperature 0.9 --batch 8 --gradient-checkpointing``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer  # pyright: ignore[reportMissingImports]


class Watched(GKDTrainer):
    """GKDTrainer, with account of its work.

    Attributes:
        seconds: CPU time of this process by part of the work; ``start`` is what it had spent before the first step.
        lengths: Tokens of each trained response.
        computed: Positions of all batches that were trained on, padding included, and those without it.
        decoded: Decoding steps times responses, and tokens of these.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seconds, self.lengths = {"start": 0.0, "generation": 0.0, "teacher": 0.0}, list[int]()
        self.computed, self.decoded = [0, 0], [0, 0]
        generate, forward = self.generate_on_policy_outputs, self.teacher_model.forward
        self.generate_on_policy_outputs = lambda *given: self._counted(self._timed("generation", generate, *given))
        self.teacher_model.forward = lambda **given: self._timed("teacher", forward, **given)

    def _timed(self, part: str, function: Any, *given: Any, **named: Any) -> Any:
        before = time.process_time()
        result = function(*given, **named)
        self.seconds[part] += time.process_time() - before
        return result

    def _counted(self, generated: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Any:
        labels = generated[2]
        width = int((labels != -100).any(0).sum())
        self.decoded = [self.decoded[0] + width * len(labels), self.decoded[1] + int((labels != -100).sum())]
        return generated

    def compute_loss(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        mask = inputs["attention_mask"]
        self.lengths += (inputs["labels"] != -100).sum(1).tolist()
        self.computed = [self.computed[0] + mask.numel(), self.computed[1] + int(mask.sum())]
        return super().compute_loss(model, inputs, *given, **named)


class Start(TrainerCallback):
    """Notes when the first step begins."""

    def __init__(self, trainer: Watched) -> None:
        self.trainer = trainer

    def on_train_begin(self, *given: Any, **named: Any) -> None:
        self.trainer.seconds["start"] = time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("student", "teacher", "prompts", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=30)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--lmbda", type=float, default=1.0, help="share of batches of the student's responses")
    parser.add_argument("--beta", type=float, default=0.0, help="of the generalised JSD; 0: forward KL")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="then it generates without a cache")
    parser.add_argument("--group", action="store_true", help="batches of prompts whose references are equally long")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--save-steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    with open(args.prompts) as lines:
        records = [json.loads(line) for line in lines]
    # Its collator wants a reply to cut off, or with lmbda below 1 to train on.
    replies = [record.get("response", "1") for record in records]
    rows = [
        {
            "messages": [*record["messages"], {"role": "assistant", "content": reply}],
            "length": len(tokenizer(reply)["input_ids"]),
        }
        for record, reply in zip(records, replies, strict=True)
    ]
    load: Any = AutoModelForCausalLM.from_pretrained
    trainer = Watched(
        model=load(args.student, dtype="float32"),
        teacher_model=load(args.teacher, dtype="float32"),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        args=GKDConfig(
            output_dir=args.out,
            lmbda=args.lmbda,
            beta=args.beta,
            temperature=args.temperature,
            max_new_tokens=args.max_new_tokens,
            max_length=args.max_length,
            per_device_train_batch_size=args.batch,
            max_steps=args.steps,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            warmup_steps=min(20, args.steps // 10),
            weight_decay=0.1,
            adam_beta2=0.95,
            gradient_checkpointing=args.gradient_checkpointing,
            train_sampling_strategy="group_by_length" if args.group else "random",
            length_column_name="length",
            bf16=False,
            use_cpu=True,
            logging_steps=100,
            save_steps=args.save_steps,
            save_only_model=True,
            report_to=[],
            seed=args.seed,
        ),
    )
    trainer.add_callback(Start(trainer))
    trainer.train()
    work = {"seconds": trainer.seconds, "total": time.process_time(), "lengths": trainer.lengths}
    work |= {"computed": trainer.computed, "decoded": trainer.decoded}
    (Path(args.out) / "work.json").write_text(json.dumps(work))


if __name__ == "__main__":
    main()
