"""Time, memory and error of the distillation loss beside the ways it is usually written, on logits and hidden states.

    python benchmarks/loss.py                       2048 x 32000 on the CPU, fp32 and bf16
    python benchmarks/loss.py --device cuda --tokens 32768 --vocab 152064 --hidden 3584 --dtypes bfloat16

Each line is forward + backward of CE + top-k KD of every token. ``memory`` is the peak above what was there before, in
units of the logits (true for logits beyond 32 MB, whose memory the allocator gives back). On logits ``of copy`` is the
time that three passes over them (one read forward, one read and one write backward) take at the speed at which this
machine copies, over the time taken; on hidden states ``of matmuls`` is the time of the three matmuls of the head's
forward and backward, bare and in the same chunks, over the time taken. The first way of each table is the measure of
``x``. Rivals are optional (``pip install liger-kernel``); one that is not there is named with the reason.

Legend: T tokens, V vocabulary, H hidden, K top-k.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial

import torch
from measure import best_seconds, copy_bandwidth, hardware, peak_bytes, require_device
from rivals import ALPHA, Teacher, exact, linear_losses, losses, matmuls
from torch import Tensor

from megatron_npd.choices import Mode
from megatron_npd.log import run_main
from megatron_npd.ops import fused_linear
from megatron_npd.ops.distill_loss import distill_loss
from megatron_npd.ops.fused_linear import distill_linear_loss

ERROR_ROWS = 16
OTHER_FORMULA = ("alone", "JSD", "renorm_both", "top-k KL from")


def ours(logits_TV: Tensor, labels_T: Tensor, teacher: Teacher, *, inplace: bool = True, mode: Mode = "tail") -> Tensor:
    """This package's loss."""
    ids_TK, log_p_TK, log_tail_T = teacher
    return distill_loss(
        logits_TV,
        labels_T,
        teacher_ids_TK=ids_TK,
        teacher_logprobs_TK=log_p_TK,
        teacher_log_tail_T=log_tail_T,
        alpha=ALPHA,
        mode=mode,
        inplace=inplace,
    ).loss_T


def ours_linear(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, teacher: Teacher) -> Tensor:
    """This package's loss fused with the head."""
    ids_TK, log_p_TK, log_tail_T = teacher
    return distill_linear_loss(
        hidden_TH,
        weight_VH,
        labels_T,
        teacher_ids_TK=ids_TK,
        teacher_logprobs_TK=log_p_TK,
        teacher_log_tail_T=log_tail_T,
        alpha=ALPHA,
    )[0]


def head_then_ours(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, teacher: Teacher) -> Tensor:
    """The head, then this package's loss on whole logits."""
    return ours(hidden_TH @ weight_VH.t(), labels_T, teacher).sum()


