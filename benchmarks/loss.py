"""Time, memory and error of the distillation loss beside the way it is usually written.

    python benchmarks/loss.py                       2048 x 32000 on the CPU, fp32 and bf16
    python benchmarks/loss.py --device cuda --tokens 32768 --vocab 152064

Each line is forward + backward of CE + top-k KD of every token. ``memory`` is the peak above what was there before, in
units of the logits (true for logits beyond 32 MB, whose memory the allocator gives back). ``of copy`` is the time that
three passes over the logits (one read forward, one read and one write backward) take at the speed at which this
machine copies, over the time taken.

Legend: T tokens, V vocabulary, K top-k.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_npd.log import UserError, run_main
from megatron_npd.ops.distill_loss import distill_loss

ALPHA = 0.9
ERROR_ROWS = 16


def naive(logits_TV: Tensor, labels_T: Tensor, teacher: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Composite loss from one log-softmax under autograd, its tail as 1 - sum (which is not exact)."""
    ids_TK, log_p_TK, log_tail_T = teacher
    log_q_TV = logits_TV.float().log_softmax(-1)
    ce_T = -log_q_TV.gather(1, labels_T[:, None])[:, 0]
    log_q_TK = log_q_TV.gather(1, ids_TK)
    log_tail_q_T = torch.log((1 - log_q_TK.exp().sum(1)).clamp(min=1e-7))
    kd_T = (log_p_TK.exp() * (log_p_TK - log_q_TK)).sum(1) + log_tail_T.exp() * (log_tail_T - log_tail_q_T)
    return (1 - ALPHA) * ce_T + ALPHA * kd_T


def exact(logits_TV: Tensor, labels_T: Tensor, teacher: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The same with the tail as METHOD section 2 has it, for fp64."""
    ids_TK, log_p_TK, log_tail_T = (tensor.double() if tensor.is_floating_point() else tensor for tensor in teacher)
    log_q_TV = logits_TV.log_softmax(-1)
    ce_T = -log_q_TV.gather(1, labels_T[:, None])[:, 0]
    log_tail_q_T = log_q_TV.scatter(1, ids_TK, -torch.inf).logsumexp(1)
    kd_T = (log_p_TK.exp() * (log_p_TK - log_q_TV.gather(1, ids_TK))).sum(1)
    return (1 - ALPHA) * ce_T + ALPHA * (kd_T + log_tail_T.exp() * (log_tail_T - log_tail_q_T))


def ours(
    logits_TV: Tensor, labels_T: Tensor, teacher: tuple[Tensor, Tensor, Tensor], *, inplace: bool, mode: str = "tail"
) -> Tensor:
    """This package's loss."""
    ids_TK, log_p_TK, log_tail_T = teacher
    return distill_loss(
        logits_TV,
        labels_T,
        teacher_ids_TK=ids_TK,
        teacher_logprobs_TK=log_p_TK,
        teacher_log_tail_T=log_tail_T,
        alpha=ALPHA,
        mode=mode,  # pyright: ignore[reportArgumentType]
        inplace=inplace,
    ).loss_T


def require_device(device: str) -> None:
    """Refuse a device that is not there."""
    accelerator = torch.accelerator.current_accelerator()
    if device != "cpu" and (accelerator is None or accelerator.type != device):
        raise UserError(f"--device {device} must be there, got {accelerator}; run this on a machine that has it")


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def best_seconds(action: Callable[[], object], device: str, repeat: int) -> float:
    """The shortest of ``repeat`` runs: what the others add is the rest of the machine."""
    times = []
    for _ in range(repeat):
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def copy_bandwidth(device: str, num_bytes: int, repeat: int) -> float:
    """Bytes a second, read and written, of copying a buffer of ``num_bytes``."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / best_seconds(lambda: target.copy_(source), device, repeat)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def peak_bytes(action: Callable[[], object], device: str) -> int:
    """Peak memory of ``action`` above what the process held before it."""
    gc.collect()
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of resident memory
        before = _status("VmRSS")
        action()
        return _status("VmHWM") - before
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    action()
    return torch.accelerator.max_memory_allocated() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32000)
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
    logits_TV = torch.randn(shape, generator=generator, device=device) * 2
    teacher_TV = logits_TV[:, : arguments.vocab].clone().mul_(1.1).log_softmax(1)
    log_p_TK, ids_TK = teacher_TV.topk(arguments.top_k)
    log_tail_T = teacher_TV.scatter_(1, ids_TK, -torch.inf).logsumexp(1)
    del teacher_TV
    teacher = (ids_TK, log_p_TK, log_tail_T)
    labels_T = torch.randint(arguments.vocab, shape[:1], generator=generator, device=device)
    bandwidth = copy_bandwidth(device, min(logits_TV.nbytes, 1 << 30), arguments.repeat)
    print(f"{device}, {arguments.threads} threads, {shape[0]} x {shape[1]}, k = {arguments.top_k}, ", end="")
    print(f"copy {bandwidth / 1e9:.1f} GB/s, torch {torch.__version__}\n")
    print("| dtype | loss | ms | x naive | of copy | memory | gradient error |")
    print("|---|---|---|---|---|---|---|")
    losses: dict[str, Callable[..., Tensor]] = {"naive torch": naive}
    if arguments.compile:
        losses["torch.compile of it"] = torch.compile(naive)
    losses["ours"] = partial(ours, inplace=True)
    losses["ours, not in place"] = partial(ours, inplace=False)
    losses["ours, renorm_both"] = partial(ours, inplace=True, mode="renorm_both")

    for name in arguments.dtypes:
        values_TV = logits_TV.to(getattr(torch, name))
        rows_TV = values_TV[:ERROR_ROWS].double().requires_grad_()
        exact(rows_TV, labels_T[:ERROR_ROWS], tuple(tensor[:ERROR_ROWS] for tensor in teacher)).sum().backward()
        assert rows_TV.grad is not None
        baseline = 0.0
        for label, loss in losses.items():
            work_TV = values_TV.clone().requires_grad_()

            def step(loss: Callable[..., Tensor] = loss, work_TV: Tensor = work_TV) -> None:
                work_TV.grad = None
                loss(work_TV, labels_T, teacher).sum().backward()

            def refill(work_TV: Tensor = work_TV, values_TV: Tensor = values_TV) -> None:
                work_TV.grad = None
                with torch.no_grad():
                    work_TV.copy_(values_TV)

            refill()
            memory = peak_bytes(step, device) / values_TV.nbytes
            assert work_TV.grad is not None
            error = (work_TV.grad[:ERROR_ROWS].double() - rows_TV.grad).abs().max().item()
            times = []
            for _ in range(arguments.repeat):
                refill()
                times.append(best_seconds(step, device, 1))
            seconds = min(times)
            baseline = baseline or seconds
            limit = 3 * values_TV.nbytes / bandwidth
            shown = "other formula" if label.endswith("renorm_both") else f"{error:.1e}"
            print(
                f"| {name} | {label} | {seconds * 1e3:.0f} | {baseline / seconds:.1f} | {limit / seconds:.2f} "
                f"| {memory:.2f} | {shown} |",
                flush=True,
            )
    if device == "cpu":
        print("\nCUDA: not run.")


if __name__ == "__main__":
    run_main(main)
