"""Products of quantised matrices: int8 with scales, int8 weights for fp16 rows, and int4 weights in groups."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tools.corpus.case import Case, Inputs, halves, small_integers
from tools.corpus.dense import tile_of

NIBBLES = 8  # in a word of packed weights
ZERO = 8  # what stands for 0 in a nibble
GROUP = 32  # rows of weights that share a scale


@triton.jit
def scaled_integer_product(
    a, b, a_scale, b_scale, c, rows, columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), 8)
    row, column = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(a + row[:, None] * depth + k[None, :], mask=row[:, None] < rows, other=0)
        y = tl.load(b + column[None, :] * depth + k[:, None], mask=column[None, :] < columns, other=0)
        total = tl.dot(x, y, total, out_dtype=tl.int32)
    scales = tl.load(a_scale + row, mask=row < rows)[:, None] * tl.load(b_scale + column, mask=column < columns)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(c + row[:, None] * columns + column[None, :], (total.to(tl.float32) * scales).to(tl.float16), mask=inside)


def multiply_integers(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, tile: tuple[int, int, int], num_warps: int, num_stages: int
) -> Tensor:
    """int8 (M, K) and (N, K) with a scale for each row of both -> fp16 (M, N). K is a multiple of the tile's."""
    (rows, depth), columns = a.shape, b.shape[0]
    c = torch.empty(rows, columns, dtype=torch.float16, device=a.device)
    grid = (triton.cdiv(rows, tile[0]) * triton.cdiv(columns, tile[1]),)
    scaled_integer_product[grid](
        a, b, a_scale, b_scale, c, rows, columns, depth, *tile, num_warps=num_warps, num_stages=num_stages
    )
    return c


@triton.jit
def product_with_integer_weights(
    x, weight, scale, out, rows, columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        values = tl.load(x + row[:, None] * depth + k[None, :], mask=row[:, None] < rows, other=0)
        integers = tl.load(weight + k[:, None] * columns + column[None, :])
        total = tl.dot(values, integers.to(tl.float16), total)
    total *= tl.load(scale + column)[None, :]
    tl.store(out + row[:, None] * columns + column[None, :], total.to(tl.float16), mask=row[:, None] < rows)


def multiply_mixed(
    x: Tensor, weight: Tensor, scale: Tensor, tile: tuple[int, int, int], num_warps: int, num_stages: int
) -> Tensor:
    """fp16 (M, K) and int8 (K, N) with a scale for each column -> fp16 (M, N). K and N are multiples of the tile's."""
    (rows, depth), columns = x.shape, weight.shape[1]
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(rows, tile[0]), columns // tile[1])
    product_with_integer_weights[grid](
        x, weight, scale, out, rows, columns, depth, *tile, num_warps=num_warps, num_stages=num_stages
    )
    return out


@triton.jit
def product_with_packed_weights(
    x, packed, scale, out, rows, columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NIBBLES: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        values = tl.load(x + row[:, None] * depth + k[None, :], mask=row[:, None] < rows, other=0)
        words = tl.load(packed + (k // NIBBLES)[:, None] * columns + column[None, :])
        integers = ((words >> ((k % NIBBLES) * 4)[:, None]) & 15) - ZERO
        scales = tl.load(scale + (k // GROUP)[:, None] * columns + column[None, :])
        total = tl.dot(values, integers.to(tl.float16) * scales, total)
    tl.store(out + row[:, None] * columns + column[None, :], total.to(tl.float16), mask=row[:, None] < rows)


def multiply_packed(
    x: Tensor, packed: Tensor, scale: Tensor, tile: tuple[int, int, int], num_warps: int, num_stages: int
) -> Tensor:
    """fp16 (M, K) and int4 in words of eight, (K / 8, N), with fp16 scales (K / 32, N) -> fp16 (M, N)."""
    (rows, depth), columns = x.shape, packed.shape[1]
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(rows, tile[0]), columns // tile[1])
    product_with_packed_weights[grid](
        x, packed, scale, out, rows, columns, depth, *tile, NIBBLES=NIBBLES, ZERO=ZERO, GROUP=GROUP,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def _integers(rows: int, columns: int, depth: int) -> Inputs:
    scales = {"a_scale": torch.rand(rows) / 1000, "b_scale": torch.rand(columns) / 1000}
    return {"a": small_integers(rows, depth), "b": small_integers(columns, depth), **scales}


def _mixed(rows: int, columns: int, depth: int) -> Inputs:
    return {"x": halves(rows, depth), "weight": small_integers(depth, columns), "scale": torch.rand(columns) / 100}


def _packed(rows: int, columns: int, depth: int) -> Inputs:
    words = torch.randint(-(2**31), 2**31, (depth // NIBBLES, columns), dtype=torch.int32)
    return {"x": halves(rows, depth), "packed": words, "scale": torch.rand(depth // GROUP, columns).half()}


def _integer_product(dtype: torch.dtype, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    exact = a.double() @ b.double().T  # sums of int8 products overflow fp16
    return ((a_scale[:, None] * b_scale).double() * exact).to(dtype)


def _mixed_product(dtype: torch.dtype, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.to(dtype) @ (weight.to(dtype) * scale.to(dtype))


def _packed_product(dtype: torch.dtype, x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    shifts = 4 * torch.arange(NIBBLES, dtype=torch.int32)[:, None]
    integers = ((packed[:, None] >> shifts) & 15) - ZERO
    weight = integers.reshape(-1, packed.shape[1]).to(dtype) * scale.to(dtype).repeat_interleave(GROUP, 0)
    return x.to(dtype) @ weight


_SMALL = {"rows": 50, "columns": 32, "depth": 96}
_SMALL_TILES = {"tile": (64, 32, 32), "num_warps": 4, "num_stages": 2}
_LARGE = {"rows": 512, "columns": 512, "depth": 512}

CASES = (
    Case("matmul int8 with scales", multiply_integers, _integers, _integer_product, _SMALL, _SMALL_TILES, _LARGE,
         {"tile": (128, 128, 64), "num_warps": 8, "num_stages": 2}, frozenset({"imma"})),
    Case("matmul fp16 by int8", multiply_mixed, _mixed, _mixed_product, _SMALL, _SMALL_TILES, _LARGE,
         {"tile": (64, 128, 32), "num_warps": 4, "num_stages": 2}),
    Case("matmul fp16 by int4", multiply_packed, _packed, _packed_product, _SMALL, _SMALL_TILES, _LARGE,
         {"tile": (64, 64, 32), "num_warps": 4, "num_stages": 2}),
)  # fmt: skip
