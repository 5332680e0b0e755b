"""Matrix products of one dtype: plain, of a transposed matrix, by descriptors, split along the sum, and two at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tools.corpus.case import Case, Inputs, halves, small_integers


@triton.jit
def tile_of(program, row_tiles, column_tiles, ROW_TILES_AT_ONCE: tl.constexpr):
    """Programs that run at the same time share tiles of both matrices: a few rows of tiles, column by column."""
    band = program // (ROW_TILES_AT_ONCE * column_tiles)
    first = band * ROW_TILES_AT_ONCE
    height = tl.minimum(row_tiles - first, ROW_TILES_AT_ONCE)
    inside = program % (ROW_TILES_AT_ONCE * column_tiles)
    return first + inside % height, inside // height


@triton.jit
def product(
    a, b, c, rows, columns, depth, a_stride, b_stride_depth, b_stride_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), 8)
    row, column = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_at = a + row[:, None] * a_stride + k[None, :]
    b_at = b + k[:, None] * b_stride_depth + column[None, :] * b_stride_column
    total = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    for start in range(0, depth, BLOCK_K):
        left = depth - start
        x = tl.load(a_at, mask=(row[:, None] < rows) & (k[None, :] < left), other=0)
        y = tl.load(b_at, mask=(k[:, None] < left) & (column[None, :] < columns), other=0)
        total = tl.dot(x, y, total, out_dtype=SUM)
        a_at += BLOCK_K
        b_at += BLOCK_K * b_stride_depth
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(c + row[:, None] * columns + column[None, :], total.to(c.dtype.element_ty), mask=inside)


def multiply(a: Tensor, b: Tensor, tile: tuple[int, int, int], num_warps: int, num_stages: int) -> Tensor:
    """(M, K) and (K, N) -> (M, N): fp16 to fp16, int8 to int32. b may be a transposed view."""
    (rows, depth), columns = a.shape, b.shape[1]
    integers = a.dtype == torch.int8
    c = torch.empty(rows, columns, dtype=torch.int32 if integers else a.dtype, device=a.device)
    grid = (triton.cdiv(rows, tile[0]) * triton.cdiv(columns, tile[1]),)
    product[grid](
        a, b, c, rows, columns, depth, a.stride(0), b.stride(0), b.stride(1), *tile,
        SUM=tl.int32 if integers else tl.float32, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return c


@triton.jit
def product_by_descriptors(
    a, b, c, rows, columns, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    row, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    left = tl.make_tensor_descriptor(a, [rows, depth], [depth, 1], [BLOCK_M, BLOCK_K])
    right = tl.make_tensor_descriptor(b, [columns, depth], [depth, 1], [BLOCK_N, BLOCK_K])
    out = tl.make_tensor_descriptor(c, [rows, columns], [columns, 1], [BLOCK_M, BLOCK_N])
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        total = tl.dot(left.load([row, start]), right.load([column, start]).T, total)
    out.store([row, column], total.to(tl.float16))


def multiply_by_descriptors(
    a: Tensor, b: Tensor, tile: tuple[int, int, int], num_warps: int, num_stages: int
) -> Tensor:
    """(M, K) and (N, K) -> (M, N)."""
    (rows, depth), columns = a.shape, b.shape[0]
    c = torch.empty(rows, columns, dtype=a.dtype, device=a.device)
    grid = (triton.cdiv(rows, tile[0]), triton.cdiv(columns, tile[1]))
    product_by_descriptors[grid](a, b, c, rows, columns, depth, *tile, num_warps=num_warps, num_stages=num_stages)
    return c


@triton.jit
def part_of_product(
    a, b, c, columns, depth, parts,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of every `parts` slices of the depth this program adds one."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(tl.program_id(2) * BLOCK_K, depth, parts * BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(a + row[:, None] * depth + k[None, :], mask=k[None, :] < depth, other=0)
        y = tl.load(b + k[:, None] * columns + column[None, :], mask=k[:, None] < depth, other=0)
        total = tl.dot(x, y, total)
    tl.atomic_add(c + row[:, None] * columns + column[None, :], total)


def multiply_in_parts(
    a: Tensor, b: Tensor, parts: int, tile: tuple[int, int, int], num_warps: int, num_stages: int
) -> Tensor:
    """(M, K) and (K, N) -> (M, N) in fp32, added up by atomics. M and N are multiples of the tile's."""
    (rows, depth), columns = a.shape, b.shape[1]
    c = torch.zeros(rows, columns, dtype=torch.float32, device=a.device)
    grid = (rows // tile[0], columns // tile[1], parts)
    part_of_product[grid](a, b, c, columns, depth, parts, *tile, num_warps=num_warps, num_stages=num_stages)
    return c


@triton.jit
def gated_product(
    x, gate, value, out, columns, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Two products of one operand, and what a SwiGLU makes of them."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    gates, values = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        rows = tl.load(x + row[:, None] * depth + k[None, :])
        at = k[:, None] * columns + column[None, :]
        gates = tl.dot(rows, tl.load(gate + at), gates)
        values = tl.dot(rows, tl.load(value + at), values)
    result = gates * tl.sigmoid(gates) * values
    tl.store(out + row[:, None] * columns + column[None, :], result.to(tl.float16))


def gate(x: Tensor, gate: Tensor, value: Tensor, tile: tuple[int, int, int], num_warps: int, num_stages: int) -> Tensor:
    """(M, K) and twice (K, N) -> (M, N); sizes are multiples of the tile's."""
    (rows, depth), columns = x.shape, gate.shape[1]
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    grid = (rows // tile[0], columns // tile[1])
    gated_product[grid](x, gate, value, out, columns, depth, *tile, num_warps=num_warps, num_stages=num_stages)
    return out


def _operands(rows: int, columns: int, depth: int) -> Inputs:
    return {"a": halves(rows, depth), "b": halves(depth, columns)}


def _transposed(rows: int, columns: int, depth: int) -> Inputs:
    return {"a": halves(rows, depth), "b": halves(columns, depth).T}


def _both_by_rows(rows: int, columns: int, depth: int) -> Inputs:
    return {"a": halves(rows, depth), "b": halves(columns, depth)}


def _integers(rows: int, columns: int, depth: int) -> Inputs:
    return {"a": small_integers(rows, depth), "b": small_integers(depth, columns)}


def _integers_transposed(rows: int, columns: int, depth: int) -> Inputs:
    return {"a": small_integers(rows, depth), "b": small_integers(columns, depth).T}


def _gated(rows: int, columns: int, depth: int) -> Inputs:
    return {"x": halves(rows, depth), "gate": halves(depth, columns) / 8, "value": halves(depth, columns) / 8}


def _product(dtype: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
    return a.to(dtype) @ b.to(dtype)


def _product_by_rows(dtype: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
    return a.to(dtype) @ b.to(dtype).T


def _gate(dtype: torch.dtype, x: Tensor, gate: Tensor, value: Tensor) -> Tensor:
    gates = x.to(dtype) @ gate.to(dtype)
    return torch.nn.functional.silu(gates) * (x.to(dtype) @ value.to(dtype))


_RAGGED, _EVEN = {"rows": 70, "columns": 40, "depth": 72}, {"rows": 64, "columns": 32, "depth": 96}
_LARGE = {"rows": 512, "columns": 512, "depth": 512}
_SMALL_TILES = {"tile": (64, 32, 32), "num_warps": 4, "num_stages": 2}
_LARGE_TILES = {"tile": (128, 128, 32), "num_warps": 4, "num_stages": 2}
_IMMA = frozenset({"imma"})

CASES = (
    Case("matmul", multiply, _operands, _product, _RAGGED, _SMALL_TILES, _LARGE, _LARGE_TILES),
    Case("matmul, b transposed", multiply, _transposed, _product, _RAGGED, _SMALL_TILES, _LARGE, _LARGE_TILES),
    Case("matmul int8", multiply, _integers, _product, _RAGGED, _SMALL_TILES, _LARGE, _LARGE_TILES, _IMMA,
         torch.float64),
    Case("matmul int8, b transposed", multiply, _integers_transposed, _product, _RAGGED, _SMALL_TILES, _LARGE,
         _LARGE_TILES, _IMMA, torch.float64),
    Case("matmul by descriptors", multiply_by_descriptors, _both_by_rows, _product_by_rows,
         {"rows": 70, "columns": 40, "depth": 96}, _SMALL_TILES, _LARGE, _LARGE_TILES),
    Case("matmul in parts", multiply_in_parts, _operands, _product, _EVEN, {"parts": 2, **_SMALL_TILES}, _LARGE,
         {"parts": 4, **_LARGE_TILES}, dtype=torch.float32),
    Case("gated MLP", gate, _gated, _gate, _EVEN, _SMALL_TILES, _LARGE,
         {"tile": (128, 64, 32), "num_warps": 4, "num_stages": 2}),
)  # fmt: skip
