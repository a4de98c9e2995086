"""The pass over the logits that finds a top-k, as a Triton kernel: the maximum and the log-sum-exp of each tile.

Legend: T tokens, V columns of this rank's slice, N tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Columns of a program, several tiles."""
NUM_WARPS = 4
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction that flushes denormals, exp four


@triton.jit
def tile_kernel(logits, stride_t, stride_v, columns, tiles, maxima, lses, TILE: tl.constexpr, TILES: tl.constexpr):
    """``TILES`` tiles of one row."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    at = row * stride_t + column.to(tl.int64) * stride_v
    z = tl.load(logits + at, mask=column < columns, other=-float("inf")).to(tl.float32)
    largest = tl.max(z, 1)
    shift = tl.maximum(largest, _LOWEST)  # -inf - -inf is not a number
    sums = tl.sum(tl.exp2((z - shift[:, None]) * _LOG2E), 1)
    tl.store(maxima + row * tiles + tile, largest, mask=tile < tiles)
    tl.store(lses + row * tiles + tile, shift + tl.log(sums), mask=tile < tiles)


def tile_stats(z_TV: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Largest logit and log-sum-exp of each ``tile`` columns, fp32 ``[T, N]``; the last tile may be narrower.

    Args:
        z_TV: Logits, any strides.
        tile: A power of two.
    """
    num_tokens, width = z_TV.shape
    tiles, tiles_at_once = -(-width // tile), max(1, BLOCK // tile)
    max_TN, lse_TN = torch.empty(2, num_tokens, tiles, dtype=torch.float32, device=z_TV.device).unbind(0)
    launch: Any = tile_kernel[(num_tokens, -(-tiles // tiles_at_once))]
    with torch.accelerator.device_index(z_TV.device.index):
        launch(
            z_TV,
            *z_TV.stride(),
            width,
            tiles,
            max_TN,
            lse_TN,
            TILE=tile,
            TILES=tiles_at_once,
            num_warps=NUM_WARPS,
        )
    return max_TN, lse_TN
