"""What the kernels have in common: where a program's rows lie, which tiles there are, and tiles of rows in memory.

Triton code: only loading.py imports it, where there is Triton.
"""

from typing import Any

import triton
import triton.language as tl

LOG2E: Any = tl.constexpr(1.4426950408889634)
LN2: Any = tl.constexpr(0.6931471805599453)


@triton.jit
def integers(a, b, c, d, e, f, g, h, i, j):
    """In 32 bits: dropout's hash wraps around there. A graph that torch.compile makes gives numbers in 64."""
    return (
        tl.cast(a, tl.int32), tl.cast(b, tl.int32), tl.cast(c, tl.int32), tl.cast(d, tl.int32), tl.cast(e, tl.int32),
        tl.cast(f, tl.int32), tl.cast(g, tl.int32), tl.cast(h, tl.int32), tl.cast(i, tl.int32), tl.cast(j, tl.int32),
    )  # fmt: skip


@triton.jit
def reals(a, b, c):
    """In fp32, likewise."""
    return tl.cast(a, tl.float32), tl.cast(b, tl.float32), tl.cast(c, tl.float32)


@triton.jit
def tanh(x):
    """Near 0 by its series: 1 - 2 / (exp(2 |x|) + 1) would lose digits there."""
    squared = x * x
    series = squared * (-1 / 3 + squared * (2 / 15 + squared * (-17 / 315 + squared * (62 / 2835))))
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)
    return tl.where(squared < 0.0625, x + x * series, tl.where(x < 0.0, -far, far))


@triton.jit
def rows_of_sequence(cu_seqlens, batch, seqlen, stride_batch, stride_row):
    """-> the sequence's length, and how far its first row is from the tensor's, in elements. Dense without cu_seqlens.

    In 64 bits, as all that may be larger than a tile: tensors may have 2**31 elements, and more.
    """
    if cu_seqlens is None:
        length = seqlen
        offset = batch.to(tl.int64) * stride_batch
    else:
        first = tl.load(cu_seqlens + batch)
        length = tl.load(cu_seqlens + batch + 1) - first
        offset = first.to(tl.int64) * stride_row
    return length, offset


@triton.jit
def load_rows(
    x, first, length, stride_row, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + ROWS, (ROWS, COLUMNS); zeros past the sequence's length and past head_dim.

    WHOLE: all of these rows are known to exist.
    """
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    # The tile's place is one number in 64 bits, and places in it are the same for all tiles.
    at = x + first.to(tl.int64) * stride_row + (row[:, None] * stride_row + column[None, :])
    if WHOLE:
        if COLUMNS == HEAD_DIM:
            return tl.load(at)
        return tl.load(at, mask=column[None, :] < HEAD_DIM, other=0.0)
    if COLUMNS == HEAD_DIM:
        return tl.load(at, mask=(first + row)[:, None] < length, other=0.0)
    return tl.load(at, mask=((first + row)[:, None] < length) & (column[None, :] < HEAD_DIM), other=0.0)


@triton.jit
def store_rows(
    x, first, length, stride_row, values, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = x + first.to(tl.int64) * stride_row + (row[:, None] * stride_row + column[None, :])
    inside = (first + row)[:, None] < length
    if COLUMNS != HEAD_DIM:
        inside = inside & (column[None, :] < HEAD_DIM)
    tl.store(at, values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def clear_rest(
    x, cu_seqlens, batch, batches, rows, tile, tiles, stride_row, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Zeros in the rows that belong to no sequence, behind the last one, whose programs do it."""
    if batch == batches - 1:
        end = tl.load(cu_seqlens + batches)
        zeros = tl.zeros([ROWS, COLUMNS], tl.float32)
        for turn in tl.range(0, tl.cdiv(tl.maximum(rows - end - tile * ROWS, 0), tiles * ROWS)):
            first = end + (turn * tiles + tile) * ROWS
            store_rows(x, first, rows, stride_row, zeros, ROWS, HEAD_DIM, COLUMNS)


@triton.jit
def clear_rest_of_lse(lse, cu_seqlens, batch, batches, rows, tile, tiles, ROWS: tl.constexpr):
    """Likewise: these rows see no key."""
    if batch == batches - 1:
        end = tl.load(cu_seqlens + batches)
        for turn in tl.range(0, tl.cdiv(tl.maximum(rows - end - tile * ROWS, 0), tiles * ROWS)):
            first = end + (turn * tiles + tile) * ROWS
            row = first + tl.arange(0, ROWS)
            tl.store(lse + row, tl.full([ROWS], float("-inf"), tl.float32), mask=row < rows)


@triton.jit
def tiles_between(start, stop, full_start, full_stop, BLOCK: tl.constexpr):
    """Two intervals, where a tile has something to compute and where it needs no mask, in tiles of BLOCK.

    -> the first masked tile before the full ones; how many there are; the first full tile; how many; the first masked
    one behind them; how many. All begin at multiples of BLOCK.
    """
    start = start // BLOCK * BLOCK
    stop = tl.maximum(stop, start)
    full_start = tl.minimum(tl.maximum(tl.cdiv(full_start, BLOCK) * BLOCK, start), stop)
    full_stop = tl.maximum(tl.minimum(full_stop, stop) // BLOCK * BLOCK, full_start)
    before = tl.cdiv(full_start - start, BLOCK)
    behind = tl.cdiv(tl.maximum(stop - full_stop, 0), BLOCK)
    return start, before, full_start, (full_stop - full_start) // BLOCK, full_stop, behind
