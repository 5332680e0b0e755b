"""Which tiles of the score matrix exist, and which are full: flex_attention's block tables, from lengths alone.

A block is BLOCK queries of one sequence, or BLOCK of its keys. What a block of queries sees is an interval of keys
(scores/masks.py), so its tiles are a run of key blocks: those in the middle full, those at the rims partial. All of
it is arithmetic on a few numbers per block, on the device, for all blocks at once: no mask is evaluated, and the host
waits for nothing.

    keys ->   0   1   2   3   4   5          . not kept
    block r   .   p   f   f   p   .          partial: 1, 4     full: 2, 3
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...scores import Window

BLOCK = 128  # a multiple of every tile size of the kernels


class Blocks(NamedTuple):
    """One side's blocks: int32 (blocks,) each.

    batch: the sequence that a block belongs to. first: index within it of the block's first row. length: the block's
    rows that exist, 0 for blocks that only fill up a buffer.
    """

    batch: Tensor
    first: Tensor
    length: Tensor


class BlockIndices(NamedTuple):
    """For each block of one side, blocks of the other: int32 counts (1, 1, blocks), indices (1, 1, blocks, width)."""

    num_blocks: Tensor
    indices: Tensor
    full_num_blocks: Tensor
    full_indices: Tensor


class Lengths(NamedTuple):
    """int32 (batch,) each, and upper bounds that the host knows."""

    q: Tensor
    k: Tensor
    max_q: int
    max_k: int


class BlockTables(NamedTuple):
    """flex_attention's BlockMask, by its names and in its order: the key blocks of each query block (kv), then the
    query blocks of each key block (q); of both the partial ones, then the full ones."""

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor

    @property
    def kv(self) -> BlockIndices:
        return BlockIndices(*self[:4])

    @property
    def q(self) -> BlockIndices:
        return BlockIndices(*self[4:])


def blocks_of(lengths: Tensor, count: int) -> Blocks:
    """Blocks of sequences laid out behind one another, each with a new block. count: at least their number."""
    number = torch.arange(count, dtype=torch.int32, device=lengths.device)
    ends = ((lengths + (BLOCK - 1)) // BLOCK).cumsum(0).to(torch.int32)  # of each sequence, in blocks
    batch = torch.searchsorted(ends, number, right=True, out_int32=True).clamp(max=lengths.shape[0] - 1)
    first = (number - first_block(lengths)[batch]) * BLOCK
    return Blocks(batch, first, (lengths[batch] - first).clamp(0, BLOCK))


def block_tables(window: Window, q: Blocks, k: Blocks, lengths: Lengths) -> BlockTables:
    """Both directions: the key blocks of each query block, and the query blocks of each key block."""
    reach = None if window.left is None or window.right is None else int(window.left) + int(window.right) + 1
    # Queries see keys: query i stands at position i + shift.
    seqlen_k, shift = lengths.k[q.batch], (lengths.k - lengths.q)[q.batch]
    first, last = q.first + shift, q.first + q.length - 1 + shift
    kv = _block_indices(
        window.keys_seen_by_any(first, last, seqlen_k),
        window.keys_seen_by_all(first, last, seqlen_k),
        q.length > 0,
        seqlen_k,
        first_block(lengths.k)[q.batch],
        _width(lengths.max_k, reach),
        whole=torch.ones_like(q.length, dtype=torch.bool),
        end_needs_mask=True,
    )
    # Keys are seen from positions shift to shift + seqlen_q.
    seqlen_q, shift = lengths.q[k.batch], (lengths.k - lengths.q)[k.batch]
    last = k.first + k.length - 1
    start, stop = window.positions_that_see_any(k.first, last, shift, shift + seqlen_q)
    full_start, full_stop = window.positions_that_see_all(k.first, last, shift, shift + seqlen_q)
    q_of_k = _block_indices(
        (start - shift, stop - shift),
        (full_start - shift, full_stop - shift),
        k.length > 0,
        seqlen_q,
        first_block(lengths.q)[k.batch],
        _width(lengths.max_q, reach),
        whole=k.length == BLOCK,
        end_needs_mask=False,
    )
    return BlockTables(*kv, *q_of_k)


def first_block(lengths: Tensor) -> Tensor:
    """Number of each sequence's first block."""
    blocks = (lengths + (BLOCK - 1)) // BLOCK
    return (blocks.cumsum(0) - blocks).to(torch.int32)


def _width(longest: int, reach: int | None) -> int:
    """Most blocks that a run can have: all of the longest sequence, or those within reach of BLOCK rows."""
    blocks = -(-longest // BLOCK)
    return max(1, blocks if reach is None else min(blocks, (reach + BLOCK - 2) // BLOCK + 2))


def _block_indices(
    needed: Sequence[Tensor],
    full: Sequence[Tensor],
    exists: Tensor,
    length: Tensor,
    first: Tensor,
    width: int,
    whole: Tensor,
    end_needs_mask: bool,
) -> BlockIndices:
    """Intervals of the other side's rows -> its blocks.

    exists: whether this side's block has rows; whole: whether any of its tiles may be full. length: of the other side's
    sequence; first: number of its first block. end_needs_mask: a last block that its sequence does not fill is partial.
    Keys past the end need the mask; of queries past the end nothing is kept.
    """
    needed, full = ([torch.as_tensor(end, device=length.device) for end in ends] for ends in (needed, full))
    start, stop = needed[0] // BLOCK, (needed[1] + (BLOCK - 1)) // BLOCK
    stop = torch.where(exists & (needed[0] < needed[1]), stop, start)
    full_start, full_stop = (full[0] + (BLOCK - 1)) // BLOCK, full[1] // BLOCK
    if not end_needs_mask:
        full_stop = torch.where(full[1] >= length, (length + (BLOCK - 1)) // BLOCK, full_stop)
    some = whole & (start < stop) & (full_start < full_stop)
    full_start, full_stop = torch.where(some, full_start, stop), torch.where(some, full_stop, stop)
    start = start.expand_as(stop)
    before = full_start - start  # partial blocks before the full ones; the others come behind them
    column = torch.arange(width, dtype=torch.int32, device=first.device)
    partial = torch.where(column < before[:, None], start[:, None] + column, (full_stop - before)[:, None] + column)
    return BlockIndices(
        *_placed(partial, before + (stop - full_stop), first),
        *_placed(full_start[:, None] + column, full_stop - full_start, first),
    )


def _placed(blocks: Tensor, count: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Counts, and numbers of blocks in the whole buffer; 0 beyond the count, where the kernel looks but does not go."""
    column = torch.arange(blocks.shape[1], dtype=torch.int32, device=blocks.device)
    indices = torch.where(column < count[:, None], blocks + first[:, None], 0)
    return count.to(torch.int32)[None, None], indices.to(torch.int32)[None, None]
