"""A grouped product, as a mixture of experts has it: rows in order of their expert, each expert with its own matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tools.corpus.case import Case, Inputs, halves


@triton.jit
def grouped_product(
    x, weight, offsets, out, experts, columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Every program goes through all experts and takes each num_programs-th tile."""
    tile, before = tl.program_id(0), 0
    column_tiles = tl.cdiv(columns, BLOCK_N)
    for expert in range(experts):
        first, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
        tiles = tl.cdiv(end - first, BLOCK_M) * column_tiles
        while tile < before + tiles:
            row = first + (tile - before) // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
            column = (tile - before) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
            k = tl.arange(0, BLOCK_K)
            x_at = x + row[:, None] * depth + k[None, :]
            w_at = weight + expert * depth * columns + k[:, None] * columns + column[None, :]
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for _ in range(0, depth, BLOCK_K):
                total = tl.dot(tl.load(x_at, mask=row[:, None] < end, other=0), tl.load(w_at), total)
                x_at += BLOCK_K
                w_at += BLOCK_K * columns
            tl.store(out + row[:, None] * columns + column[None, :], total.to(tl.float16), mask=row[:, None] < end)
            tile += tl.num_programs(0)
        before += tiles


def multiply_grouped(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    programs: int,
    tile: tuple[int, int, int],
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """(T, K), (experts, K, N) and where each expert's rows begin and end -> (T, N). K, N: multiples of the tile's."""
    experts, depth, columns = weight.shape
    out = torch.empty(x.shape[0], columns, dtype=x.dtype, device=x.device)
    grouped_product[(programs,)](
        x, weight, offsets, out, experts, columns, depth, *tile, num_warps=num_warps, num_stages=num_stages
    )
    return out


def _inputs(rows: list[int], columns: int, depth: int) -> Inputs:
    offsets = torch.tensor([0, *rows], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {"x": halves(sum(rows), depth), "weight": halves(len(rows), depth, columns), "offsets": offsets}


def _product(dtype: torch.dtype, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    parts = zip(x.to(dtype).split(offsets.diff().tolist()), weight.to(dtype), strict=True)
    return torch.cat([rows @ matrix for rows, matrix in parts])


CASES = (
    Case(
        "grouped matmul", multiply_grouped, _inputs, _product, {"rows": [40, 0, 70], "columns": 64, "depth": 64},
        {"programs": 2, "tile": (64, 64, 32), "num_warps": 4, "num_stages": 2},
        {"rows": [100, 300, 0, 112], "columns": 512, "depth": 512},
        {"programs": 40, "tile": (128, 128, 32), "num_warps": 4, "num_stages": 2},
    ),
)  # fmt: skip
