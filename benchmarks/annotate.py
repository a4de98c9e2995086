"""Annotation: teacher forwards, top-k and both IFD losses, beside the two bare forwards on the same packed rows.

    python benchmarks/annotate.py                     widths of Qwen2.5-0.5B, 6 of its 24 layers, random: 10 minutes
    python benchmarks/annotate.py --layers 24 --device cuda --bf16

Bare: the model's layers over the rows with the prompts and over those without, and the output layer at the tokens that
predict the response; nothing is made of the logits. "All logits": as a plain forward leaves them, for every token.
transformers scores the same samples one by one, and a vLLM server answers for them with ``prompt_logprobs``, both with
the prompts and without. Times are the shortest of several runs in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import best_seconds, hardware, require_device

from megatron_npd.config.settings import AnnotateConfig
from megatron_npd.log import run_main
from megatron_npd.platform import get_platform

VOCAB_SIZE, TOP_K = 151936, 10


def make_model(path: Path, layers: int, dtype: str) -> Path:
    """A random Qwen2 model of Qwen2.5-0.5B's widths, as a Hugging Face directory without a tokenizer."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(path)
    return path


def make_samples(tokens: int, seq_length: int) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Prompts, headers and responses of about ``tokens`` tokens: log-normal lengths, a quarter of them the prompt."""
    rng = np.random.default_rng(0)
    prompts, responses = [], []
    while sum(map(len, prompts)) + sum(map(len, responses)) < tokens:
        length = int(np.clip(rng.lognormal(np.log(300), 0.6), 16, seq_length))
        prompts.append(rng.integers(0, VOCAB_SIZE, length // 4))
        responses.append(rng.integers(0, VOCAB_SIZE, length - length // 4))
    return prompts, [prompt[-3:] for prompt in prompts], responses


def bare_forward(scorer: Any, micro_batches: list[Any], all_logits: bool) -> Callable[[], None]:
    """The model over the rows, and the output layer at response positions or at all of them."""
    from megatron_npd.models.build import head_weight, packed_params, without_output_layer
    from megatron_npd.teacher.megatron_scorer import HEAD_ROWS

    def forward() -> None:
        for micro in micro_batches:
            batch = micro.batch.to(scorer.device)
            with torch.no_grad():
                with without_output_layer(scorer.model):
                    hidden_T1H = scorer.model(
                        input_ids=batch.tokens,
                        position_ids=batch.position_ids,
                        attention_mask=None,
                        packed_seq_params=packed_params(batch.cu_seqlens),
                    )
                rows = torch.arange(len(hidden_T1H)) if all_logits else batch.loss_mask[0].nonzero()[:, 0]
                for part in rows.split(HEAD_ROWS):
                    scorer.model.output_layer(hidden_T1H[part], weight=head_weight(scorer.model))

    return forward


def transformers_forwards(path: Path, device: str, pairs: list[tuple[np.ndarray, np.ndarray]], dtype: str) -> Any:
    """Log-softmax, top-k and the sampled tokens' log-probs, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), trust_remote_code=False)
    model.to(device).eval()  # pyright: ignore[reportArgumentType]  (transformers' decorator hides its self)

    @torch.no_grad()
    def forward() -> None:
        for prefix, response in pairs:
            tokens = torch.tensor(np.concatenate([prefix, response]), device=device)[None]
            logits_nV = model(tokens, logits_to_keep=len(response) + 1).logits[0, :-1].float()
            logprobs_nV = torch.log_softmax(logits_nV, dim=-1)
            logprobs_nV.topk(TOP_K)
            logprobs_nV.gather(1, tokens[0, -len(response) :, None])

    return forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=4, help="packed rows with the prompts, about")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rivals", nargs="*", default=["transformers", "vllm"], choices=["transformers", "vllm"])
    args = parser.parse_args()
    require_device(args.device)
    get_platform(args.device)
    from megatron_npd.platform.initialize import initialize_distributed
    from megatron_npd.teacher.megatron_scorer import Scorer

    dtype = "bfloat16" if args.bf16 else "float32"
    root = Path(tempfile.mkdtemp(prefix="npd-annotate-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, root)
        path = make_model(root / "model", args.layers, dtype)
        prompts, headers, responses = make_samples(args.rows * args.seq_length, args.seq_length)
        n = sum(map(len, responses))
        initialize_distributed()
        sizes = {"seq_length": args.seq_length, "micro_batch_size": args.micro_batch_size}
        scorer = Scorer(path, **sizes, bf16=args.bf16, vocab_size=VOCAB_SIZE)
        micro_batches = [
            micro for prefixes in (prompts, headers) for micro in scorer.micro_batches(prefixes, responses)[1]
        ]
        used = sum(micro.tokens for micro in micro_batches)
        fill = used / sum(micro.batch.position_ids.numel() for micro in micro_batches)
        print(
            f"{hardware(args.device, torch.get_num_threads())}, {dtype}; "
            f"{len(responses)} samples, {n} response tokens; "
            f"{len(micro_batches)} forwards of up to {args.micro_batch_size} x {args.seq_length}, {100 * fill:.1f} % "
            f"filled; {args.layers} layers of 896, vocabulary {VOCAB_SIZE}, k = {TOP_K}"
        )

        def ours() -> None:
            for prefixes, top_k in ((prompts, TOP_K), (headers, 0)):
                scores = scorer.score(prefixes, responses, top_k=top_k)
                assert scores is not None
                scores.losses()

        actions: dict[str, Callable[[], object]] = {
            "the two bare forwards": bare_forward(scorer, micro_batches, all_logits=False),
            "the two bare forwards, all logits": bare_forward(scorer, micro_batches, all_logits=True),
            "ours: forwards, top-k, tails, both losses": ours,
        }
        if "transformers" in args.rivals:
            pairs = [*zip(prompts, responses, strict=True), *zip(headers, responses, strict=True)]
            actions["transformers, one by one, log-softmax, top-k"] = transformers_forwards(
                path, args.device, pairs, dtype
            )
        if "vllm" in args.rivals:
            from megatron_npd.teacher.vllm_scorer import ServerScorer

            cfg = AnnotateConfig(top_k=TOP_K, seq_length=args.seq_length, bf16=args.bf16, backend="vllm")
            servers = stack.enter_context(ServerScorer(path, cfg))
            actions["vLLM server, prompt_logprobs (--backend vllm)"] = lambda: (
                servers.score(prompts, responses, top_k=TOP_K),
                servers.score(headers, responses),
            )
        best: dict[str, float] = {}
        for _ in range(args.repeat):
            for what, action in actions.items():
                best[what] = min(best.get(what, np.inf), best_seconds(action, args.device, 1))
        bare = best["the two bare forwards"]
        print("\n| what | s | x the bare forwards | response tokens/s |\n|---|---|---|---|")
        for what, seconds in best.items():
            print(f"| {what} | {seconds:.2f} | {seconds / bare:.3f} | {n / seconds:.0f} |")


if __name__ == "__main__":
    run_main(main)