def table(
    ways: Mapping[str, Callable[..., Tensor] | str],
    inputs: tuple[Tensor, ...],
    rest: tuple[object, ...],
    expected: Tensor,
    *,
    limit: float,
    unit: int,
    arguments: argparse.Namespace,
) -> None:
    """Print a line for each way.

    Args:
        ways: By name; called with ``inputs`` (which get gradients) and ``rest``; its sum is differentiated.
        inputs: Made anew for each run: a loss may destroy them.
        rest: Other arguments.
        expected: Gradient of the first input's first rows in fp64.
        limit: Seconds that the work takes at least.
        unit: Bytes that memory is told in.
        arguments: Of the command line.
    """
    baseline, name = 0.0, str(inputs[0].dtype).removeprefix("torch.")
    for label, way in ways.items():
        if isinstance(way, str):
            print(f"| {name} | {label} | {way} | | | | |", flush=True)
            continue
        work = [tensor.clone().requires_grad_() for tensor in inputs]

        def step(way: Callable[..., Tensor] = way, work: list[Tensor] = work) -> None:
            way(*work, *rest).sum().backward()

        def refill(work: list[Tensor] = work) -> None:
            with torch.no_grad():
                for tensor, values in zip(work, inputs, strict=True):
                    tensor.grad = None
                    tensor.copy_(values)

        step()  # compiles, and warms the allocator
        refill()
        memory = peak_bytes(step, arguments.device) / unit
        assert work[0].grad is not None
        error = (work[0].grad[: len(expected)].double() - expected).abs().max().item()
        seconds = best_seconds(step, arguments.device, arguments.repeat, refill)
        baseline = baseline or seconds
        shown = "other formula" if any(words in label for words in OTHER_FORMULA) else f"{error:.1e}"
        print(
            f"| {name} | {label} | {seconds * 1e3:.4g} | {baseline / seconds:.1f} | {limit / seconds:.2f} "
            f"| {memory:.2f} | {shown} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--hidden", type=int, default=896, help="of the head; 0 leaves the fused losses out")
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="torch.compile of the naive loss too (slow to start)")
    arguments = parser.parse_args()
    device = arguments.device
    require_device(device)
    torch.set_num_threads(arguments.threads)

    generator = torch.Generator(device).manual_seed(0)
    shape = (arguments.tokens, arguments.vocab)

    def problem(logits_TV: Tensor) -> tuple[Tensor, Teacher]:
        teacher_TV = (logits_TV.float() * 1.1).log_softmax(1)
        log_p_TK, ids_TK = teacher_TV.topk(arguments.top_k)
        labels_T = torch.randint(arguments.vocab, shape[:1], generator=generator, device=device)
        return labels_T, (ids_TK, log_p_TK, teacher_TV.scatter_(1, ids_TK, -torch.inf).logsumexp(1))

    def exact_gradient(logits_TV: Tensor, labels_T: Tensor, teacher: Teacher) -> Tensor:
        rows_TV = logits_TV[:ERROR_ROWS].detach().double().requires_grad_()
        ids_TK, log_p_TK, log_tail_T = teacher
        exact(
            rows_TV, labels_T[:ERROR_ROWS], (ids_TK[:ERROR_ROWS], log_p_TK[:ERROR_ROWS], log_tail_T[:ERROR_ROWS])
        ).sum().backward()
        assert rows_TV.grad is not None
        return rows_TV.grad

    logits_TV = torch.randn(shape, generator=generator, device=device) * 2
    labels_T, teacher = problem(logits_TV)
    bandwidth = copy_bandwidth(device, min(logits_TV.nbytes, 1 << 30), arguments.repeat)
    print(f"{hardware(device, arguments.threads)}; {shape[0]} x {shape[1]}, k = {arguments.top_k}, ", end="")
    print(f"copy {bandwidth / 1e9:.1f} GB/s\n")
    print("| dtype | loss | ms | x | of copy | memory | gradient error |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.dtypes:
        values_TV = logits_TV.to(getattr(torch, name))
        ways = losses(device, arguments.compile) | {
            "ours": ours,
            "ours, not in place": partial(ours, inplace=False),
            "ours, renorm_both": partial(ours, mode="renorm_both"),
        }
        table(
            ways,
            (values_TV,),
            (labels_T, teacher),
            exact_gradient(values_TV, labels_T, teacher),
            limit=3 * values_TV.nbytes / bandwidth,
            unit=values_TV.nbytes,
            arguments=arguments,
        )
        del values_TV
    del logits_TV
    if arguments.hidden:
        print(f"\n{shape[0]} x {arguments.hidden} hidden states, a head of {shape[1]} x {arguments.hidden}\n")
        print("| dtype | loss | ms | x | of matmuls | memory | gradient error |")
        print("|---|---|---|---|---|---|---|")
    for name in arguments.dtypes if arguments.hidden else []:
        sizes = (shape[0], arguments.hidden), (shape[1], arguments.hidden)
        hidden_TH, weight_VH = (torch.randn(size, generator=generator, device=device) for size in sizes)
        hidden_TH = hidden_TH.to(getattr(torch, name))
        weight_VH = (weight_VH * (2 / arguments.hidden**0.5)).to(hidden_TH.dtype)
        logits_TV = hidden_TH @ weight_VH.t()
        labels_T, teacher = problem(logits_TV)
        expected_TH = exact_gradient(logits_TV, labels_T, teacher) @ weight_VH.double()
        elements = fused_linear.CPU_CHUNK_ELEMENTS if device == "cpu" else fused_linear.CHUNK_ELEMENTS
        grad_CV = logits_TV[: max(1, elements // shape[1])].clone()
        unit = logits_TV.nbytes
        del logits_TV
        limit = best_seconds(lambda h=hidden_TH, w=weight_VH, g=grad_CV: matmuls(h, w, g), device, arguments.repeat)
        del grad_CV
        table(
            linear_losses(device) | {"head, then ours": head_then_ours, "ours, fused": ours_linear},
            (hidden_TH, weight_VH),
            (labels_T, teacher),
            expected_TH,
            limit=limit,
            unit=unit,
            arguments=arguments,
        )
    if device == "cpu":
        print("\nCUDA: not run.")


if __name__ == "__main__":
    run_main(main)
