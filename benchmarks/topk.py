"""Time of the exact top-k with log tail and sampled log-probabilities beside torch's own operations.

    python benchmarks/topk.py                       256 x 151936 on the CPU, fp32 and bf16

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measure import best_seconds, require_device
from torch import Tensor

from megatron_npd.log import run_main
from megatron_npd.ops.topk import topk_logprobs


def plain(logits_TV: Tensor, k: int, sampled_ids_T: Tensor) -> tuple[Tensor, ...]:
    """Top-k, log tail and the sampled ids' log-probabilities from a log-softmax."""
    log_p_TV = logits_TV.float().log_softmax(1)
    logprobs_TK, ids_TK = log_p_TV.topk(k)
    sampled_T = log_p_TV.gather(1, sampled_ids_T[:, None])[:, 0]
    return ids_TK, logprobs_TK, log_p_TV.scatter_(1, ids_TK, -torch.inf).logsumexp(1), sampled_T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--repeat", type=int, default=7)
    arguments = parser.parse_args()
    device, k = arguments.device, arguments.top_k
    require_device(device)
    torch.set_num_threads(arguments.threads)
    print(f"{device}, {arguments.threads} threads, {arguments.tokens} x {arguments.vocab}, k = {k}, ", end="")
    print(f"torch {torch.__version__}\n")
    print("| dtype | what | ms | x torch.topk |")
    print("|---|---|---|---|")
    for name in arguments.dtypes:
        generator = torch.Generator(device).manual_seed(0)
        shape = (arguments.tokens, arguments.vocab)
        logits_TV = (torch.randn(shape, generator=generator, device=device) * 3).to(getattr(torch, name))
        sampled_T = torch.randint(shape[1], shape[:1], generator=generator, device=device)
        ways: dict[str, Callable[[], object]] = {
            "torch.topk of the logits, nothing else": lambda z=logits_TV: z.float().topk(k),
            "log-softmax, torch.topk, tail, sampled": lambda z=logits_TV, s=sampled_T: plain(z, k, s),
            "ours: top-k, tail, sampled": lambda z=logits_TV, s=sampled_T: topk_logprobs(
                z, k, vocab_size=z.shape[1], sampled_ids_T=s
            ),
        }
        baseline = 0.0
        for label, way in ways.items():
            seconds = best_seconds(way, device, arguments.repeat)
            baseline = baseline or seconds
            print(f"| {name} | {label} | {seconds * 1e3:.0f} | {baseline / seconds:.1f} |", flush=True)
    if device == "cpu":
        print("\nCUDA: not run.")


if __name__ == "__main__":
    run_main(main)
