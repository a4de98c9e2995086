"""What the compiler makes of the Triton kernels: registers, spills and shared memory, for a GPU that need not be there.

    python benchmarks/ptx.py                        sm_90 (H100, H200), 32768 x 152064, k = 10
    python benchmarks/ptx.py --arch 80 --top-k 128

The launches are the package's own, recorded with tensors that have a shape and no memory. ``resident`` is how many
programs a multiprocessor holds at once by registers and threads, ``in flight`` the logits that these wait for when each
waits for one tile: latency times bandwidth of an H200 asks for some 25 KiB.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from megatron_npd.ops import distill_loss_triton, topk_triton
from megatron_npd.ops.arguments import Problem
from megatron_npd.ops.divergences import Objective, Rows, gradient_rule
from megatron_npd.ops.vocab_parallel import VocabShard

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
REGISTERS, THREADS = 65536, 2048  # of a multiprocessor of sm_80 and sm_90


class Recorder:
    """Stands for a kernel and keeps the arguments of its last launch."""

    def __init__(self, kernel: JITFunction):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        return self

    def __call__(self, *args: Any, num_warps: int, **constants: Any) -> None:
        self.num_warps = num_warps
        self.arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | constants

    def source(self) -> ASTSource:
        """The specialisation that this launch asks for, as Triton's own launcher chooses it."""
        signature, constants, attributes = {}, {}, {}
        for position, (name, value) in enumerate(self.arguments.items()):
            if isinstance(value, torch.Tensor):
                signature[name], aligned = f"*{TYPES[value.dtype]}", True
            elif isinstance(value, float):
                signature[name], aligned = "fp32", False
            elif name.isupper() or value is None or value == 1:
                signature[name], constants[name], aligned = "constexpr", value, False
            else:
                signature[name], aligned = "i64" if value >= 2**31 else "i32", value % 16 == 0
            if aligned:
                attributes[(position,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)  # pyright: ignore[reportArgumentType]


def launch(dtype: torch.dtype, tokens: int, vocab: int, top_k: int) -> dict[str, Recorder]:
    """Every kernel's launch for logits of this type and size."""
    recorders = {}
    for module in (distill_loss_triton, topk_triton):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            recorders[name] = Recorder(getattr(module, name))
            setattr(module, name, recorders[name])
    try:
        with torch.device("meta"):
            logits_TV = torch.empty(tokens, vocab, dtype=dtype)
            ids_NK, labels_N = torch.empty(tokens, top_k, dtype=torch.int64), torch.empty(tokens, dtype=torch.int64)
            log_target_NB = torch.empty(tokens, top_k + 1)
            rows = Rows(index_N=None, labels_N=labels_N, ids_NK=ids_NK, log_target_NB=log_target_NB, weights_N=None)
            objective = Objective(
                ce_weight=0.1,
                kd_weight=0.9,
                divergence="forward_kl",
                coefficient=0.0,
                student_on_ids=False,
                temperature=1.0,
            )
            problem = Problem(rows, objective, VocabShard(width=vocab, columns=vocab), labels_N, tokens)
            rule = gradient_rule(rows, objective)
            distill_loss_triton.statistics(logits_TV, problem, rule, logits_TV)
            topk_triton.tile_stats(logits_TV, 128)
    finally:
        for module in (distill_loss_triton, topk_triton):
            for name in set(vars(module)) & set(recorders):
                setattr(module, name, recorders[name].kernel)
    return recorders


def resources(recorder: Recorder, arch: int) -> tuple[int, int, int]:
    """Registers a thread, bytes of stack (spills) a thread and bytes of shared memory a program."""
    target = GPUTarget("cuda", arch, 32)
    binary = compile(recorder.source(), target=target, options={"num_warps": recorder.num_warps}).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    assert found, usage
    registers, stack, shared = map(int, found.groups())
    return registers, stack, shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, help="compute capability (default: 90)")
    parser.add_argument("--tokens", type=int, default=32768, help="rows of the logits (default: 32768)")
    parser.add_argument("--vocab", type=int, default=152064, help="columns of the logits (default: 152064)")
    parser.add_argument("--top-k", type=int, default=10, help="teacher ids per token (default: 10)")
    args = parser.parse_args()
    print("| kernel | logits | registers | spills, B | shared, B | threads | resident | in flight, KiB |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for name, recorder in launch(dtype, args.tokens, args.vocab, args.top_k).items():
            registers, stack, shared = resources(recorder, args.arch)
            threads = recorder.num_warps * 32
            resident = min(REGISTERS // (-(-registers // 8) * 8 * threads), THREADS // threads, 32)
            block = recorder.arguments.get("BLOCK", topk_triton.BLOCK)
            flight = resident * block * dtype.itemsize // 1024
            cells = [name, TYPES[dtype], registers, stack, shared, threads, resident, flight]
            print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
