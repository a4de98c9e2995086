"""TRL's on-policy distillation as its users run it, for ``loop.py``; run by an interpreter that has TRL (1.16).

It trains on the student's own responses to the prompts, ``--steps`` batches of ``--batch`` prompts, with the forward KL
on the whole vocabulary, and leaves ``checkpoint-N`` directories.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from datasets import Dataset  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer  # pyright: ignore[reportMissingImports]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("student", "teacher", "prompts", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=30)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--save-steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with open(args.prompts) as lines:
        rows = [json.loads(line)["messages"] for line in lines]
    # Its collator wants a reply to cut off; with lmbda 1 no step reads it.
    data = Dataset.from_list([{"messages": [*row, {"role": "assistant", "content": "1"}]} for row in rows])
    load: Any = AutoModelForCausalLM.from_pretrained
    trainer = GKDTrainer(
        model=load(args.student, dtype="float32"),
        teacher_model=load(args.teacher, dtype="float32"),
        processing_class=AutoTokenizer.from_pretrained(args.student),
        train_dataset=data,
        args=GKDConfig(
            output_dir=args.out,
            lmbda=1.0,
            beta=0.0,
            temperature=1.0,
            max_new_tokens=args.max_new_tokens,
            max_length=256,
            per_device_train_batch_size=args.batch,
            max_steps=args.steps,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            weight_decay=0.1,
            adam_beta2=0.95,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=100,
            save_steps=args.save_steps,
            save_only_model=True,
            report_to=[],
            seed=args.seed,
        ),
    )
    trainer.train()


if __name__ == "__main__":
    main()
