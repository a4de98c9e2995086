"""Devices with the numbers of their data sheets: what a run can be planned for, and what a device could reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_npd.choices import GpuName

GB = 10**9
MIB, GIB = 2**20, 2**30
TERA = 10**12


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One device.

    Attributes:
        platform: Which of the platforms runs on it.
        memory: Its memory, in bytes.
        flops_bf16: Dense matrix products in bfloat16 at their peak, in FLOP/s.
        flops_fp32: The same in float32, without TF32.
        bandwidth: Of its memory, in bytes per second.
        link: To its neighbours in the node, in bytes per second and direction.
        source: Where the numbers are from.
    """

    platform: Literal["cpu", "cuda", "npu"]
    memory: float
    flops_bf16: float
    flops_fp32: float
    bandwidth: float
    link: float
    source: str

    def flops(self, bf16: bool) -> float:
        """Peak of the type that a stage computes in."""
        return self.flops_bf16 if bf16 else self.flops_fp32


def _nvidia(memory: float, bf16: float, fp32: float, bandwidth: float, link: float, source: str) -> Accelerator:
    """Memory in MiB, as nvidia-smi tells it; TFLOP/s; GB/s."""
    return Accelerator(
        platform="cuda",
        memory=memory * MIB,
        flops_bf16=bf16 * TERA,
        flops_fp32=fp32 * TERA,
        bandwidth=bandwidth * GB,
        link=link * GB,
        source=source,
    )


ACCELERATORS: dict[GpuName, Accelerator] = {
    "a100-40g": _nvidia(40960, 312, 19.5, 1555, 300, "NVIDIA A100 data sheet, SXM"),
    "a100-80g": _nvidia(81920, 312, 19.5, 2039, 300, "NVIDIA A100 data sheet, SXM"),
    "l40s-48g": _nvidia(46068, 362, 91.6, 864, 32, "NVIDIA L40S data sheet; PCIe 4"),
    "h100-80g": _nvidia(81559, 989, 67, 3350, 450, "NVIDIA H100 data sheet, SXM"),
    "h20-96g": _nvidia(97871, 148, 44, 4000, 450, "as reported for the H20, which has no public data sheet"),
    "h200-141g": _nvidia(143771, 989, 67, 4800, 450, "NVIDIA H200 data sheet, SXM"),
    "b200-180g": _nvidia(183359, 2250, 75, 8000, 900, "NVIDIA DGX B200 data sheet, by 8"),
    "ascend-910b-64g": Accelerator(
        platform="npu",
        memory=64 * GIB,
        flops_bf16=313 * TERA,
        flops_fp32=75 * TERA,
        bandwidth=1600 * GB,
        link=196 * GB,
        source="as reported for the 910B3 of an Atlas 800T A2, which has no public data sheet",
    ),
}


def accelerator_of(product: str) -> Accelerator | None:
    """The data sheet of a device by its product name (``NVIDIA H200``); None: it is not known."""
    name = product.lower().replace(" ", "").replace("-", "")
    known = {key.rpartition("-")[0].replace("-", ""): sheet for key, sheet in ACCELERATORS.items()}
    found = [key for key in known if key in name]
    return known[max(found, key=len)] if found else None  # h20 is in h200 too
